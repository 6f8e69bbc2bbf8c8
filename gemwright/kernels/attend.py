"""Attention over packed documents with one interface: dense blocks in plain PyTorch, or flash attention on a GPU.

Shapes: q [N, H, E] already scaled, k and v [N, K, E], output [N, H, E]; documents lie one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from gemwright.kernels.attention import Block, attention, attention_backward, plan_blocks
from gemwright.layout import DOCUMENT_ROWS, LONG, document_room

Kept = tuple[Tensor, ...]
# Documents of a uniform row, at least.
FEWEST = 16


class Attention(Protocol):
    """Which token sees which, and how that is computed."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        """(output, what the backward wants besides it)."""

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv)."""


class Blocked:
    """Dense blocks of documents of like length; see `kernels.attention`. Runs anywhere, keeps nothing."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        """See `Attention.forward`."""
        return attention(q, k, v, self._blocks), ()

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attention.backward`."""
        return attention_backward(do, q, k, v, self._blocks)


class Flash:
    """FlashAttention-2 as PyTorch carries it, with document bounds and a window of `window` tokens (itself counted).

    Its backward adds in an order that varies, unless `torch.use_deterministic_algorithms` is on. `uniform` makes rows
    of as many tokens alike: empty documents fill up their number, and any may be as long as the row.
    Source: Dao 2023 (arXiv 2307.08691). The operators take the window that the public function does not.
    """

    def __init__(
        self, lengths: Sequence[int], window: int | None, device: torch.device, *, uniform: bool = False
    ) -> None:
        tokens = sum(lengths)
        empty = max(FEWEST, 1 << (len(lengths) - 1).bit_length()) - len(lengths) if uniform else 0
        lengths = [*lengths, *[0] * empty]
        self._longest = tokens if uniform else max(lengths)
        self._lengths = lengths
        self._spans = spans(lengths, tokens + document_room(tokens))
        self.bounds = _bounds(lengths, device)
        self._own = [self.bounds]
        if len(self._spans) > 1:
            self._own = [_bounds(lengths[part], device) for part in self._spans]
        narrow = window is not None and window < self._longest
        self._window = {"window_size_left": window - 1, "window_size_right": 0} if window and narrow else {}

    @property
    def kind(self) -> tuple[object, ...]:
        """Where two are of one kind, the kernels of one do the other's work once its `bounds` hold the other's."""
        return (
            len(self.bounds),
            self._longest,
            self._window.get("window_size_left"),
            id(self) if len(self._own) > 1 else 0,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        """See `Attention.forward`; keeps the log-sum-exp [H, N] fp32 and two empty random states."""
        bounds, longest = self.bounds, self._longest
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=1.0, **self._window
        )
        return out, (lse, state, unused)

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attention.backward`; many documents go some at a time, a long row one kv head at a time: less memory."""
        lse, *states = kept
        apart = k.shape[1] if len(q) > LONG else 1
        if apart == 1 and len(self._own) == 1:
            return self._backward(do, q, k, v, out, lse, states, self.bounds)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
        heads, kv_heads, start = q.shape[1] // apart, k.shape[1] // apart, 0
        for part, bounds in zip(self._spans, self._own, strict=True):
            at = slice(start, start + sum(self._lengths[part]))
            start = at.stop
            for group in range(apart):
                own, one = slice(group * heads, (group + 1) * heads), slice(group * kv_heads, (group + 1) * kv_heads)
                some = (do[at, own], q[at, own], k[at, one], v[at, one], out[at, own], lse[own, at].contiguous())
                dq[at, own], dk[at, one], dv[at, one] = self._backward(*some, states, bounds)
        return dq, dk, dv

    def _backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        states: Sequence[Tensor],
        bounds: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        longest = self._longest
        return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
            do, q, k, v, out, lse, bounds, bounds, longest, longest, 0.0, True, *states, scale=1.0, **self._window
        )


class WithImages:
    """A `Flash` for rows in which the tokens of an image (first and last row, exclusive) see each other both ways.

    What comes later in its image a query sees by a second pass, over the images alone and from their ends, where the
    next token's key takes the place of its own; both passes are joined by their log-sum-exp.
    Source: Dao 2023 (arXiv 2307.08691), section 3.1, for the joining of parts.
    """

    def __init__(self, flash: Flash, images: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._flash, self._later = flash, Flash([end - begin - 1 for begin, end in images], None, device)
        queries = [row for begin, end in images for row in range(end - 2, begin - 1, -1)]
        self._queries = torch.tensor(queries).to(device, non_blocking=True)
        self._keys = self._queries + 1

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        """See `Attention.forward`."""
        out, (lse, *states) = self._flash.forward(q, k, v)
        later, (later_lse, *_) = self._later.forward(q[self._queries], k[self._keys], v[self._keys])
        own_lse = lse[:, self._queries]
        joined = torch.logaddexp(own_lse, later_lse)
        own, more = ((part - joined).exp_().t()[:, :, None] for part in (own_lse, later_lse))
        out[self._queries] = (out[self._queries] * own + later * more).to(out.dtype)
        lse[:, self._queries] = joined
        return out, (lse, *states)

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attention.backward`."""
        dq, dk, dv = self._flash.backward(do, q, k, v, out, kept)
        lse, *states = kept
        at, keys = self._queries, self._keys
        kept = (lse[:, at].contiguous(), *states)
        own_dq, own_dk, own_dv = self._later.backward(do[at], q[at], k[keys], v[keys], out[at], kept)
        dq[at] += own_dq  # no row is named twice
        dk[keys] += own_dk
        dv[keys] += own_dv
        return dq, dk, dv


def spans(lengths: Sequence[int], most: int) -> list[slice]:
    """Neighbouring documents whose tokens and `DOCUMENT_ROWS` each come to `most` at most, or single ones."""
    found, start, taken = [], 0, 0
    for index, length in enumerate(lengths):
        cost = length + DOCUMENT_ROWS
        if index > start and taken + cost > most:
            found.append(slice(start, index))
            start, taken = index, 0
        taken += cost
    return [*found, slice(start, len(lengths))]


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def plan(
    lengths: Sequence[int],
    window: int | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    uniform: bool = False,
    images: Sequence[tuple[int, int]] = (),
    pasts: Sequence[Sequence[int]] = (),
) -> Attention:
    """The fastest attention for documents of `lengths` there: flash in bf16 from compute capability 8.0 on.

    `images` are the first and last (exclusive) rows of each; their tokens see each other both ways. `pasts`, which
    flash attention does not know, are the rows that documents share with earlier ones (see `plan_blocks`).
    """
    images = [(begin, end) for begin, end in images if end - begin > 1]
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0):
        if any(pasts):
            raise ValueError("flash attention knows nothing that documents share")
        flash = Flash(lengths, window, device, uniform=uniform)
        return WithImages(flash, images, device) if images else flash
    return Blocked(plan_blocks(lengths, window, device, images, pasts))
