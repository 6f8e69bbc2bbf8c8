"""RMSNorm with a folded weight (1+w already added), forward and backward, statistics and products in fp32.

Shapes: x [N, D] in the compute dtype, weight [D] fp32, rstd [N, 1] fp32. `out` may be a view with longer rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (y, rstd) with y = x * rstd * weight (+ residual) in x's dtype, written to `out` where given.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467); Gemma multiplies in fp32 and rounds once, at the end.
    """
    scaled, rstd = scaled_and_rstd(x, weight, eps)
    if residual is not None:
        scaled.add_(residual)
    return (scaled.to(x.dtype) if out is None else out.copy_(scaled)), rstd


def scaled_and_rstd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x * rstd * weight, rstd), both fp32, over the last dimension of x [..., D]."""
    scaled = x.to(torch.float32, copy=True)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    rstd = norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return scaled.mul_(rstd).mul_(weight), rstd


def norm_add_norm(
    a: Tensor, x: Tensor, post_weight: Tensor, next_weight: Tensor, eps: float, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The seam between attention and MLP: (middle, rstd_a, normed, rstd_middle).

    middle = x + rms_norm(a) rounded to x's dtype, normed = rms_norm(middle), written to `out` where given.
    """
    middle, rstd_a = rms_norm(a, post_weight, eps, residual=x)
    normed, rstd_middle = rms_norm(middle, next_weight, eps, out=out)
    return middle, rstd_a, normed, rstd_middle


def rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, *, add: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Return dx (+ add) in x's dtype; dy may be of any float dtype. The weight is frozen and gets no gradient.

    `out` may be `add` itself, or `dy` where that has x's dtype.
    """
    x_f = x.to(torch.float32)
    g = torch.mul(dy.to(torch.float32), weight)
    inner = torch.linalg.vecdot(g, x_f).unsqueeze(-1)
    coefficient = rstd.pow(3).mul_(inner).mul_(-1.0 / x.shape[-1])
    dx = g.mul_(rstd).addcmul_(x_f, coefficient)
    if add is not None:
        dx.add_(add)
    return dx.to(x.dtype) if out is None else out.copy_(dx)
