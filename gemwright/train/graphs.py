"""Replays whole steps as CUDA graphs, where launching their kernels one by one takes longer than computing them.

A step that is captured allocates from a pool of its own, reads its rows from tensors that later rows are copied into,
and brings layers through the ring by copies that are part of the graph.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemwright.kernels.attend import Flash
from gemwright.model.activations import Activations, Offloaded
from gemwright.model.decoder import Gemma
from gemwright.model.streamed import StreamedResidency
from gemwright.model.waits import Pairs
from gemwright.report import say
from gemwright.train.batches import Row
from gemwright.train.step import StepLoss, Work, forward_backward

# Shapes of steps that are captured; each takes some megabytes of the driver.
MOST = 3
Kind = tuple[object, ...]


@dataclass(frozen=True)
class _Captured:
    """A step as a graph; `place` is where the ring has to stand before it, and stands after it again."""

    graph: torch.cuda.CUDAGraph
    rows: Sequence[Row]
    weight: Tensor
    nll: Tensor
    place: tuple[object, ...]
    waits: Pairs


class Graphs:
    """Computes steps one after another over the same model: each kind of step plainly twice, then as a graph."""

    def __init__(self, model: Gemma, residency: StreamedResidency, work: Work, store: Activations) -> None:
        self._model, self._residency, self._work, self._store = model, residency, work, store
        self.captured: dict[Kind, _Captured] = {}
        self._seen: dict[Kind, int] = {}
        self._pool: Any = None
        self._refused = False

    def forward_backward(self, rows: Sequence[Row], seed: int) -> StepLoss:
        """As `train.step.forward_backward`, of which it gives the same bits."""
        kind = tuple(part for row in rows for part in _kind(row))
        captured = self.captured.get(kind)
        if captured is None and self._wants(kind):
            captured = self._capture(kind, rows)
        if captured is None or captured.place != self._residency.place():
            self._seen[kind] = self._seen.get(kind, 0) + 1
            return forward_backward(self._model, rows, self._work, self._store, seed=seed)
        return self._replay(captured, rows)

    def _wants(self, kind: Kind) -> bool:
        return self._seen.get(kind, 0) >= 2 and len(self.captured) < MOST and not self._refused

    def _capture(self, kind: Kind, rows: Sequence[Row]) -> _Captured | None:
        residency, place = self._residency, self._residency.place()
        weight = torch.zeros((), dtype=torch.float32, device=residency.device)
        residency.settle()
        residency.waits.swap([])
        torch.cuda.synchronize(residency.device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                try:
                    residency.settle()
                    done = forward_backward(self._model, rows, self._work, self._store, weight=weight)
                    residency.settle()
                except RuntimeError:
                    self._rejoin()
                    raise
        except RuntimeError as error:  # memory running out among them
            failed = str(error).splitlines()[0]
        else:
            failed = "" if residency.place() == place else "the ring of layers ends elsewhere than it began"
        if failed:
            self._refused = True
            del graph
            say(f"this step cannot be replayed as a CUDA graph and goes on kernel by kernel ({failed})")
            residency.rewind()
            if isinstance(self._store, Offloaded):
                self._store.forget()
            gc.collect()  # what the failed step held is still in its frames, and its memory in the graph's pool
            torch.cuda.empty_cache()
            return None
        residency.settle()
        self._pool = self._pool or graph.pool()
        made = _Captured(graph, rows, weight, done.nll, place, residency.waits.swap([]))
        self.captured[kind] = made
        return made

    def _rejoin(self) -> None:
        """Have a capture that failed wait for the streams it began: else neither it nor its random state ends."""
        streams = list(self._residency.streams)
        if isinstance(self._store, Offloaded):
            streams += self._store.streams
        now = torch.cuda.current_stream(self._residency.device)
        for stream in streams:
            with torch.cuda.stream(stream):
                begun = torch.cuda.is_current_stream_capturing()
            if begun:
                now.wait_stream(stream)

    def _replay(self, captured: _Captured, rows: Sequence[Row]) -> StepLoss:
        labelled = sum(row.labelled for row in rows)
        captured.weight.fill_(1.0 / labelled)
        for own, row in zip(captured.rows, rows, strict=True):
            if own is not row:
                for into, values in zip(_tensors(own), _tensors(row), strict=True):
                    into.copy_(values)
        captured.graph.replay()
        self._residency.settle()
        self._residency.waits.swap(captured.waits)
        return StepLoss(captured.nll, labelled, sum(row.tokens for row in rows))


def _kind(row: Row) -> Kind:
    """What two rows must share to take each other's place in a graph."""
    kinds = [attention.kind if isinstance(attention, Flash) else id(attention) for attention in row.attention]
    return (len(row.ids), len(row.at), *kinds)


def _tensors(row: Row) -> list[Tensor]:
    bounds = [attention.bounds for attention in row.attention if isinstance(attention, Flash)]
    return [row.ids, row.at, row.targets, *bounds, *(half for table in row.tables for half in table)]
