"""FP8 products: weights both ways, adapters behind the rows, a whole model's gradients, and who is refused.

The product never computes in fp8 on a CPU. Here PyTorch's own `_scaled_mm` on CPU tensors and the plain twins of the
kernels stand for the GPU's, under the same layouts and scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemwright.errors import InputError
from gemwright.kernels import fp8 as kernels
from gemwright.kernels.dispatch import join_tail, quantise_rows
from gemwright.layout import GROUPS, Keep, scratch_bytes
from gemwright.model.decoder import Gemma
from gemwright.model.fp8 import Fp8Scratch, Fp8Weight
from gemwright.model.lora import LoRA
from gemwright.model.residency import Residency, UnpackedResidency
from gemwright.model.streamed import StreamedResidency
from gemwright.plan.training import Arrangement, Job, itemise
from gemwright.spec import LINEARS, SPECS, ModelSpec
from gemwright.train.batches import Encoded, make_row
from gemwright.train.config import TrainConfig
from gemwright.train.setup import check_compute
from gemwright.train.step import Work, forward_backward
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.quants import pack, unpack
from gemwright.weights.random_model import write_random_gguf

BF16, CPU = torch.bfloat16, torch.device("cpu")
TINY = replace(
    SPECS["270m"], name="tiny", layers=7, hidden=64, mlp=160, heads=4, kv_heads=2, head_dim=32, query_scalar=32,
    window=9, vocab=515, context=2048,
)  # fmt: skip
# What rounding both operands to 3 bits of mantissa leaves of a long product: each factor is off by about 2.6 %.
PRODUCT_ERROR = 0.045
# Of gradients: bf16 rounds to 7 bits, so 16 times its error would be all of fp8's. Seven layers add up to a quarter.
TIMES_BF16, GRADIENT_ERROR = 16, 0.3


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(ours: Tensor, right: Tensor) -> float:
    return float((ours.double() - right.double()).norm() / right.double().norm())


def weight_of(values: Tensor, t: int) -> Fp8Weight:
    """An Fp8Weight of `values` [out, in] with room for adapters of rank `t`."""
    (rows, cols), scale = values.shape, torch.empty(len(values))
    normal, turned = kernels.new_rows(rows, cols, t, values), kernels.new_rows(cols, rows, t, values)
    for buffer in (normal, turned):
        buffer.view(torch.uint8).fill_(0x7F)  # NaN
    quantise_rows(values, normal[:, :cols], scale)
    return Fp8Weight(normal, turned, scale, torch.ones(1, cols))


@pytest.mark.parametrize(("rows", "cols", "t"), [(96, 64, 8), (160, 272, 24), (48, 512, 0)])
def test_products_both_ways(rows: int, cols: int, t: int) -> None:
    values, x, dy = randn(rows, cols, seed=1), randn(37, cols, seed=2, dtype=BF16), randn(37, rows, seed=3, dtype=BF16)
    values *= randn(rows, 1, seed=4).exp()  # rows and tokens of unlike size
    x, dy = x * randn(37, 1, seed=5).exp().to(BF16), dy * 1e-9
    weight = weight_of(values, t)
    assert weight.shape == values.shape and len(weight) == rows
    y = weight.product(x, torch.empty(37, rows, dtype=BF16))
    assert y.dtype == BF16 and error(y, x.float() @ values.t()) < PRODUCT_ERROR
    dx = weight.back(dy)
    assert dx.shape == (37, cols) and error(dx, dy.float() @ values) < PRODUCT_ERROR


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 10.0])
def test_adapters_keep_the_precision_of_bf16(size: float) -> None:
    """What t adds to a product in fp8 is nearly as exact as in bf16, be b small or as large as W."""
    rows, cols, t = 96, 128, 16
    values, x = 0.02 * randn(rows, cols, seed=1), randn(37, cols, seed=2, dtype=BF16)
    b, a = 0.02 * size * randn(rows, t, seed=4, dtype=BF16), 0.1 * randn(t, cols, seed=5, dtype=BF16)
    low = x @ a.t()
    scale, own = torch.empty(rows), torch.empty(37)
    normal, tokens = kernels.new_rows(rows, cols, t, values), kernels.new_rows(37, cols, t, values)
    quantise_rows(values, normal[:, :cols], scale)
    gain = join_tail(b, scale, normal[:, cols:])
    quantise_rows(x, tokens, own, None, low, gain)
    added = (tokens[:, cols:].float() * own[:, None]) @ (normal[:, cols:].float() * scale[:, None]).t()
    assert error(added, low.float() @ b.float().t()) < 2**-8
    assert error(tokens[:, :cols].float() * own[:, None], x) < 0.03
    y = weight_of(values, t).product(x, torch.empty(37, rows, dtype=BF16), low, b)
    assert error(y, x.float() @ values.t() + low.float() @ b.float().t()) < PRODUCT_ERROR


def test_gradients_pass_an_adapter() -> None:
    values, dy = 0.02 * randn(96, 128, seed=1), 1e-7 * randn(37, 96, seed=3, dtype=BF16)
    a, dt = 0.1 * randn(16, 128, seed=5, dtype=BF16), 3e-8 * randn(37, 16, seed=6, dtype=BF16)
    right = dy.float() @ values + dt.float() @ a.float()
    assert error(weight_of(values, 16).back(dy, dt, a), right) < PRODUCT_ERROR


def test_an_adapter_of_zeros_changes_nothing() -> None:
    values, x = randn(64, 96, seed=1), randn(5, 96, seed=2, dtype=BF16)
    out, b = torch.empty(5, 64, dtype=BF16), torch.zeros(64, 8, dtype=BF16)
    y = weight_of(values, 8).product(x, torch.empty_like(out), randn(5, 8, seed=3, dtype=BF16), b)
    assert torch.equal(y, weight_of(values, 0).product(x, out))


@pytest.mark.parametrize("qtype", ["Q4_0", "Q8_0", "F16", "BF16"])
def test_weights_are_filled_from_packed_values(qtype: str) -> None:
    values = {part: randn(*shape, seed=1) for part, shape in TINY.linear_shapes.items()}
    values["up"][5] *= 1e-6
    values["up"][6] = 0
    raw = {part: pack(each, qtype) for part, each in values.items()}
    scratch, seen = Fp8Scratch(TINY, {"qkv": 8}, CPU), []
    for _ in range(2):
        scratch._flat.fill_(0x7F)
        for group, parts in GROUPS.items():
            scratch.fill(3, group, [(raw[part], qtype) for part in parts])
        for group, weight in scratch.weights(3).items():
            right = torch.cat([unpack(raw[part], qtype) for part in GROUPS[group]])
            x = randn(9, right.shape[1], seed=2, dtype=BF16)
            assert (
                error(weight.product(x, torch.empty(9, len(right), dtype=BF16)), x.float() @ right.t()) < PRODUCT_ERROR
            )
            dy = randn(9, len(right), seed=3, dtype=BF16)
            assert error(weight.back(dy), dy.float() @ right) < PRODUCT_ERROR
        scale = scratch._scales[3, "gate_up"]
        torch.testing.assert_close(
            scale[:5] * kernels.TOP, unpack(raw["gate"], qtype)[:5].abs().amax(1), rtol=2**-8, atol=0
        )
        assert torch.equal(scale[165:167], scratch._floors[3, "gate_up"].expand(2))
        seen.append(torch.cat(list(scratch._scales.values())).clone())
    assert torch.equal(*seen)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = tmp_path_factory.mktemp("fp8") / "tiny.gguf"
    write_random_gguf(path, TINY, "Q4_0", seed=1)
    return open_model(path)


def documents(spec: ModelSpec, lengths: Sequence[int]) -> list[Encoded]:
    rng = torch.Generator().manual_seed(5)
    draw = [torch.randint(4, spec.vocab, (n,), generator=rng).tolist() for n in lengths]
    return [Encoded(ids, [True] * len(ids)) for ids in draw]


def gradients(file: ModelFile, kind: str, work: Work, targets: Sequence[str] = LINEARS, **lora: float) -> Tensor:
    dtype = torch.float32 if kind == "fp32" else BF16
    adapters = LoRA(file.spec, 4, 4.0, targets, dtype=dtype, dropout=lora.get("dropout", 0.0))
    adapters.master.add_(0.02 * torch.randn(adapters.master.shape, generator=torch.Generator().manual_seed(2)))
    adapters.refresh()
    residency: Residency = UnpackedResidency(file, dtype)
    if kind == "fp8":
        layers = range(file.spec.layers)
        residency = StreamedResidency(file, CPU, tails=adapters.tails(), resident=layers, fp8=True)
    rows = [make_row(file.spec, documents(file.spec, lengths), dtype=dtype) for lengths in ((41, 20), (30, 33, 9))]
    forward_backward(Gemma(residency, adapters), rows, work)
    assert bool(torch.isfinite(adapters.grad).all())
    return adapters.grad


@pytest.mark.parametrize("work", [Work(Keep.INPUT, chunk=48), Work(Keep.PRODUCTS)], ids=("input", "products"))
def test_gradients_of_a_whole_model(file: ModelFile, work: Work) -> None:
    right = gradients(file, "fp32", work)
    ours, plain = (error(gradients(file, kind, work), right) for kind in ("fp8", "bf16"))
    assert ours < TIMES_BF16 * plain


@pytest.mark.parametrize("targets", [("q", "v"), ("down",)], ids="+".join)
def test_gradients_where_some_groups_have_no_adapter(file: ModelFile, targets: tuple[str, ...]) -> None:
    work = Work(Keep.INPUT)
    assert error(gradients(file, "fp8", work, targets), gradients(file, "fp32", work, targets)) < GRADIENT_ERROR


def test_gradients_under_dropout(file: ModelFile) -> None:
    ours, right = (gradients(file, kind, Work(Keep.INPUT), dropout=0.3) for kind in ("fp8", "bf16"))
    assert error(ours, right) < GRADIENT_ERROR


@pytest.mark.parametrize("size", ["270m", "1b", "4b", "12b", "27b"])
def test_what_is_allocated_is_counted(size: str) -> None:
    spec = SPECS[size]
    job = Job(spec, 1 << 28, 1 << 29, 16, LINEARS, 2048, 4, fp8=True)
    tails = {group: job.tail(group) for group in GROUPS}
    with torch.device("meta"):
        scratch = Fp8Scratch(spec, tails, torch.device("meta"))
    held = scratch._flat.numel() + sum(normal.untyped_storage().nbytes() for normal in scratch._normal.values())
    scales = 4 * spec.layers * sum(rows for rows, _ in scratch.sizes.values())
    assert scratch_bytes(spec, tails) == held + scales
    largest = max(rows * cols for rows, cols in spec.linear_shapes.values())
    assert 2 * largest <= scratch._flat.numel()
    plan = Arrangement(0, 2, (Keep.INPUT,) * spec.layers, (False,) * spec.layers, 4, 8192, 8192, 8192)
    in_fp8, in_bf16 = itemise(job, plan), itemise(replace(job, fp8=False), plan)
    assert in_fp8.items["one layer, unpacked"] == held + scales
    assert abs(in_fp8.predicted_bytes / in_bf16.predicted_bytes - 1) < 0.15


def config(tmp_path: Path, **settings: object) -> TrainConfig:
    return TrainConfig(data="a.jsonl", model="270m", out=tmp_path, **settings)


def test_fp8_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config(tmp_path).compute == "bf16" and config(tmp_path, compute="fp8").compute == "fp8"
    for wrong in ({"compute": "fp16"}, {"compute": "fp8", "precision": "fp32"}):
        with pytest.raises(InputError, match="--compute"):
            config(tmp_path, **wrong)
    check_compute("bf16", CPU)
    with pytest.raises(InputError, match="--compute: a CPU has no fp8") as caught:
        check_compute("fp8", CPU)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    with pytest.raises(InputError, match=r"RTX 3090 \(compute capability 8.6\) has no fp8"):
        check_compute("fp8", torch.device("cuda", 0))
