"""Triton twins of `kernels.heads`: a program norms and rotates some heads of one token.

SIZE is the head's size E, HALF half of it padded to a power of two, Q and K the counts of q and kv heads.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

Table = tuple[Tensor, Tensor]
PIECE = 1024  # values a program


@cache
def head_launch(size: int) -> tuple[int, int, int]:
    """(heads a program, half a head padded to a power of two, warps): 16 values a thread, 8 of each half."""
    half = triton.next_power_of_2(size // 2)
    return max(1, PIECE // (2 * half)), half, 2


@triton.jit
def _tile(group, COUNT: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """(head [HEADS, 1], e [HEADS, HALF], its mask, that of the tile).

    e is as large as the tile, so that weights and angles get the heads' layout; one row of them would force its own.
    """
    head = group * HEADS + tl.arange(0, HEADS)[:, None]
    e = tl.broadcast_to(tl.arange(0, HALF)[None, :], (HEADS, HALF))
    return head, e, e < SIZE // 2, (head < COUNT) & (e < SIZE // 2)


@triton.jit
def _rotate(
    x, weight, cos, sin, out, rstd, group, eps,
    COUNT: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Norm and rotate the heads of `group` among COUNT of one token; x and out point to the first of them."""
    head, e, inside, mask = _tile(group, COUNT, SIZE, HEADS, HALF)
    half: tl.constexpr = SIZE // 2
    at = head * SIZE + e
    low = tl.load(x + at, mask, other=0.0).to(tl.float32)
    high = tl.load(x + half + at, mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(low * low + high * high, 1, keep_dims=True) / SIZE + eps)
    low *= r * tl.load(weight + e, inside, other=0.0)
    high *= r * tl.load(weight + half + e, inside, other=0.0)
    c, s = tl.load(cos + e, inside, other=0.0), tl.load(sin + e, inside, other=0.0)
    tl.store(out + at, (low * c - high * s).to(out.dtype.element_ty), mask)
    tl.store(out + half + at, (high * c + low * s).to(out.dtype.element_ty), mask)
    tl.store(rstd + head, r, head < COUNT)


