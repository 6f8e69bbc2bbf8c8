"""Triton twin of `kernels.cross_entropy.softmax_chunk`: a program turns one row of logits into weights, in one read."""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from gemwright.kernels.cross_entropy import Running


@cache
def chunk_launch(width: int) -> tuple[int, int]:
    """(columns padded to a power of two, warps): 16 values a thread, at most 16 warps."""
    block = max(64, triton.next_power_of_2(width))
    return block, min(16, max(2, block // 512))


# The four running tensors are views at any offset: their alignment must not make new variants.
@triton.jit(do_not_specialize=["start", "top", "total", "right", "shrink"])
def _softmax_chunk_kernel(logits, target, start, top, total, right, shrink, width, pitch, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    value = tl.load(logits + row * pitch + col, col < width, other=float("-inf")).to(tl.float32)
    before = tl.load(top + row)
    highest = tl.maximum(before, tl.max(value, 0))
    local = tl.load(target + row) - start
    # From registers: another warp may have written its weights over the target's logit by now.
    picked = tl.sum(tl.where(col == local, value, 0.0), 0)
    weight = tl.exp2((value - highest) * 1.4426950408889634)
    ratio = tl.exp2((before - highest) * 1.4426950408889634)
    tl.store(total + row, tl.load(total + row) * ratio + tl.sum(weight, 0))
    tl.store(top + row, highest)
    tl.store(shrink + row, ratio)
    tl.store(right + row, picked, (local >= 0) & (local < width))
    tl.store(logits + row * pitch + col, weight.to(logits.dtype.element_ty), col < width)


def softmax_chunk(logits: Tensor, target: Tensor, start: int, running: Running) -> None:
    """As `cross_entropy.softmax_chunk`."""
    rows, width = logits.shape
    block, warps = chunk_launch(width)
    _softmax_chunk_kernel[(rows,)](
        logits, target, start, running.top, running.total, running.right, running.shrink, width, logits.stride(0),
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
