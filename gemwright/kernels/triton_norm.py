"""Triton twins of `kernels.norm`: whole rows in registers, so that each input is read once."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 2048  # values a program at least, where rows are short


@cache
def row_launch(width: int) -> tuple[int, int, int]:
    """(rows a program, columns padded to a power of two, warps): 16 values a thread, at most 16 warps."""
    block = max(16, triton.next_power_of_2(width))
    return max(1, PIECE // block), block, min(16, max(4, block // 512))


@triton.jit
def _row_tile(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(row int64 [ROWS, 1], its mask, column [ROWS, BLOCK], mask of the tile).

    The column is as large as the tile, so that weights get the rows' layout; one row of them would force its own.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.broadcast_to(tl.arange(0, BLOCK)[None, :], (ROWS, BLOCK))
    return row, row < rows, col, (row < rows) & (col < width)


@triton.jit
def _rstd(value, width, eps):
    return tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / width + eps)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x, weight, residual, y, rstd, rows, width, eps, x_pitch, residual_pitch, y_pitch,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, real, col, mask = _row_tile(rows, width, ROWS, BLOCK)
    value = tl.load(x + row * x_pitch + col, mask, other=0.0).to(tl.float32)
    w = tl.load(weight + col, col < width, other=0.0)
    r = _rstd(value, width, eps)
    value = value * r * w
    if residual is not None:
        value += tl.load(residual + row * residual_pitch + col, mask, other=0.0).to(tl.float32)
    tl.store(rstd + row, r, real)
    tl.store(y + row * y_pitch + col, value.to(y.dtype.element_ty), mask)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `norm.rms_norm`; rows of each tensor may have a pitch of their own."""
    rows, width = x.shape
    y = torch.empty_like(x) if out is None else out
    rstd = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    tile, block, warps = row_launch(width)
    residual_pitch = 0 if residual is None else residual.stride(0)
    _rms_norm_kernel[(-(-rows // tile),)](
        x, weight, residual, y, rstd, rows, width, eps, x.stride(0), residual_pitch, y.stride(0),
        ROWS=tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y, rstd


@triton.jit(do_not_specialize=["rows"])
def _norm_add_norm_kernel(
    a, x, post_weight, next_weight, middle, normed, rstd_a, rstd_middle, rows, width, eps,
    a_pitch, x_pitch, normed_pitch, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, real, col, mask = _row_tile(rows, width, ROWS, BLOCK)
    value = tl.load(a + row * a_pitch + col, mask, other=0.0).to(tl.float32)
    through = tl.load(x + row * x_pitch + col, mask, other=0.0).to(tl.float32)
    r = _rstd(value, width, eps)
    tl.store(rstd_a + row, r, real)
    rounded = (value * r * tl.load(post_weight + col, col < width, other=0.0) + through).to(middle.dtype.element_ty)
    tl.store(middle + row * width + col, rounded, mask)
    value = rounded.to(tl.float32)
    r = _rstd(value, width, eps)
    tl.store(rstd_middle + row, r, real)
    value = value * r * tl.load(next_weight + col, col < width, other=0.0)
    tl.store(normed + row * normed_pitch + col, value.to(normed.dtype.element_ty), mask)


def norm_add_norm(
    a: Tensor, x: Tensor, post_weight: Tensor, next_weight: Tensor, eps: float, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `norm.norm_add_norm`, in one pass over a and x."""
    rows, width = a.shape
    middle = torch.empty((rows, width), dtype=a.dtype, device=a.device)
    normed = torch.empty_like(middle) if out is None else out
    rstd_a = torch.empty((rows, 1), dtype=torch.float32, device=a.device)
    rstd_middle = torch.empty_like(rstd_a)
    tile, block, warps = row_launch(width)
    _norm_add_norm_kernel[(-(-rows // tile),)](
        a, x, post_weight, next_weight, middle, normed, rstd_a, rstd_middle, rows, width, eps,
        a.stride(0), x.stride(0), normed.stride(0), ROWS=tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return middle, rstd_a, normed, rstd_middle


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_backward_kernel(
    dy, x, rstd, weight, add, out, rows, width, dy_pitch, x_pitch, add_pitch, out_pitch,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, real, col, mask = _row_tile(rows, width, ROWS, BLOCK)
    value = tl.load(x + row * x_pitch + col, mask, other=0.0).to(tl.float32)
    g = tl.load(dy + row * dy_pitch + col, mask, other=0.0).to(tl.float32)
    g *= tl.load(weight + col, col < width, other=0.0)
    r = tl.load(rstd + row, real, other=0.0)
    # Read before the sum, behind whose barrier `out` is written: the two may be the same memory.
    if add is not None:
        more = tl.load(add + row * add_pitch + col, mask, other=0.0).to(tl.float32)
    inner = tl.sum(g * value, 1, keep_dims=True)
    dx = g * r - value * (r * r * r * inner / width)
    if add is not None:
        dx += more
    tl.store(out + row * out_pitch + col, dx.to(out.dtype.element_ty), mask)


def rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, *, add: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """As `norm.rms_norm_backward`; `out` may be `add` or `dy`."""
    rows, width = x.shape
    dx = torch.empty_like(x) if out is None else out
    tile, block, warps = row_launch(width)
    add_pitch = 0 if add is None else add.stride(0)
    _rms_norm_backward_kernel[(-(-rows // tile),)](
        dy, x, rstd, weight, add, dx, rows, width, dy.stride(0), x.stride(0), add_pitch, dx.stride(0),
        ROWS=tile, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return dx
