"""Each kernel forward and backward: no further from fp64 than plain PyTorch in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemwright.kernels.attention import QUERY_BLOCK, attention, attention_backward, plan_blocks
from gemwright.kernels.cross_entropy import ROWS, linear_cross_entropy
from gemwright.kernels.geglu import geglu, geglu_backward
from gemwright.kernels.norm import rms_norm, rms_norm_backward
from gemwright.kernels.rope import rope, rope_backward, rope_table

EPS = 1e-6
# What may be added to plain PyTorch's own error, as a share of the largest value: about one rounding.
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=("fp32", "bf16"))
ODD = pytest.mark.parametrize(("rows", "width"), [(252, 507), (507, 123), (123, 252), (1, 123)])


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def plain_gradients(
    run: Callable[..., Tensor], dy: Tensor, inputs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Output and input gradients of `run` by autograd in `dtype`."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    y = run(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype)))


def assert_no_worse(
    ours: Sequence[Tensor], run: Callable[..., Tensor], dy: Tensor, inputs: Sequence[Tensor], extra: float = 0.0
) -> None:
    """Every tensor of `ours` (output, then gradients) is as near to fp64 as plain PyTorch's in the inputs' dtype."""
    dtype = inputs[0].dtype
    exact = plain_gradients(run, dy, inputs, torch.float64)
    plain = plain_gradients(run, dy, inputs, dtype)
    for index, (mine, theirs, right) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.shape == right.shape and torch.isfinite(mine).all()
        size = float(right.abs().max()) or 1.0
        error = float((mine.double() - right).abs().max()) / size
        theirs_error = float((theirs.double() - right).abs().max()) / size
        assert error <= theirs_error + TOLERANCE[dtype] + extra, (
            f"tensor {index}: {error:.2e}, plain {theirs_error:.2e}"
        )


def plain_norm(weight: Tensor) -> Callable[..., Tensor]:
    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.to(wide.dtype)
        return y.to(x.dtype) if residual is None else y.to(x.dtype) + residual

    return run


@DTYPES
@ODD
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, dy = randn(rows, width, seed=1, dtype=dtype, scale=3), randn(rows, width, seed=2, dtype=dtype)
    weight = 1 + randn(width, seed=3)
    y, rstd = rms_norm(x, weight, EPS)
    dx = rms_norm_backward(dy, x, rstd, weight)
    assert y.dtype == dx.dtype == dtype
    assert_no_worse((y, dx), plain_norm(weight), dy, (x,))


@DTYPES
@ODD
def test_rms_norm_adds_a_residual_and_a_gradient(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = (randn(rows, width, seed=s, dtype=dtype) for s in (1, 2))
    dy, weight = randn(rows, width, seed=3, dtype=dtype), 1 + randn(width, seed=4)
    y, rstd = rms_norm(x, weight, EPS, residual=residual)
    dx = rms_norm_backward(dy, x, rstd, weight, add=dy)

    def run(x: Tensor, residual: Tensor) -> Tensor:
        return plain_norm(weight)(x, residual) + x * 1

    out, _, through_residual = plain_gradients(run, dy, (x, residual), torch.float64)
    exact_dx = plain_gradients(plain_norm(weight), dy, (x,), torch.float64)[1] + dy.double()
    bound = 2 * TOLERANCE[dtype]
    assert float((y.double() - (out - x.double())).abs().max()) <= bound * float(out.abs().max())
    assert float((dx.double() - exact_dx).abs().max()) <= bound * float(exact_dx.abs().max())
    assert torch.equal(through_residual, dy.double())


def test_rms_norm_of_zeros_is_zero() -> None:
    x, weight = torch.zeros(3, 123), torch.ones(123)
    y, rstd = rms_norm(x, weight, EPS)
    assert not y.any() and torch.isfinite(rms_norm_backward(torch.ones_like(x), x, rstd, weight)).all()


@DTYPES
@ODD
def test_geglu(rows: int, width: int, dtype: torch.dtype) -> None:
    gate, up = (randn(rows, width, seed=s, dtype=dtype, scale=2) for s in (1, 2))
    gate_up, y, again = torch.cat([gate, up], 1), torch.empty_like(gate), torch.empty_like(gate)
    dy, out = randn(rows, width, seed=3, dtype=dtype), torch.empty(rows, 2 * width, dtype=dtype)
    kept = geglu(gate_up, y)
    geglu_backward(dy, gate_up, kept, out)
    gradients = (out[:, :width], out[:, width:])
    assert_no_worse((y, *gradients), lambda g, u: F.gelu(g, approximate="tanh") * u, dy, (gate, up))
    geglu_backward(dy, gate_up, None, gate_up, again)
    assert torch.equal(gate_up, out) and torch.equal(again, y)


def plain_rope(positions: Tensor, base: float, scale: float) -> Callable[[Tensor], Tensor]:
    """As transformers writes it: tables of the full head, cast to the input's dtype, and a half-rotated copy."""

    def run(x: Tensor) -> Tensor:
        width = x.shape[-1]
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        frequencies = base ** (-torch.arange(0, width, 2, dtype=wide) / width) / scale
        angles = (positions.to(wide)[:, None] * frequencies)[:, None].repeat(1, 1, 2)
        low, high = x.chunk(2, -1)
        return x * angles.cos().to(x.dtype) + torch.cat([-high, low], -1) * angles.sin().to(x.dtype)

    return run


