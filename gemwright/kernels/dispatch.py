"""The one place that chooses between a kernel's plain PyTorch and its Triton form."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from gemwright.kernels import cross_entropy as _cross_entropy
from gemwright.kernels import fp8 as _fp8
from gemwright.kernels import geglu as _geglu
from gemwright.kernels import heads as _heads
from gemwright.kernels import norm as _norm
from gemwright.report import say

P = ParamSpec("P")
R = TypeVar("R")
BF16_SINCE = (8, 0)


@cache
def _twins(index: int) -> ModuleType | None:
    """The Triton kernels for CUDA device `index`, or None, for a reason that is said once."""
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if capability < BF16_SINCE:
        say(f"{name} has no bf16 (compute capability {capability[0]}.{capability[1]}): plain PyTorch computes, slower")
        return None
    try:
        from gemwright.kernels import triton_ops
    except ImportError as error:
        say(f"{name} computes with plain PyTorch, slower, since Triton cannot be imported ({error})")
        return None
    return triton_ops


def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on `device`; `kernels.triton_unpack` may then be imported as well."""
    if device.type != "cuda":
        return False
    return _twins(torch.cuda.current_device() if device.index is None else device.index) is not None


def _dispatched(plain: Callable[P, R]) -> Callable[P, R]:
    """`plain`, or its twin of the same name where the first argument lies on a device with Triton."""
    name = plain.__name__

    @wraps(plain)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        first = cast(Tensor, args[0])
        if first.is_cuda and (twins := _twins(first.get_device())) is not None:
            return cast(R, getattr(twins, name)(*args, **kwargs))
        return plain(*args, **kwargs)

    return chosen


geglu = _dispatched(_geglu.geglu)
geglu_backward = _dispatched(_geglu.geglu_backward)
join_tail = _dispatched(_fp8.join_tail)
norm_add_norm = _dispatched(_norm.norm_add_norm)
norm_rope = _dispatched(_heads.norm_rope)
norm_rope_backward = _dispatched(_heads.norm_rope_backward)
quantise_rows = _dispatched(_fp8.quantise_rows)
rms_norm = _dispatched(_norm.rms_norm)
rms_norm_backward = _dispatched(_norm.rms_norm_backward)
softmax_chunk = _dispatched(_cross_entropy.softmax_chunk)
turn = _dispatched(_fp8.turn)

__all__ = [
    "geglu",
    "geglu_backward",
    "has_triton",
    "join_tail",
    "norm_add_norm",
    "norm_rope",
    "norm_rope_backward",
    "quantise_rows",
    "rms_norm",
    "rms_norm_backward",
    "softmax_chunk",
    "turn",
]
