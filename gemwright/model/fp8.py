"""Frozen weights as FP8 operands: one product gives base and adapter, forward and, from a transposed copy, backward.

A row of W has a scale that never changes. The backward multiplies dy by those scales before it is rounded itself, so
that W^T is the same bytes transposed: both directions see the same weights. Adapters ride behind the rows, as
`kernels.fp8` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gemwright.kernels.dispatch import join_tail, quantise_rows, turn
from gemwright.kernels.fp8 import TINY, new_rows
from gemwright.layout import GROUPS, group_sizes, rows_bytes
from gemwright.model.unpacked import unpack
from gemwright.spec import ModelSpec
from gemwright.weights.quants import PLAIN

# Hopper's tensor cores add in 14 bits. Over rows up to this length that loses less than rounding to FP8 did; over
# longer ones cuBLAS is asked to add in fp32 in between, which is slower.
FAST_SUMS = 8448
# Of a group's mean scale: the least one. A row of next to nothing would otherwise make its adapter's part huge.
LEAST = 1 / 32


class Fp8Weight:
    """A group's matrix W [out, in] during one visit of its layer; stands where `model.lora` takes a [out, in] Tensor.

    `normal` [out, in + tail] holds W over `scale` (fp32 [out]) already; `turned` [in, out + tail] is filled on demand.
    `ones` is fp32 [1, at least in].
    """

    def __init__(self, normal: Tensor, turned: Tensor, scale: Tensor, ones: Tensor) -> None:
        self.shape = torch.Size((len(normal), len(turned)))
        self._normal, self._turned, self._scale, self._ones = normal, turned, scale, ones[:, : len(turned)]
        self._gain: Tensor | None = None
        self._gain_back: Tensor | None = None
        self._is_turned = False

    def __len__(self) -> int:
        return self.shape[0]

    def product(self, x: Tensor, out: Tensor, t: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        """Write x W^T + t b^T to `out` [N, out] (bf16) and return it; x [N, in], t [N, T], b [out, T]."""
        if b is not None and self._gain is None:
            self._gain = join_tail(b, self._scale, self._normal[:, self.shape[1] :])
        return _multiply(x, self._normal, self._scale.view(1, -1), out, None, t, self._gain)

    def back(self, dy: Tensor, dt: Tensor | None = None, a: Tensor | None = None) -> Tensor:
        """dy W + dt a [N, in] (bf16); dy [N, out], dt [N, T], a [T, in]."""
        rows, columns = self.shape
        if not self._is_turned:
            turn(self._normal[:, :columns], self._turned[:, :rows])
            self._is_turned = True
        if a is not None and self._gain_back is None:
            self._gain_back = join_tail(a.t(), None, self._turned[:, rows:])
        out = torch.empty(len(dy), columns, dtype=dy.dtype, device=dy.device)
        return _multiply(dy, self._turned, self._ones, out, self._scale, dt, self._gain_back)


def _multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    out: Tensor,
    factor: Tensor | None,
    tail: Tensor | None,
    gain: Tensor | None,
) -> Tensor:
    """x, its columns times `factor`, with its tail, times weight^T and its rows' `scale` [1, rows]."""
    if tail is None:  # without one, what lies behind the rows is left out
        weight = weight[:, : x.shape[1]]
    rows = new_rows(len(x), x.shape[1], 0 if tail is None else tail.shape[1], x)
    own = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    quantise_rows(x, rows, own.view(-1), factor, tail, gain)
    torch._scaled_mm(
        rows, weight.t(), own, scale, out_dtype=out.dtype, use_fast_accum=rows.shape[1] <= FAST_SUMS, out=out
    )
    return out


class Fp8Scratch:
    """Room for one layer's matrices in FP8, both ways, and the scales of all layers' rows once they are known."""

    def __init__(self, spec: ModelSpec, tails: Mapping[str, int], device: torch.device) -> None:
        self.sizes, self._device, nothing = group_sizes(spec), device, torch.empty(0, device=device)
        tail = {group: tails.get(group, 0) for group in GROUPS}
        self._normal = {g: new_rows(*size, tail[g], nothing) for g, size in self.sizes.items()}
        turned = {g: rows_bytes(cols, rows, tail[g]) for g, (rows, cols) in self.sizes.items()}
        # One after another, since a first visit borrows the whole of it.
        self._flat = torch.empty(sum(turned.values()), dtype=torch.uint8, device=device)
        pieces = dict(zip(turned, self._flat.split(list(turned.values())), strict=True))
        self._turned = {g: new_rows(cols, rows, tail[g], nothing, pieces[g]) for g, (rows, cols) in self.sizes.items()}
        self._ones = torch.ones(1, max(cols for _, cols in self.sizes.values()), dtype=torch.float32, device=device)
        self._scales: dict[tuple[int, str], Tensor] = {}
        self._floors: dict[tuple[int, str], Tensor] = {}

    def fill(self, layer: int, group: str, pieces: Sequence[tuple[Tensor, str]]) -> None:
        """Write a group's packed matrices (each uint8 [rows, row_bytes] with its type), one below the other."""
        key, (height, cols) = (layer, group), self.sizes[group]
        heights = [len(raw) for raw, _ in pieces]
        outs = self._normal[group][:, :cols].split(heights)
        if key not in self._scales:
            scales = torch.empty(height, dtype=torch.float32, device=self._device)
            for (raw, qtype), out, scale in zip(pieces, outs, scales.split(heights), strict=True):
                quantise_rows(self._values(raw, qtype, out), out, scale)
            self._floors[key] = (scales.mean() * LEAST).view(1)
            self._scales[key] = torch.maximum(scales, self._floors[key]).clamp_min_(TINY)
        for (raw, qtype), out, scale in zip(pieces, outs, self._scales[key].split(heights), strict=True):
            if qtype in PLAIN:
                quantise_rows(raw.view(PLAIN[qtype]), out, scale, floor=self._floors[key])
            else:
                unpack(raw, qtype, out, scale)

    def _values(self, raw: Tensor, qtype: str, out: Tensor) -> Tensor:
        """The values of `raw` as they are, or in bf16 where the transposed matrices will be."""
        if qtype in PLAIN:
            return raw.view(PLAIN[qtype])
        return unpack(raw, qtype, self._flat[: 2 * out.numel()].view(torch.bfloat16).view(out.shape))

    def weights(self, layer: int) -> dict[str, Fp8Weight]:
        """The matrices of the layer that was filled in last, for one visit: adapters are taken up anew."""
        return {g: Fp8Weight(self._normal[g], self._turned[g], self._scales[layer, g], self._ones) for g in GROUPS}
