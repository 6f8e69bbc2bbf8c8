"""Packs and unpacks GGUF's number formats in PyTorch, bit for bit as `gguf.quants` does.

Block layouts: ggml-quants.c of llama.cpp. Shape letters: n blocks, each of `bytes` bytes holding `cols` values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Values unpacked at once: temporaries stay in the CPU's second-level cache; a GPU wants few, large launches.
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 24
_LOW4 = 0x0F0F0F0F0F0F0F0F
_LOW1 = 0x0101010101010101


def block_size(qtype: str) -> tuple[int, int]:
    """(values, bytes) of one block of `qtype`."""
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[qtype]]
    return int(values), int(size)


def row_bytes(cols: int, qtype: str) -> int:
    """Bytes of a row of `cols` values; ValueError where they do not fill whole blocks."""
    values, size = block_size(qtype)
    if cols % values:
        raise ValueError(f"{cols} columns do not fill whole {qtype} blocks of {values}")
    return cols // values * size


def unpack(raw: Tensor, qtype: str, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The values of `raw` (uint8 [..., bytes_per_row]) as [..., cols]; exact in fp32, then rounded to `dtype`.

    `out` (contiguous, any float dtype) receives them when given, with cache-sized temporaries only.
    """
    values, size = block_size(qtype)
    shape = (*raw.shape[:-1], raw.shape[-1] // size * values)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=raw.device)
    elif out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous of shape {shape}, not {tuple(out.shape)}")
    raw = raw.contiguous()
    if raw.data_ptr() % 4:
        raw = raw.clone()
    if qtype in PLAIN:
        return out.copy_(raw.view(PLAIN[qtype]))
    kernel, blocks, target = _KERNELS[qtype], raw.view(-1, size), out.view(-1, values)
    step = (_CPU_CHUNK if raw.device.type == "cpu" else _GPU_CHUNK) // values
    for start in range(0, blocks.shape[0], step):
        kernel(blocks[start : start + step], target[start : start + step])
    return out


def pack(values: Tensor, qtype: str) -> Tensor:
    """`values` (fp32 [..., cols]) packed as uint8 [..., bytes_per_row]; byte-equal to `gguf.quants.quantize`.

    Raises ValueError for a type that cannot be packed or columns that do not fill whole blocks.
    """
    if qtype in PLAIN:
        return values.to(PLAIN[qtype]).contiguous().view(torch.uint8)
    if qtype not in _PACKERS:
        raise ValueError(f"cannot pack {qtype}; possible: {', '.join(PACKABLE)}")
    width, size = block_size(qtype)
    out = torch.empty((*values.shape[:-1], row_bytes(values.shape[-1], qtype)), dtype=torch.uint8, device=values.device)
    blocks, target, step = values.reshape(-1, width), out.view(-1, size), _CPU_CHUNK // width
    for start in range(0, blocks.shape[0], step):
        target[start : start + step] = _PACKERS[qtype](blocks[start : start + step].float())
    return out


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 at byte `at` of each block, as fp32 [n, 1]."""
    return blocks.view(torch.float16)[:, at // 2 : at // 2 + 1].float()


def _compact(part: Tensor) -> Tensor:
    """A copy without gaps; `contiguous()` leaves one block's slice as it is, whose stride no wider type can view."""
    return part.clone(memory_format=torch.contiguous_format)


def _nibbles(packed: Tensor, group: int) -> Tensor:
    """uint8 [n, k] -> int64 words [n, k / group, 2, group / 8]: low nibbles of each group of bytes, then the high."""
    words = _compact(packed).view(torch.int64).view(packed.shape[0], -1, group // 8)
    out = torch.empty((*words.shape[:2], 2, words.shape[2]), dtype=torch.int64, device=packed.device)
    torch.bitwise_and(words, _LOW4, out=out[:, :, 0])
    torch.bitwise_and(words >> 4, _LOW4, out=out[:, :, 1])
    return out


@cache
def _bit_table(when_set: int, when_clear: int, device: torch.device) -> Tensor:
    """int64 [256]: the eight bytes that the bits of each byte stand for, lowest bit first."""
    bits = (torch.arange(256).view(-1, 1) >> torch.arange(8)) & 1
    table = torch.where(bits.bool(), when_set, when_clear).to(torch.uint8)
    return table.view(torch.int64).view(-1).to(device)


def _spread(bits: Tensor, when_set: int, when_clear: int) -> Tensor:
    """uint8 [n, 4] -> int64 words [n, 4]: each bit becomes one byte."""
    table = _bit_table(when_set, when_clear, bits.device)
    return torch.index_select(table, 0, bits.reshape(-1).int()).view(bits.shape)


def _bytes(words: Tensor, n: int) -> Tensor:
    return words.view(n, -1).view(torch.int8)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    q = _bytes(_nibbles(blocks[:, 2:], 16), len(blocks)).sub_(8)
    out.copy_(q.float().mul_(_half(blocks, 0)))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    q = _bytes(_nibbles(blocks[:, 4:], 16), len(blocks))
    out.copy_(q.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2)))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    # A clear high bit means minus 16: as a signed byte, setting the upper nibble does just that.
    q = _nibbles(blocks[:, 6:], 16).view(-1, 4).bitwise_or_(_spread(blocks[:, 2:6], 0, 0xF0))
    out.copy_(_bytes(q, len(blocks)).float().mul_(_half(blocks, 0)))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    q = _nibbles(blocks[:, 8:], 16).view(-1, 4).bitwise_or_(_spread(blocks[:, 4:8], 0x10, 0))
    out.copy_(_bytes(q, len(blocks)).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2)))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0)))


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima of a K block (uint8 [n, 12]) as fp32 [n, 8] each."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], dim=1)
    mins = torch.cat([middle & 0x3F, (high >> 4) | ((middle >> 2) & 0x30)], dim=1)
    return scales.float(), mins.float()


