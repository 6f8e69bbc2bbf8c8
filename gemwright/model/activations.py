"""Where the activations that a backward wants wait for it: on the device, or in locked host memory meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from gemwright.model.layer import LayerPass
from gemwright.model.pinned import Locks, host_buffer, touch
from gemwright.model.waits import Waits
from gemwright.report import say

_ALIGN = 256
# Buffers that are made at a time: the system provides and locks pages on one core each.
_AHEAD = 4


class Activations(Protocol):
    """Keeps a layer's input and what its visit exports, from the forward to the backward."""

    def put(self, layer: int, row: int, x: Tensor, visit: LayerPass) -> None:
        """Take over the input and, where it goes elsewhere, the exports of `visit`."""

    def fetch(self, layer: int) -> None:
        """Begin to bring a layer's back; its `take` comes later."""

    def take(self, layer: int, row: int, visit: LayerPass) -> Tensor:
        """The input; `visit` holds its exports again."""


class OnDevice:
    """Everything stays where it was computed."""

    def __init__(self) -> None:
        self._inputs: dict[tuple[int, int], Tensor] = {}

    def put(self, layer: int, row: int, x: Tensor, visit: LayerPass) -> None:
        """See `Activations.put`."""
        self._inputs[layer, row] = x

    def fetch(self, layer: int) -> None:
        """See `Activations.fetch`."""

    def take(self, layer: int, row: int, visit: LayerPass) -> Tensor:
        """See `Activations.take`."""
        return self._inputs.pop((layer, row))


class Offloaded:
    """Layers of which `on_host[layer]` is true wait in host memory; copies run beside the computation.

    At most two layers are on their way out and one on its way in, which bounds the device memory they take.
    """

    def __init__(self, on_host: Sequence[bool], device: torch.device, waits: Waits | None = None) -> None:
        self._on_host, self._device = on_host, device
        self._here = OnDevice()
        self._leaving: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._away: dict[tuple[int, int], list[Tensor]] = {}
        self._back: dict[tuple[int, int], tuple[torch.cuda.Event, list[Tensor]]] = {}
        self._locks = Locks()
        self._pool = ThreadPoolExecutor(_AHEAD)
        self._coming: deque[Future[Tensor]] = deque()
        self._refused = False
        self.waits = waits or Waits()
        self.streams = [self._out, self._in]
        self.copies = 1  # more of them stand for a slower link

    def put(self, layer: int, row: int, x: Tensor, visit: LayerPass) -> None:
        """See `Activations.put`."""
        if not self._on_host[layer]:
            self._here.put(layer, row, x, visit)
            self._let_go(0)
            return
        tensors = [x, *visit.export()]
        places = self._places((layer, row), tensors)
        now = torch.cuda.current_stream(self._device)
        self._out.wait_stream(now)
        with torch.cuda.stream(self._out):
            for place, tensor in list(zip(places, tensors, strict=True)) * self.copies:
                place.copy_(tensor, non_blocking=True)
        self._leaving.append((self._out.record_event(), tensors))
        self._away[layer, row] = places
        self._let_go(2)

    def fetch(self, layer: int) -> None:
        """See `Activations.fetch`."""
        now = torch.cuda.current_stream(self._device)
        self._let_go(0)
        keys = [key for key in self._away if key[0] == layer]
        if not keys:
            return
        arriving = {key: [torch.empty_like(place, device=self._device) for place in self._away[key]] for key in keys}
        self._in.wait_stream(now)  # the memory just taken may still be read by work queued before
        for key, tensors in arriving.items():
            with torch.cuda.stream(self._in):
                for place, tensor in list(zip(self._away.pop(key), tensors, strict=True)) * self.copies:
                    tensor.copy_(place, non_blocking=True)
            self._back[key] = self._in.record_event(), tensors

    def take(self, layer: int, row: int, visit: LayerPass) -> Tensor:
        """See `Activations.take`."""
        if not self._on_host[layer]:
            return self._here.take(layer, row, visit)
        event, tensors = self._back.pop((layer, row))
        self.waits.wait(self._device, event)
        visit.restore(tensors[1:])
        return tensors[0]

    def _let_go(self, count: int) -> None:
        """Free the device memory of all but `count` that are on their way out, once they have arrived."""
        while len(self._leaving) > count:
            torch.cuda.current_stream(self._device).wait_event(self._leaving.popleft()[0])

    def close(self) -> None:
        """Give the memory back, the host's and the device's."""
        torch.cuda.synchronize(self._device)
        self.forget()
        for coming in self._coming:
            coming.result()
        self._coming.clear()
        self._pool.shutdown()
        self._locks.unlock_all()
        self._buffers.clear()

    def forget(self) -> None:
        """Let go of a step that came to no end."""
        self._here = OnDevice()
        for held in (self._leaving, self._away, self._back):
            held.clear()

    def _places(self, key: tuple[int, int], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host tensors like `tensors`, in the buffer of that layer and row."""
        sizes = [-(-prod(t.shape) * t.element_size() // _ALIGN) * _ALIGN for t in tensors]
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < sum(sizes):
            if buffer is not None:
                torch.cuda.synchronize(self._device)
                self._locks.unlock(buffer)
            buffer = self._buffers[key] = self._next_buffer(key[0], sum(sizes))
        places, at = [], 0
        for tensor, size in zip(tensors, sizes, strict=True):
            whole = buffer[at : at + tensor.numel() * tensor.element_size()]
            places.append(whole.view(tensor.dtype).view(tensor.shape))
            at += size
        return places

    def _next_buffer(self, layer: int, size: int) -> Tensor:
        """A new buffer; those of later layers, which keep as much, are being made meanwhile."""
        later = sum(self._on_host[layer + 1 :])
        while len(self._coming) <= min(_AHEAD, later):
            self._coming.append(self._pool.submit(self._new_buffer, size))
        buffer = self._coming.popleft().result()
        if buffer.numel() >= size:
            return buffer
        self._locks.unlock(buffer)
        return self._new_buffer(size)

    def _new_buffer(self, size: int) -> Tensor:
        buffer = host_buffer(size)
        touch(buffer)
        if not self._locks.lock(buffer) and not self._refused:
            self._refused = True
            say("the system locks no more host memory: activations are copied through unlocked memory, more slowly")
        return buffer
