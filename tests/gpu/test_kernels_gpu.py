"""Each Triton kernel on a GPU: no further from fp32 than plain PyTorch in bf16 is, at odd and at the models' shapes.

python -m pytest --noconftest -m gpu tests/gpu      # needs torch, triton, gguf and pytest only
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux on x86-64")
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
    pytest.skip("no CUDA device", allow_module_level=True)

from gemwright.kernels import cross_entropy, dispatch, geglu, heads, norm, triton_ops
from gemwright.kernels.cross_entropy import Running, linear_cross_entropy
from gemwright.kernels.rope import rope_table
from gemwright.kernels.triton_unpack import FORMATS, unpack
from gemwright.weights import quants

pytestmark = pytest.mark.gpu

EPS, BF16, DEVICE = 1e-6, torch.bfloat16, torch.device("cuda", 0)
# Beyond plain PyTorch's own error, as a share of the largest value: half of one bf16 rounding.
TOLERANCE = 1e-3
ROWS = pytest.mark.parametrize(
    ("rows", "width"), [(252, 507), (507, 123), (1, 252), (2048, 5376), (2048, 2560), (1000, 1152), (3001, 640)]
)
MLPS = pytest.mark.parametrize(("rows", "width"), [(252, 507), (1, 123), (2048, 21504), (2048, 10240), (333, 6912)])
HEADS = pytest.mark.parametrize(
    ("rows", "q", "kv", "size"),
    [(252, 3, 1, 42), (507, 5, 2, 32), (1, 4, 4, 16), (2048, 32, 16, 128), (2048, 8, 4, 256), (777, 4, 1, 256)],
)


def randn(*shape: int, seed: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device=DEVICE)).to(dtype)


def pitched(rows: int, width: int) -> Tensor:
    """A view whose rows lie further apart than they are long; what lies between must stay as it is."""
    return torch.full((rows, width + 32), 7.0, dtype=BF16, device=DEVICE)[:, :width]


def untouched(view: Tensor) -> bool:
    whole = view.as_strided((view.shape[0], view.stride(0)), (view.stride(0), 1))
    return bool((whole[:, view.shape[1] :] == 7).all())


def wide(x: object) -> object:
    """Any bf16 tensor as fp32, tuples by their members."""
    if isinstance(x, tuple):
        return tuple(wide(part) for part in x)
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def check(ours: Sequence[Tensor], plain: Callable[..., Sequence[Tensor]], *args: object, **named: object) -> None:
    """`ours` against plain(args) in bf16, both measured against plain in fp32 of the same inputs."""
    theirs = plain(*args, **named)
    exact = plain(*map(wide, args), **{name: wide(value) for name, value in named.items()})
    for index, (mine, other, right) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert mine.shape == right.shape and mine.dtype == other.dtype and bool(torch.isfinite(mine).all())
        size = float(right.abs().max()) or 1.0
        error, their_error = (float((x.float() - right).abs().max()) / size for x in (mine, other))
        assert error <= their_error + TOLERANCE, f"tensor {index}: {error:.2e}, plain {their_error:.2e}"


def test_the_dispatch_chooses_triton_here() -> None:
    assert dispatch.has_triton(DEVICE) and dispatch.has_triton(torch.device("cuda"))
    assert not dispatch.has_triton(torch.device("cpu"))
    x, weight = randn(3, 123, seed=1), randn(123, seed=2, dtype=torch.float32)
    for mine, theirs in zip(dispatch.rms_norm(x, weight, EPS), triton_ops.rms_norm(x, weight, EPS), strict=True):
        assert torch.equal(mine, theirs)


@ROWS
def test_norms(rows: int, width: int) -> None:
    x, more = randn(rows, width, seed=1, scale=3), randn(rows, width, seed=2)
    weight, following = randn(width, seed=3, dtype=torch.float32), randn(width, seed=4, dtype=torch.float32)
    check(triton_ops.rms_norm(x, weight, EPS), norm.rms_norm, x, weight, EPS)
    out = pitched(rows, width)
    check(triton_ops.rms_norm(x, weight, EPS, residual=more, out=out), norm.rms_norm, x, weight, EPS, residual=more)
    assert untouched(out)
    seam = triton_ops.norm_add_norm(x, more, weight, following, EPS, out=out)
    check(seam, norm.norm_add_norm, x, more, weight, following, EPS)
    assert untouched(out)


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=("fp32", "bf16"))
def test_norm_backward(rows: int, width: int, dtype: torch.dtype) -> None:
    x, add, dy = (
        randn(rows, width, seed=1, scale=3),
        randn(rows, width, seed=2),
        randn(rows, width, seed=3, dtype=dtype),
    )
    weight = randn(width, seed=4, dtype=torch.float32)
    rstd = norm.rms_norm(x, weight, EPS)[1]

    def plain(dy: Tensor, x: Tensor, add: Tensor | None) -> tuple[Tensor]:
        return (norm.rms_norm_backward(dy, x, rstd, weight, add=add),)

    check((triton_ops.rms_norm_backward(dy, x, rstd, weight),), plain, dy, x, None)
    fresh = triton_ops.rms_norm_backward(dy, x, rstd, weight, add=add)
    check((fresh,), plain, dy, x, add)
    gap = randn(rows, width + 9, seed=3, dtype=dtype)
    gap[:, :width] = dy
    out = pitched(rows, width)
    triton_ops.rms_norm_backward(gap[:, :width], x, rstd, weight, add=add, out=out)
    assert torch.equal(out, fresh) and untouched(out)
    # In place, many times: a race between the reads and the writes would show now and then.
    for _ in range(20):
        alias = add.clone()
        assert torch.equal(triton_ops.rms_norm_backward(dy, x, rstd, weight, add=alias, out=alias), fresh)
        if dtype == BF16:
            alias = dy.clone()
            assert torch.equal(triton_ops.rms_norm_backward(alias, x, rstd, weight, add=add, out=alias), fresh)


@HEADS
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=("fp32", "bf16"))
def test_heads(rows: int, q: int, kv: int, size: int, dtype: torch.dtype) -> None:
    qkv, table = randn(rows, (q + 2 * kv) * size, seed=1), rope_table(torch.arange(rows, device=DEVICE), size, 1e6, 8.0)
    weights = randn(size, seed=2, dtype=torch.float32), randn(size, seed=3, dtype=torch.float32)
    ours = triton_ops.norm_rope(qkv, *weights, table, q, kv, EPS)
    check(ours, heads.norm_rope, qkv, *weights, table, q, kv, EPS)
    rstd = (ours[2], ours[3])
    dq, dk = randn(rows, q, size, seed=4), randn(rows, kv, size, seed=5, dtype=dtype)
    dv = randn(kv, rows, size, seed=6, dtype=dtype).transpose(0, 1)

    def plain(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor) -> tuple[Tensor]:
        return (heads.norm_rope_backward(dq, dk, dv, qkv, rstd, *weights, table, torch.empty_like(qkv)),)

    out = triton_ops.norm_rope_backward(dq, dk, dv, qkv, rstd, *weights, table, torch.full_like(qkv, torch.nan))
    check((out,), plain, dq, dk, dv, qkv)


@MLPS
def test_geglu(rows: int, width: int) -> None:
    gate_up, dwide = randn(rows, 2 * width, seed=1, scale=2), randn(rows, width + 9, seed=2)[:, :width]

    def forward(gate_up: Tensor) -> tuple[Tensor]:
        geglu.geglu(gate_up, out := torch.empty_like(gate_up[:, :width].contiguous()))
        return (out,)

    def backward(dwide: Tensor, gate_up: Tensor) -> tuple[Tensor]:
        geglu.geglu_backward(dwide, gate_up, None, out := torch.empty_like(gate_up))
        return (out,)

    out, again, gradient = pitched(rows, width), pitched(rows, width), torch.empty_like(gate_up)
    triton_ops.geglu(gate_up, out)
    check((out,), forward, gate_up)
    triton_ops.geglu_backward(dwide, gate_up, None, gradient)
    check((gradient,), backward, dwide, gate_up)
    triton_ops.geglu_backward(dwide, gate_up, None, gate_up, again)
    assert torch.equal(gate_up, gradient) and torch.equal(again, out)
    assert untouched(out) and untouched(again)


def test_geglu_of_huge_values_is_finite() -> None:
    gate = torch.tensor([[1e30, -1e30, 3e38, -3e38, 90.0, -90.0, 0.0, -5.0]], device=DEVICE)
    gate_up, d = torch.cat([gate, torch.full_like(gate, 0.5)], 1), torch.ones_like(gate)
    triton_ops.geglu_backward(d, gate_up, None, gate_up, out := torch.empty_like(gate))
    torch.testing.assert_close(out, 0.5 * torch.nn.functional.gelu(gate, approximate="tanh"), rtol=1e-6, atol=1e-6)
    right = torch.tensor([[0.5, 0, 0.5, 0, 0.5, 0, 0.25, 0]], device=DEVICE)
    torch.testing.assert_close(gate_up[:, :8], right, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=("fp32", "bf16"))
@pytest.mark.parametrize("chunk", [123, 252, 507, 1, 64, 4096, 16384])
def test_softmax_chunk(chunk: int, dtype: torch.dtype) -> None:
    rows, start = 700, 4096
    target = torch.randint(start, start + chunk, (rows,), device=DEVICE)
    # At both edges, just outside of them, before, and ignored.
    target[:6] = torch.tensor([start, start + chunk - 1, start + chunk, start - 1, 0, -100], device=DEVICE)
    before = [randn(rows, 1, seed=s, dtype=torch.float32).abs() for s in range(4)]
    logits = randn(rows, chunk, seed=5, dtype=dtype, scale=4)

    def plain(logits: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        weights, running = logits.clone(), Running(*(part.clone() for part in parts))
        cross_entropy.softmax_chunk(weights, target, start, running)
        return weights, running.top, running.total, running.right, running.shrink

    ours, running = logits.clone(), Running(*(part.clone() for part in before))
    triton_ops.softmax_chunk(ours, target, start, running)
    check((ours, running.top, running.total, running.right, running.shrink), plain, logits, *before)


def test_cross_entropy_through_chunks() -> None:
    h, head = randn(507, 640, seed=1, scale=0.2), randn(9001, 640, seed=2)
    target = torch.randint(0, 9001, (507,), device=DEVICE)
    target[::7] = -100
    ours, plain = (
        linear_cross_entropy(h, lambda a, b: head[a:b], 9001, target, head.__getitem__, softmax=softmax)
        for softmax in (triton_ops.softmax_chunk, cross_entropy.softmax_chunk)
    )
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine is not None and theirs is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def random_blocks(rows: int, cols: int, qtype: str) -> Tensor:
    """Random bytes, of which those that are fp16 scales are finite: their exponent is never all ones."""
    form, generator = FORMATS[qtype], torch.Generator(DEVICE).manual_seed(1)
    shape = (rows * (cols // form.values), form.size)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE, generator=generator)
    for at in {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208]}.get(qtype, [0, 2]):
        raw[:, at + 1] &= 0xBF
    return raw.view(rows, -1)


@pytest.mark.parametrize("qtype", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (123, 768), (2560, 2560), (5376, 21504), (21504, 5376)])
def test_unpack_is_bit_equal(rows: int, cols: int, qtype: str) -> None:
    raw = random_blocks(rows, cols, qtype)
    for dtype in (BF16, torch.float32):
        plain = quants.unpack(raw, qtype, dtype)
        assert torch.equal(unpack(raw, qtype, torch.empty(rows, cols, dtype=dtype, device=DEVICE)), plain)
    out = pitched(rows, cols)
    unpack(raw, qtype, out)
    assert torch.equal(out, quants.unpack(raw, qtype, BF16)) and untouched(out)
    first, last = rows // 3, rows - rows // 4
    part = unpack(raw[first:last], qtype, torch.empty_like(out[first:last]))
    assert torch.equal(part, out[first:last])


ENOUGH_BYTES = 20e9


@pytest.mark.skipif(torch.cuda.mem_get_info()[0] < ENOUGH_BYTES, reason="less than 20 GB of device memory is free")
def test_offsets_beyond_two_to_the_31() -> None:
    """The last rows of tensors of more than 2^31 elements are those of a small tensor."""
    last = 5
    weight = randn(5376, seed=1, dtype=torch.float32)
    for qtype in ("Q4_0", "Q6_K"):
        raw = random_blocks(410_000, 5376, qtype)
        out = unpack(raw, qtype, torch.empty(410_000, 5376 + 8, dtype=BF16, device=DEVICE)[:, :5376])
        assert torch.equal(out[-last:], quants.unpack(raw[-last:], qtype, BF16))
        flat = unpack(raw, qtype, torch.empty(410_000, 5376, dtype=BF16, device=DEVICE))
        assert torch.equal(flat[-last:], out[-last:])
        del raw, out
    y, rstd = triton_ops.rms_norm(flat, weight, EPS)
    small, small_rstd = triton_ops.rms_norm(flat[-last:].clone(), weight, EPS)
    assert torch.equal(y[-last:], small) and torch.equal(rstd[-last:], small_rstd)
    triton_ops.rms_norm_backward(y, flat, rstd, weight, out=y)
    assert torch.equal(y[-last:], triton_ops.rms_norm_backward(small, flat[-last:].clone(), small_rstd, weight))
    del flat, y
    gate_up = torch.empty(52_000, 2 * 21504, dtype=BF16, device=DEVICE)
    gate_up[-last:] = randn(last, 2 * 21504, seed=2)
    small, wide_out = gate_up[-last:].clone(), torch.empty(52_000, 21504, dtype=BF16, device=DEVICE)
    triton_ops.geglu(gate_up, wide_out)
    triton_ops.geglu(small, small_out := torch.empty(last, 21504, dtype=BF16, device=DEVICE))
    assert torch.equal(wide_out[-last:], small_out)
    triton_ops.geglu_backward(wide_out, gate_up, None, gate_up)
    triton_ops.geglu_backward(small_out, small, None, small)
    assert torch.equal(gate_up[-last:], small)
    del gate_up, wide_out
    qkv = torch.empty(270_000, 64 * 128, dtype=BF16, device=DEVICE)
    qkv[-last:] = randn(last, 64 * 128, seed=3)
    table, weights = rope_table(torch.arange(270_000, device=DEVICE), 128, 1e6, 8.0), (weight[:128], weight[128:256])
    q, k, *rstds = triton_ops.norm_rope(qkv, *weights, table, 32, 16, EPS)
    end = (table[0][-last:], table[1][-last:])
    small_q, small_k, *_ = triton_ops.norm_rope(qkv[-last:].clone(), *weights, end, 32, 16, EPS)
    assert torch.equal(q[-last:], small_q) and torch.equal(k[-last:], small_k)
    small = qkv[-last:].clone()
    out = triton_ops.norm_rope_backward(q, k, k, qkv, (rstds[0], rstds[1]), *weights, table, torch.empty_like(qkv))
    ends = (rstds[0][-last:], rstds[1][-last:])
    few = triton_ops.norm_rope_backward(
        q[-last:], k[-last:], k[-last:], small, ends, *weights, end, torch.empty_like(small)
    )
    assert torch.equal(out[-last:], few)
