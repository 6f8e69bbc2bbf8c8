"""Writes models of random weights in true or test shapes: for tests, and to measure sizes one has no weights of."""

from __future__ import annotations

import struct
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gemwright.errors import InputError
from gemwright.spec import ModelSpec
from gemwright.weights import names
from gemwright.weights.gguf_reader import GGUFFile
from gemwright.weights.gguf_writer import Piece, write_gguf_model
from gemwright.weights.quants import PACKABLE, QTYPES, block_size, pack, row_bytes

MIX = "Q4_K_M"
RANDOM_TYPES = (*QTYPES, MIX)
_STD = 0.02
# Where columns do not fill blocks of 256, llama.cpp falls back to these too.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_TILE_VALUES = 1 << 18
# Each matrix is a piece of its type's tile, repeated, from one of so many first blocks on.
_STARTS = 1 << 12


def write_random_gguf(
    path: Path,
    spec: ModelSpec,
    qtype: str = "Q8_0",
    seed: int = 0,
    tokenizer_from: GGUFFile | None = None,
    on_progress: Callable[[int], None] = lambda written: None,
) -> None:
    """Write a model marked as random, weights about N(0, 0.02), norms near 1; tensor by tensor, at the disk's speed.

    Its tokenizer, when given, must have `spec.vocab` tokens. The same arguments give the same bytes. `on_progress` is
    told on the way how many of `weight_bytes` are written.
    """
    rng, written = torch.Generator().manual_seed(seed), 0
    tiles: dict[str, Tensor] = {}
    pieces: list[Piece] = []
    tensors = random_tensors(spec, qtype)
    for name, (shape, kind) in tensors.items():
        if len(shape) > 1 and kind not in tiles:
            longest = max(prod(other) // block_size(kind)[0] for other, its in tensors.values() if its == kind)
            tile = _tile(kind, rng)
            tiles[kind] = tile.repeat(-(-(longest + _STARTS) // len(tile)), 1)
        start = int(torch.randint(0, _STARTS, (1,), generator=rng))
        piece = _norm(name, shape, rng) if len(shape) == 1 else _linear(name, shape, kind, tiles[kind], start)
        pieces.append(_reporting(piece, on_progress, written))
        written += prod(shape[:-1]) * row_bytes(shape[-1], kind)
    write_gguf_model(path, spec, pieces, tokenizer_from=tokenizer_from, file_type=qtype, is_random=True)


def random_tensors(spec: ModelSpec, qtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, type) of each tensor by our names, where the linear layers are to be `qtype`, one of RANDOM_TYPES."""
    if qtype not in RANDOM_TYPES:
        raise InputError(f"cannot write {qtype}", where="--type", fix=f"Choose one of {', '.join(RANDOM_TYPES)}.")
    shapes = names.expected_shapes(spec, spec.vocab)
    return {name: (shape, _kind(name, shape, qtype, spec.layers)) for name, shape in shapes.items()}


def weight_bytes(spec: ModelSpec, qtype: str) -> int:
    """What all tensors of such a model take on disk."""
    return sum(prod(shape[:-1]) * row_bytes(shape[-1], kind) for shape, kind in random_tensors(spec, qtype).values())


def _kind(name: str, shape: tuple[int, ...], qtype: str, layers: int) -> str:
    """The type of one tensor. The mix is llama.cpp's (llama-quant.cpp, use_more_bits), as are the fallbacks."""
    if len(shape) == 1:
        return "F32"
    if qtype == MIX:
        layer, _, part = name.partition(".")
        finer = name == "embed" or (part in ("v", "down") and _takes_more_bits(int(layer), layers))
        qtype = "Q6_K" if finer else "Q4_K"
    return _FALLBACK[qtype] if shape[-1] % block_size(qtype)[0] else qtype


def _takes_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _reporting(piece: Piece, on_progress: Callable[[int], None], written: int) -> Piece:
    """`piece`, which says when its turn comes that `written` bytes came before it."""

    def make() -> Tensor:
        on_progress(written)
        return piece.make()

    return Piece(piece.name, piece.shape, piece.qtype, make)


def _norm(name: str, shape: tuple[int, ...], rng: torch.Generator) -> Piece:
    raw = pack(1 + 0.1 * torch.randn(shape, generator=rng), "F32")
    return Piece(names.to_gguf(name), shape, "F32", lambda: raw)


def _linear(name: str, shape: tuple[int, ...], kind: str, tile: Tensor, start: int) -> Piece:
    blocks = shape[0] * shape[1] // block_size(kind)[0]
    return Piece(names.to_gguf(name), shape, kind, lambda: tile[start : start + blocks])


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
