"""Unpacks GGUF's packed blocks on a GPU, bit for bit as `weights.quants.unpack`, one launch a matrix.

Block layouts: ggml-quants.c of llama.cpp. A tile [T, C] has one row for each piece of a block and one column for each
byte of it: the 8 columns of a thread are loaded as widely as the block's alignment (2 bytes or more) allows, and stored
as 16 bytes of bf16 without any exchange between threads. All products are exact in fp32 up to the one rounding that
`weights.quants` has too, so a fused multiply-add changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

VALUES = 2048  # a program: more would make threads share what they load, through shared memory


@dataclass(frozen=True)
class Format:
    """A block of `values` in `size` bytes, computed as `pieces` rows of a tile; a thread has 8 columns of one row."""

    values: int
    size: int
    pieces: int
    warps: int


FORMATS = {
    "Q4_0": Format(32, 18, 1, 4),
    "Q4_1": Format(32, 20, 1, 4),
    "Q5_0": Format(32, 22, 1, 4),
    "Q5_1": Format(32, 24, 1, 4),
    "Q8_0": Format(32, 34, 1, 8),
    "Q4_K": Format(256, 144, 4, 4),
    "Q5_K": Format(256, 176, 4, 4),
    "Q6_K": Format(256, 210, 4, 2),
}


@triton.jit
def _half(at, mask):
    return tl.load(at.to(tl.pointer_type(tl.float16)), mask, other=0.0).to(tl.float32)


@triton.jit
def _word(at, mask):
    return tl.load(at.to(tl.pointer_type(tl.uint16)), mask, other=0).to(tl.int32)


@triton.jit
def _byte(at, mask):
    return tl.load(at, mask, other=0).to(tl.int32)


@triton.jit
def _put(at, value, inverse, mask):
    if inverse is not None:
        value *= inverse
    tl.store(at, value.to(at.dtype.scalar.element_ty), mask)


@triton.jit
def _legacy(src, dst, inverse, mask, QTYPE: tl.constexpr):
    """Blocks of 32: byte c holds value c in its low nibble, value 16 + c in its high one; bit e of a word is fifth."""
    c = tl.arange(0, 16)[None, :]
    has_min: tl.constexpr = QTYPE == "Q4_1" or QTYPE == "Q5_1"
    has_fifth: tl.constexpr = QTYPE == "Q5_0" or QTYPE == "Q5_1"
    fifth: tl.constexpr = 4 if has_min else 2
    packed = _byte(src + (fifth + 4 if has_fifth else fifth) + c, mask)
    low, high = packed & 15, packed >> 4
    if has_fifth:
        low |= ((_word(src + fifth, mask) >> c) & 1) << 4
        high |= ((_word(src + fifth + 2, mask) >> c) & 1) << 4
    if not has_min:
        low -= 16 if has_fifth else 8
        high -= 16 if has_fifth else 8
    d = _half(src, mask)
    low, high = low.to(tl.float32) * d, high.to(tl.float32) * d
    if has_min:
        m = _half(src + 2, mask)
        low, high = low + m, high + m
    _put(dst + c, low, inverse, mask)
    _put(dst + 16 + c, high, inverse, mask)


@triton.jit
def _q8_0(src, dst, inverse, mask):
    c = tl.arange(0, 32)[None, :]
    q = tl.load((src + 2 + c).to(tl.pointer_type(tl.int8)), mask, other=0).to(tl.float32)
    _put(dst + c, q * _half(src, mask), inverse, mask)


@triton.jit
def _scale_and_min(src, d, dmin, sub, mask):
    """d * scale and dmin * min of sub-block `sub` (0 to 7): 6 bits each, spread over 12 bytes."""
    at = src + 4 + (sub & 3)
    low, middle, high = _byte(at, mask), _byte(at + 4, mask), _byte(at + 8, mask)
    scale = tl.where(sub < 4, low & 63, (high & 15) | ((low >> 2) & 48))
    least = tl.where(sub < 4, middle & 63, (high >> 4) | ((middle >> 2) & 48))
    return d * scale.to(tl.float32), dmin * least.to(tl.float32)


@triton.jit
def _affine(src, dst, piece, inverse, mask, FIFTH: tl.constexpr):
    """Q4_K, and Q5_K with FIFTH: piece g holds sub-blocks 2g (low nibbles) and 2g + 1 (high) of 32 values each."""
    c = tl.arange(0, 32)[None, :]
    packed = _byte(src + (48 if FIFTH else 16) + piece * 32 + c, mask)
    low, high = packed & 15, packed >> 4
    if FIFTH:
        bits = _byte(src + 16 + c, mask) >> (2 * piece)
        low |= (bits & 1) << 4
        high |= (bits & 2) << 3
    d, dmin = _half(src, mask), _half(src + 2, mask)
    scale, least = _scale_and_min(src, d, dmin, 2 * piece, mask)
    _put(dst + piece * 64 + c, low.to(tl.float32) * scale - least, inverse, mask)
    scale, least = _scale_and_min(src, d, dmin, 2 * piece + 1, mask)
    _put(dst + piece * 64 + 32 + c, high.to(tl.float32) * scale - least, inverse, mask)


@triton.jit
def _q6_k(src, dst, piece, inverse, mask):
    """Piece 2h + s: values s * 16 + c of the four quarters of half h; each 16 values have a scale of their own."""
    c = tl.arange(0, 16)[None, :]
    half, part = piece // 2, piece % 2
    first = _byte(src + half * 64 + part * 16 + c, mask)
    second = _byte(src + 32 + half * 64 + part * 16 + c, mask)
    upper = _byte(src + 128 + half * 32 + part * 16 + c, mask)
    d = _half(src + 208, mask)
    scales = (src + 192 + half * 8 + part).to(tl.pointer_type(tl.int8))
    dst += half * 128 + part * 16 + c
    for quarter in tl.static_range(4):
        q = (second if quarter % 2 else first) >> (4 * (quarter // 2))
        q = ((q & 15) | (((upper >> (2 * quarter)) & 3) << 4)) - 32
        scale = d * tl.load(scales + 2 * quarter, mask, other=0).to(tl.float32)
        _put(dst + 32 * quarter, q.to(tl.float32) * scale, inverse, mask)


@triton.jit(do_not_specialize=["blocks", "per_row"])
def _unpack_kernel(
    raw, out, scale, blocks, per_row, pitch,
    QTYPE: tl.constexpr, VALUES: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr, TILE: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, TILE)[:, None]
    first, local, piece = tl.program_id(0) * (TILE // PIECES), row // PIECES, row % PIECES
    block = first + local
    mask = block < blocks
    inverse = None
    if scale is not None:
        inverse = 1.0 / tl.load(scale + block // per_row, mask, other=1.0)
    src = raw + first.to(tl.int64) * SIZE + local * SIZE
    if FLAT:
        dst = out + first.to(tl.int64) * VALUES + local * VALUES
    else:
        line = block // per_row
        dst = out + line.to(tl.int64) * pitch + (block - line * per_row) * VALUES
    if QTYPE == "Q8_0":
        _q8_0(src, dst, inverse, mask)
    elif QTYPE == "Q6_K":
        _q6_k(src, dst, piece, inverse, mask)
    elif PIECES == 4:
        _affine(src, dst, piece, inverse, mask, QTYPE == "Q5_K")
    else:
        _legacy(src, dst, inverse, mask, QTYPE)


def unpack(raw: Tensor, qtype: str, out: Tensor, scale: Tensor | None = None) -> Tensor:
    """Write the values of `raw` (uint8, contiguous, whole rows) into `out` [rows, cols] (bf16 or fp32) and return it.

    Rows of `out` may have a pitch above cols. Slices of whole rows of both unpack a part. ValueError for other types.
    With `scale` (fp32 [rows]) each row is divided by its own, for an `out` of fp8.
    """
    if qtype not in FORMATS:
        raise ValueError(f"cannot unpack {qtype} on a GPU; possible: {', '.join(FORMATS)}")
    form, (rows, cols), pitch = FORMATS[qtype], out.shape, out.stride(0)
    per_row = cols // form.values
    if raw.numel() != rows * per_row * form.size or cols % form.values or not raw.is_contiguous() or out.stride(1) != 1:
        raise ValueError(f"{tuple(raw.shape)} bytes are not the {qtype} blocks of {tuple(out.shape)} values")
    step = VALUES // form.values
    _unpack_kernel[(-(-rows * per_row // step),)](
        raw, out, scale, rows * per_row, per_row, pitch, QTYPE=qtype, VALUES=form.values, SIZE=form.size,
        PIECES=form.pieces, TILE=step * form.pieces, FLAT=pitch == cols or rows == 1, num_warps=form.warps,
    )  # fmt: skip
    return out
