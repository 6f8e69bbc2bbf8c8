"""Where packed weights wait in host memory, and how they get from there into a slot on the GPU.

Mapped: the file's own mapping, its pages locked, so that the system's page cache is the one copy. Pinned: a locked
copy. Pageable: the mapping as it is, through a small locked staging ring; what a model larger than RAM needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import psutil
import torch
from torch import Tensor

from gemwright.errors import MachineError
from gemwright.model.pinned import Locks, host_buffer
from gemwright.report import say
from gemwright.spec import LINEARS
from gemwright.weights.model_file import ModelFile

SourceKind = Literal["auto", "mapped", "pinned", "pageable"]
_ALIGN = 32


@dataclass(frozen=True)
class Piece:
    """One packed matrix of a layer: where it lies in the layer's bytes, as [rows, row_bytes] of `qtype`."""

    part: str
    start: int
    rows: int
    row_bytes: int
    qtype: str

    def of(self, layer: Tensor) -> Tensor:
        """The matrix within the bytes of its layer."""
        return layer[self.start : self.start + self.rows * self.row_bytes].view(self.rows, self.row_bytes)


class LayerBytes:
    """A layer's packed matrices as they lie in host memory: one run of bytes where the file has them together."""

    def __init__(self, file: ModelFile, index: int) -> None:
        stored = {part: file.tensors[f"{index}.{part}"].data for part in LINEARS}
        order = sorted(LINEARS, key=lambda part: stored[part].data_ptr())
        first, last = stored[order[0]], stored[order[-1]]
        span = last.data_ptr() + last.numel() - first.data_ptr()
        total = sum(data.numel() for data in stored.values())
        same = all(d.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for d in stored.values())
        self.runs: list[tuple[Tensor, int]] = []
        if same and span <= total + total // 64 and first.data_ptr() % _ALIGN == 0:
            run = torch.empty(0, dtype=torch.uint8).set_(first.untyped_storage(), first.storage_offset(), (span,), (1,))
            self.runs.append((run, 0))
            starts = {part: data.data_ptr() - first.data_ptr() for part, data in stored.items()}
            self.size = span
        else:
            starts, self.size = {}, 0
            for part in order:
                starts[part] = self.size
                self.runs.append((stored[part].view(-1), self.size))
                self.size += -(-stored[part].numel() // _ALIGN) * _ALIGN
        self.pieces = [
            Piece(part, starts[part], len(stored[part]), stored[part].shape[1], file.tensors[f"{index}.{part}"].qtype)
            for part in LINEARS
        ]


class Source(Protocol):
    """Copies layers into device memory, on the copy stream it was given."""

    kind: str
    stream: torch.cuda.Stream

    def copy(self, layer: int, slot: Tensor, ready: torch.cuda.Event) -> Callable[[], torch.cuda.Event]:
        """Begin to copy a layer into `slot` once `ready` has happened; the call returned gives the event of its end."""

    def close(self) -> None:
        """Unlock and give back."""


class Locked:
    """A source of locked bytes: each layer is one asynchronous copy, or one a matrix where a file scatters them."""

    def __init__(self, kind: str, runs: Sequence[list[tuple[Tensor, int]]], locks: Locks, device: torch.device):
        self.kind, self._runs, self._locks, self.stream = kind, runs, locks, torch.cuda.Stream(device)

    def copy(self, layer: int, slot: Tensor, ready: torch.cuda.Event) -> Callable[[], torch.cuda.Event]:
        """See `Source.copy`."""
        self.stream.wait_event(ready)
        with torch.cuda.stream(self.stream):
            for run, at in self._runs[layer]:
                slot[at : at + run.numel()].copy_(run, non_blocking=True)
        done = self.stream.record_event()
        return lambda: done

    def close(self) -> None:
        """See `Source.close`."""
        torch.cuda.synchronize()
        self._locks.unlock_all()


class Pageable:
    """Unlocked bytes through two locked staging buffers, filled by a thread one layer ahead of the copy."""

    kind = "pageable"

    def __init__(self, layers: Sequence[LayerBytes], device: torch.device) -> None:
        self._layers, self.stream, self._device = layers, torch.cuda.Stream(device), device
        self._pool = ThreadPoolExecutor(1)
        largest = max(layer.size for layer in layers)
        self._staging = [host_buffer(largest) for _ in range(2)]
        self._locks = Locks()
        for buffer in self._staging:
            self._locks.lock(buffer)
        self._free: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def copy(self, layer: int, slot: Tensor, ready: torch.cuda.Event) -> Callable[[], torch.cuda.Event]:
        """See `Source.copy`."""
        turn, self._turn = self._turn, 1 - self._turn
        future: Future[torch.cuda.Event] = self._pool.submit(self._move, layer, slot, ready, turn)
        return future.result

    @torch.inference_mode()
    def _move(self, layer: int, slot: Tensor, ready: torch.cuda.Event, turn: int) -> torch.cuda.Event:
        free, buffer, source = self._free[turn], self._staging[turn], self._layers[layer]
        if free is not None:
            free.synchronize()
        for run, at in source.runs:
            buffer[at : at + run.numel()].copy_(run)
        self.stream.wait_event(ready)
        with torch.cuda.stream(self.stream):
            slot[: source.size].copy_(buffer[: source.size], non_blocking=True)
        done: torch.cuda.Event = self.stream.record_event()
        self._free[turn] = done
        return done

    def close(self) -> None:
        """See `Source.close`."""
        self._pool.shutdown()
        torch.cuda.synchronize()
        self._locks.unlock_all()


def open_source(layers: Sequence[LayerBytes], kind: SourceKind, device: torch.device) -> Source:
    """The fastest source that this machine allows, or the one asked for; what had to be given up is said aloud.

    Locking is refused where more than four fifths of the free memory would be locked, or by the system.
    """
    total = sum(layer.size for layer in layers)
    room = total <= psutil.virtual_memory().available * 4 // 5
    if kind in ("auto", "mapped") and room:
        wholes = {run.untyped_storage().data_ptr(): run.untyped_storage() for layer in layers for run, _ in layer.runs}
        locks = Locks()
        files = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in wholes.values()]
        if all([locks.lock(whole, read_only=True) for whole in files]):
            return Locked("mapped", [layer.runs for layer in layers], locks, device)
        locks.unlock_all()
    if kind == "mapped":
        raise MachineError(
            "the system does not lock the model's file in memory", fix="Use --source pinned or pageable."
        )
    if kind in ("auto", "pinned") and room:
        buffer, runs = _copy_layers(layers)
        locks = Locks()
        if locks.lock(buffer):
            return Locked("pinned", runs, locks, device)
    if kind == "pinned":
        raise MachineError(f"the system does not lock {total:,} bytes of memory", fix="Use --source pageable.")
    if kind == "auto":
        say("weights stream from unlocked memory, more slowly: the system would not lock so much of it")
    return Pageable(layers, device)


def _copy_layers(layers: Sequence[LayerBytes]) -> tuple[Tensor, list[list[tuple[Tensor, int]]]]:
    """All layers one after another in one new buffer, and each as a run of it."""
    starts = [0]
    for layer in layers:
        starts.append(starts[-1] + -(-layer.size // 4096) * 4096)
    buffer = host_buffer(starts[-1])

    def fill(index: int) -> None:
        for run, at in layers[index].runs:
            buffer[starts[index] + at : starts[index] + at + run.numel()].copy_(run)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fill, range(len(layers))))
    return buffer, [[(buffer[start : start + layer.size], 0)] for start, layer in zip(starts, layers, strict=False)]
