"""RMSNorm with a folded weight (1+w already added), forward and backward, statistics and products in fp32.

Shapes: x [..., D] in the compute dtype, weight [D] fp32, rstd [..., 1] fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return (y, rstd) with y = x * rstd * weight (+ residual) in `dtype` (default x's).

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467); Gemma multiplies in fp32 and rounds once, at the end.
    """
    scaled = x.to(torch.float32, copy=True)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    rstd = norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    scaled.mul_(rstd).mul_(weight)
    if residual is not None:
        scaled.add_(residual)
    return scaled.to(dtype or x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, *, add: Tensor | None = None) -> Tensor:
    """Return dx (+ add) in x's dtype; dy may be of any float dtype. The weight is frozen and gets no gradient."""
    x_f = x.to(torch.float32)
    g = torch.mul(dy.to(torch.float32), weight)
    inner = torch.linalg.vecdot(g, x_f).unsqueeze(-1)
    coefficient = rstd.pow(3).mul_(inner).mul_(-1.0 / x.shape[-1])
    dx = g.mul_(rstd).addcmul_(x_f, coefficient)
    if add is not None:
        dx.add_(add)
    return dx.to(x.dtype)
