"""Where a layer's weights are while it computes: kept unpacked, or unpacked on each visit into one reused scratch.

`layer(i)` hands out matrices that are valid until `release(i)`; nothing may hold on to them longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, Union

import torch
from torch import Tensor

from gemwright.layout import GROUPS, group_sizes
from gemwright.spec import ModelSpec
from gemwright.weights.model_file import ModelFile
from gemwright.weights.quants import unpack

if TYPE_CHECKING:
    from gemwright.model.fp8 import Fp8Weight

Matrix: TypeAlias = Union[Tensor, "Fp8Weight"]


@dataclass(frozen=True)
class LayerWeights:
    """`matrices[group]` is [out, in] in the compute dtype; `norms[name]` fp32, folded, q_norm scaled for attention."""

    matrices: Mapping[str, Matrix]
    norms: Mapping[str, Tensor]


class Residency(Protocol):
    """What gives the decoder its weights, one layer at a time."""

    spec: ModelSpec
    dtype: torch.dtype
    vocab: int
    final_norm: Tensor

    def layer(self, index: int) -> LayerWeights:
        """The weights of a layer, valid until its release."""

    def release(self, index: int) -> None:
        """The layer will not be read again before the next `layer(index)`."""

    def head_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the tied head [stop - start, hidden] in the compute dtype, valid until the next call."""

    def embed(self, ids: Tensor) -> Tensor:
        """Scaled embeddings [N, hidden] of int64 `ids` [N]."""

    def own_rows(self, ids: Tensor) -> Tensor:
        """Rows of the tied head for int64 `ids` [N], fp32 [N, hidden]."""


def layer_norms(file: ModelFile, index: int, device: torch.device | None = None) -> dict[str, Tensor]:
    """The norms of a layer as `LayerWeights` has them."""
    norms = {name: file.norm(f"{index}.{name}") for name in file.spec.norm_shapes}
    norms["q_norm"] = norms["q_norm"] * file.spec.query_scalar**-0.5
    return {name: norm.to(device=device) for name, norm in norms.items()}


def new_matrices(
    spec: ModelSpec, dtype: torch.dtype, tails: Mapping[str, int] | None = None, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Room for a layer's matrices, `tails[group]` columns wider than they are."""
    sizes = {g: (rows, cols + (tails or {}).get(g, 0)) for g, (rows, cols) in group_sizes(spec).items()}
    return {group: torch.empty(size, dtype=dtype, device=device) for group, size in sizes.items()}


class UnpackedResidency:
    """Weights in ordinary RAM: as many layers as `budget_bytes` holds stay unpacked, the rest use the scratch.

    Layers come before the head in the budget, since a step visits them two or three times and the head once.
    """

    def __init__(self, file: ModelFile, dtype: torch.dtype, budget_bytes: int | None = None) -> None:
        self.spec, self.dtype, self._file = file.spec, dtype, file
        self.vocab = self.spec.vocab
        self.final_norm = file.norm("final_norm")
        self._norms = [layer_norms(file, i) for i in range(self.spec.layers)]
        layer_bytes = sum(r * c for r, c in self.spec.linear_shapes.values()) * dtype.itemsize
        head_bytes = self.vocab * self.spec.hidden * dtype.itemsize
        left = layer_bytes * self.spec.layers + head_bytes if budget_bytes is None else budget_bytes
        self.kept_layers = min(self.spec.layers, left // layer_bytes)
        self.keeps_head = left - self.kept_layers * layer_bytes >= head_bytes
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._scratch: dict[str, Tensor] | None = None
        self._head: Tensor | None = None

    def layer(self, index: int) -> LayerWeights:
        """See `Residency.layer`."""
        if index in self._kept:
            return LayerWeights(self._kept[index], self._norms[index])
        if index < self.kept_layers:
            matrices = self._kept[index] = new_matrices(self.spec, self.dtype)
        else:
            matrices = self._scratch = self._scratch or new_matrices(self.spec, self.dtype)
        for group, parts in GROUPS.items():
            start = 0
            for part in parts:
                stored = self._file.tensors[f"{index}.{part}"]
                unpack(stored.data, stored.qtype, out=matrices[group][start : start + stored.shape[0]])
                start += stored.shape[0]
        return LayerWeights(matrices, self._norms[index])

    def release(self, index: int) -> None:
        """Nothing to do: the next visit of another layer overwrites the scratch."""

    def head_rows(self, start: int, stop: int) -> Tensor:
        """See `Residency.head_rows`."""
        stored = self._file.tensors["embed"]
        if not self.keeps_head:
            return unpack(stored.data[start:stop], stored.qtype, self.dtype)
        if self._head is None:
            self._head = unpack(stored.data[: self.vocab], stored.qtype, self.dtype)
        return self._head[start:stop]

    def embed(self, ids: Tensor) -> Tensor:
        """See `Residency.embed`."""
        return self.own_rows(ids).mul_(self.spec.hidden**0.5).to(self.dtype)

    def own_rows(self, ids: Tensor) -> Tensor:
        """See `Residency.own_rows`."""
        stored = self._file.tensors["embed"]
        return unpack(stored.data.index_select(0, ids), stored.qtype)
