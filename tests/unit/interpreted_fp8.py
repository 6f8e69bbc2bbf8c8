"""The Triton kernels of fp8 on CPU tensors against their plain twins; `test_triton_interpreter.py` runs this file.

Triton's interpreter rounds 31.9 to 16 in fp8, since it drops the carry; PyTorch's rounding stands in for it here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from gemwright.kernels import fp8, triton_fp8
from gemwright.kernels.triton_unpack import FORMATS, unpack
from gemwright.layout import PITCH
from gemwright.weights import quants

BF16 = torch.bfloat16


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def right_rounding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    convert = interpreter._convert_float

    def rounded(value: numpy.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> numpy.ndarray:
        if target != tl.float8e4nv or source != tl.float32:
            return convert(value, source, target, mode)
        right = torch.from_numpy(value.copy()).clamp(-fp8.TOP, fp8.TOP).to(fp8.FP8)
        return right.view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    yield


def assert_equal(ours: Tensor, plain: Tensor) -> None:
    """Equal but for rare ties, which the last bit of fp32 decides."""
    ours, plain = ours.float(), plain.float()
    unit = torch.clamp(plain.abs(), min=2**-6).log2().floor().exp2() / 8
    assert bool(torch.isfinite(ours).all()) and bool(((ours - plain).abs() <= unit).all())
    assert float((ours != plain).float().mean()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=("fp32", "bf16"))
@pytest.mark.parametrize(("rows", "width", "t"), [(5, 64, 8), (3, 5376, 48), (1, 160, 0), (9, 16, 24)])
def test_quantise_rows(rows: int, width: int, t: int, dtype: torch.dtype) -> None:
    x = randn(rows, width + 8, seed=1, dtype=dtype)[:, :width]
    x[0] = 0
    factor, gain, columns = randn(width, seed=2).abs(), torch.tensor([0.3]), fp8.tail_columns(t)
    wide = randn(rows, width + t, seed=3, dtype=dtype)
    for tail, by in (
        (wide[:, width:] if t else None, None),
        (None, factor),
        (9 * wide[:, width:] if t else None, factor),
    ):
        outs = [fp8.new_rows(rows, width, t, x) for _ in range(2)]
        scales = [torch.empty(rows) for _ in range(2)]
        for module, out, scale in zip((triton_fp8, fp8), outs, scales, strict=True):
            out.view(torch.uint8).fill_(7)
            module.quantise_rows(x, out, scale, by, tail, gain, torch.tensor([1e-3]) if by is None else None)
        torch.testing.assert_close(*scales)
        assert outs[0].shape == (rows, width + columns) and outs[0].stride(0) % PITCH == 0
        assert_equal(outs[0][:, :width], outs[1][:, :width])
        for out, scale in zip(outs, scales, strict=True):
            if tail is not None:
                first, again, low = (out[:, width + i * t : width + (i + 1) * t].float() for i in range(3))
                assert torch.equal(first, again)
                right = tail.float() / gain / scale[:, None]
                torch.testing.assert_close(first + low, right, rtol=2**-8, atol=2**-9)
            end = width + (3 * t if tail is not None else 0)
            assert not out[:, end:].view(torch.uint8).any()


@pytest.mark.parametrize(("rows", "t", "size"), [(70, 8, 1.0), (300, 48, 1e-4), (64, 16, 0.0), (33, 24, 60.0)])
@pytest.mark.parametrize("turned", [False, True])
def test_join_tail(rows: int, t: int, size: float, turned: bool) -> None:
    b = size * (randn(t, rows, seed=1).t() if turned else randn(rows, t, seed=1))
    scale = None if turned else 1 / 448 * (0.5 + randn(rows, seed=2).abs())
    outs = [fp8.new_rows(rows, 64, t, b)[:, 64:] for _ in range(2)]
    for out in outs:
        out.view(torch.uint8).fill_(7)
    gains = [module.join_tail(b, scale, out) for module, out in zip((triton_fp8, fp8), outs, strict=True)]
    torch.testing.assert_close(*gains)
    for out, gain in zip(outs, gains, strict=True):
        high, low, again = (out[:, i * t : (i + 1) * t].float() for i in range(3))
        assert torch.equal(high, again) and not out[:, 3 * t :].view(torch.uint8).any()
        right = b * gain / (1 if scale is None else scale[:, None])
        assert float(right.abs().max()) <= fp8.AIM * 1.001
        torch.testing.assert_close(high + low, right, rtol=2**-8, atol=2**-9)


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (160, 272), (16, 128)])
def test_turn(rows: int, columns: int) -> None:
    source = fp8.new_rows(rows, columns, 8, torch.empty(0))
    source.view(torch.uint8).copy_(torch.randint(0, 256, source.shape, dtype=torch.uint8))
    out = fp8.new_rows(columns, rows, 16, source)
    out.view(torch.uint8).fill_(9)
    triton_fp8.turn(source[:, :columns], out[:, :rows])
    assert torch.equal(out[:, :rows].view(torch.uint8), source[:, :columns].t().view(torch.uint8))
    assert bool((out[:, rows:].view(torch.uint8) == 9).all())


@pytest.mark.parametrize("qtype", FORMATS)
def test_unpack_to_fp8(qtype: str) -> None:
    rows, values = 7, 2 * FORMATS[qtype].values
    shape = (rows, 2 * FORMATS[qtype].size)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for at in {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208]}.get(qtype, [0, 2]):
        raw[:, at + 1 :: FORMATS[qtype].size] &= 0xBF
    plain = quants.unpack(raw, qtype)
    scale = plain.abs().amax(1) / fp8.TOP
    ours, right = (fp8.new_rows(rows, values, 8, raw)[:, :values] for _ in range(2))
    unpack(raw, qtype, ours, scale)
    right.copy_((plain * (1 / scale)[:, None]).to(fp8.FP8))
    assert_equal(ours, right)
