"""Which number format the matrix products use on this machine."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal

import torch

from gemwright.errors import InputError

Precision = Literal["auto", "bf16", "fp32"]


def choose_dtype(precision: str, device: torch.device | None = None) -> torch.dtype:
    """The dtype for `auto`, `bf16` or `fp32`; float16 is refused, since Gemma 3's activations overflow it."""
    if precision == "auto" and device is not None and device.type == "cuda":
        return torch.bfloat16
    if precision == "auto":
        return torch.bfloat16 if _bf16_is_faster() else torch.float32
    if precision not in ("bf16", "fp32"):
        why = "Gemma 3's activations overflow float16" if "16" in precision else f"unknown precision {precision!r}"
        raise InputError(why, where="--precision", fix="Use auto, bf16 or fp32.")
    return torch.bfloat16 if precision == "bf16" else torch.float32


@cache
def _bf16_is_faster() -> bool:
    """Measured, once a process, in a tenth of a second: what a CPU says of itself is not what its library does.

    A CPU without bf16 arithmetic may take a hundred times as long as in fp32, which few rows show at once.
    """
    few, few_bf16 = (_product_s(16, dtype, repeats=1) for dtype in (torch.float32, torch.bfloat16))
    return few_bf16 < 4 * few and _product_s(256, torch.bfloat16) < _product_s(256, torch.float32)


def _product_s(rows: int, dtype: torch.dtype, repeats: int = 3) -> float:
    """Seconds of a product [rows, 1024] x [1024, 1024], the fastest of some after one."""
    x, w, times = torch.ones(rows, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype), []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        torch.mm(x, w)
        times.append(time.perf_counter() - start)
    return min(times[1:])
