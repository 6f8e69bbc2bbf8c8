"""Adapters over streamed weights on a GPU: gradients no further from fp32 than those of a CPU in bf16 are.

python -m pytest --noconftest -m gpu tests/gpu      # needs torch, triton, gguf, safetensors, psutil, pydantic, pytest
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from gemwright.layout import Keep, adapter_parameters, group_sizes
from gemwright.model.decoder import Gemma
from gemwright.model.lora import LoRA
from gemwright.model.residency import Residency, UnpackedResidency, new_matrices
from gemwright.model.streamed import StreamedResidency
from gemwright.spec import SPECS
from gemwright.train.batches import Encoded, make_row
from gemwright.train.step import Work, forward_backward
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.random_model import write_random_gguf

pytestmark = pytest.mark.gpu

SPEC = replace(SPECS["270m"], name="small", layers=7, vocab=2048)
RANK, CPU, GPU, BF16 = 12, torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
# Beyond the CPU's own error in bf16, as a share of the norm of all gradients of A, of B or of m.
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    write_random_gguf(path, SPEC, "Q4_0")
    return open_model(path)


def new(dtype: torch.dtype, device: torch.device, *, dora: bool) -> LoRA:
    return LoRA(SPEC, RANK, 2.0 * RANK, dtype=dtype, device=device, dora=dora)


def gradients(lora: LoRA, residency: Residency, device: torch.device, keep: Keep) -> list[torch.Tensor]:
    """Those of all A, all B and all m of two rows, each as one fp64 vector on the CPU."""
    rng = torch.Generator().manual_seed(0)
    lengths = (70, 200, 33, 150)
    ids = [torch.randint(0, SPEC.vocab, (length,), generator=rng).tolist() for length in lengths]
    documents = [Encoded(own, [at % 3 == 0 for at in range(len(own))]) for own in ids]
    rows = [make_row(SPEC, part, device, residency.dtype) for part in (documents[:2], documents[2:])]
    forward_backward(Gemma(residency, lora), rows, Work(keep, 100))
    kinds = [*zip(*lora.gradients().values(), strict=True), tuple(lora.magnitude_gradients().values())]
    return [torch.cat([gradient.flatten() for gradient in kind]).cpu().double() for kind in kinds if kind]


@pytest.mark.parametrize("dora", [False, True], ids=("lora", "dora"))
@pytest.mark.parametrize("keep", list(Keep), ids=lambda keep: keep.name)
def test_gradients_over_streamed_weights(file: ModelFile, keep: Keep, dora: bool) -> None:
    first = new(torch.float32, CPU, dora=dora)
    first.measure(UnpackedResidency(file, torch.float32, 0))
    rng = torch.Generator().manual_seed(1)
    pairs = adapter_parameters(SPEC, RANK, first.targets)
    first.master[:pairs].normal_(0, 0.02, generator=rng)
    first.master[pairs:].mul_(1 + 0.1 * torch.randn(len(first.master) - pairs, generator=rng))
    found = []
    for dtype, device in ((torch.float32, CPU), (BF16, CPU), (BF16, GPU)):
        lora = new(dtype, device, dora=dora)
        lora.master.copy_(first.master)
        lora.refresh()
        if device == CPU:
            found.append(gradients(lora, UnpackedResidency(file, dtype), device, keep))
            continue
        residency = StreamedResidency(file, device, tails=lora.tails(), resident=[2, 4], source="pageable")
        try:
            found.append(gradients(lora, residency, device, keep))
        finally:
            residency.close()
    assert len(found[0]) == 2 + dora
    for side, (exact, plain, ours) in enumerate(zip(*found, strict=True)):
        error, plain_error = (float((one - exact).norm() / exact.norm()) for one in (ours, plain))
        assert error <= plain_error + TOLERANCE, f"{'ABm'[side]}: {error:.4f}, CPU in bf16 {plain_error:.4f}"


def test_b_is_written_where_matrices_lie_now() -> None:
    """A step that is laid out anew may get the first of its matrices where the last one's was, and others elsewhere."""
    lora = new(BF16, GPU, dora=False)
    lora.master.normal_()
    lora.refresh()
    before, after = (new_matrices(SPEC, BF16, lora.tails(), GPU) for _ in range(2))
    after["qkv"] = before["qkv"]
    for matrix in after.values():
        matrix.fill_(torch.nan)
    for matrices in (before, after):
        lora.join(0, matrices)
    for group, (_, columns) in group_sizes(SPEC).items():
        assert torch.equal(after[group][:, columns:], before[group][:, columns:]), group
