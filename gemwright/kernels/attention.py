"""Attention over packed documents, forward and backward, as dense blocks of equal shape.

A packed row holds many documents that never see each other. Short ones of similar length share one block (padded);
a long one is cut into query blocks, each with only the keys that its window reaches. Work is so proportional to what
attends, not to the square of the row. It is causal, but that the tokens of an image see each other both ways, as far as
the window lets them. Shapes: q [N, H, D] already scaled, k and v [N, K, D], output [N, H, D].
Source for images: Google's gemma_pytorch, in whose Gemma 3 local and global layers do so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

Span = tuple[int, int, int, int]  # first and last (exclusive) row of the queries, then of the keys
QUERY_BLOCK = 256
# Pieces are rounded up to few shapes: the CPU library compiles each new shape of a product, for milliseconds.
LENGTH_STEP, COUNT_STEP = 16, 4
# What a further block costs, in tokens of filling: up to here shorter documents join the next longer ones.
JOIN_TOKENS = 32


@dataclass(frozen=True)
class Block:
    """`count` independent pieces of `queries` x `keys`; indices are rows of the packed tensors.

    What fills a piece up repeats rows of its own; `query_homes` sends the results of such queries to a row beyond the
    last, and `padded` (bool [count, 1, queries, 1], None where nothing is) tells which they are.
    """

    count: int
    queries: int
    keys: int
    query_rows: Tensor
    query_homes: Tensor
    key_rows: Tensor
    bias: Tensor
    padded: Tensor | None


def plan_blocks(
    lengths: Sequence[int],
    window: int | None,
    device: torch.device | None = None,
    images: Sequence[tuple[int, int]] = (),
) -> list[Block]:
    """Blocks for documents of `lengths` lying one after another; `window` counts the token itself (None: all).

    `images` are the first and last (exclusive) rows of each, none beyond its document.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    spans: list[list[Span]] = []
    short = sorted((length, start) for start, length in zip(starts, lengths, strict=False) if length <= QUERY_BLOCK)
    for length, documents in groupby(short, lambda document: _rounded(document[0], LENGTH_STEP)):
        group = [(start, start + own, start, start + own) for own, start in documents]
        filling = sum(length - _rounded(b - a, LENGTH_STEP) for a, b, _, _ in spans[-1]) if spans else 0
        spans[-1:] = [spans[-1] + group] if spans and filling <= JOIN_TOKENS else [*spans[-1:], group]
    for start, length in zip(starts, lengths, strict=False):
        if length > QUERY_BLOCK:
            for first in range(start, start + length, QUERY_BLOCK):
                oldest = start if window is None else max(start, first - window + 1)
                last = min(first + QUERY_BLOCK, start + length)
                newest = max([last, *(end for begin, end in images if begin < last < end)])
                spans.append([(first, last, oldest, newest)])
    image = torch.full((starts[-1],), -1)
    for index, (begin, end) in enumerate(images):
        image[begin:end] = index
    return [_block(group, window, image, device) for group in spans]


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def _block(spans: list[Span], window: int | None, image: Tensor, device: torch.device | None) -> Block:
    """`image` [N] says of each row which image it belongs to, or -1."""
    tokens = len(image)
    queries = _rounded(max(b - a for a, b, _, _ in spans), LENGTH_STEP)
    keys = _rounded(max(d - c for _, _, c, d in spans), LENGTH_STEP)
    count = len(spans) if len(spans) == 1 else _rounded(len(spans), COUNT_STEP)
    at = torch.tensor(spans + [(0, 0, 0, 0)] * (count - len(spans)))
    q = at[:, :1] + torch.arange(queries)
    k = at[:, 2:3] + torch.arange(keys)
    real_q, real_k = q < at[:, 1:2], k < at[:, 3:4]
    q_image, k_image = (image[rows.clamp(max=tokens - 1)] for rows in (q, k))
    together = (q_image[:, :, None] == k_image[:, None, :]) & (q_image >= 0)[:, :, None]
    seen = ((k[:, None, :] <= q[:, :, None]) | together) & real_k[:, None, :]
    if window is not None:
        seen &= q[:, :, None] - k[:, None, :] < window
    seen |= ~real_q[:, :, None]  # a padded query attends anywhere, so that its softmax stays finite; it is dropped
    bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    homes = q.masked_fill(~real_q, tokens)
    q, k = (torch.minimum(rows, last - 1).clamp_(min=0) for rows, last in ((q, at[:, 1:2]), (k, at[:, 3:4])))
    q, homes, k, bias = (part.to(device) for part in (q.flatten(), homes.flatten(), k.flatten(), bias))
    padded = None if real_q.all() else ~real_q[:, None, :, None].to(device)
    return Block(count, queries, keys, q, homes, k, bias, padded)


