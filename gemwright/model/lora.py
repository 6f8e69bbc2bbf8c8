"""LoRA adapters: fp32 masters in one flat vector, working copies in the compute dtype, gradients by hand.

Source: Hu et al. 2021 (arXiv 2106.09685). y = W x + scale B A x, with A [rank, in] and B [out, rank]; scale is
alpha / rank, or alpha / sqrt(rank) with rank stabilisation (Kalajdzievski 2023, arXiv 2312.03732).
DoRA (Liu et al. 2024, arXiv 2402.09353) multiplies each row of y by m / ||W + scale B A||, with m [out] learned and the
norm a constant in the backward (section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gemwright.errors import InputError, needed
from gemwright.kernels.dispatch import has_triton
from gemwright.kernels.products import product
from gemwright.layout import GROUPS, TAIL_STEP, adapter_parameters, rounded
from gemwright.model.fp8 import Fp8Weight
from gemwright.model.residency import Matrix, Residency
from gemwright.spec import LINEARS, ModelSpec

CPU = torch.device("cpu")
# Rows of a frozen weight whose norms are taken at once, for which a CPU makes a copy in fp32.
_NORM_ROWS = 1024


@dataclass(frozen=True)
class GroupLoRA:
    """The adapters of the linear layers in one group of one layer, as a product with a block-diagonal B.

    `a` [g rank, in] is a working copy, `grad_a` its gradient, views of flat vectors. `b` [out, T] is a working copy
    that holds the scale, where T is g rank rounded up to whole TAIL_STEPs by zeros; on a GPU all layers share one,
    which is valid during a visit in fp8. `blocks` gives for each adapted part its rows of b, its columns of b, and its
    B's gradient; `magnitudes`, with DoRA, its rows, its m and the gradient of m.
    """

    a: Tensor
    b: Tensor
    tail: int
    grad_a: Tensor
    blocks: list[tuple[slice, slice, Tensor]]
    magnitudes: list[tuple[slice, Tensor, Tensor]]


class LoRA:
    """All adapters of one model. `master` and `grad` are flat fp32 vectors; the optimizer sees only these two.

    In the flat vectors the A of a group's parts lie together, then their B, so that a group is one product. The
    magnitudes of DoRA follow after all pairs; `measure` gives a new adapter's their values.
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
        dora: bool = False,
        device: torch.device = CPU,
    ) -> None:
        check_targets(spec, rank, targets)
        self.spec, self.rank, self.alpha, self.targets, self.dropout = spec, rank, alpha, tuple(targets), dropout
        self.stabilised, self.dora = stabilised, dora
        self.scale = alpha / (math.sqrt(rank) if stabilised else rank)
        self.names = [f"{i}.{part}" for i in range(spec.layers) for part in LINEARS if part in targets]
        master = torch.zeros(adapter_parameters(spec, rank, targets, dora=dora))
        generator = torch.Generator().manual_seed(seed)
        drawn = self._views(master)
        for name in self.names:
            torch.nn.init.kaiming_uniform_(drawn[name][0], a=math.sqrt(5), generator=generator)
        self.master, self.grad = master.to(device), torch.zeros_like(master, device=device)
        self._copy = self.master.to(dtype) if dtype != self.master.dtype else self.master
        self._pairs, self._grads = self._views(self.master), self._views(self.grad)
        self._magnitudes, self._magnitude_grads = self._magnitude_views(self.master), self._magnitude_views(self.grad)
        self._squares: dict[tuple[int, str], Tensor] = {}
        self._gains: dict[tuple[int, str], Tensor] = {}
        self._rooms: dict[str, Tensor] = {}
        self._tables: dict[tuple[int, ...], tuple[Tensor, int]] = {}
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

    def _magnitude_views(self, flat: Tensor) -> dict[str, Tensor]:
        if not self.dora:
            return {}
        rows = [self.spec.linear_shapes[name.split(".")[1]][0] for name in self.names]
        return dict(zip(self.names, flat[-sum(rows) :].split(rows), strict=True))

    def _group(self, layer: int, group: str, dtype: torch.dtype) -> GroupLoRA | None:
        parts, shapes, rank = self._parts(group), self.spec.linear_shapes, self.rank
        if not parts:
            return None
        width, row = rank * len(parts), 0
        blocks: list[tuple[slice, slice, Tensor]] = []
        magnitudes: list[tuple[slice, Tensor, Tensor]] = []
        for part in GROUPS[group]:
            if part in parts:
                column = rank * len(blocks)
                rows, columns = slice(row, row + shapes[part][0]), slice(column, column + rank)
                name = f"{layer}.{part}"
                blocks.append((rows, columns, self._grads[name][1]))
                if self.dora:
                    magnitudes.append((rows, self._magnitudes[name], self._magnitude_grads[name]))
            row += shapes[part][0]
        first = self._grads[f"{layer}.{parts[0]}"][0]
        cols, tail = shapes[parts[0]][1], rounded(width, TAIL_STEP)
        place = ((width, cols), (cols, 1), first.storage_offset())
        if self.master.is_cuda:
            if group not in self._rooms:
                self._rooms[group] = torch.zeros(row, tail, dtype=dtype, device=self.master.device)
            b = self._rooms[group]
        else:
            b = torch.zeros(row, tail, dtype=dtype)
        return GroupLoRA(self._copy.as_strided(*place), b, tail, self.grad.as_strided(*place), blocks, magnitudes)

    def group(self, layer: int, group: str) -> GroupLoRA | None:
        """The adapters of a group, or None where none of its parts is a target."""
        return self._groups[layer, group]

    def tails(self) -> dict[str, int]:
        """How many columns the adapters of each group add to its input."""
        return {group: rounded(self.rank * len(self._parts(group)), TAIL_STEP) for group in GROUPS}

    def measure(self, residency: Residency) -> None:
        """Square the frozen rows that DoRA's norms are made of; magnitudes of zero, as a new adapter's, begin at them.

        Visits every layer once, and none for plain LoRA.
        """
        for layer in range(self.spec.layers if self.dora else 0):
            matrices = residency.layer(layer).matrices
            for name in GROUPS:
                group = self._groups[layer, name]
                if group is not None:
                    rows = torch.split(_plain(matrices[name])[:, : group.a.shape[1]], _NORM_ROWS)
                    norms = [torch.linalg.vector_norm(w, dim=1, dtype=torch.float32) for w in rows]
                    square = self._squares[layer, name] = torch.cat(norms).square_()
                    for own, magnitude, _ in group.magnitudes:
                        if not magnitude.any():
                            magnitude.copy_(square[own].sqrt())
            residency.release(layer)
        self._gains.clear()

    def gain(self, layer: int, name: str) -> Tensor | None:
        """DoRA's factor for each row of a group, fp32 [out], as of the last `join`; None for plain LoRA."""
        return self._gains.get((layer, name))

    def refresh(self) -> None:
        """Copy the masters into the working copies; call after every change of `master`."""
        self._gains.clear()
        if self._copy is not self.master:
            self._copy.copy_(self.master)
        for (layer, name), group in self._groups.items():
            if group is not None and not self.master.is_cuda:
                for part, (rows, columns, _) in zip(self._parts(name), group.blocks, strict=True):
                    torch.mul(self._pairs[f"{layer}.{part}"][1], self.scale, out=group.b[rows, columns])

    def join(self, layer: int, matrices: Mapping[str, Matrix]) -> None:
        """Make ready for a visit of a layer: its B, scaled, go into the last columns of matrices with room for them.

        With DoRA the gains are computed from them, once after each `refresh`.
        """
        self._put_b(layer, matrices)
        for name in GROUPS if self.dora else ():
            group = self._groups[layer, name]
            if group is not None and (layer, name) not in self._gains:
                self._gains[layer, name] = self._new_gain(group, self._squares[layer, name], _plain(matrices[name]))

    def _new_gain(self, group: GroupLoRA, square: Tensor, weight: Tensor) -> Tensor:
        """m / ||W + scale B A|| of each row, and 1 for rows without an adapter.

        The norm's square is ||w||^2 + 2 w A^T b + b A A^T b for a row w with its scaled b.
        """
        width, cols = group.a.shape
        a, b = group.a.float(), (weight[:, cols:] if weight.shape[1] > cols else group.b)[:, :width].float()
        crossed = torch.mm(weight[:, :cols], group.a.t()).mul(2.0).add(torch.mm(b, torch.mm(a, a.t())))
        norm = (square + (crossed * b).sum(1)).clamp_min_(1e-30).sqrt_()
        gain = torch.ones_like(norm)
        for rows, magnitude, _ in group.magnitudes:
            torch.div(magnitude, norm[rows], out=gain[rows])
        return gain

    def _put_b(self, layer: int, matrices: Mapping[str, Matrix]) -> None:
        tails = {name: tail for name in GROUPS if (tail := self._tail(layer, name, matrices[name])) is not None}
        if not tails:
            return
        first = next(iter(tails.values()))
        if first.is_cuda and first.dtype == torch.bfloat16 and has_triton(first.device):
            from gemwright.kernels.triton_join import join

            key = (layer, *(tail.data_ptr() for tail in tails.values()))  # each may have moved without the others
            if key not in self._tables:
                self._tables[key] = self._table(layer, tails)
            table, rows = self._tables[key]
            join(self.master, table, self.scale, self.rank, max(self.tails().values()), rows)
            return
        for name, tail in tails.items():
            tail.zero_()
            for part, (rows_of, columns, _) in zip(
                self._parts(name), needed(self._groups[layer, name]).blocks, strict=True
            ):
                tail[rows_of, columns] = self._pairs[f"{layer}.{part}"][1] * self.scale

    def _tail(self, layer: int, name: str, matrix: Matrix) -> Tensor | None:
        """Where b goes for a visit: behind the rows of the matrix, or beside one in fp8; None where it lies ready."""
        group = self._groups[layer, name]
        if group is None:
            return None
        if isinstance(matrix, Tensor):
            return matrix[:, group.a.shape[1] :] if matrix.shape[1] > group.a.shape[1] else None
        return group.b

    def _table(self, layer: int, targets: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """What `triton_join.join` is told of a layer, and the most rows of a part."""
        entries, tails = [], self.tails()
        for name, tail in targets.items():
            row, column, pitch = 0, 0, tail.stride(0)
            for part in GROUPS[name]:
                rows, adapted = self.spec.linear_shapes[part][0], part in self.targets
                at = int(self._pairs[f"{layer}.{part}"][1].storage_offset()) if adapted else -1
                address = tail.data_ptr() + tail.element_size() * row * pitch
                entries.append((at, rows, address, pitch, column, tails[name]))
                row, column = row + rows, column + self.rank * adapted
        return torch.tensor(entries).to(self.master.device), max(entry[1] for entry in entries)

    def pairs(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """(A, B) of every adapted linear layer by our names: views of `master`."""
        return {name: self._pairs[name] for name in self.names}

    def gradients(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The gradients of `pairs`: views of `grad`."""
        return {name: self._grads[name] for name in self.names}

    def magnitudes(self) -> Mapping[str, Tensor]:
        """DoRA's m [out] of every adapted linear layer by our names, views of `master`; empty for plain LoRA."""
        return dict(self._magnitudes)

    def magnitude_gradients(self) -> Mapping[str, Tensor]:
        """The gradients of `magnitudes`: views of `grad`."""
        return dict(self._magnitude_grads)

    def load(self, pairs: Mapping[str, tuple[Tensor, Tensor]], magnitudes: Mapping[str, Tensor] | None = None) -> None:
        """Take over the values of `pairs` and, with DoRA, `magnitudes`, whose names and shapes must be ours."""
        for name, (a, b) in self._pairs.items():
            a.copy_(pairs[name][0])
            b.copy_(pairs[name][1])
        for name, magnitude in (magnitudes or {}).items():
            self._magnitudes[name].copy_(magnitude)
        self.refresh()


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
    spec: ModelSpec,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    alpha: float,
    dtype: torch.dtype,
    magnitudes: Mapping[str, Tensor] | None = None,
) -> LoRA:
    """A LoRA holding an adapter read from disk, with DoRA's `magnitudes` where it has some; one rank for all layers.

    `alpha` is the scale times the rank, however the adapter came by it.
    """
    targets = tuple(p for p in LINEARS if any(name.endswith(f".{p}") for name in pairs))
    rank = next(iter(pairs.values()))[0].shape[0]
    lora = LoRA(spec, rank, alpha, targets, dtype=dtype, dora=bool(magnitudes))
    missing = [name for name in lora.names if name not in pairs]
    if missing or any(a.shape[0] != rank for a, _ in pairs.values()):
        raise InputError(
            f"lacks {missing[0]}" if missing else "has layers of different ranks",
            where="adapter",
            fix="Use the llama.cpp engine for this adapter.",
        )
    lora.load(pairs, magnitudes)
    return lora


class Linear:
    """One group's product with its adapters, for one visit of one layer by one micro-batch. Keeps nothing.

    Its input lies in rows of in + T columns (`room`), the last ones filled with t = dropout(x) a^T. Where the weight is
    [out, in + T] with b as its last columns (`LoRA.join`), base and adapter are one product; else they are two. An
    `Fp8Weight` takes them together. DoRA's gain multiplies what comes out of it and what goes back into it.
    """

    def __init__(self, lora: LoRA | None, layer: int, group: str, seed: int = 0) -> None:
        self._lora, self._group = lora, lora.group(layer, group) if lora is not None else None
        self._seed = seed * len(GROUPS) + list(GROUPS).index(group)
        self._place = layer, group

    def room(self, x: Tensor, rows: int, width: int) -> Tensor:
        """An empty input [rows, width + T] of x's dtype on its device."""
        tail = 0 if self._group is None else self._group.tail
        return torch.empty(rows, width + tail, dtype=x.dtype, device=x.device)

    def fill(self, room: Tensor, chunk: int = 0) -> None:
        """Compute t from the x that lies in `room`."""
        if self._group is not None:
            x, t = self._split(room)
            mask, width = self._mask(x, chunk), self._group.a.shape[0]
            torch.mm(x if mask is None else x * mask, self._group.a.t(), out=t[:, :width])
            if width < t.shape[1]:
                t[:, width:] = 0

    def forward(self, room: Tensor, weight: Matrix, out: Tensor | None = None) -> Tensor:
        """y [rows, out] = x W^T + t b^T of a filled `room`, times the gain; in `out` where that is given."""
        x, t = self._split(room)
        if isinstance(weight, Fp8Weight):
            out = x.new_empty(len(x), weight.shape[0]) if out is None else out
            weight.product(x, out, *(() if self._group is None else (t, self._group.b)))
        elif self._group is None or weight.shape[1] == room.shape[1]:
            out = product(room, weight, out)
        else:
            out = product(x, weight, out).addmm_(t, self._group.b.t())
        return out if (gain := self._gain()) is None else out.mul_(gain)

    def gradient_room(self, y: Tensor) -> Tensor:
        """Where the gradient of y may be written: over y, unless the magnitudes' gradient still needs it."""
        return y if self._gain() is None else torch.empty_like(y)

    def backward(
        self, dy: Tensor, weight: Matrix, room: Tensor, y: Tensor, chunk: int = 0, *, input_gradient: bool = True
    ) -> Tensor | None:
        """Add the adapters' gradients to their LoRA and return dx (None where nobody asks for it).

        `y` is the forward's output. With DoRA `dy` and `y` are overwritten.
        """
        group = self._group
        if group is None or self._lora is None:
            return _back(dy, weight) if input_gradient else None
        if (gain := self._gain()) is not None:
            _add_magnitudes(group, dy, y)
            dy.mul_(gain)
        x, t = self._split(room)
        joined = isinstance(weight, Tensor) and weight.shape[1] == room.shape[1]
        both = _back(dy, weight) if joined and input_gradient else None
        if both is not None:
            dt = both[:, x.shape[1] :]
        elif isinstance(weight, Tensor) and joined:
            dt = torch.mm(dy, weight[:, x.shape[1] :])
        else:
            dt = torch.mm(dy, group.b)
        mask, width = self._mask(x, chunk), group.a.shape[0]
        _add_product(group.grad_a, dt[:, :width].t(), x if mask is None else x * mask)
        self._add_b(group, dy, t, self._lora.scale)
        if not input_gradient:
            return None
        if isinstance(weight, Fp8Weight) and mask is None:
            a = group.a if dt.shape[1] == width else F.pad(group.a, (0, 0, 0, dt.shape[1] - width))
            return weight.back(dy, dt, a)
        dx = _back(dy, weight) if both is None else both[:, : x.shape[1]]
        if mask is None:
            return dx.addmm_(dt[:, :width], group.a)
        return dx.add_(torch.mm(dt[:, :width], group.a).mul_(mask))

    def _gain(self) -> Tensor | None:
        return None if self._lora is None else self._lora.gain(*self._place)

    @staticmethod
    def _add_b(group: GroupLoRA, dy: Tensor, t: Tensor, scale: float) -> None:
        if dy.is_cuda or dy.dtype == torch.float32:
            for rows, columns, grad_b in group.blocks:
                _add_product(grad_b, dy[:, rows].t(), t[:, columns], scale)
            return
        db_t = torch.mm(t.t(), dy)  # in bf16 a CPU is faster with the thin side first
        for rows, columns, grad_b in group.blocks:
            grad_b.add_(db_t[columns, rows].t(), alpha=scale)

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


def _plain(matrix: Matrix) -> Tensor:
    """DoRA's norms need the rows themselves; `train.config` refuses it together with fp8."""
    if not isinstance(matrix, Tensor):
        raise TypeError("DoRA over weights in fp8")
    return matrix


def _back(dy: Tensor, weight: Matrix) -> Tensor:
    return weight.back(dy) if isinstance(weight, Fp8Weight) else torch.mm(dy, weight)


def _add_magnitudes(group: GroupLoRA, dy: Tensor, y: Tensor) -> None:
    """Add the gradients of a group's m, overwriting y, which is linear in m, so that dm = sum(dy y) / m."""
    total = y.mul_(dy).sum(0, dtype=torch.float32)
    for rows, magnitude, gradient in group.magnitudes:
        gradient.add_(torch.where(magnitude == 0, 0.0, total[rows] / magnitude))


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """total (fp32) += scale left right, summed in fp32 throughout where the device's products can add to it."""
    if left.dtype == torch.float32:
        total.addmm_(left, right, alpha=scale)
    elif total.is_cuda:
        torch.addmm(total, left, right, alpha=scale, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(left, right), alpha=scale)
