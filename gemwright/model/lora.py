"""LoRA adapters: fp32 masters in one flat vector, working copies in the compute dtype, gradients by hand.

Source: Hu et al. 2021 (arXiv 2106.09685). y = W x + (alpha / rank) B A x, with A [rank, in] and B [out, rank].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemwright.errors import InputError
from gemwright.model.residency import GROUPS
from gemwright.spec import LINEARS, ModelSpec


@dataclass
class GroupLoRA:
    """The adapters of the linear layers in one group of one layer, as a product with a block-diagonal B.

    `a` [g*rank, in] and `b` [out, g*rank] are working copies (b holds the scale); `blocks` says which rows of b and
    which of its columns belong to each adapted part, with the master and gradient of its A and B.
    """

    a: Tensor
    b: Tensor
    blocks: list[tuple[slice, slice, str]]


class LoRA:
    """All adapters of one model. `master` and `grad` are flat fp32 vectors; the optimizer sees only these two."""

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
    ) -> None:
        _check(spec, rank, targets)
        self.spec, self.rank, self.alpha, self.targets, self.dropout = spec, rank, alpha, tuple(targets), dropout
        self.scale = alpha / rank
        self.names = [f"{i}.{part}" for i in range(spec.layers) for part in LINEARS if part in targets]
        sizes = [rank * sum(spec.linear_shapes[name.split(".")[1]]) for name in self.names]
        self.master, self.grad = torch.zeros(sum(sizes)), torch.zeros(sum(sizes))
        self._pairs, self._grads = self._views(self.master), self._views(self.grad)
        self._groups = {(i, g): self._group(i, g, dtype) for i in range(spec.layers) for g in GROUPS}
        generator = torch.Generator().manual_seed(seed)
        for a, _ in self._pairs.values():
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.refresh()

    def _views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        views, at = {}, 0
        for name in self.names:
            rows, cols = self.spec.linear_shapes[name.split(".")[1]]
            middle, end = at + self.rank * cols, at + self.rank * (cols + rows)
            views[name] = (flat[at:middle].view(self.rank, cols), flat[middle:end].view(rows, self.rank))
            at = end
        return views

    def _group(self, layer: int, group: str, dtype: torch.dtype) -> GroupLoRA | None:
        blocks, row, column = [], 0, 0
        for part in GROUPS[group]:
            rows, cols = self.spec.linear_shapes[part]
            if part in self.targets:
                blocks.append((slice(row, row + rows), slice(column, column + self.rank), f"{layer}.{part}"))
                column += self.rank
            row += rows
        if not blocks:
            return None
        return GroupLoRA(torch.zeros(column, cols, dtype=dtype), torch.zeros(row, column, dtype=dtype), blocks)

    def group(self, layer: int, group: str) -> GroupLoRA | None:
        """The adapters of a group, or None where none of its parts is a target."""
        return self._groups[layer, group]

    def refresh(self) -> None:
        """Copy the masters into the working copies; call after every change of `master`."""
        for group in filter(None, self._groups.values()):
            for rows, columns, name in group.blocks:
                a, b = self._pairs[name]
                group.a[columns] = a
                group.b[rows, columns] = b * self.scale

    def add_gradient(self, group: GroupLoRA, da: Tensor, db: Tensor) -> None:
        """Accumulate gradients with respect to the working copies into `grad`, taking back the scale."""
        for rows, columns, name in group.blocks:
            grad_a, grad_b = self._grads[name]
            grad_a.add_(da[columns])
            grad_b.add_(db[rows, columns], alpha=self.scale)

    def pairs(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """(A, B) of every adapted linear layer by our names: views of `master`."""
        return self._pairs

    def load(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take over the values of `pairs`, whose names and shapes must be ours."""
        for name, (a, b) in self._pairs.items():
            a.copy_(pairs[name][0])
            b.copy_(pairs[name][1])
        self.refresh()


def _check(spec: ModelSpec, rank: int, targets: Sequence[str]) -> None:
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


class LinearPass:
    """One group's matrix product with its adapters: `forward` keeps what `backward` needs, and nothing of the weight.

    x [N, in], y [N, out], all in the compute dtype.
    """

    def __init__(self, lora: LoRA | None, layer: int, group: str, generator: torch.Generator | None) -> None:
        self._lora = lora
        self._group = lora.group(layer, group) if lora is not None else None
        self._generator = generator if lora is not None and lora.dropout else None

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """y = x W^T + t b^T with t = dropout(x) a^T."""
        y = torch.mm(x, weight.t())
        if self._group is None:
            return y
        self._x, self._mask = x, self._new_mask(x)
        self._t = torch.mm(x if self._mask is None else x * self._mask, self._group.a.t())
        return y.addmm_(self._t, self._group.b.t())

    def backward(self, dy: Tensor, weight: Tensor, *, input_gradient: bool = True) -> Tensor | None:
        """Add the adapters' gradients to their LoRA and return dx (None where nobody asks for it)."""
        dx = torch.mm(dy, weight) if input_gradient else None
        if self._group is None or self._lora is None:
            return dx
        dt = torch.mm(dy, self._group.b)
        x = self._x if self._mask is None else self._x * self._mask
        self._lora.add_gradient(self._group, torch.mm(dt.t(), x), torch.mm(self._t.t(), dy).t())
        if dx is None or self._mask is None:
            return dx.addmm_(dt, self._group.a) if dx is not None else None
        return dx.add_(torch.mm(dt, self._group.a).mul_(self._mask))

    def _new_mask(self, x: Tensor) -> Tensor | None:
        if self._generator is None or self._lora is None:
            return None
        keep = 1.0 - self._lora.dropout
        return torch.empty_like(x).bernoulli_(keep, generator=self._generator).div_(keep)
