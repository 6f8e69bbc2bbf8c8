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
    """Measured, once a process, in a few milliseconds: what a CPU says of itself does not say what its library does."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        torch.mm(x, w)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(x, w)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < seconds[torch.float32]
