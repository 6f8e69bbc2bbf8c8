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
from typing import NamedTuple

import torch
from torch import Tensor

from gemwright.layout import rounded

QUERY_BLOCK = 256
# Pieces are rounded up to few shapes: the CPU library compiles each new shape of a product, for milliseconds.
LENGTH_STEP, COUNT_STEP = 16, 4
# What a further block costs, in tokens of filling: up to here shorter documents join the next longer ones.
JOIN_TOKENS = 32


class Piece(NamedTuple):
    """Rows of queries `first` to `last` (exclusive), those of the `keys` [n], and how many of these come before."""

    first: int
    last: int
    keys: Tensor
    before: int


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
    pasts: Sequence[Sequence[int]] = (),
) -> list[Block]:
    """Blocks for documents of `lengths` lying one after another; `window` counts the token itself (None: all).

    `images` are the first and last (exclusive) rows of each, none beyond its document. `pasts` are the rows, in their
    order, of what each document shares with earlier ones and so begins with, though its own rows begin after it.
    """
    pieces, short, start = list[list[Piece]](), list[Piece](), 0
    for past, length in zip(pasts or [()] * len(lengths), lengths, strict=True):
        rows = torch.cat([torch.tensor(past, dtype=torch.long), torch.arange(start, start + length)])
        for first in range(start, start + length, QUERY_BLOCK):
            last, before = min(first + QUERY_BLOCK, start + length), len(past) + first - start
            newest = max([last, *(end for begin, end in images if begin < last < end)])
            oldest = 0 if window is None else max(0, before - window + 1)
            piece = Piece(first, last, rows[oldest : len(past) + newest - start], before - oldest)
            if length <= QUERY_BLOCK:
                short.append(piece)
            else:
                pieces.append([piece])
        start += length
    short.sort(key=lambda piece: (len(piece.keys), piece.first))
    joined: list[list[Piece]] = []
    for keys, alike in groupby(short, lambda piece: rounded(len(piece.keys), LENGTH_STEP)):
        group = list(alike)
        filling = sum(keys - rounded(len(piece.keys), LENGTH_STEP) for piece in joined[-1]) if joined else 0
        joined[-1:] = [joined[-1] + group] if joined and filling <= JOIN_TOKENS else [*joined[-1:], group]
    return [_block(group, window, start, images, device) for group in [*joined, *pieces]]


def _block(
    pieces: list[Piece],
    window: int | None,
    tokens: int,
    images: Sequence[tuple[int, int]],
    device: torch.device | None,
) -> Block:
    queries = rounded(max(piece.last - piece.first for piece in pieces), LENGTH_STEP)
    keys = rounded(max(len(piece.keys) for piece in pieces), LENGTH_STEP)
    count = len(pieces) if len(pieces) == 1 else rounded(len(pieces), COUNT_STEP)
    filled = [(0, 0, 0, 0)] * (count - len(pieces))
    at = torch.tensor([(p.first, p.last, len(p.keys), p.before) for p in pieces] + filled)
    first, last, key_count, before = at[:, :, None].unbind(1)
    q, k = first + torch.arange(queries), torch.zeros(count, keys, dtype=torch.long)
    for row, piece in zip(k, pieces, strict=False):
        row[: len(piece.keys)] = piece.keys
        row[len(piece.keys) :] = piece.keys[-1]
    real_q, real_k = q < last, torch.arange(keys) < key_count
    homes = q.masked_fill(~real_q, tokens)
    q = torch.minimum(q, last - 1).clamp_(min=0)
    q_at, k_at = before[:, :, None] + torch.arange(queries)[:, None], torch.arange(keys)
    seen = k_at <= q_at
    for begin, end in images:
        of_q, of_k = ((begin <= rows) & (rows < end) for rows in (q, k))
        seen |= of_q[:, :, None] & of_k[:, None, :]
    seen &= real_k[:, None, :]
    if window is not None:
        seen &= q_at - k_at < window
    seen |= ~real_q[:, :, None]  # a padded query attends anywhere, so that its softmax stays finite; it is dropped
    bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
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
