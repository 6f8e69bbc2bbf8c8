"""Packed weights that stream through a ring of GPU buffers, some or all of them resident; the scratch is reused.

A layer is unpacked from its slot (or its resident copy) into one bf16 scratch as soon as it is asked for; the slot is
then free for a layer ahead. Order on the device's stream keeps the scratch valid until the next layer is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from gemwright.errors import needed
from gemwright.layout import GROUPS
from gemwright.model.fp8 import Fp8Scratch
from gemwright.model.residency import LayerWeights, layer_norms, new_matrices
from gemwright.model.sources import LayerBytes, Source, SourceKind, open_source
from gemwright.model.unpacked import unpack
from gemwright.model.waits import Waits
from gemwright.weights.model_file import ModelFile

_EMBED_ROWS = 8192


def spread(count: int, of: int) -> list[int]:
    """`count` of the indices 0..of-1, evenly spaced: where resident layers give the link the most time to catch up."""
    return sorted({(2 * i + 1) * of // (2 * count) for i in range(count)}) if count else []


class StreamedResidency:
    """A `Residency` on a GPU for steps that visit all layers up and then down again.

    `resident` layers stay packed on the device, others pass through `slots` buffers. `tails[group]` columns are left
    free at the right of each matrix for the adapters (see `model.lora.Linear`). With `fp8` the scratch holds
    `model.fp8.Fp8Weight`s instead of bf16.
    """

    def __init__(
        self,
        file: ModelFile,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.bfloat16,
        tails: Mapping[str, int] | None = None,
        resident: Collection[int] = (),
        slots: int = 2,
        source: SourceKind = "auto",
        head_rows: int = 8192,
        fp8: bool = False,
    ) -> None:
        self.spec, self.dtype, self.device, self._file = file.spec, dtype, device, file
        self.vocab = self.spec.vocab
        self.final_norm = file.norm("final_norm").to(device)
        self._norms = [layer_norms(file, i, device) for i in range(self.spec.layers)]
        self._layers = [LayerBytes(file, i) for i in range(self.spec.layers)]
        self.streamed = [i for i in range(self.spec.layers) if i not in resident]
        self._embed = file.tensors["embed"].data.to(device)
        self._scratch = {} if fp8 else new_matrices(self.spec, dtype, tails, device)
        self._fp8 = Fp8Scratch(self.spec, tails or {}, device) if fp8 else None
        self._head = torch.empty(head_rows, self.spec.hidden, dtype=dtype, device=device)
        self._moves = [[] if fp8 else self._moves_of(i) for i in range(self.spec.layers)]
        self._unpacked: int | None = None
        self._source: Source | None = open_source(self._layers, source, device) if self.streamed else None
        largest = max((self._layers[i].size for i in self.streamed), default=0)
        count = min(slots, len(self.streamed))
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(count)]
        self._free = [self._event() for _ in self._slots]
        self._slot_of = {layer: i % count for i, layer in enumerate(self.streamed)}  # neighbours never share one
        self._holds: list[int | None] = [None] * count
        self._arrivals: dict[int, Callable[[], torch.cuda.Event]] = {}
        self._resident = {i: self._bring(i) for i in sorted(resident)}
        order = [*range(self.spec.layers), *reversed(range(self.spec.layers))]
        self._order, self._at = order, 0
        self._wanted = [self._ahead(at, order, count) for at in range(len(order))]
        self.waits = Waits()
        self._prefetch(self._ahead(-1, order, count))

    @property
    def source_kind(self) -> str:
        """How the streamed layers lie in host memory, or "none"."""
        return self._source.kind if self._source else "none"

    @property
    def streams(self) -> list[torch.cuda.Stream]:
        """Those that copy, beside the one that computes."""
        return [self._source.stream] if self._source else []

    def layer(self, index: int) -> LayerWeights:
        """See `Residency.layer`."""
        at = self._find(index)
        if self._unpacked != index:
            packed = self._resident.get(index)
            slot = None if packed is not None else self._arrived(index)
            self._unpack(index, self._slots[slot] if slot is not None else needed(packed))
            if slot is not None:
                self._free[slot] = self._event()
        self._prefetch(self._wanted[at])
        return LayerWeights(self._fp8.weights(index) if self._fp8 else self._scratch, self._norms[index])

    def release(self, index: int) -> None:
        """See `Residency.release`; the stream's order does the rest."""

    def head_rows(self, start: int, stop: int) -> Tensor:
        """See `Residency.head_rows`; at most as many at once as were asked for."""
        stored = self._file.tensors["embed"]
        return unpack(self._embed[start:stop], stored.qtype, self._head[: stop - start])

    def embed(self, ids: Tensor) -> Tensor:
        """See `Residency.embed`."""
        out = torch.empty(len(ids), self.spec.hidden, dtype=self.dtype, device=self.device)
        for part, rows in zip(torch.split(ids, _EMBED_ROWS), torch.split(out, _EMBED_ROWS), strict=True):
            rows.copy_(self.own_rows(part).mul_(self.spec.hidden**0.5))
        return out

    def own_rows(self, ids: Tensor) -> Tensor:
        """Rows of the tied head for `ids` [N], fp32 [N, hidden]."""
        out = torch.empty(len(ids), self.spec.hidden, dtype=torch.float32, device=self.device)
        return unpack(self._embed.index_select(0, ids), self._file.tensors["embed"].qtype, out)

    def close(self) -> None:
        """Unlock host memory and let go of the device's; nothing can be asked for afterwards."""
        if self._source:
            self._source.close()
        self._slots, self._resident, self._scratch, self._fp8, self._moves = [], {}, {}, None, []
        self._embed = self._head = self.final_norm

    def _bring(self, index: int) -> Tensor:
        layer = torch.empty(self._layers[index].size, dtype=torch.uint8, device=self.device)
        if self._source is not None:
            self._source.copy(index, layer, self._event())().synchronize()
        else:
            for run, at in self._layers[index].runs:
                layer[at : at + run.numel()].copy_(run)
        return layer

    def _unpack(self, index: int, packed: Tensor) -> None:
        if self._fp8 is not None:
            pieces = {piece.part: piece for piece in self._layers[index].pieces}
            for group, parts in GROUPS.items():
                self._fp8.fill(index, group, [(pieces[p].of(packed), pieces[p].qtype) for p in parts])
        for start, end, row_bytes, qtype, out in self._moves[index]:
            unpack(packed[start:end].view(-1, row_bytes), qtype, out)
        self._unpacked = index

    def _moves_of(self, index: int) -> list[tuple[int, int, int, str, Tensor]]:
        """(start, end, bytes a row, type, target) of a layer's unpacking; matrices that adjoin in both are one."""
        shapes, pieces = self.spec.linear_shapes, {piece.part: piece for piece in self._layers[index].pieces}
        moves: list[tuple[int, int, int, str, Tensor]] = []
        for group, parts in GROUPS.items():
            row, first = 0, len(moves)
            for part in parts:
                (rows, cols), piece = shapes[part], pieces[part]
                start, end = piece.start, piece.start + piece.rows * piece.row_bytes
                below = row
                if len(moves) > first and moves[-1][1] == start and moves[-1][3] == piece.qtype:
                    start, below = moves[-1][0], row - (moves[-1][1] - moves[-1][0]) // piece.row_bytes
                    moves.pop()
                moves.append(
                    (start, end, piece.row_bytes, piece.qtype, self._scratch[group][below : row + rows, :cols])
                )
                row += rows
        return moves

    def _event(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def _find(self, index: int) -> int:
        """The place in the order of visits; a caller that begins anew is followed."""
        size = len(self._order)
        at = next((a % size for a in range(self._at, self._at + size) if self._order[a % size] == index), 0)
        self._at = (at + 1) % size
        return at

    def _ahead(self, at: int, order: Sequence[int], count: int) -> list[int]:
        """The next `count` layers to stream after place `at`, soonest first; at a turn the scratch has the layer."""
        found: list[int] = []
        for step in range(1, len(order)):
            layer = order[(at + step) % len(order)]
            if layer in self.streamed and layer not in found and not (at >= 0 and layer == order[at] and step == 1):
                found.append(layer)
            if len(found) == count:
                break
        return found

    def _prefetch(self, wanted: Sequence[int]) -> None:
        for layer in wanted:
            slot = self._slot_of[layer]
            if self._holds[slot] != layer:
                self._holds[slot] = layer
                self._arrivals[slot] = needed(self._source).copy(layer, self._slots[slot], self._free[slot])

    def _arrived(self, index: int) -> int:
        """Have the stream wait for a layer's copy; its slot."""
        self._prefetch([index])
        slot = self._slot_of[index]
        arrival = self._arrivals.pop(slot, None)
        if arrival is not None:
            self.waits.wait(self.device, arrival())
        return slot

    def place(self) -> tuple[object, ...]:
        """Where the ring stands: what it holds and who comes next."""
        return (*self._holds, self._unpacked, self._at)

    def settle(self) -> None:
        """Have the stream wait for all layers under way, and mark all slots as free from here on."""
        now = torch.cuda.current_stream(self.device)
        for arrival in self._arrivals.values():
            now.wait_event(arrival())
        self._arrivals.clear()
        self._free = [self._event() for _ in self._slots]

    def rewind(self) -> None:
        """Forget what the ring holds and begin anew with the first layers."""
        torch.cuda.synchronize(self.device)
        self._holds, self._unpacked, self._at = [None] * len(self._slots), None, 0
        self._arrivals.clear()
        self._free = [self._event() for _ in self._slots]
        self._prefetch(self._ahead(-1, self._order, len(self._slots)))
