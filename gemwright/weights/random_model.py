"""Writes models of random weights in true or test shapes: for tests, and to measure sizes one has no weights of."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from gemwright.errors import InputError
from gemwright.spec import ModelSpec
from gemwright.weights import names
from gemwright.weights.gguf_reader import GGUFFile
from gemwright.weights.gguf_writer import Piece, write_gguf_model
from gemwright.weights.quants import PACKABLE, QTYPES, block_size, pack

_STD = 0.02
# Where columns do not fill blocks of 256, llama.cpp falls back to these too.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_TILE_VALUES = 1 << 18


def write_random_gguf(
    path: Path, spec: ModelSpec, qtype: str = "Q8_0", seed: int = 0, tokenizer_from: GGUFFile | None = None
) -> None:
    """Write a model marked as random, weights about N(0, 0.02), norms near 1; tensor by tensor, at the disk's speed.

    Its tokenizer, when given, must have `spec.vocab` tokens. The same arguments give the same bytes.
    """
    if qtype not in QTYPES:
        raise InputError(f"cannot write {qtype}", where=path, fix=f"Choose one of {', '.join(QTYPES)}.")
    rng = torch.Generator().manual_seed(seed)
    tiles: dict[str, Tensor] = {}
    pieces: list[Piece] = []
    for name, shape in names.expected_shapes(spec, spec.vocab).items():
        kind = "F32" if len(shape) == 1 else _kind(qtype, shape[-1])
        if len(shape) > 1 and kind not in tiles:
            tiles[kind] = _tile(kind, rng)
        start = int(torch.randint(0, 1 << 12, (1,), generator=rng))
        pieces.append(_norm(name, shape, rng) if len(shape) == 1 else _linear(name, shape, kind, tiles[kind], start))
    write_gguf_model(path, spec, pieces, tokenizer_from=tokenizer_from, file_type=qtype, is_random=True)


def _kind(qtype: str, cols: int) -> str:
    return _FALLBACK[qtype] if cols % block_size(qtype)[0] else qtype


def _norm(name: str, shape: tuple[int, ...], rng: torch.Generator) -> Piece:
    raw = pack(1 + 0.1 * torch.randn(shape, generator=rng), "F32")
    return Piece(names.to_gguf(name), shape, "F32", lambda: raw)


def _linear(name: str, shape: tuple[int, ...], kind: str, tile: Tensor, start: int) -> Piece:
    blocks = shape[0] * shape[1] // block_size(kind)[0]

    def make() -> Tensor:
        return tile.repeat(-(-(start + blocks) // len(tile)), 1)[start : start + blocks]

    return Piece(names.to_gguf(name), shape, kind, make)


def _tile(kind: str, rng: torch.Generator) -> Tensor:
    """uint8 [blocks, bytes] of random blocks. Their number is odd, so that rows of a matrix do not repeat at once."""
    values, size = block_size(kind)
    if kind in PACKABLE:
        width = max(values, 32)
        blocks = _TILE_VALUES // width - 1
        packed = pack(torch.randn(blocks, width, generator=rng) * _STD, kind)
        return packed.view(-1, size)
    tile = torch.randint(0, 256, (_TILE_VALUES // values - 1, size), dtype=torch.uint8, generator=rng)
    return _set_scales(tile, kind)


def _set_scales(tile: Tensor, kind: str) -> Tensor:
    """Give uniformly random quants the scale that makes their standard deviation 0.02 and their mean about 0."""
    levels = {"4": 16, "5": 32, "6": 64}[kind[1]]
    d = _STD / (levels / 12**0.5)
    middle = (levels - 1) / 2
    if kind == "Q5_0":
        tile[:, :2] = _fp16(d)
    elif kind in ("Q4_1", "Q5_1"):
        tile[:, :4] = _fp16(d, -d * middle)
    elif kind == "Q6_K":
        tile[:, 192:208] = 16
        tile[:, 208:] = _fp16(d / 16)
    else:  # Q4_K, Q5_K: all sixteen 6-bit scales and minima are 32
        tile[:, :4] = _fp16(d / 32, d * middle / 32)
        tile[:, 4:12], tile[:, 12:16] = 0xA0, 0
    return tile


def _fp16(*values: float) -> Tensor:
    return torch.tensor(list(struct.pack(f"<{len(values)}e", *values)), dtype=torch.uint8)