@DTYPES
@pytest.mark.parametrize(("base", "scale", "length"), [(1e4, 1.0, 123), (1e6, 8.0, 507), (1e6, 1.0, 252)])
def test_rope(base: float, scale: float, length: int, dtype: torch.dtype) -> None:
    positions = torch.arange(length)
    x, dy = (randn(length, 3, 42, seed=s, dtype=dtype) for s in (1, 2))
    table = rope_table(positions, 42, base, scale)
    y, dx = rope(x, table, dtype), rope_backward(dy, table, dtype)
    exact = plain_gradients(plain_rope(positions, base, scale), dy, (x,), torch.float64)
    plain = plain_gradients(plain_rope(positions, base, scale), dy, (x,), dtype)
    for mine, theirs, right in zip((y, dx), plain, exact, strict=True):
        # An angle of hundreds is itself an fp32 number, in both: their error is alike, not the same.
        bound = 1.5 * float((theirs.double() - right).abs().max()) + TOLERANCE[dtype] * float(right.abs().max())
        assert mine.dtype == dtype and float((mine.double() - right).abs().max()) <= bound


def test_rope_backward_undoes_rope_far_into_the_context() -> None:
    table = rope_table(torch.tensor([0, 1, 32_767, 131_071]), 64, 1e6, 8.0)
    x = randn(4, 2, 64, seed=1)
    torch.testing.assert_close(rope_backward(rope(x, table, torch.float32), table), x, rtol=0, atol=2e-6)
    torch.testing.assert_close(rope(x, table, torch.float32)[0], x[0], rtol=0, atol=0)


Images = Sequence[tuple[int, int]]