@triton.jit
def _norm_rope_kernel(
    qkv, q_weight, k_weight, cos, sin, q, k, rstd_q, rstd_k, eps, pitch,
    Q: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    q_groups: tl.constexpr = (Q + HEADS - 1) // HEADS
    groups: tl.constexpr = q_groups + (K + HEADS - 1) // HEADS
    group = tl.program_id(0) % groups
    token = (tl.program_id(0) // groups).to(tl.int64)
    x, at = qkv + token * pitch, token * (SIZE // 2)
    if group < q_groups:
        _rotate(
            x, q_weight, cos + at, sin + at, q + token * (Q * SIZE), rstd_q + token * Q, group, eps,
            Q, SIZE, HEADS, HALF,
        )  # fmt: skip
    else:
        _rotate(
            x + Q * SIZE, k_weight, cos + at, sin + at, k + token * (K * SIZE), rstd_k + token * K, group - q_groups,
            eps, K, SIZE, HEADS, HALF,
        )  # fmt: skip


def norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, table: Table, heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `heads.norm_rope`."""
    rows, size, device = qkv.shape[0], qkv.shape[1] // (heads + 2 * kv_heads), qkv.device
    q = torch.empty((rows, heads, size), dtype=qkv.dtype, device=device)
    k = torch.empty((rows, kv_heads, size), dtype=qkv.dtype, device=device)
    rstd_q = torch.empty((rows, heads, 1), dtype=torch.float32, device=device)
    rstd_k = torch.empty((rows, kv_heads, 1), dtype=torch.float32, device=device)
    tile, half, warps = head_launch(size)
    _norm_rope_kernel[(rows * (-(-heads // tile) - (-kv_heads // tile)),)](
        qkv, q_weight, k_weight, table[0], table[1], q, k, rstd_q, rstd_k, eps, qkv.stride(0),
        Q=heads, K=kv_heads, SIZE=size, HEADS=tile, HALF=half, num_warps=warps,
    )  # fmt: skip
    return q, k, rstd_q, rstd_k


@triton.jit
def _unrotate(
    d, head_pitch, x, rstd, weight, cos, sin, out, group,
    COUNT: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """The gradient of `_rotate` from d (heads `head_pitch` apart); with COPY, d itself."""
    head, e, inside, mask = _tile(group, COUNT, SIZE, HEADS, HALF)
    half: tl.constexpr = SIZE // 2
    at = head * SIZE + e
    low = tl.load(d + head * head_pitch + e, mask, other=0.0).to(tl.float32)
    high = tl.load(d + half + head * head_pitch + e, mask, other=0.0).to(tl.float32)
    if not COPY:
        c, s = tl.load(cos + e, inside, other=0.0), tl.load(sin + e, inside, other=0.0)
        x_low = tl.load(x + at, mask, other=0.0).to(tl.float32)
        x_high = tl.load(x + half + at, mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + head, head < COUNT, other=0.0)
        g_low = (low * c + high * s) * tl.load(weight + e, inside, other=0.0)
        g_high = (high * c - low * s) * tl.load(weight + half + e, inside, other=0.0)
        inner = tl.sum(g_low * x_low + g_high * x_high, 1, keep_dims=True) * (r * r * r) / SIZE
        low, high = g_low * r - x_low * inner, g_high * r - x_high * inner
    tl.store(out + at, low.to(out.dtype.element_ty), mask)
    tl.store(out + half + at, high.to(out.dtype.element_ty), mask)


@triton.jit
def _norm_rope_backward_kernel(
    dq, dk, dv, qkv, rstd_q, rstd_k, q_weight, k_weight, cos, sin, out,
    dq_pitch, dk_pitch, dv_pitch, dq_head, dk_head, dv_head, qkv_pitch, out_pitch,
    Q: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    q_groups: tl.constexpr = (Q + HEADS - 1) // HEADS
    k_groups: tl.constexpr = (K + HEADS - 1) // HEADS
    group = tl.program_id(0) % (q_groups + 2 * k_groups)
    token = (tl.program_id(0) // (q_groups + 2 * k_groups)).to(tl.int64)
    x, y, at = qkv + token * qkv_pitch, out + token * out_pitch, token * (SIZE // 2)
    if group < q_groups:
        _unrotate(
            dq + token * dq_pitch, dq_head, x, rstd_q + token * Q, q_weight, cos + at, sin + at, y, group,
            Q, SIZE, HEADS, HALF, False,
        )  # fmt: skip
    elif group < q_groups + k_groups:
        _unrotate(
            dk + token * dk_pitch, dk_head, x + Q * SIZE, rstd_k + token * K, k_weight, cos + at, sin + at,
            y + Q * SIZE, group - q_groups, K, SIZE, HEADS, HALF, False,
        )  # fmt: skip
    else:
        _unrotate(
            dv + token * dv_pitch, dv_head, x, rstd_k, k_weight, cos, sin,
            y + (Q + K) * SIZE, group - q_groups - k_groups, K, SIZE, HEADS, HALF, True,
        )  # fmt: skip


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
    """As `heads.norm_rope_backward`; the gradients may have any strides but a last one of 1."""
    (rows, heads, size), kv_heads = dq.shape, dk.shape[1]
    tile, half, warps = head_launch(size)
    _norm_rope_backward_kernel[(rows * (-(-heads // tile) - 2 * (-kv_heads // tile)),)](
        dq, dk, dv, qkv, rstd[0], rstd[1], q_weight, k_weight, table[0], table[1], out,
        dq.stride(0), dk.stride(0), dv.stride(0), dq.stride(1), dk.stride(1), dv.stride(1),
        qkv.stride(0), out.stride(0), Q=heads, K=kv_heads, SIZE=size, HEADS=tile, HALF=half, num_warps=warps,
    )  # fmt: skip
    return out
