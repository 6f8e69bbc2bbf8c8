"""Rotary position embedding over half-split heads, forward and backward.

Shapes: x [N, H, D]; tables cos and sin [N, 1, D/2] fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, base: float, scale: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for integer `positions` [N]; `scale` divides the positions (linear scaling, 8 from 4B up).

    Source: Su et al. 2021 (arXiv 2104.09864).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.to(torch.float32)[:, None] * (1.0 / (scale * base**exponents))
    return angles.cos()[:, None], angles.sin()[:, None]


def rope(x: Tensor, table: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Rotate x into a new tensor of `dtype`."""
    cos, sin = table
    low, high = x.float().chunk(2, dim=-1)  # one conversion: PyTorch's products of two dtypes are slow
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    out_low, out_high = out.chunk(2, dim=-1)
    if dtype == torch.float32:
        torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-1)
        torch.mul(high, cos, out=out_high).addcmul_(low, sin)
    else:
        out_low.copy_(torch.mul(low, cos).addcmul_(high, sin, value=-1))
        out_high.copy_(torch.mul(high, cos).addcmul_(low, sin))
    return out


def rope_backward(dy: Tensor, table: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The gradient of `rope`: the rotation by the opposite angle."""
    return rope(dy, (table[0], -table[1]), dtype)
