"""Products with a weight's rows; on a CPU by the faster of the two libraries that PyTorch brings."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gemwright.host import read_cpu

# Fewer rows oneDNN sums less exactly than MKL (LOG.md).
_FEW_ROWS = 32


def product(x_MK: Tensor, weight_NK: Tensor, out: Tensor | None = None) -> Tensor:
    """x W^T [M, N] in their dtype; in `out` where that is given, which on some CPUs takes a copy more.

    With and without `out` it is the same to the last bit.
    """
    plain = x_MK.dtype != torch.float32 or x_MK.device.type != "cpu" or len(x_MK) < _FEW_ROWS
    if plain or not mkl_is_slow():
        return torch.mm(x_MK, weight_NK.t(), out=out)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, None, "none", [], "")
    return y if out is None else out.copy_(y)


@cache
def mkl_is_slow() -> bool:
    """Whether oneDNN had better multiply fp32: MKL, which does so by default, is made for Intel's processors.

    On others it takes up to twice as long (LOG.md). Not measured here: a run that goes on must add as it did before.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkl.is_available():
        return False
    return torch.backends.mkldnn.is_available() and "Intel" not in (read_cpu([], Path("/"), {}).name or "Intel")
