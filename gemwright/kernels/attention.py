"""Causal attention over packed documents, forward and backward, as dense blocks of equal shape.

A packed row holds many documents that never see each other. Short ones of similar length share one block (padded);
a long one is cut into query blocks, each with only the keys that its window reaches. Work is so proportional to what
attends, not to the square of the row. Shapes: q [N, H, D] already scaled, k and v [N, K, D], output [N, H, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_BLOCK = 256
# Pieces are rounded up to few shapes: the CPU library compiles each new shape of a product, for milliseconds.
LENGTH_STEP, COUNT_STEP = 16, 4


@dataclass(frozen=True)
class Block:
    """`count` independent pieces of `queries` x `keys`; indices are rows of the packed tensors."""

    count: int
    queries: int
    keys: int
    query_rows: Tensor
    key_rows: Tensor
    bias: Tensor
    real_queries: Tensor
    real_keys: Tensor
    padded_queries: Tensor


def plan_blocks(lengths: Sequence[int], window: int | None, device: torch.device | None = None) -> list[Block]:
    """Blocks for documents of `lengths` lying one after another; `window` counts the token itself (None: all)."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    spans: list[list[tuple[int, int, int, int]]] = []
    short = sorted((length, start) for start, length in zip(starts, lengths, strict=False) if length <= QUERY_BLOCK)
    for length, start in short:
        group = spans[-1] if spans else []
        if not group or _rounded(length, LENGTH_STEP) != _rounded(group[0][1] - group[0][0], LENGTH_STEP):
            spans.append([])
        spans[-1].append((start, start + length, start, start + length))
    for start, length in zip(starts, lengths, strict=False):
        if length > QUERY_BLOCK:
            for first in range(start, start + length, QUERY_BLOCK):
                oldest = start if window is None else max(start, first - window + 1)
                last = min(first + QUERY_BLOCK, start + length)
                spans.append([(first, last, oldest, last)])
    return [_block(group, window, device) for group in spans]


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def _block(spans: list[tuple[int, int, int, int]], window: int | None, device: torch.device | None) -> Block:
    queries = _rounded(max(b - a for a, b, _, _ in spans), LENGTH_STEP)
    keys = _rounded(max(d - c for _, _, c, d in spans), LENGTH_STEP)
    count = len(spans) if len(spans) == 1 else _rounded(len(spans), COUNT_STEP)
    at = torch.tensor(spans + [(0, 0, 0, 0)] * (count - len(spans)))
    q = at[:, :1] + torch.arange(queries)
    k = at[:, 2:3] + torch.arange(keys)
    real_q, real_k = q < at[:, 1:2], k < at[:, 3:4]
    seen = (k[:, None, :] <= q[:, :, None]) & real_k[:, None, :]
    if window is not None:
        seen &= q[:, :, None] - k[:, None, :] < window
    seen |= ~real_q[:, :, None]  # a padded query attends anywhere, so that its softmax stays finite; it is dropped
    bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    q, k = (torch.minimum(rows, last - 1).clamp_(min=0) for rows, last in ((q, at[:, 1:2]), (k, at[:, 3:4])))
    places = (real.flatten().nonzero()[:, 0] for real in (real_q, real_k, ~real_q))
    parts = (q.flatten(), k.flatten(), bias, *places)
    return Block(count, queries, keys, *(part.to(device) for part in parts))


def _heads(x: Tensor, rows: Tensor, count: int, length: int, kv_heads: int, zero: Tensor | None = None) -> Tensor:
    """Gather `rows` of x [N, H, D] into [count * kv_heads, groups * length, D], those at `zero` as zeros."""
    heads, width = x.shape[1:]
    groups = heads // kv_heads
    picked = x.index_select(0, rows)
    if zero is not None and len(zero):
        picked.index_fill_(0, zero, 0)
    return (
        picked.view(count, length, kv_heads, groups, width)
        .permute(0, 2, 3, 1, 4)
        .reshape(count * kv_heads, groups * length, width)
    )


def _spread(out: Tensor, piece: Tensor, rows: Tensor, real: Tensor, count: int, length: int, *, add: bool) -> None:
    """The reverse of `_heads`: put (or add) the real rows of `piece` back into out [N, H, D]."""
    heads, width = out.shape[1:]
    kv_heads = piece.shape[0] // count
    flat = piece.view(count, kv_heads, heads // kv_heads, length, width).permute(0, 3, 1, 2, 4)
    flat = flat.reshape(count * length, heads, width)
    if real.shape[0] != flat.shape[0]:
        flat, rows = flat.index_select(0, real), rows.index_select(0, real)
    if add:
        out.index_add_(0, rows, flat.to(out.dtype))
    else:
        out.index_copy_(0, rows, flat.to(out.dtype))


def _probabilities(q: Tensor, k: Tensor, block: Block) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2)).float()
    kv_heads = q.shape[0] // block.count
    scores.view(block.count, kv_heads, -1, block.queries, block.keys).add_(block.bias[:, None, None])
    return torch.softmax(scores, -1).to(q.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Softmax(q k^T + mask) v for every block; softmax in fp32."""
    out = torch.empty_like(q)
    kv_heads = k.shape[1]
    for b in blocks:
        p = _probabilities(
            _heads(q, b.query_rows, b.count, b.queries, kv_heads), _heads(k, b.key_rows, b.count, b.keys, kv_heads), b
        )
        piece = torch.bmm(p, _heads(v, b.key_rows, b.count, b.keys, kv_heads))
        _spread(out, piece, b.query_rows, b.real_queries, b.count, b.queries, add=False)
    return out


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq in q's dtype; dk, dv in fp32); probabilities are computed again, never kept."""
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    kv_heads = k.shape[1]
    for b in blocks:
        q_b = _heads(q, b.query_rows, b.count, b.queries, kv_heads)
        # A padded query repeats a real one; without a gradient of its own it adds nothing to dk and dv.
        do_b = _heads(do, b.query_rows, b.count, b.queries, kv_heads, b.padded_queries)
        k_b, v_b = (_heads(x, b.key_rows, b.count, b.keys, kv_heads) for x in (k, v))
        p = _probabilities(q_b, k_b, b)
        dp = torch.bmm(do_b, v_b.transpose(1, 2)).float()
        dp.sub_(torch.mul(dp, p).sum(-1, keepdim=True)).mul_(p)
        ds = dp.to(q.dtype)
        _spread(dq, torch.bmm(ds, k_b), b.query_rows, b.real_queries, b.count, b.queries, add=False)
        _spread(dk, torch.bmm(ds.transpose(1, 2), q_b), b.key_rows, b.real_keys, b.count, b.keys, add=True)
        _spread(dv, torch.bmm(p.transpose(1, 2), do_b), b.key_rows, b.real_keys, b.count, b.keys, add=True)
    return dq, dk, dv
