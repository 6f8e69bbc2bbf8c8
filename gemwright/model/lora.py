"""LoRA adapters: fp32 masters in one flat vector, working copies in the compute dtype, gradients by hand.

Source: Hu et al. 2021 (arXiv 2106.09685). y = W x + scale B A x, with A [rank, in] and B [out, rank]; scale is
alpha / rank, or alpha / sqrt(rank) with rank stabilisation (Kalajdzievski 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemwright.errors import InputError
from gemwright.model.fp8 import Fp8Weight
from gemwright.model.residency import GROUPS, Matrix
from gemwright.spec import LINEARS, ModelSpec

CPU = torch.device("cpu")
# Rows of an input with its tail stay aligned to 16 bytes, as the kernels' wide loads need.
TAIL_STEP = 8


@dataclass(frozen=True)
class GroupLoRA:
    """The adapters of the linear layers in one group of one layer, as a product with a block-diagonal B.

    Working copies: `a` [T, in] and `b` [out, T] (b holds the scale), where T is g rank rounded up to whole TAIL_STEPs
    by zeros. `grad_a` [g rank, in] fp32 is a view of the flat gradient; `blocks` gives for each adapted part its rows
    of b, its columns of b, and its B's gradient.
    """

    a: Tensor
    b: Tensor
    grad_a: Tensor
    blocks: list[tuple[slice, slice, Tensor]]


class LoRA:
    """All adapters of one model. `master` and `grad` are flat fp32 vectors; the optimizer sees only these two.

    In the flat vectors the A of a group's parts lie together, then their B, so that a group is one product.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rank: int,
        alpha: float,
        targets: Sequence[str] = LINEARS,
        *,
        dtype: torch.dtype,
        dropout: float = 0.0,
        seed: int = 0,
        stabilised: bool = False,
        device: torch.device = CPU,
    ) -> None:
        check_targets(spec, rank, targets)
        self.spec, self.rank, self.alpha, self.targets, self.dropout = spec, rank, alpha, tuple(targets), dropout
        self.scale = alpha / (math.sqrt(rank) if stabilised else rank)
        self.names = [f"{i}.{part}" for i in range(spec.layers) for part in LINEARS if part in targets]
        master = torch.zeros(parameters(spec, rank, targets))
        generator = torch.Generator().manual_seed(seed)
        drawn = self._views(master)
        for name in self.names:
            torch.nn.init.kaiming_uniform_(drawn[name][0], a=math.sqrt(5), generator=generator)
        self.master, self.grad = master.to(device), torch.zeros_like(master, device=device)
        self._pairs, self._grads = self._views(self.master), self._views(self.grad)
        self._groups = {(i, g): self._group(i, g, dtype) for i in range(spec.layers) for g in GROUPS}
        self.refresh()

    def _parts(self, group: str) -> list[str]:
        return [part for part in GROUPS[group] if part in self.targets]

    def _views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        views, at, rank = {}, 0, self.rank
        for layer in range(self.spec.layers):
            for group in GROUPS:
                parts, shapes = self._parts(group), self.spec.linear_shapes
                at_b = at + sum(rank * shapes[part][1] for part in parts)
                for part in parts:
                    rows, cols = shapes[part]
                    a, b = flat[at : at + rank * cols], flat[at_b : at_b + rank * rows]
                    views[f"{layer}.{part}"] = (a.view(rank, cols), b.view(rows, rank))
                    at, at_b = at + rank * cols, at_b + rank * rows
                at = at_b
        return views

    def _group(self, layer: int, group: str, dtype: torch.dtype) -> GroupLoRA | None:
        parts, shapes, rank = self._parts(group), self.spec.linear_shapes, self.rank
        if not parts:
            return None
        width, row = rank * len(parts), 0
        blocks: list[tuple[slice, slice, Tensor]] = []
        for part in GROUPS[group]:
            if part in parts:
                column = rank * len(blocks)
                rows, columns = slice(row, row + shapes[part][0]), slice(column, column + rank)
                blocks.append((rows, columns, self._grads[f"{layer}.{part}"][1]))
            row += shapes[part][0]
        first = self._grads[f"{layer}.{parts[0]}"][0]
        cols = shapes[parts[0]][1]
        grad_a = first.as_strided((width, cols), (cols, 1), first.storage_offset())
        device = self.master.device
        tail = _padded(width)
        return GroupLoRA(
            torch.zeros(tail, cols, dtype=dtype, device=device),
            torch.zeros(row, tail, dtype=dtype, device=device),
            grad_a,
            blocks,
        )

    def group(self, layer: int, group: str) -> GroupLoRA | None:
        """The adapters of a group, or None where none of its parts is a target."""
        return self._groups[layer, group]

    def tails(self) -> dict[str, int]:
        """How many columns the adapters of each group add to its input."""
        return {group: _padded(self.rank * len(self._parts(group))) for group in GROUPS}

    def refresh(self) -> None:
        """Copy the masters into the working copies; call after every change of `master`."""
        for (layer, name), group in self._groups.items():
            if group is None:
                continue
            width, cols = group.grad_a.shape
            group.a[:width].copy_(self.master.as_strided((width, cols), (cols, 1), group.grad_a.storage_offset()))
            for part, (rows, columns, _) in zip(self._parts(name), group.blocks, strict=True):
                torch.mul(self._pairs[f"{layer}.{part}"][1], self.scale, out=group.b[rows, columns])

    def pairs(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """(A, B) of every adapted linear layer by our names: views of `master`."""
        return {name: self._pairs[name] for name in self.names}

    def gradients(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The gradients of `pairs`: views of `grad`."""
        return {name: self._grads[name] for name in self.names}

    def load(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take over the values of `pairs`, whose names and shapes must be ours."""
        for name, (a, b) in self._pairs.items():
            a.copy_(pairs[name][0])
            b.copy_(pairs[name][1])
        self.refresh()


def _padded(width: int) -> int:
    return -(-width // TAIL_STEP) * TAIL_STEP


def parameters(spec: ModelSpec, rank: int, targets: Sequence[str]) -> int:
    """Trained values of an adapter."""
    return spec.layers * rank * sum(sum(spec.linear_shapes[part]) for part in targets)


def check_targets(spec: ModelSpec, rank: int, targets: Sequence[str]) -> None:
    """InputError where the adapters asked for are none."""
    unknown = [t for t in targets if t not in LINEARS]
    if unknown or not targets:
        raise InputError(
            f"unknown LoRA target {unknown[0]!r}" if unknown else "no LoRA target",
            where="--targets",
            fix=f"Choose among {', '.join(LINEARS)}.",
        )
    widest = min(min(spec.linear_shapes[t]) for t in targets)
    if not 1 <= rank <= widest:
        raise InputError(
            f"rank {rank} does not fit the matrices of Gemma 3 {spec.name}", where="--rank", fix=f"Use 1 to {widest}."
        )


def lora_from_pairs(
    spec: ModelSpec, pairs: Mapping[str, tuple[Tensor, Tensor]], alpha: float, dtype: torch.dtype
) -> LoRA:
    """A LoRA holding an adapter read from disk; ranks must agree over its layers."""
    targets = tuple(p for p in LINEARS if any(name.endswith(f".{p}") for name in pairs))
    rank = next(iter(pairs.values()))[0].shape[0]
    lora = LoRA(spec, rank, alpha, targets, dtype=dtype)
    missing = [name for name in lora.names if name not in pairs]
    if missing or any(a.shape[0] != rank for a, _ in pairs.values()):
        raise InputError(
            f"lacks {missing[0]}" if missing else "has layers of different ranks",
            where="adapter",
            fix="Use the llama.cpp engine for this adapter.",
        )
    lora.load(pairs)
    return lora


class Linear:
    """One group's product with its adapters, for one visit of one layer by one micro-batch. Keeps nothing.

    Its input lies in rows of in + T columns (`room`), the last ones filled with t = dropout(x) a^T. Where the weight is
    [out, in + T] with b as its last columns (`join`), base and adapter are one product; where it is [out, in], two.
    An `Fp8Weight` takes them together.
    """

    def __init__(self, lora: LoRA | None, layer: int, group: str, seed: int = 0) -> None:
        self._lora, self._group = lora, lora.group(layer, group) if lora is not None else None
        self._seed = seed * len(GROUPS) + list(GROUPS).index(group)

    def room(self, x: Tensor, rows: int, width: int) -> Tensor:
        """An empty input [rows, width + T] of x's dtype on its device."""
        tail = 0 if self._group is None else self._group.a.shape[0]
        return torch.empty(rows, width + tail, dtype=x.dtype, device=x.device)

    def join(self, weight: Matrix) -> None:
        """Put b into the last columns of a weight that has them."""
        if isinstance(weight, Tensor) and self._group is not None and weight.shape[1] > self._group.a.shape[1]:
            weight[:, self._group.a.shape[1] :].copy_(self._group.b)

    def fill(self, room: Tensor, chunk: int = 0) -> None:
        """Compute t from the x that lies in `room`."""
        if self._group is not None:
            x, t = self._split(room)
            mask = self._mask(x, chunk)
            torch.mm(x if mask is None else x * mask, self._group.a.t(), out=t)

    def forward(self, room: Tensor, weight: Matrix, out: Tensor) -> Tensor:
        """Write y [rows, out] = x W^T + t b^T of a filled `room` to `out` and return it."""
        x, t = self._split(room)
        if isinstance(weight, Fp8Weight):
            return weight.product(x, out, t, self._group.b) if self._group is not None else weight.product(x, out)
        if self._group is None or weight.shape[1] == room.shape[1]:
            return torch.mm(room, weight.t(), out=out)
        return torch.mm(x, weight.t(), out=out).addmm_(t, self._group.b.t())

    def backward(
        self, dy: Tensor, weight: Matrix, room: Tensor, chunk: int = 0, *, input_gradient: bool = True
    ) -> Tensor | None:
        """Add the adapters' gradients to their LoRA and return dx (None where nobody asks for it)."""
        group = self._group
        if group is None or self._lora is None:
            return _back(dy, weight) if input_gradient else None
        x, t = self._split(room)
        joined = isinstance(weight, Tensor) and weight.shape[1] == room.shape[1]
        both = _back(dy, weight) if joined and input_gradient else None
        dt = both[:, x.shape[1] :] if both is not None else torch.mm(dy, group.b)
        mask = self._mask(x, chunk)
        _add_product(group.grad_a, dt[:, : group.grad_a.shape[0]].t(), x if mask is None else x * mask)
        db_t = torch.mm(t.t(), dy)
        for rows, columns, grad_b in group.blocks:
            grad_b.add_(db_t[columns, rows].t(), alpha=self._lora.scale)
        if not input_gradient:
            return None
        if isinstance(weight, Fp8Weight) and mask is None:
            return weight.back(dy, dt, group.a)
        dx = _back(dy, weight) if both is None else both[:, : x.shape[1]]
        if mask is None:
            return dx.addmm_(dt, group.a)
        return dx.add_(torch.mm(dt, group.a).mul_(mask))

    def _split(self, room: Tensor) -> tuple[Tensor, Tensor]:
        width = room.shape[1] if self._group is None else self._group.a.shape[1]
        return room[:, :width], room[:, width:]

    def _mask(self, x: Tensor, chunk: int) -> Tensor | None:
        """The same for the same seed and chunk each time it is asked for: the backward draws it again."""
        if self._lora is None or not self._lora.dropout:
            return None
        generator = torch.Generator(x.device).manual_seed(self._seed * 65_537 + chunk)
        keep = 1.0 - self._lora.dropout
        return (
            torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(keep, generator=generator).div_(keep)
        )


def _back(dy: Tensor, weight: Matrix) -> Tensor:
    return weight.back(dy) if isinstance(weight, Fp8Weight) else torch.mm(dy, weight)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (fp32) += left right, summed in fp32 throughout where the device's products can add to it."""
    if total.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(left, right))
