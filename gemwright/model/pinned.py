"""Host memory that a GPU copies from and to at full speed: pages locked where they lie."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_THREADS, _PIECE = 8, 1 << 26
_READ_ONLY = 8  # cudaHostRegisterReadOnly: what allows a file's mapping to be locked


def host_buffer(size: int) -> Tensor:
    """uint8 [size] of ordinary memory of its own mapping, in huge pages where the system has them, not yet touched."""
    block = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)[:size]


def touch(buffer: Tensor) -> None:
    """Have the system provide every page of a new buffer now, on several threads."""
    in_pieces(buffer, lambda piece: piece[:: mmap.PAGESIZE].zero_())


def in_pieces(buffer: Tensor, work: Callable[[Tensor], object]) -> None:
    """Call `work(piece)` for all pieces of a buffer, side by side."""

    def quietly(piece: Tensor) -> None:
        with torch.inference_mode():
            work(piece)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(quietly, torch.split(buffer, _PIECE)))


def lock(buffer: Tensor, *, read_only: bool = False) -> bool:
    """Lock the pages of a host tensor for direct copies until `unlock`; False where the system refuses."""
    error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), _READ_ONLY if read_only else 0)
    if int(error) == 0:
        return True
    _forget_error()
    return False


def unlock(buffer: Tensor) -> None:
    """Undo `lock`."""
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def _forget_error() -> None:
    """A refused call leaves its error behind, and the next launch, this one, would report it as its own."""
    try:
        torch.ones(1, device="cuda")
    except RuntimeError:
        return


class Locks:
    """The host tensors that one owner has locked; what is left when the owner goes is unlocked then.

    A mapping that is gone but still locked would trip whatever is given its addresses next.
    """

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}
        self._end = weakref.finalize(self, _unlock_all, self._held)
        self._end.atexit = False

    def lock(self, buffer: Tensor, *, read_only: bool = False) -> bool:
        """Lock the pages of a host tensor; False where the system refuses."""
        if not lock(buffer, read_only=read_only):
            return False
        self._held[buffer.data_ptr()] = buffer
        return True

    def unlock(self, buffer: Tensor) -> None:
        """Unlock one, if it was locked here."""
        if self._held.pop(buffer.data_ptr(), None) is not None:
            unlock(buffer)

    def unlock_all(self) -> None:
        """Unlock all."""
        _unlock_all(self._held)


def _unlock_all(held: dict[int, Tensor]) -> None:
    while held:
        unlock(held.popitem()[1])


def can_lock(size: int) -> bool:
    """Whether so many bytes can be locked now; they are given back at once."""
    try:
        buffer = host_buffer(size)
    except (OSError, ValueError):
        return False
    if not lock(buffer):
        return False
    unlock(buffer)
    return True
