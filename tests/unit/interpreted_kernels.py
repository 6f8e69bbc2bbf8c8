"""The Triton kernels on CPU tensors against their plain twins; `test_triton_interpreter.py` runs this file.

fp32 is held to rounding. bf16 gets units in the last place more: Triton's interpreter cuts off where a GPU rounds.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemwright.kernels import geglu, heads, norm, triton_ops
from gemwright.kernels.cross_entropy import Running, linear_cross_entropy, softmax_chunk
from gemwright.kernels.rope import rope_table
from gemwright.kernels.triton_unpack import FORMATS, unpack
from gemwright.weights import quants

EPS = 1e-6
SHAPES = pytest.mark.parametrize(("rows", "width"), [(252, 123), (1, 507), (7, 2500), (3, 16)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pitched(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """A view whose rows lie further apart than they are long; what lies between must stay as it is."""
    return torch.full((rows, width + 32), 7.0, dtype=dtype)[:, :width]


def untouched(view: Tensor) -> bool:
    whole = view.as_strided((view.shape[0], view.stride(0)), (view.stride(0), 1))
    return bool((whole[:, view.shape[1] :] == 7).all())


def assert_near(ours: Tensor, plain: Tensor, computed: torch.dtype | None = None) -> None:
    """Equal but for roundings of dtype `computed`, that of `plain` if None."""
    bound = {torch.float32: 3e-6, torch.bfloat16: 2**-6}[computed or plain.dtype]
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    scale = float(plain.float().abs().max()) or 1.0
    torch.testing.assert_close(ours.float(), plain.float(), rtol=bound, atol=bound * scale * 0.05)


@DTYPES
@SHAPES
def test_norms(rows: int, width: int, dtype: torch.dtype) -> None:
    x, more, weight = (
        randn(rows, width, seed=1, dtype=dtype),
        randn(rows, width, seed=2, dtype=dtype),
        randn(width, seed=3),
    )
    out = pitched(rows, width, dtype)
    for ours, plain in (
        (triton_ops.rms_norm(x, weight, EPS), norm.rms_norm(x, weight, EPS)),
        (triton_ops.rms_norm(x, weight, EPS, residual=more, out=out), norm.rms_norm(x, weight, EPS, residual=more)),
        (
            triton_ops.norm_add_norm(x, more, weight, 1 - weight, EPS),
            norm.norm_add_norm(x, more, weight, 1 - weight, EPS),
        ),
    ):
        for mine, theirs in zip(ours, plain, strict=True):
            assert_near(mine, theirs, dtype)
    assert untouched(out)
    triton_ops.norm_add_norm(x, more, weight, weight, EPS, out=out)
    assert_near(out, norm.norm_add_norm(x, more, weight, weight, EPS)[2])
    assert untouched(out)


@DTYPES
@SHAPES
def test_norm_backward(rows: int, width: int, dtype: torch.dtype) -> None:
    x, add, weight = (
        randn(rows, width, seed=1, dtype=dtype),
        randn(rows, width, seed=2, dtype=dtype),
        randn(width, seed=3),
    )
    rstd = norm.rms_norm(x, weight, EPS)[1]
    wide = randn(rows, width + 9, seed=4)
    for dy in (wide[:, :width], wide[:, :width].to(dtype)):
        out = pitched(rows, width, dtype)
        triton_ops.rms_norm_backward(dy, x, rstd, weight, add=add, out=out)
        expected = norm.rms_norm_backward(dy, x, rstd, weight, add=add)
        assert_near(out, expected)
        assert untouched(out)
        assert_near(triton_ops.rms_norm_backward(dy, x, rstd, weight), norm.rms_norm_backward(dy, x, rstd, weight))
        for alias in (add.clone(), dy.to(dtype, copy=True)):
            to_add, gradient = (alias, dy) if torch.equal(alias, add) else (add, alias)
            same = triton_ops.rms_norm_backward(gradient, x, rstd, weight, add=to_add, out=alias)
            assert same is alias
            assert_near(
                alias, norm.rms_norm_backward(gradient, x, rstd, weight, add=add) if alias is to_add else expected
            )


@DTYPES
@pytest.mark.parametrize(("rows", "q", "kv", "size"), [(5, 4, 1, 256), (7, 11, 5, 42), (1, 2, 1, 32), (3, 32, 16, 16)])
def test_heads(rows: int, q: int, kv: int, size: int, dtype: torch.dtype) -> None:
    qkv, table = (
        randn(rows, (q + 2 * kv) * size, seed=1, dtype=dtype),
        rope_table(torch.arange(rows) + 90, size, 1e4, 1.0),
    )
    weights = randn(size, seed=2), randn(size, seed=3)
    ours = triton_ops.norm_rope(qkv, *weights, table, q, kv, EPS)
    plain = heads.norm_rope(qkv, *weights, table, q, kv, EPS)
    for mine, theirs in zip(ours, plain, strict=True):
        assert_near(mine, theirs)
    dq = randn(rows, q, size, seed=4, dtype=dtype)
    for wide in (torch.float32, dtype):
        dk = randn(kv, rows, size, seed=5, dtype=wide).transpose(0, 1)
        dv = randn(rows, kv, size, seed=6, dtype=wide)
        out = triton_ops.norm_rope_backward(dq, dk, dv, qkv, plain[2:], *weights, table, torch.empty_like(qkv))
        right = heads.norm_rope_backward(dq, dk, dv, qkv, plain[2:], *weights, table, torch.empty_like(qkv))
        assert_near(out, right)


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(25, 123), (1, 507), (3, 2100)])
def test_geglu(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up, dwide = (
        3 * randn(rows, 2 * width, seed=1, dtype=dtype),
        randn(rows, width + 5, seed=2, dtype=dtype)[:, :width],
    )
    plain, right, out, wide = (
        torch.empty(rows, width, dtype=dtype),
        torch.empty_like(gate_up),
        *(pitched(rows, width, dtype) for _ in range(2)),
    )
    # In fp32 throughout: plain bf16 rounds the activation on the way.
    activated = geglu.geglu(gate_up.float(), high := plain.float())
    geglu.geglu_backward(dwide.float(), gate_up.float(), activated, high_right := right.float())
    assert triton_ops.geglu(gate_up, out) is None
    assert_near(out, high.to(dtype))
    triton_ops.geglu_backward(dwide, gate_up, None, right)
    assert_near(right, high_right.to(dtype))
    triton_ops.geglu_backward(dwide, gate_up, None, gate_up, wide)
    assert torch.equal(gate_up, right) and torch.equal(wide, out)
    assert untouched(out) and untouched(wide)


def test_geglu_of_huge_values_is_finite() -> None:
    gate = torch.tensor([[1e30, -1e30, 3e38, -3e38, 90.0, -90.0, 0.0, -5.0]])
    gate_up, out, d = torch.cat([gate, torch.full_like(gate, 0.5)], 1), torch.empty_like(gate), torch.ones_like(gate)
    triton_ops.geglu(gate_up, out)
    torch.testing.assert_close(out, 0.5 * torch.nn.functional.gelu(gate, approximate="tanh"), rtol=1e-6, atol=1e-6)
    triton_ops.geglu_backward(d, gate_up, None, gate_up)
    right = torch.tensor([[0.5, 0, 0.5, 0, 0.5, 0, 0.25, 0]])
    torch.testing.assert_close(gate_up[:, :8], right, rtol=1e-6, atol=2e-6)


@DTYPES
@pytest.mark.parametrize("chunk", [123, 252, 1, 64])
def test_softmax_chunk(chunk: int, dtype: torch.dtype) -> None:
    rows, start = 7, 100
    # Inside, at both edges, just outside of them, before, and ignored.
    target = torch.tensor([start + chunk // 2, start, start + chunk - 1, start + chunk, start - 1, 0, -100])
    running = [Running(*(randn(rows, 1, seed=s).abs() for s in range(4))) for _ in range(2)]
    logits = 4 * randn(rows, chunk, seed=5, dtype=dtype)
    ours = logits.clone()
    triton_ops.softmax_chunk(ours, target, start, running[0])
    softmax_chunk(logits, target, start, running[1])
    assert_near(ours, logits)
    for name in ("top", "total", "right", "shrink"):
        assert_near(getattr(running[0], name), getattr(running[1], name))


def test_cross_entropy_through_chunks() -> None:
    h, head = randn(9, 32, seed=1), randn(507, 32, seed=2)
    target = torch.tensor([0, 122, 123, 245, 246, 506, -100, 9, -1])
    ours, plain = (
        linear_cross_entropy(h, lambda a, b: head[a:b], 507, target, head.__getitem__, chunk=123, softmax=softmax)
        for softmax in (triton_ops.softmax_chunk, softmax_chunk)
    )
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine is not None and theirs is not None
        assert_near(mine, theirs)


def random_blocks(rows: int, blocks: int, qtype: str) -> Tensor:
    """Random bytes, of which those that are fp16 scales are finite: their exponent is never all ones."""
    raw = torch.randint(
        0, 256, (rows * blocks, FORMATS[qtype].size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    for at in {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208]}.get(qtype, [0, 2]):
        raw[:, at + 1] &= 0xBF
    return raw.view(rows, -1)


def test_formats_are_those_of_gguf() -> None:
    for qtype, form in FORMATS.items():
        assert quants.block_size(qtype) == (form.values, form.size)


@pytest.mark.parametrize("qtype", FORMATS)
def test_unpack_is_bit_equal(qtype: str) -> None:
    rows, blocks = (5, 3) if qtype.endswith("K") else (11, 25)
    raw, cols = random_blocks(rows, blocks, qtype), blocks * FORMATS[qtype].values
    plain = quants.unpack(raw, qtype)
    for out in (torch.empty(rows, cols), pitched(rows, cols, torch.float32)):
        assert torch.equal(unpack(raw, qtype, out), plain)
    assert untouched(out)
    part = torch.empty(3, cols)
    assert torch.equal(unpack(raw[1:4], qtype, part), plain[1:4])
    cut = (plain.view(torch.int32) >> 16 << 16).view(torch.float32)
    assert torch.equal(unpack(raw, qtype, torch.empty(rows, cols, dtype=torch.bfloat16)).float(), cut)


def test_unpack_refuses_what_does_not_fit() -> None:
    raw = random_blocks(2, 3, "Q4_0")
    for qtype, out in (("Q4_0", torch.empty(2, 64)), ("Q8_0", torch.empty(2, 96)), ("Q4_0", torch.empty(96, 2).t())):
        with pytest.raises(ValueError, match="are not the"):
            unpack(raw, qtype, out)
    with pytest.raises(ValueError, match="cannot unpack BF16"):
        unpack(raw, "BF16", torch.empty(2, 27))
