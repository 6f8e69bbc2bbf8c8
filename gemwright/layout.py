"""Sizes and shapes that the plan counts and the code allocates by; stated once, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

from gemwright.spec import ModelSpec

# Linear layers that read the same input are one matrix product; the order of rows is the order of names.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
# Rows of an input with its tail stay aligned to 16 bytes, as the kernels' wide loads need.
TAIL_STEP = 8
# Rows and their labels are filled up to whole steps: the CPU library compiles each new shape of a product.
FILL_STEP = 16
# The same where all rows are to have one size.
ROW_STEP, LABEL_STEP = 64, 32
# Up to this share of its positions a row's labels are few: its last layer leaves the others out after its attention.
FEW = 0.5
# Tokens of a row from which on the attention's backward goes head by head: memory counts more than launches.
LONG = 16_384
# Rows of fp32 sums that flash attention's backward takes for each document beyond its tokens.
DOCUMENT_ROWS = 128


def document_room(tokens: int) -> int:
    """Most such rows of all documents together; with more of them the backward goes head by head."""
    return max(tokens // 8, 16 * DOCUMENT_ROWS)


PITCH = 128  # bytes; rows begin at whole lines of the cache


class Keep(IntEnum):
    """What the forward leaves for the backward; the rest is computed again.

    INPUT: the layer's input. NARROW: also the attention's and the MLP's outputs, a hidden vector a token each, which
    spares the backward the attention and two of the four products. HEADS: also the joint projection. PRODUCTS: also the
    MLP's wide one, so that no product is computed twice. ALL: everything.
    """

    INPUT = 0
    NARROW = 1
    HEADS = 2
    PRODUCTS = 3
    ALL = 4


def rounded(count: int, step: int) -> int:
    """`count` up to whole steps."""
    return -(-count // step) * step


def label_step(tokens: int) -> int:
    """To whole numbers of how many labels the rows of so many tokens are filled up where all are to be alike."""
    return rounded(tokens, 8 * LABEL_STEP) // 8


def group_sizes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each group's matrix."""
    shapes = spec.linear_shapes
    return {group: (sum(shapes[p][0] for p in parts), shapes[parts[0]][1]) for group, parts in GROUPS.items()}


def adapter_parameters(spec: ModelSpec, rank: int, targets: Sequence[str], *, dora: bool = False) -> int:
    """Trained values of an adapter."""
    shapes = spec.linear_shapes
    return spec.layers * sum(rank * sum(shapes[part]) + dora * shapes[part][0] for part in targets)


def tail_columns(width: int) -> int:
    """Columns that an adapter of T = `width` takes behind a row: three parts, filled up to 16 as products need."""
    return -(-3 * width // 16) * 16


def rows_bytes(rows: int, width: int, tail: int) -> int:
    """Bytes of `rows` fp8 rows of `width` values and a tail (see `kernels.fp8.new_rows`)."""
    return rows * (-(-(width + tail_columns(tail)) // PITCH) * PITCH)


def scratch_bytes(spec: ModelSpec, tails: Mapping[str, int]) -> int:
    """What `model.fp8.Fp8Scratch` takes of the device in the end."""
    total = 0
    for group, (rows, cols) in group_sizes(spec).items():
        tail = tails.get(group, 0)
        total += rows_bytes(rows, cols, tail) + rows_bytes(cols, rows, tail) + 4 * rows * spec.layers
    return total


def product_bytes(rows: int, width: int, tail: int) -> int:
    """What a product's rounded input of `rows` tokens takes for its time."""
    return rows_bytes(rows, width, tail) + 4 * rows


def activation_bytes(spec: ModelSpec, tokens: int, itemsize: int) -> int:
    """What the backward of all layers keeps of `tokens` tokens when nothing is recomputed."""
    joint = sum(spec.linear_shapes[part][0] for part in ("q", "k", "v"))
    heads = (2 * spec.heads + spec.kv_heads) * spec.head_dim
    return spec.layers * tokens * itemsize * (7 * spec.hidden + joint + heads + 5 * spec.mlp)
