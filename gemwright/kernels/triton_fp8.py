"""Triton twins of `kernels.fp8`, for devices that have fp8 (compute capability 8.9 and later)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemwright.kernels.fp8 import AIM, MOST, TINY, TOP

# A row is passed twice, a piece at a time: the wider it is, the more threads it has, so that the rows under way at once
# (20 to 35 MB on an H100) still lie in the cache the second time.
PIECES, WIDEST = 3, 8192
TAIL_ROWS = 64
SIDE = 128


@triton.jit
def _rounded(value):
    """The nearest e4m3 of `value` (below 480), in fp32: the compiler's way back from fp8 mixes up bytes (3.6)."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < 0.015625, (value + 24576.0) - 24576.0, normal)


@triton.jit
def _write_parts(at, value, mask, column, SECOND_LOW: tl.constexpr, T: tl.constexpr):
    """hi, then lo and hi (or hi and lo) of `value` at columns 0, T and 2 T."""
    rounded = _rounded(value)
    high, low = rounded.to(at.dtype.element_ty), (value - rounded).to(at.dtype.element_ty)
    tl.store(at + column, high, mask)
    tl.store(at + T + column, low if SECOND_LOW else high, mask)
    tl.store(at + 2 * T + column, high if SECOND_LOW else low, mask)


