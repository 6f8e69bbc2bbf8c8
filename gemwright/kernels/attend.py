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
from gemwright.layout import LONG

Kept = tuple[Tensor, ...]


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

    Its backward adds in an order that varies, unless `torch.use_deterministic_algorithms` is on.
    Source: Dao 2023 (arXiv 2307.08691). The operators take the window that the public function does not.
    """

    def __init__(self, lengths: Sequence[int], window: int | None, device: torch.device) -> None:
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        self._bounds, self._longest = bounds.to(device, non_blocking=True), max(lengths)
        narrow = window is not None and window < self._longest
        self._window = {"window_size_left": window - 1, "window_size_right": 0} if window and narrow else {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        """See `Attention.forward`; keeps the log-sum-exp [H, N] fp32 and two empty random states."""
        bounds, longest = self._bounds, self._longest
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=1.0, **self._window
        )
        return out, (lse, state, unused)

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attention.backward`; a long row goes one kv head at a time, with a share of the temporaries."""
        if len(q) <= LONG:
            return self._backward(do, q, k, v, out, kept)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
        lse, *states = kept
        shared = q.shape[1] // k.shape[1]
        for head in range(k.shape[1]):
            own, one = slice(head * shared, (head + 1) * shared), slice(head, head + 1)
            some = (do[:, own], q[:, own], k[:, one], v[:, one], out[:, own], (lse[own], *states))
            dq[:, own], dk[:, one], dv[:, one] = self._backward(*some)
        return dq, dk, dv

    def _backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        bounds, longest, (lse, state, unused) = self._bounds, self._longest, kept
        return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
            do, q, k, v, out, lse, bounds, bounds, longest, longest, 0.0, True, state, unused, scale=1.0, **self._window
        )


def plan(lengths: Sequence[int], window: int | None, device: torch.device, dtype: torch.dtype) -> Attention:
    """The fastest attention for documents of `lengths` there: flash in bf16 from compute capability 8.0 on."""
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0):
        return Flash(lengths, window, device)
    return Blocked(plan_blocks(lengths, window, device))