def _affine(blocks: Tensor, words: Tensor, out: Tensor) -> None:
    """out = d * scale * q - dmin * min, over eight groups of 32 values."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    scales.mul_(_half(blocks, 0))
    mins.mul_(_half(blocks, 2))
    q = _bytes(words, len(blocks)).view(-1, 8, 32).float()
    out.view(-1, 8, 32).copy_(q.mul_(scales.unsqueeze(2)).sub_(mins.unsqueeze(2)))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    _affine(blocks, _nibbles(blocks[:, 16:], 32), out)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    words = _nibbles(blocks[:, 48:], 32).view(-1, 8, 4)
    high = _compact(blocks[:, 16:48]).view(torch.int64).unsqueeze(1)
    shifts = torch.arange(8, device=blocks.device).view(8, 1)
    _affine(blocks, words.bitwise_or_(((high >> shifts) & _LOW1) << 4), out)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    words = _nibbles(blocks[:, :128], 64).view(-1, 2, 4, 4)  # [n, half, quarter, 32 values]
    high = _compact(blocks[:, 128:192]).view(torch.int64).view(-1, 2, 1, 4)
    shifts = torch.arange(0, 8, 2, device=blocks.device).view(4, 1)
    words.bitwise_or_(((high >> shifts) & (3 * _LOW1)) << 4)
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    q = _bytes(words, len(blocks)).sub_(32).view(-1, 16, 16).float()
    out.view(-1, 16, 16).copy_(q.mul_(scales.unsqueeze(2)))


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.zeros_like(d), 1 / d)


def _scale_bytes(d: Tensor) -> Tensor:
    return d.to(torch.float16).view(torch.uint8)


def _pack_q4_0(blocks: Tensor) -> Tensor:
    d = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)) / -8
    q = (blocks * _inverse(d) + 8.5).trunc().clamp_(0, 15).to(torch.uint8)
    return torch.cat([_scale_bytes(d), q[:, :16] | (q[:, 16:] << 4)], dim=1)


def _pack_q8_0(blocks: Tensor) -> Tensor:
    d = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * _inverse(d)
    size = scaled.abs()
    whole = size.floor()
    q = scaled.sign() * (whole + (2 * (size - whole)).floor())
    return torch.cat([_scale_bytes(d), q.to(torch.int8).view(torch.uint8)], dim=1)


_KERNELS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
_PACKERS: dict[str, Callable[[Tensor], Tensor]] = {"Q4_0": _pack_q4_0, "Q8_0": _pack_q8_0}
QTYPES = (*_KERNELS, *PLAIN)
PACKABLE = (*_PACKERS, *PLAIN)