def _places(rows: Tensor, count: int, heads: int) -> Tensor:
    """Where the heads of packed `rows` [count * length] lie in x [N * H, D], in the order [count, H, length]."""
    every = torch.arange(heads, device=rows.device)
    return (rows.view(count, 1, -1) * heads + every[:, None]).flatten()


def _heads(x: Tensor, rows: Tensor, count: int, kv_heads: int) -> Tensor:
    """Gather `rows` of x [N, H, D] into [count * kv_heads, groups * length, D]."""
    picked = x.reshape(-1, x.shape[2]).index_select(0, _places(rows, count, x.shape[1]))
    return picked.view(count * kv_heads, -1, x.shape[2])


def _back_home(pieces: Sequence[Tensor], blocks: Sequence[Block], like: Tensor) -> Tensor:
    """The reverse of `_heads`: the blocks' `pieces` as one tensor of `like`'s shape [N, H, D].

    A gather by the places turned round; writing to scattered rows takes six times as long on a CPU.
    """
    tokens, heads, width = like.shape
    found = torch.cat([piece.view(-1, width) for piece in pieces])
    homes = torch.cat([_places(b.query_homes, b.count, heads) for b in blocks])
    order = homes.new_zeros((tokens + 1) * heads)
    order.index_copy_(0, homes, torch.arange(len(homes), device=homes.device))
    return found.index_select(0, order[: tokens * heads]).view(like.shape)


def _add(out: Tensor, piece: Tensor, rows: Tensor, count: int) -> None:
    """Add `piece` to out [N, H, D] fp32."""
    width = out.shape[2]
    out.view(-1, width).index_add_(0, _places(rows, count, out.shape[1]), piece.view(-1, width).to(out.dtype))


def _probabilities(q: Tensor, k: Tensor, block: Block) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2)).float()
    kv_heads = q.shape[0] // block.count
    scores.view(block.count, kv_heads, -1, block.queries, block.keys).add_(block.bias[:, None, None])
    return torch.softmax(scores, -1).to(q.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Softmax(q k^T + mask) v for every block; softmax in fp32."""
    kv_heads, pieces = k.shape[1], []
    for b in blocks:
        p = _probabilities(_heads(q, b.query_rows, b.count, kv_heads), _heads(k, b.key_rows, b.count, kv_heads), b)
        pieces.append(torch.bmm(p, _heads(v, b.key_rows, b.count, kv_heads)))
    return _back_home(pieces, blocks, q)


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq in q's dtype; dk, dv in fp32); probabilities are computed again, never kept."""
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    kv_heads, pieces = k.shape[1], []
    for b in blocks:
        q_b, do_b = (_heads(x, b.query_rows, b.count, kv_heads) for x in (q, do))
        k_b, v_b = (_heads(x, b.key_rows, b.count, kv_heads) for x in (k, v))
        p = _probabilities(q_b, k_b, b)
        if b.padded is not None:  # they repeat real ones: with no weight they add nothing to dk and dv
            p.view(b.count, -1, b.queries, b.keys).masked_fill_(b.padded, 0)
        dp = torch.bmm(do_b, v_b.transpose(1, 2)).float()
        dp.sub_(torch.mul(dp, p).sum(-1, keepdim=True)).mul_(p)
        ds = dp.to(q.dtype)
        pieces.append(torch.bmm(ds, k_b))
        _add(dk, torch.bmm(ds.transpose(1, 2), q_b), b.key_rows, b.count)
        _add(dv, torch.bmm(p.transpose(1, 2), do_b), b.key_rows, b.count)
    return _back_home(pieces, blocks, q), dk, dv
