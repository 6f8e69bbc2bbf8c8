"""Triton twins of `kernels.geglu`: a program computes one piece of one row.

gelu(x) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3) is the tanh form without its cancellation at negative x.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor


@cache
def piece_launch(width: int) -> tuple[int, int]:
    """(columns a program, warps): 8 values a thread, one 16-byte access of each tensor."""
    block = min(1024, max(32, triton.next_power_of_2(width)))
    return block, max(1, block // 256)


@triton.jit
def _gelu_parts(x):
    """(sigmoid(2u), d(2u)/dx); x^2 is bounded where the sigmoid is 0 or 1 anyway, so that nothing overflows."""
    square = tl.minimum(x * x, 1e4)
    twice_u = 1.5957691216057308 * x * (1.0 + 0.044715 * square)
    return 1.0 / (1.0 + tl.exp(-twice_u)), 1.5957691216057308 * (1.0 + 0.134145 * square)


@triton.jit
def _piece(width, BLOCK: tl.constexpr):
    """(row int64, columns [BLOCK]) of this program; one grid axis, since rows exceed what a second one may count."""
    pieces = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // pieces
    return row.to(tl.int64), (tl.program_id(0) - row * pieces) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _geglu_kernel(gate_up, out, width, gate_pitch, out_pitch, BLOCK: tl.constexpr):
    row, col = _piece(width, BLOCK)
    gate = tl.load(gate_up + row * gate_pitch + col, col < width, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_pitch + width + col, col < width, other=0.0).to(tl.float32)
    weight, _ = _gelu_parts(gate)
    tl.store(out + row * out_pitch + col, (gate * weight * up).to(out.dtype.element_ty), col < width)


def geglu(gate_up: Tensor, out: Tensor) -> Tensor | None:
    """As `geglu.geglu`; nothing is kept for the backward."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    block, warps = piece_launch(width)
    _geglu_kernel[(rows * -(-width // block),)](
        gate_up, out, width, gate_up.stride(0), out.stride(0), BLOCK=block, num_warps=warps
    )
    return None


@triton.jit
def _geglu_backward_kernel(
    dwide, gate_up, out, wide, width, dwide_pitch, gate_pitch, out_pitch, wide_pitch, BLOCK: tl.constexpr
):
    row, col = _piece(width, BLOCK)
    mask = col < width
    d = tl.load(dwide + row * dwide_pitch + col, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * gate_pitch + col, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_pitch + width + col, mask, other=0.0).to(tl.float32)
    weight, slope = _gelu_parts(gate)
    activated = gate * weight
    dgate = d * up * (weight + activated * (1.0 - weight) * slope)
    tl.store(out + row * out_pitch + col, dgate.to(out.dtype.element_ty), mask)
    tl.store(out + row * out_pitch + width + col, (d * activated).to(out.dtype.element_ty), mask)
    if wide is not None:
        tl.store(wide + row * wide_pitch + col, (activated * up).to(wide.dtype.element_ty), mask)


def geglu_backward(
    dwide: Tensor, gate_up: Tensor, kept: Tensor | None, out: Tensor, wide: Tensor | None = None
) -> None:
    """As `geglu.geglu_backward`; `kept` is not looked at, since computing it again costs no time beside the reads."""
    rows, width = dwide.shape
    block, warps = piece_launch(width)
    wide_pitch = 0 if wide is None else wide.stride(0)
    _geglu_backward_kernel[(rows * -(-width // block),)](
        dwide, gate_up, out, wide, width, dwide.stride(0), gate_up.stride(0), out.stride(0), wide_pitch,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
