"""Packed values written out by whatever the device of the bytes has for it."""

from __future__ import annotations

from torch import Tensor

from gemwright.kernels.dispatch import has_triton
from gemwright.kernels.fp8 import FP8
from gemwright.weights import quants


def unpack(raw: Tensor, qtype: str, out: Tensor, scale: Tensor | None = None) -> Tensor:
    """Write the values of `raw` to `out` [rows, cols], whose rows may have a longer pitch.

    With `scale` (fp32 [rows]) each row is divided by its own, for an `out` of fp8.
    """
    if raw.is_cuda and has_triton(raw.device) and qtype not in quants.PLAIN:
        from gemwright.kernels import triton_unpack

        return triton_unpack.unpack(raw, qtype, out, scale)
    if scale is not None:
        return out.copy_((quants.unpack(raw, qtype) * (1 / scale).unsqueeze(1)).to(FP8))
    if out.is_contiguous():
        return quants.unpack(raw, qtype, out=out)
    return out.copy_(quants.unpack(raw, qtype, out.dtype))
