"""One decoder layer, forward and backward written out, so that a layer can stream, recompute or be kept at will.

Legend: N tokens of a packed row, D hidden, H heads, K kv heads, E head size, F mlp width.
Source: Gemma 3 technical report (arXiv 2503.19786); norms before and after attention and MLP, q/k norm, GeGLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gemwright.kernels.attention import Block, attention, attention_backward
from gemwright.kernels.geglu import geglu, geglu_backward
from gemwright.kernels.norm import rms_norm, rms_norm_backward
from gemwright.kernels.rope import rope, rope_backward
from gemwright.model.lora import LinearPass, LoRA
from gemwright.model.residency import LayerWeights
from gemwright.spec import ModelSpec

Table = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def split_heads(spec: ModelSpec, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views q [N, H, E], k [N, K, E], v [N, K, E] of the joint projection."""
    heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
    first, second = spec.heads, spec.heads + spec.kv_heads
    return heads[:, :first], heads[:, first:second], heads[:, second:]


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
        norms, matrices, eps, dtype = weights.norms, weights.matrices, self.spec.norm_eps, x_ND.dtype
        normed, self._rstd_x = rms_norm(x_ND, norms["attn_norm"], eps)
        qkv = self.qkv.forward(normed, matrices["qkv"])
        self._q_raw, self._k_raw, self._v = split_heads(self.spec, qkv)
        q, self._rstd_q = rms_norm(self._q_raw, norms["q_norm"], eps, dtype=torch.float32)
        k, self._rstd_k = rms_norm(self._k_raw, norms["k_norm"], eps, dtype=torch.float32)
        self._q, self._k = rope(q, self.table, dtype), rope(k, self.table, dtype)
        attended = attend(self._q, self._k, self._v).flatten(1)
        self._x, self._wanted = x_ND, wanted
        if wanted is not None:
            attended, x_ND = attended.index_select(0, wanted), x_ND.index_select(0, wanted)
        self._a = self.o.forward(attended, matrices["o"])
        middle, self._rstd_a = rms_norm(self._a, norms["attn_post_norm"], eps, residual=x_ND)
        normed, self._rstd_m = rms_norm(middle, norms["mlp_norm"], eps)
        gate_up = self.gate_up.forward(normed, matrices["gate_up"])
        self._gate, self._up = gate_up.chunk(2, dim=1)
        wide, self._activated = geglu(self._gate, self._up)
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
        norms, matrices, dtype = weights.norms, weights.matrices, self._x.dtype
        dd = rms_norm_backward(dy_ND, self._d, self._rstd_d, norms["mlp_post_norm"])
        dwide = _needed(self.down.backward(dd, matrices["down"]))
        dgate_up = torch.empty(dwide.shape[0], 2 * dwide.shape[1], dtype=dtype)
        geglu_backward(dwide, self._gate, self._up, self._activated, dgate_up)
        dnormed = _needed(self.gate_up.backward(dgate_up, matrices["gate_up"]))
        dmiddle = rms_norm_backward(dnormed, self._middle, self._rstd_m, norms["mlp_norm"], add=dy_ND)
        da = rms_norm_backward(dmiddle, self._a, self._rstd_a, norms["attn_post_norm"])
        dattended = self._everywhere(_needed(self.o.backward(da, matrices["o"]))).view(self._q.shape)
        dq, dk, dv = attention_backward(dattended, self._q, self._k, self._v, blocks)
        dqkv = torch.empty(dq.shape[0], matrices["qkv"].shape[0], dtype=dtype)
        dq_raw, dk_raw, dv_raw = split_heads(self.spec, dqkv)
        dq_raw.copy_(rms_norm_backward(rope_backward(dq, self.table), self._q_raw, self._rstd_q, norms["q_norm"]))
        dk_raw.copy_(rms_norm_backward(rope_backward(dk, self.table), self._k_raw, self._rstd_k, norms["k_norm"]))
        dv_raw.copy_(dv)
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
