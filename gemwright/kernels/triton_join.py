"""Writes the B of a layer's adapters into the tail columns of its unpacked matrices: one launch a visit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Values of a program: sixteen a thread, whatever the rank, so that none has to be put aside.
_VALUES = 2048


@triton.jit
def _join_adapters_kernel(master, table, scale, blocks, RANK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    entry = table + tl.program_id(0) // blocks * 6
    source, rows, address = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    pitch, first, tail = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    own = (row < rows) & (source >= 0) & (column >= first) & (column < first + RANK)
    b = tl.load(master + source + row * RANK + (column - first), mask=own, other=0.0)
    target = address.to(tl.pointer_type(tl.bfloat16)) + row * pitch + column
    tl.store(target, (b * scale).to(tl.bfloat16), mask=(row < rows) & (column < tail))


def join(master: Tensor, table: Tensor, scale: float, rank: int, width: int, rows: int) -> None:
    """Write the tails that `table` names; `width` is the widest tail, `rows` the most rows of an entry.

    `table` int64 [parts, 6] on the device: place of B in `master` (fp32; -1 for zeros), its rows, the address of its
    first tail value (bf16), the pitch there, its first column within the tail, the columns of the tail.
    """
    power = 1 << (width - 1).bit_length()
    each = max(1, _VALUES // power)
    blocks = -(-rows // each)
    grid = (blocks * table.shape[0],)
    _join_adapters_kernel[grid](master, table, scale, blocks, RANK=rank, WIDTH=power, ROWS=each, num_warps=4)