@triton.jit
def _quantise_kernel(
    x, factor, tail, gain, floor, out, scale, width, x_pitch, tail_pitch, out_pitch,
    TOP: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, T: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_pitch
    out += row * out_pitch
    col = tl.arange(0, BLOCK)
    peak = tl.zeros([BLOCK], tl.float32)
    for piece in range(PIECES):
        at = piece * BLOCK + col
        value = tl.load(x + at, at < width, other=0.0).to(tl.float32)
        if factor is not None:
            value *= tl.load(factor + at, at < width, other=0.0)
        peak = tl.maximum(peak, tl.abs(value))
    top = tl.max(peak, 0)
    if tail is not None:
        c = tl.arange(0, TILE)
        t = tl.load(tail + row * tail_pitch + c, c < T, other=0.0).to(tl.float32) / tl.load(gain)
        top = tl.maximum(top, tl.max(tl.abs(t), 0))
    if floor is not None:
        top = tl.maximum(top, tl.load(floor) * TOP)
    top = tl.maximum(top, TINY)
    tl.store(scale + row, top / TOP)
    inverse = TOP / top
    for piece in range(PIECES):
        at = piece * BLOCK + col
        value = tl.load(x + at, at < width, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if factor is not None:
            value *= tl.load(factor + at, at < width, other=0.0)
        tl.store(out + at, (value * inverse).to(out.dtype.element_ty), at < width)
    if COLUMNS > 0:
        out += width
        filled: tl.constexpr = 0 if tail is None else 3 * T
        if tail is not None:
            _write_parts(out, t * inverse, c < T, c, False, T)
        if filled < COLUMNS:
            end = tl.arange(0, END)
            tl.store(out + end, tl.zeros([END], out.dtype.element_ty), (end >= filled) & (end < COLUMNS))


def quantise_rows(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    factor: Tensor | None = None,
    tail: Tensor | None = None,
    gain: Tensor | None = None,
    floor: Tensor | None = None,
) -> None:
    """As `fp8.quantise_rows`; a program a row, read once from memory."""
    (rows, width), columns = x.shape, out.shape[1] - x.shape[1]
    t = 0 if tail is None else tail.shape[1]
    block = min(WIDEST, max(256, triton.next_power_of_2(-(-width // PIECES))))
    _quantise_kernel[(rows,)](
        x, factor, tail, gain, floor, out, scale, width,
        x.stride(0), 0 if tail is None else tail.stride(0), out.stride(0),
        TOP=TOP, TINY=TINY, BLOCK=block, PIECES=-(-width // block), T=t, TILE=triton.next_power_of_2(max(t, 1)),
        COLUMNS=columns, END=triton.next_power_of_2(max(columns, 1)), num_warps=max(1, block // 512),
    )  # fmt: skip


@triton.jit
def _tail(b, scale, rows, row_step, column_step, T: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, TILE)[None, :]
    mask = (row < rows) & (c < T)
    value = tl.load(b + row.to(tl.int64) * row_step + c * column_step, mask, other=0.0).to(tl.float32)
    if scale is not None:
        value /= tl.load(scale + row, row < rows, other=1.0)
    return value, row, c, mask


@triton.jit
def _peak_kernel(b, scale, peaks, rows, row_step, column_step, T: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    value, _, _, _ = _tail(b, scale, rows, row_step, column_step, T, ROWS, TILE)
    tl.store(peaks + tl.program_id(0), tl.max(tl.max(tl.abs(value), 1), 0))


@triton.jit
def _join_kernel(
    b, scale, peaks, gain, out, rows, row_step, column_step, out_pitch, programs,
    AIM: tl.constexpr, MOST: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    value, row, c, mask = _tail(b, scale, rows, row_step, column_step, T, ROWS, TILE)
    each = tl.arange(0, PROGRAMS)
    peak = tl.max(tl.load(peaks + each, each < programs, other=0.0), 0)
    factor = AIM / tl.maximum(peak, AIM / MOST)
    if tl.program_id(0) == 0:
        tl.store(gain, factor)
    at = out + row.to(tl.int64) * out_pitch
    _write_parts(at, value * factor, mask, c, True, T)
    if COLUMNS > 3 * T:
        end = tl.arange(0, END)[None, :]
        zero = tl.zeros([ROWS, END], out.dtype.element_ty)
        tl.store(at + end, zero, (row < rows) & (end >= 3 * T) & (end < COLUMNS))


def join_tail(b: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """As `fp8.join_tail`; each program of the second launch finds the gain from the peaks that the first one left."""
    (rows, t), columns = b.shape, out.shape[1]
    programs = -(-rows // TAIL_ROWS)
    both = torch.empty(programs + 1, dtype=torch.float32, device=b.device)
    peaks, gain = both[1:], both[:1]
    tile = triton.next_power_of_2(t)
    _peak_kernel[(programs,)](b, scale, peaks, rows, *b.stride(), T=t, ROWS=TAIL_ROWS, TILE=tile, num_warps=4)
    _join_kernel[(programs,)](
        b, scale, peaks, gain, out, rows, *b.stride(), out.stride(0), programs, AIM=AIM, MOST=MOST, T=t,
        ROWS=TAIL_ROWS, TILE=tile, PROGRAMS=triton.next_power_of_2(programs), COLUMNS=columns,
        END=triton.next_power_of_2(columns), num_warps=4,
    )  # fmt: skip
    return gain


@triton.jit
def _turn_kernel(source, out, rows, columns, pitch, out_pitch, SIDE: tl.constexpr):
    """All in words of 4 bytes: `rows` counts fours of rows, `columns` fours of columns, and a tile is 4 SIDE square.

    Threads exchange whole words, in each of which the bytes of four rows are already beside each other.
    """
    across = tl.cdiv(columns, SIDE)
    down = tl.program_id(0) // across
    row = down * SIDE + tl.arange(0, SIDE)
    col = (tl.program_id(0) - down * across) * SIDE + tl.arange(0, SIDE)
    at, mask = source + row.to(tl.int64)[:, None] * (4 * pitch) + col[None, :], (row < rows)[:, None] & (col < columns)
    first, second = tl.load(at, mask, other=0), tl.load(at + pitch, mask, other=0)
    third, fourth = tl.load(at + 2 * pitch, mask, other=0), tl.load(at + 3 * pitch, mask, other=0)
    to = out + col.to(tl.int64)[:, None] * (4 * out_pitch) + row[None, :]
    mask = (col < columns)[:, None] & (row < rows)[None, :]
    for byte in tl.static_range(4):
        word = ((first >> (8 * byte)) & 255) | (((second >> (8 * byte)) & 255) << 8)
        word |= (((third >> (8 * byte)) & 255) << 16) | ((fourth >> (8 * byte)) << 24)
        tl.store(to + byte * out_pitch, tl.trans(word), mask)


def turn(rows: Tensor, out: Tensor) -> None:
    """As `fp8.turn`, for multiples of 16 rows and columns."""
    words_in, words_out = (each.view(torch.uint8).view(torch.int32) for each in (rows, out))
    (count, columns), side = words_in.shape, SIDE // 4
    _turn_kernel[(-(-count // SIDE) * -(-columns // side),)](
        words_in, words_out, count // 4, columns, words_in.stride(0), words_out.stride(0), SIDE=side, num_warps=8
    )
