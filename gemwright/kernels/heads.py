"""From the joint projection to rotated, normed heads and back: q/k norm and rotary embedding as one step.

Legend: N tokens, H heads, K kv heads, E head size. qkv [N, (H + 2K) E] holds q, k and v heads one after another.
"""

from __future__ import annotations

from torch import Tensor

from gemwright.kernels.norm import rms_norm_backward, scaled_and_rstd
from gemwright.kernels.rope import rope, rope_backward

Table = tuple[Tensor, Tensor]
# Values at once: temporaries stay in the CPU's second-level cache.
_CPU_VALUES = 1 << 19


def split_heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q [N, H, E], k [N, K, E], v [N, K, E] of the joint projection."""
    split = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1)
    return split[:, :heads], split[:, heads : heads + kv_heads], split[:, heads + kv_heads :]


def norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, table: Table, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q [N, H, E], k [N, K, E], rstd_q [N, H, 1], rstd_k [N, K, 1]): normed per head in fp32, then rotated.

    Weights [E] fp32, that of q with the attention's scale folded in; `table` as of `kernels.rope.rope_table`.
    """
    q_raw, k_raw, _ = split_heads(qkv, heads, kv_heads)
    q, rstd_q = scaled_and_rstd(q_raw, q_weight, eps)
    k, rstd_k = scaled_and_rstd(k_raw, k_weight, eps)
    return rope(q, table, qkv.dtype), rope(k, table, qkv.dtype), rstd_q, rstd_k


def norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    rstd: tuple[Tensor, Tensor],
    q_weight: Tensor,
    k_weight: Tensor,
    table: Table,
    out: Tensor,
) -> Tensor:
    """Write the gradient of qkv into `out` [N, (H + 2K) E]; dq [N, H, E], dk and dv [N, K, E] of any float dtype."""
    heads, kv_heads = dq.shape[1], dk.shape[1]
    raw, target = split_heads(qkv, heads, kv_heads), split_heads(out, heads, kv_heads)
    sides = ((dq, raw[0], rstd[0], q_weight, target[0]), (dk, raw[1], rstd[1], k_weight, target[1]))
    step = dq.shape[0] if dq.is_cuda else max(1, _CPU_VALUES // dq[0].numel())
    for rows in (slice(at, at + step) for at in range(0, dq.shape[0], step)):
        turned = (table[0][rows], table[1][rows])
        for dy, x, scale, weight, dx in sides:
            rms_norm_backward(rope_backward(dy[rows], turned), x[rows], scale[rows], weight, out=dx[rows])
    target[2].copy_(dv)
    return out