def dense_mask(lengths: Sequence[int], window: int | None, images: Images = ()) -> Tensor:
    """Which key each query of packed documents sees, as one square."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(sum(lengths))
    age = at[:, None] - at[None, :]
    seen = (document[:, None] == document[None, :]) & (age >= 0)
    for begin, end in images:
        seen[begin:end, begin:end] = True
    return seen if window is None else seen & (age < window)


def plain_attention(lengths: Sequence[int], window: int | None, images: Images = ()) -> Callable[..., Tensor]:
    seen = dense_mask(lengths, window, images)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k).masked_fill(~seen, -math.inf)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        return torch.einsum("hqk,khd->qhd", torch.softmax(wide, -1).to(q.dtype), v)

    return run


def check_attention(
    lengths: Sequence[int],
    window: int | None,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    extra: float = 0.0,
    images: Images = (),
) -> None:
    tokens = sum(lengths)
    q = randn(tokens, heads, width, seed=seed, dtype=dtype, scale=width**-0.25)
    k = randn(tokens, kv_heads, width, seed=seed + 1, dtype=dtype, scale=width**-0.25)
    v = randn(tokens, kv_heads, width, seed=seed + 2, dtype=dtype)
    dy = randn(tokens, heads, width, seed=seed + 3, dtype=dtype)
    blocks = plan_blocks(lengths, window, images=images)
    ours = (attention(q, k, v, blocks), *attention_backward(dy, q, k, v, blocks))
    assert_no_worse(ours, plain_attention(lengths, window, images), dy, (q, k, v), extra)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=9),
    window=st.none() | st.integers(1, 80),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    width=st.sampled_from([1, 9, 16]),
    seed=st.integers(0, 1000),
)
def test_attention_of_any_documents(
    lengths: list[int], window: int | None, heads: tuple[int, int], width: int, seed: int
) -> None:
    # The search finds gradients that nearly cancel, where one rounding is a large share; a wrong mask is far more.
    check_attention(lengths, window, *heads, width, seed=seed, extra=2e-5)


W = 252
EDGES = [[W], [W + 1], [2 * W], [W - 1, W + 1, 1], [QUERY_BLOCK], [QUERY_BLOCK + 1], [3, 2 * QUERY_BLOCK + 123, 5]]


@DTYPES
@pytest.mark.parametrize("window", [W, None, 1])
@pytest.mark.parametrize("lengths", EDGES, ids=str)
def test_attention_at_the_edges_of_window_and_block(lengths: list[int], window: int | None, dtype: torch.dtype) -> None:
    check_attention(lengths, window, 2, 1, 12, dtype)


@pytest.mark.parametrize("window", [507, QUERY_BLOCK, 100])
def test_attention_of_a_long_document_with_a_window_about_its_block(window: int) -> None:
    check_attention([1100, 30], window, 2, 1, 12)


@pytest.mark.parametrize("window", [300, 40, None])
def test_attention_of_images_across_the_edges_of_blocks(window: int | None) -> None:
    images = [(0, 20), (25, 70), (110, 111), (90 + 240, 90 + 290), (90 + 500, 90 + 640), (90 + 640, 90 + 699)]
    check_attention([90, 700, 5], window, 4, 2, 12, images=images)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 400),
    data=st.data(),
)
def test_attention_of_any_images(lengths: list[int], window: int | None, data: st.DataObject) -> None:
    check_attention(lengths, window, 2, 1, 8, extra=2e-5, images=data.draw(images_in(lengths)))


@st.composite
def images_in(draw: st.DrawFn, lengths: Sequence[int]) -> Images:
    """Some images within documents of these lengths, one after another or with text between."""
    images: list[tuple[int, int]] = []
    start = 0
    for length in lengths:
        cuts = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
        some = [pair for pair in pairwise(cuts) if draw(st.booleans())]
        images += [(start + a, start + b) for a, b in some]
        start += length
    return images


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=2, max_size=6),
    window=st.none() | st.integers(1, 300),
    data=st.data(),
)
def test_a_document_does_not_notice_its_neighbours(lengths: list[int], window: int | None, data: st.DataObject) -> None:
    tokens = sum(lengths)
    q, k, v, dy = (randn(tokens, heads, 16, seed=s) for s, heads in enumerate((4, 2, 2, 4)))
    which = data.draw(st.integers(0, len(lengths) - 1))
    own = slice(sum(lengths[:which]), sum(lengths[: which + 1]))
    packed, alone = plan_blocks(lengths, window), plan_blocks([lengths[which]], window)
    together = (attention(q, k, v, packed), *attention_backward(dy, q, k, v, packed))
    apart = (
        attention(q[own], k[own], v[own], alone),
        *attention_backward(dy[own], q[own], k[own], v[own], alone),
    )
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one[own], other, rtol=1e-5, atol=2e-6)


@settings(max_examples=40)
@given(
    begun=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 400), st.integers(1, 300)), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 300),
)
def test_what_documents_share_counts_for_each(
    begun: list[int], lengths: list[tuple[int, int, int]], window: int | None
) -> None:
    # Documents that begin others: each of the first few as such, then some that go on after a part of one of these.
    own = [max(n, 1) for n in begun]
    starts = [sum(own[:i]) for i in range(len(own))]
    pasts: list[list[int]] = [[] for _ in own]
    for which, most, length in lengths:
        first = starts[which % len(begun)]
        pasts.append(list(range(first, first + min(most, own[which % len(begun)]))))
        own.append(length)
    tokens = sum(own)
    q, k, v, dy = (randn(tokens, heads, 16, seed=s) for s, heads in enumerate((4, 2, 2, 4)))
    blocks = plan_blocks(own, window, pasts=pasts)
    out, dq = attention(q, k, v, blocks), torch.zeros_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    start = 0
    for past, length in zip(pasts, own, strict=True):
        rows = [*past, *range(start, start + length)]
        alone = plan_blocks([len(rows)], window)
        weight = dy[rows].clone()
        weight[: len(past)] = 0  # its own output alone is looked at
        expected = attention(q[rows], k[rows], v[rows], alone)[len(past) :]
        torch.testing.assert_close(out[start : start + length], expected, rtol=1e-5, atol=2e-6)
        for whole, part in zip((dq, dk, dv), attention_backward(weight, q[rows], k[rows], v[rows], alone), strict=True):
            whole.index_add_(0, torch.tensor(rows), part)
        start += length
    for ours, whole in zip(attention_backward(dy, q, k, v, blocks), (dq, dk, dv), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)


def test_neighbours_of_another_content_change_no_bit() -> None:
    lengths = [40, 300, 38, 41]
    own = slice(40, 340)
    q, k, v = (randn(sum(lengths), heads, 16, seed=s) for s, heads in enumerate((4, 2, 2)))
    blocks = plan_blocks(lengths, 64)
    before = attention(q, k, v, blocks)
    for x in (q, k, v):
        x[: own.start] = 1e30
        x[own.stop :] = torch.nan
    assert torch.equal(attention(q, k, v, blocks)[own], before[own])


@pytest.mark.parametrize(("lengths", "window"), [([1] * 300, 4), ([255, 256, 257, 3], None), ([1000], 100)])
def test_every_query_is_planned_once_and_sees_only_its_own_past(lengths: list[int], window: int | None) -> None:
    tokens = sum(lengths)
    # The value of each key is a one-hot of its place: where the output is not zero, the query looked.
    q, v = torch.zeros(tokens, 1, 1), torch.eye(tokens)[:, None]
    blocks = plan_blocks(lengths, window)
    seen = torch.cat([attention(q, q, v[:, :, at : at + 1], blocks) for at in range(tokens)], dim=2)[:, 0]
    mask = dense_mask(lengths, window)
    torch.testing.assert_close(seen, mask / mask.sum(1, keepdim=True))


def check_cross_entropy(count: int, width: int, vocab: int, dtype: torch.dtype, scale: float = 1.0) -> None:
    h, head = randn(count, width, seed=1, dtype=dtype, scale=scale), randn(vocab, width, seed=2, dtype=dtype)
    target = torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(3))
    nll, dh = linear_cross_entropy(h, lambda a, b: head[a:b], vocab, target, head.__getitem__)
    assert dh is not None and nll.dtype == dh.dtype == torch.float32

    def run(h: Tensor) -> Tensor:
        logits = h @ head.to(h.dtype).t()
        return F.cross_entropy(logits if h.dtype == torch.float64 else logits.float(), target, reduction="none")

    assert_no_worse((nll, dh), run, torch.ones(count), (h,))
    only, nothing = linear_cross_entropy(h, lambda a, b: head[a:b], vocab, target)
    assert torch.equal(only, nll) and nothing is None


@DTYPES
@pytest.mark.parametrize(
    ("count", "width", "vocab"), [(123, 252, 2 * ROWS + 507), (1, 123, ROWS + 1), (252, 123, 507), (7, 507, ROWS)]
)
def test_linear_cross_entropy(count: int, width: int, vocab: int, dtype: torch.dtype) -> None:
    check_cross_entropy(count, width, vocab, dtype, scale=0.2)


@pytest.mark.parametrize("order", [1, -1])
def test_linear_cross_entropy_of_extreme_logits(order: int) -> None:
    """Logits from -1e4 to 1e4, rising or falling over the chunks, so that the running maximum moves or stays."""
    vocab = 2 * ROWS + 123
    logits = torch.linspace(-1e4, 1e4, vocab) * order
    h, head = torch.eye(2, dtype=torch.float32), torch.stack([logits, -logits], dim=1).contiguous()
    target = torch.tensor([5, vocab - 3])
    nll, dh = linear_cross_entropy(h, lambda a, b: head[a:b], vocab, target, head.__getitem__)
    exact = F.cross_entropy((h.double() @ head.double().t()), target, reduction="none")
    weights = torch.softmax(h.double() @ head.double().t(), -1)
    exact_dh = weights @ head.double() - head[target].double()
    assert dh is not None
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(dh.double(), exact_dh, rtol=1e-5, atol=1e-2)


def test_linear_cross_entropy_of_one_certain_position() -> None:
    vocab = ROWS + 123
    head = torch.zeros(vocab, 3)
    head[vocab - 1] = 1e4
    h, target = torch.ones(1, 3), torch.tensor([vocab - 1])
    nll, dh = linear_cross_entropy(h, lambda a, b: head[a:b], vocab, target, head.__getitem__)
    assert dh is not None and nll.tolist() == [0.0] and not dh.any()


def test_a_certain_position_gets_no_gradient_from_what_its_own_row_lost_in_rounding() -> None:
    head, h = randn(507, 32, seed=1), torch.zeros(1, 32, dtype=torch.bfloat16)
    h[0] = 100 * head[9]
    _, dh = linear_cross_entropy(h, lambda a, b: head[a:b].bfloat16(), 507, torch.tensor([9]), head.__getitem__)
    assert dh is not None and not dh.any()


@pytest.mark.parametrize("left_out", [2.0**-4, 2.0**-10, 2.0**-16])
@pytest.mark.parametrize("order", [1, -1], ids=["likely tokens first", "likely tokens last"])
@DTYPES
def test_what_a_gradient_leaves_out_keeps_to_its_bound(left_out: float, order: int, dtype: torch.dtype) -> None:
    """Every share of the probability lies alone in a direction of its own, a chunk of four rows each."""
    count, chunks, chunk = 64, 40, 4
    head = torch.eye(chunks, dtype=dtype).repeat_interleave(chunk, 0)
    # Positions more and less sure of what comes; some not asked for anything.
    h = (order * torch.linspace(12, -12, chunks) * torch.linspace(0, 1.5, count)[:, None]).to(dtype)
    target = torch.randint(0, len(head), (count,), generator=torch.Generator().manual_seed(1))
    target[::9] = -1
    (nll, exact), (same, dh) = (
        linear_cross_entropy(
            h, lambda a, b: head[a:b], len(head), target, head.__getitem__, chunk=chunk, left_out=share
        )
        for share in (0.0, left_out)
    )
    assert dh is not None and exact is not None and torch.equal(nll, same)
    missing = (exact - dh).abs().sum(1)
    rounding = 1e-6 if dtype == torch.float32 else 4e-3
    assert missing.max() < left_out + rounding
    assert left_out < 2.0**-4 or missing.max() > 1e-3, "nothing was left out"
    assert not dh[::9].any()


def test_linear_cross_entropy_reads_each_row_once() -> None:
    vocab, head, spans = 2 * ROWS + 123, randn(2 * ROWS + 123, 5, seed=1), []

    def rows(start: int, stop: int) -> Tensor:
        spans.append((start, stop))
        return head[start:stop]

    linear_cross_entropy(randn(4, 5, seed=2), rows, vocab, torch.arange(4))
    assert spans[0][0] == 0 and spans[-1][1] == vocab and all(a[1] == b[0] for a, b in pairwise(spans))


def test_ignored_positions_have_no_loss_and_no_gradient() -> None:
    torch.manual_seed(0)
    head, h = torch.randn(507, 32), torch.randn(7, 32)
    target = torch.tensor([3, -100, 506, 0, -100, 9, 250])
    nll, dh = linear_cross_entropy(h, lambda a, b: head[a:b], 507, target, head.__getitem__)
    assert dh is not None
    kept = target >= 0
    alone, d_alone = linear_cross_entropy(h[kept], lambda a, b: head[a:b], 507, target[kept], head.__getitem__)
    assert d_alone is not None
    torch.testing.assert_close(nll[kept], alone)
    torch.testing.assert_close(dh[kept], d_alone)
    assert nll[~kept].eq(0).all() and dh[~kept].eq(0).all()
