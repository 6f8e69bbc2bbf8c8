"""LoRA pairs by our names, and the check that they belong to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from gemwright.errors import InputError
from gemwright.spec import LINEARS, ModelSpec

# "3.q" -> (A [rank, in], B [out, rank]); the layer's output grows by scale * B A x.
Pairs: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
# "3.q" -> m [out] of DoRA; empty for every other adapter.
Magnitudes: TypeAlias = Mapping[str, Tensor]


def check_magnitudes(pairs: Pairs, magnitudes: Magnitudes, where: object) -> None:
    """InputError naming the first pair without its magnitudes, where there are any, or with too many or few."""
    for name in (pairs.keys() | magnitudes.keys()) if magnitudes else ():
        rows = len(pairs[name][1]) if name in pairs else 0
        if name not in magnitudes or magnitudes[name].shape != (rows,):
            have = f"magnitudes {tuple(magnitudes[name].shape)}" if name in magnitudes else "no magnitudes"
            raise InputError(f"{name} has {have}, not ({rows},)", where=where, fix="Give a whole adapter folder.")


def check_pairs(spec: ModelSpec, pairs: Pairs, where: object) -> None:
    """InputError naming the first pair that does not fit `spec`: a layer it lacks or another shape."""
    if not pairs:
        raise InputError("the adapter has no LoRA pairs", where=where, fix="Give the folder or file of a finished run.")
    for name, (a, b) in pairs.items():
        layer, _, part = name.partition(".")
        if part not in LINEARS or not layer.isdecimal() or int(layer) >= spec.layers:
            what = f"the adapter changes {name}, which Gemma 3 {spec.name} does not have"
            raise InputError(what, where=where, fix="Give the model that the adapter was trained on.")
        rows, cols = spec.linear_shapes[part]
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != cols or b.shape[0] != rows or a.shape[0] != b.shape[1]:
            have = f"{name} has A {tuple(a.shape)} and B {tuple(b.shape)}"
            what = f"{have}; Gemma 3 {spec.name} wants [r, {cols}] and [{rows}, r]"
            raise InputError(what, where=where, fix="Give the model that the adapter was trained on.")
