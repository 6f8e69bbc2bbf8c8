"""One decoder layer, forward and backward written out, so that a layer can stream, recompute or be kept at will.

Legend: N tokens of a packed row, D hidden, H heads, K kv heads, E head size, F mlp width.
Source: Gemma 3 technical report (arXiv 2503.19786); norms before and after attention and MLP, q/k norm, GeGLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gemwright.kernels.attention import Block, attention, attention_backward
from gemwright.kernels.dispatch import (
    geglu,
    geglu_backward,
    norm_add_norm,
    norm_rope,
    norm_rope_backward,
    rms_norm,
    rms_norm_backward,
)
from gemwright.kernels.heads import split_heads
from gemwright.model.lora import LinearPass, LoRA
from gemwright.model.residency import LayerWeights
from gemwright.spec import ModelSpec

Table = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class LayerPass:
    """One visit of one layer by one micro-batch; `backward` may be called once after `forward`.

    It keeps activations only: the weights come anew with each call, since a streamed layer's buffer is recycled.
    """

    def __init__(self, spec: ModelSpec, index: int, table: Table, lora: LoRA | None, seed: int = 0) -> None:
        self.spec, self.table, self._first = spec, table, index == 0
        generator = torch.Generator().manual_seed(seed) if lora is not None and lora.dropout else None
        self.qkv, self.o, self.gate_up, self.down = (
            LinearPass(lora, index, group, generator) for group in ("qkv", "o", "gate_up", "down")
        )

    def forward(self, x_ND: Tensor, weights: LayerWeights, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """The layer's output [N, D]; `attend` maps (q [N, H, E] scaled, k, v [N, K, E]) to [N, H, E].

        `wanted` (int64 [M]) asks for the output [M, D] of those positions only: what follows the attention is then
        computed for them alone, as the last layer needs where few positions carry a label.
        """
        spec, norms, matrices, eps = self.spec, weights.norms, weights.matrices, self.spec.norm_eps
        normed, self._rstd_x = rms_norm(x_ND, norms["attn_norm"], eps)
        self._qkv = qkv = self.qkv.forward(normed, matrices["qkv"])
        self._q, self._k, *self._rstd_qk = norm_rope(
            qkv, norms["q_norm"], norms["k_norm"], self.table, spec.heads, spec.kv_heads, eps
        )
        self._v = split_heads(qkv, spec.heads, spec.kv_heads)[2]
        attended = attend(self._q, self._k, self._v).flatten(1)
        self._x, self._wanted = x_ND, wanted
        if wanted is not None:
            attended, x_ND = attended.index_select(0, wanted), x_ND.index_select(0, wanted)
        self._a = self.o.forward(attended, matrices["o"])
        middle, self._rstd_a, normed, self._rstd_m = norm_add_norm(
            self._a, x_ND, norms["attn_post_norm"], norms["mlp_norm"], eps
        )
        self._gate_up = self.gate_up.forward(normed, matrices["gate_up"])
        wide = torch.empty(normed.shape[0], spec.mlp, dtype=x_ND.dtype)
        self._activated = geglu(self._gate_up, wide)
        self._d = self.down.forward(wide, matrices["down"])
        y, self._rstd_d = rms_norm(self._d, norms["mlp_post_norm"], eps, residual=middle)
        self._middle = middle
        return y

    def _everywhere(self, gradient: Tensor) -> Tensor:
        """A gradient of the wanted positions, with zeros at all others."""
        if self._wanted is None:
            return gradient
        whole = gradient.new_zeros(self._x.shape[0], gradient.shape[1])
        return whole.index_copy_(0, self._wanted, gradient)

    def backward(self, dy_ND: Tensor, weights: LayerWeights, blocks: Sequence[Block]) -> Tensor | None:
        """The gradient of the layer's input [N, D] from that of its output ([M, D] where only those were wanted).

        None for the first layer, below which nothing learns.
        """
        norms, matrices = weights.norms, weights.matrices
        dd = rms_norm_backward(dy_ND, self._d, self._rstd_d, norms["mlp_post_norm"])
        dwide = _needed(self.down.backward(dd, matrices["down"]))
        dgate_up = torch.empty_like(self._gate_up)
        geglu_backward(dwide, self._gate_up, self._activated, dgate_up)
        dnormed = _needed(self.gate_up.backward(dgate_up, matrices["gate_up"]))
        dmiddle = rms_norm_backward(dnormed, self._middle, self._rstd_m, norms["mlp_norm"], add=dy_ND)
        da = rms_norm_backward(dmiddle, self._a, self._rstd_a, norms["attn_post_norm"])
        dattended = self._everywhere(_needed(self.o.backward(da, matrices["o"]))).view(self._q.shape)
        dq, dk, dv = attention_backward(dattended, self._q, self._k, self._v, blocks)
        dqkv = torch.empty_like(self._qkv)
        rstd = (self._rstd_qk[0], self._rstd_qk[1])
        norm_rope_backward(dq, dk, dv, self._qkv, rstd, norms["q_norm"], norms["k_norm"], self.table, dqkv)
        dnormed_x = self.qkv.backward(dqkv, matrices["qkv"], input_gradient=not self._first)
        if dnormed_x is None:
            return None
        return rms_norm_backward(dnormed_x, self._x, self._rstd_x, norms["attn_norm"], add=self._everywhere(dmiddle))


def packed_attention(blocks: Sequence[Block]) -> Attend:
    """The `attend` of training: packed documents that never see each other."""
    return lambda q, k, v: attention(q, k, v, blocks)


def _needed(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise RuntimeError("a layer's inner gradient was not computed")
    return gradient
