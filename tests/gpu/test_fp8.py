"""FP8 on a GPU: kernels against their plain twins, products at true shapes, gradients and a short training.

python -m pytest --noconftest -m gpu tests/gpu/test_fp8.py      # needs torch, triton, gguf, psutil and pytest
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux on x86-64")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
    pytest.skip("no CUDA device", allow_module_level=True)
if torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("this GPU has no fp8", allow_module_level=True)

from gemwright.kernels import fp8, triton_fp8
from gemwright.kernels.triton_unpack import FORMATS, unpack
from gemwright.layout import Keep, group_sizes
from gemwright.model.decoder import Gemma
from gemwright.model.fp8 import Fp8Weight
from gemwright.model.lora import LoRA
from gemwright.model.streamed import StreamedResidency
from gemwright.spec import SPECS, ModelSpec
from gemwright.train.batches import Encoded, Row, make_row
from gemwright.train.optimizer import Optimizer, learning_rate
from gemwright.train.step import Work, forward_backward
from gemwright.weights import quants
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.random_model import write_random_gguf

pytestmark = pytest.mark.gpu

BF16, DEVICE = torch.bfloat16, torch.device("cuda", 0)
# Rounding both factors to 3 bits of mantissa leaves a long product off by some 3.7 %.
PRODUCT_ERROR = 0.045
# bf16 rounds to 7 bits: 16 times its error would be that of fp8 in everything, of which the products are a part.
TIMES_BF16 = 16.0


def randn(*shape: int, seed: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device=DEVICE)).to(dtype)


def error(ours: Tensor, right: Tensor) -> float:
    return float((ours.double() - right.double()).norm() / right.double().norm())


def assert_equal(ours: Tensor, plain: Tensor) -> None:
    """The same fp8 values but for rare ties, which the last bit of fp32 decides."""
    ours, plain = ours.float(), plain.float()
    assert bool(torch.isfinite(ours).all()) and error(ours, plain) < 0.01
    assert float((ours != plain).float().mean()) < 0.002


@pytest.mark.parametrize(
    ("rows", "width", "t"), [(2048, 5376, 48), (777, 43008, 32), (123, 21504, 16), (252, 640, 0), (1, 2560, 24)]
)
def test_quantise_rows(rows: int, width: int, t: int) -> None:
    wide = randn(rows, width + t, seed=1) * randn(rows, 1, seed=2).exp()
    x, own = wide[:, :width], wide[:, width:] if t else None
    factor, gain = randn(width, seed=3, dtype=torch.float32).abs(), torch.tensor([0.3], device=DEVICE)
    for tail, by in ((own, None), (None, factor), (own, factor)):
        outs = [fp8.new_rows(rows, width, t, x) for _ in range(2)]
        scales = [torch.empty(rows, device=DEVICE) for _ in range(2)]
        for module, out, scale in zip((triton_fp8, fp8), outs, scales, strict=True):
            out.view(torch.uint8).fill_(7)
            module.quantise_rows(x, out, scale, by, tail, gain)
        torch.testing.assert_close(*scales)
        assert_equal(*outs)
    fp8_of_nan = fp8.new_rows(rows, width, t, x)
    x[0, 3] = math.nan
    triton_fp8.quantise_rows(x, fp8_of_nan, scales[0])
    assert bool(torch.isnan(fp8_of_nan[0, 3].float()))


@pytest.mark.parametrize(("rows", "cols"), [(43008, 5376), (5376, 21504), (1536, 640)])
def test_tail_and_transposition(rows: int, cols: int) -> None:
    t = 32
    b, a = randn(rows, t, seed=1, scale=0.01), randn(t, cols, seed=2, scale=0.01)
    scale = 1e-4 * (0.5 + randn(rows, seed=3, dtype=torch.float32).abs())
    source = fp8.new_rows(rows, cols, t, b)
    source.view(torch.uint8).copy_(torch.randint(0, 127, source.shape, dtype=torch.uint8, device=DEVICE))
    turned = fp8.new_rows(cols, rows, t, b)
    triton_fp8.turn(source[:, :cols], turned[:, :rows])
    assert torch.equal(turned[:, :rows].view(torch.uint8), source[:, :cols].view(torch.uint8).t())
    for values, by, out in ((b, scale, source[:, cols:]), (a.t(), None, turned[:, rows:])):
        gain = triton_fp8.join_tail(values, by, out)
        plain = torch.empty_like(out)
        torch.testing.assert_close(gain, fp8.join_tail(values, by, plain))
        assert_equal(out, plain)


@pytest.mark.parametrize("qtype", FORMATS)
def test_unpack_to_fp8(qtype: str) -> None:
    rows, cols, form = 2560, 10240, FORMATS[qtype]
    raw = torch.randint(0, 256, (rows * cols // form.values, form.size), dtype=torch.uint8, device=DEVICE)
    for at in {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208]}.get(qtype, [0, 2]):
        raw[:, at + 1] &= 0xBF
    raw = raw.view(rows, -1)
    plain = quants.unpack(raw, qtype)
    scale = plain.abs().amax(1) / fp8.TOP
    out = unpack(raw, qtype, fp8.new_rows(rows, cols, 16, raw)[:, :cols], scale)
    assert_equal(out, (plain * (1 / scale).unsqueeze(1)).to(fp8.FP8))


@pytest.mark.parametrize("size", ["4b", "12b", "27b"])
@pytest.mark.parametrize("tokens", [2048, 333])
def test_products_at_true_shapes(size: str, tokens: int) -> None:
    for rows, cols in group_sizes(SPECS[size]).values():
        values, b, a = (
            randn(rows, cols, seed=1, scale=0.02),
            randn(rows, 24, seed=2, scale=0.01),
            randn(24, cols, seed=3),
        )
        scale = torch.empty(rows, device=DEVICE)
        normal, turned = fp8.new_rows(rows, cols, 24, values), fp8.new_rows(cols, rows, 24, values)
        triton_fp8.quantise_rows(values, normal[:, :cols], scale)
        weight = Fp8Weight(normal, turned, scale, torch.ones(1, cols, device=DEVICE))
        x, t, dy = randn(tokens, cols, seed=4), randn(tokens, 24, seed=5), randn(tokens, rows, seed=6, scale=1e-6)
        right = x.float() @ values.float().t()
        for low in (t, None):
            own = right if low is None else right + low.float() @ b.float().t()
            y = torch.empty(tokens, rows, dtype=BF16, device=DEVICE)
            assert error(weight.product(x, y, low, None if low is None else b), own) < PRODUCT_ERROR
        dt = randn(tokens, 24, seed=7, scale=1e-7)
        right = dy.float() @ values.float() + dt.float() @ a.float()
        assert error(weight.back(dy, dt, a), right) < PRODUCT_ERROR


def new_file(folder: Path, spec: ModelSpec, qtype: str) -> ModelFile:
    write_random_gguf(folder / "model.gguf", spec, qtype, seed=1)
    return open_model(folder / "model.gguf")


TINY = replace(
    SPECS["270m"], name="tiny", layers=7, hidden=128, mlp=320, heads=4, kv_heads=2, head_dim=64, query_scalar=64,
    window=64, vocab=515, context=2048,
)  # fmt: skip
FEW_4B = replace(SPECS["4b"], name="few", layers=3, global_every=2, vocab=4096, vision=None)


def rows_of(spec: ModelSpec, dtype: torch.dtype, lengths: Sequence[Sequence[int]]) -> list[Row]:
    """Documents that count upwards from a random number: something to learn."""
    rng, rows = torch.Generator().manual_seed(5), []
    for row in lengths:
        starts = torch.randint(4, spec.vocab, (len(row),), generator=rng).tolist()
        docs = [[4 + (s + 3 * i) % (spec.vocab - 4) for i in range(n)] for s, n in zip(starts, row, strict=True)]
        rows.append(make_row(spec, [Encoded(ids, [True] * n) for ids, n in zip(docs, row, strict=True)], DEVICE, dtype))
    return rows


def new_model(file: ModelFile, kind: str, *, resident: bool, learned: bool) -> Gemma:
    dtype = torch.float32 if kind == "fp32" else BF16
    lora = LoRA(file.spec, 8, 8.0, dtype=dtype, device=DEVICE)
    if learned:
        lora.master.add_(0.02 * torch.randn(lora.master.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE))
        lora.refresh()
    layers = range(file.spec.layers) if resident else ()
    return Gemma(
        StreamedResidency(file, DEVICE, dtype=dtype, tails=lora.tails(), resident=layers, fp8=kind == "fp8"), lora
    )


def gradient(model: Gemma, rows: list[Row], work: Work) -> tuple[float, Tensor]:
    lora = model.lora
    assert lora is not None
    lora.grad.zero_()
    loss = forward_backward(model, rows, work).loss
    return loss, lora.grad.clone()


@pytest.mark.parametrize(
    ("spec", "qtype", "lengths"),
    [
        (TINY, "Q8_0", ((300, 141), (200, 55, 1))),
        (TINY, "BF16", ((300, 141), (200, 55, 1))),
        (FEW_4B, "Q4_0", ((1500, 500), (900, 1100))),
        (FEW_4B, "Q4_K", ((2000,),)),
    ],
    ids=("tiny-Q8_0", "tiny-BF16", "4b-Q4_0", "4b-Q4_K"),
)
def test_gradients_are_no_further_off_than_their_rounding(
    spec: ModelSpec, qtype: str, lengths: Sequence[Sequence[int]], tmp_path: Path
) -> None:
    file, found = new_file(tmp_path, spec, qtype), {}
    work = Work(Keep.NARROW, chunk=512, positions=512, head_rows=4096)
    for kind in ("fp32", "bf16", "fp8"):
        model = new_model(file, kind, resident=kind == "fp8", learned=True)
        rows = rows_of(spec, torch.float32 if kind == "fp32" else BF16, lengths)
        found[kind] = gradient(model, rows, work)
        if kind == "fp8":
            again = gradient(model, rows, work)
            assert error(again[1], found[kind][1]) < 0.02  # a second visit, with scales that are known
            streamed = gradient(new_model(file, kind, resident=False, learned=True), rows, work)
            assert error(streamed[1], found[kind][1]) < 0.02
        del model
    (right_loss, right), (_, plain), (loss, ours) = found["fp32"], found["bf16"], found["fp8"]
    print(f"fp8 {error(ours, right):.4f}, bf16 {error(plain, right):.4f}, loss {loss:.4f} of {right_loss:.4f}")
    assert error(ours, right) < TIMES_BF16 * error(plain, right)
    assert loss == pytest.approx(right_loss, rel=0.02)


def test_thirty_steps_learn_as_in_bf16(tmp_path: Path) -> None:
    file, curves = new_file(tmp_path, replace(FEW_4B, layers=2), "Q4_0"), {}
    for kind in ("bf16", "fp8"):
        model = new_model(file, kind, resident=True, learned=False)
        assert model.lora is not None
        optimizer, rows, losses = Optimizer(model.lora, 0.0, 1.0), rows_of(file.spec, BF16, ((512, 512),)), []
        for step in range(30):
            losses.append(forward_backward(model, rows, Work(Keep.INPUT, 1024, 1024, 4096)).loss)
            optimizer.update(learning_rate(step, 30, 5e-3, 0.1), losses[-1])
        curves[kind] = losses
    print(*(f"{kind} {[round(x, 3) for x in losses]}" for kind, losses in curves.items()), sep="\n")
    fell = curves["bf16"][0] - curves["bf16"][-1]
    assert fell > 0.5
    for ours, plain in zip(curves["fp8"], curves["bf16"], strict=True):
        assert abs(ours - plain) < 0.1 * fell
