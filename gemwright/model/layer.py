"""One decoder layer, forward and backward written out, so that a layer can stream, recompute or be kept at will.

Legend: N tokens of a packed row, M of them wanted, D hidden, H heads, K kv heads, E head size, F mlp width.
Source: Gemma 3 technical report (arXiv 2503.19786); norms before and after attention and MLP, q/k norm, GeGLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemwright.errors import needed
from gemwright.kernels.attend import Attention, Kept
from gemwright.kernels.dispatch import (
    geglu,
    geglu_backward,
    norm_add_norm,
    norm_rope,
    norm_rope_backward,
    rms_norm,
    rms_norm_backward,
)
from gemwright.kernels.heads import Table, split_heads
from gemwright.layout import GROUPS, Keep
from gemwright.model.lora import Linear, LoRA
from gemwright.model.residency import LayerWeights
from gemwright.spec import ModelSpec


@dataclass
class Chunk:
    """What some tokens of a layer hold from the attention's end to the layer's.

    `a` and `d` [n, D] the outputs of attention and MLP, `middle` = x + norm(a); `attended`, `normed` and `wide` the
    inputs of the products with their tails.
    """

    attended: Tensor
    a: Tensor
    middle: Tensor
    rstd_a: Tensor
    normed: Tensor
    rstd: Tensor
    gate_up: Tensor
    activated: Tensor | None
    wide: Tensor
    d: Tensor


class LayerPass:
    """One visit of one layer by one micro-batch: `forward`, then `backward` once.

    It keeps activations only: the weights come anew with each call, since a streamed layer's buffer is recycled.
    All but the attention runs in chunks of `chunk` tokens, so that what is wide never exists for a long row at once.
    """

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        table: Table,
        attention: Attention,
        lora: LoRA | None = None,
        *,
        seed: int = 0,
        chunk: int = 1 << 30,
    ) -> None:
        self.spec, self.table, self.attention, self._chunk, self._first = spec, table, attention, chunk, index == 0
        self._lora, self._index = lora, index
        self._linears = {group: Linear(lora, index, group, seed) for group in GROUPS}
        self._wanted: Tensor | None = None
        self._entries: list[tuple[Tensor, Tensor]] = []
        self._chunks: list[Chunk] = []
        self._qkv: Tensor | None = None
        self._v: Tensor | None = None
        self._heads: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._attended: Tensor | None = None
        self._kept: Kept = ()
        self._a: Tensor | None = None
        self._d: Tensor | None = None
        self._gate_up: Tensor | None = None
        self._rstd_d: list[Tensor] = []
        self._given: list[str] = []
        self._states: Kept = ()

    def forward(
        self, x_ND: Tensor, weights: LayerWeights, wanted: Tensor | None = None, keep: Keep = Keep.ALL
    ) -> Tensor:
        """The layer's output [N, D].

        `wanted` (int64 [M]) asks for the output [M, D] of those positions only: what follows the attention is then
        computed for them alone, as the last layer needs where few positions carry a label.
        """
        self._wanted = wanted
        if self._lora is not None:
            self._lora.join(self._index, weights.matrices)
        self._attend(x_ND, weights, hold=keep == Keep.ALL)
        if keep < Keep.ALL:
            self._heads = self._v = None
        if keep < Keep.HEADS:
            self._qkv = None
        x = x_ND if wanted is None else x_ND.index_select(0, wanted)
        y = torch.empty_like(x)
        between = Keep.INPUT < keep < Keep.ALL
        a, d = (torch.empty_like(x), torch.empty_like(x)) if between else (None, None)
        gate_up = x.new_empty(len(x), 2 * self.spec.mlp) if keep == Keep.PRODUCTS else None
        for index, at in enumerate(self._slices(x)):
            chunk = self._pass_chunk(index, at, x[at], weights, a, d, gate_up)
            norm, eps = weights.norms["mlp_post_norm"], self.spec.norm_eps
            self._rstd_d.append(rms_norm(chunk.d, norm, eps, residual=chunk.middle, out=y[at])[1])
            if keep == Keep.ALL:
                self._chunks.append(chunk)
            del chunk
        self._a, self._d, self._gate_up = a, d, gate_up
        if keep == Keep.INPUT:
            self._attended, self._kept = None, ()
        return y

    def export(self) -> list[Tensor]:
        """Give away the large tensors that are held, to be put elsewhere until `restore` brings them back."""
        names = ("_attended", "_a", "_d", "_qkv", "_gate_up")
        held = {name: getattr(self, name) for name in names}
        given = {name: tensor for name, tensor in held.items() if tensor is not None}
        for name in given:
            setattr(self, name, None)
        kept, self._kept = self._kept, ()
        self._given, self._states = list(given), kept[1:]
        return [*given.values(), *kept[:1]]

    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Take back what `export` gave, or copies of it, in its order."""
        for name, tensor in zip(self._given, tensors, strict=False):
            setattr(self, name, tensor)
        self._kept = (*tensors[len(self._given) :], *self._states)

    def backward(self, dy: Tensor, x_ND: Tensor, weights: LayerWeights) -> Tensor | None:
        """The gradient of the layer's input [N, D] from that of its output ([M, D] where only those were wanted).

        `x_ND` is the forward's input; `dy` is overwritten. None for the first layer, below which nothing learns.
        """
        if self._lora is not None:
            self._lora.join(self._index, weights.matrices)
        self._attend(x_ND, weights, hold=False)
        wanted = self._wanted
        x = x_ND if wanted is None else x_ND.index_select(0, wanted)
        slices = self._slices(x)
        dattended = x.new_empty(len(x), self.spec.heads * self.spec.head_dim) if len(slices) > 1 else None
        for index, at in enumerate(slices):
            chunk = self._chunks.pop(0) if self._chunks else self._pass_chunk(index, at, x[at], weights)
            part = self._chunk_backward(index, chunk, dy[at], weights)
            del chunk
            if dattended is None:
                dattended = part
            else:
                dattended[at] = part
        dattended = needed(dattended)
        if wanted is not None:
            dattended, dy = everywhere(dattended, wanted, len(x_ND)), everywhere(dy, wanted, len(x_ND))
        (q, k, v), out = self._qkv_heads(), self._out()
        do = torch.unflatten(dattended, 1, out.shape[1:])
        gradients = self.attention.backward(do, q, k, v, out, self._kept)
        del q, k, v, out, do, dattended
        self._attended, self._kept = None, ()
        for index, at in enumerate(self._slices(x_ND)):
            self._entry_backward(index, at, gradients, dy[at], x_ND[at], weights)
        return None if self._first else dy

    def _slices(self, x: Tensor) -> list[slice]:
        return [slice(at, min(at + self._chunk, len(x))) for at in range(0, len(x), self._chunk)]

    def _enter(self, index: int, x: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
        """The joint projection's input with its tail, and its rstd."""
        room = self._linears["qkv"].room(x, *x.shape)
        _, rstd = rms_norm(x, weights.norms["attn_norm"], self.spec.norm_eps, out=room[:, : x.shape[1]])
        self._linears["qkv"].fill(room, index)
        return room, rstd

    def _attend(self, x: Tensor, weights: LayerWeights, *, hold: bool) -> None:
        """Compute what is missing of the joint projection, the heads and the attention's output."""
        spec, norms, attended = self.spec, weights.norms, None
        if self._attended is None and len(x) <= self._chunk:  # before what goes again, whose place would stay a gap
            attended = self._linears["o"].room(x, len(x), spec.heads * spec.head_dim)
        if self._qkv is None:
            matrix, slices = weights.matrices["qkv"], self._slices(x)
            # Taken before the input's room, which is given back first; on a CPU the product may bring its own.
            self._qkv = x.new_empty(len(x), matrix.shape[0]) if len(slices) > 1 or x.is_cuda else None
            for index, at in enumerate(slices):
                entry = self._enter(index, x[at], weights)
                qkv = self._linears["qkv"].forward(entry[0], matrix, None if self._qkv is None else self._qkv[at])
                if hold:
                    self._entries.append(entry)
            self._qkv = qkv if self._qkv is None else self._qkv
        if self._heads is None:
            shape = (spec.heads, spec.kv_heads, spec.norm_eps)
            self._heads = norm_rope(self._qkv, norms["q_norm"], norms["k_norm"], self.table, *shape)
            self._v = split_heads(self._qkv, spec.heads, spec.kv_heads)[2]
            if len(x) > self._chunk:  # a long row computes the raw heads again, a chunk at a time
                self._v, self._qkv = self._v.contiguous(), None
        if self._attended is None:
            out, self._kept = self.attention.forward(*self._qkv_heads())
            self._attended = self._linears["o"].room(x, len(x), out[0].numel()) if attended is None else attended
            self._out().copy_(out)

    def _qkv_heads(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, *_ = needed(self._heads)
        return q, k, needed(self._v)

    def _out(self) -> Tensor:
        """The attention's output [N, H, E] as a view."""
        spec, attended = self.spec, needed(self._attended)
        return torch.unflatten(attended[:, : spec.heads * spec.head_dim], 1, (spec.heads, spec.head_dim))

    def _pass_chunk(
        self,
        index: int,
        at: slice,
        x: Tensor,
        weights: LayerWeights,
        a: Tensor | None = None,
        d: Tensor | None = None,
        wide_out: Tensor | None = None,
    ) -> Chunk:
        """Some tokens' way from the attention's output to the layer's; products go to their rows of a, d and wide_out.

        Products that are kept from an earlier visit are not computed again.
        """
        linears, matrices, norms = self._linears, weights.matrices, weights.norms
        whole, wanted = needed(self._attended), self._wanted
        attended = whole[at] if wanted is None else whole.index_select(0, wanted[at])
        if self._a is None or wanted is not None:
            linears["o"].fill(attended, index)
        if self._a is None:
            rows = linears["o"].forward(attended, matrices["o"], None if a is None else a[at])
        else:
            rows = self._a[at]
        normed = linears["gate_up"].room(x, *x.shape)
        middle, rstd_a, _, rstd = norm_add_norm(
            rows, x, norms["attn_post_norm"], norms["mlp_norm"], self.spec.norm_eps, out=normed[:, : x.shape[1]]
        )
        linears["gate_up"].fill(normed, index)
        if self._gate_up is None:
            out = None if wide_out is None else wide_out[at]
            gate_up = linears["gate_up"].forward(normed, matrices["gate_up"], out)
        else:
            gate_up = self._gate_up[at]
        wide = linears["down"].room(x, len(x), self.spec.mlp)
        activated = geglu(gate_up, wide[:, : self.spec.mlp])
        linears["down"].fill(wide, index)
        if self._d is None:
            down = linears["down"].forward(wide, matrices["down"], None if d is None else d[at])
        else:
            down = self._d[at]
        return Chunk(attended, rows, middle, rstd_a, normed, rstd, gate_up, activated, wide, down)

    def _chunk_backward(self, index: int, chunk: Chunk, dy: Tensor, weights: LayerWeights) -> Tensor:
        """From the gradient of the layer's output to that of the attention's, returned, and of x past it, in `dy`."""
        linears, matrices, norms = self._linears, weights.matrices, weights.norms
        dd = rms_norm_backward(dy, chunk.d, self._rstd_d[index], norms["mlp_post_norm"])
        dwide = needed(linears["down"].backward(dd, matrices["down"], chunk.wide, chunk.d, index))
        dboth, both = linears["gate_up"].gradient_room(chunk.gate_up), chunk.gate_up
        geglu_backward(dwide, both, chunk.activated, dboth)
        del dwide
        dnormed = needed(linears["gate_up"].backward(dboth, matrices["gate_up"], chunk.normed, both, index))
        rms_norm_backward(dnormed, chunk.middle, chunk.rstd, norms["mlp_norm"], add=dy, out=dy)
        da = rms_norm_backward(dy, chunk.a, chunk.rstd_a, norms["attn_post_norm"])
        return needed(linears["o"].backward(da, matrices["o"], chunk.attended, chunk.a, index))

    def _entry_backward(
        self,
        index: int,
        at: slice,
        gradients: tuple[Tensor, Tensor, Tensor],
        dy: Tensor,
        x: Tensor,
        weights: LayerWeights,
    ) -> None:
        """From the gradients of some tokens' heads to that of the layer's input, added to `dy`."""
        linear, matrix, norms = self._linears["qkv"], weights.matrices["qkv"], weights.norms
        room, rstd = self._entries[index] if self._entries else self._enter(index, x, weights)
        known = self._qkv
        qkv = linear.forward(room, matrix) if known is None else known[at]
        dq, dk, dv = (gradient[at] for gradient in gradients)
        *_, rstd_q, rstd_k = needed(self._heads)
        table = (self.table[0][at], self.table[1][at])
        dqkv = norm_rope_backward(
            dq, dk, dv, qkv, (rstd_q[at], rstd_k[at]), norms["q_norm"], norms["k_norm"], table, torch.empty_like(qkv)
        )
        dnormed = linear.backward(dqkv, matrix, room, qkv, index, input_gradient=not self._first)
        if dnormed is not None:
            rms_norm_backward(dnormed, x, rstd, norms["attn_norm"], add=dy, out=dy)


def everywhere(gradient: Tensor, wanted: Tensor, rows: int) -> Tensor:
    """A gradient of the wanted positions, with zeros at all others."""
    return gradient.new_zeros(rows, gradient.shape[1]).index_copy_(0, wanted, gradient)
