"""FP8 (e4m3) operands for `torch._scaled_mm`: rows with a scale each, and behind them an adapter in two fp8 parts.

y = x W^T + t b^T is one product of longer rows: those of x end in t = hi + lo, those of W in b = hi + lo, both rounded
to fp8 part by part, arranged so that the product holds hi hi + hi lo + lo hi. That keeps 8 bits of the adapter, as many
as bf16 does, and costs 3 T columns. `gain` divides t and multiplies b, so that both fit the scales of their rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemwright.layout import rows_bytes, tail_columns

FP8 = torch.float8_e4m3fn
TOP = 448.0  # the largest e4m3
TINY = 1e-30  # of a row's largest value; far below any gradient, far above what fp32 cannot invert
# Where b's largest part lies, so that t is small beside x. Of a b too small for this gain nothing is seen anyway.
AIM, MOST = 128.0, 4096.0


def new_rows(rows: int, width: int, tail: int, like: Tensor, flat: Tensor | None = None) -> Tensor:
    """Empty fp8 [rows, width + tail_columns(tail)] on the device of `like`, or within the bytes of `flat`."""
    size, columns = rows_bytes(rows, width, tail), width + tail_columns(tail)
    flat = torch.empty(size, dtype=torch.uint8, device=like.device) if flat is None else flat[:size]
    return flat.view(FP8).view(rows, size // rows)[:, :columns]


def quantise_rows(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    factor: Tensor | None = None,
    tail: Tensor | None = None,
    gain: Tensor | None = None,
    floor: Tensor | None = None,
) -> None:
    """Write x [N, K] in fp8 to the first K columns of `out` [N, K or more] and its rows' scales to `scale` (fp32 [N]).

    The columns of x are multiplied by `factor` (fp32 [K]) first. What `out` has more than K becomes `tail` [N, T] over
    `gain` (fp32 [1]) as hi, hi, lo, or zeros without a tail. Real values are those of `out` times `scale`, which are
    the rows' largest over 448, at least `floor` (fp32 [1]).
    """
    value, more = x.float(), out.shape[1] - x.shape[1]
    value = value if factor is None else value * factor
    top = value.abs().amax(1, keepdim=True)
    t = None if tail is None or gain is None else tail.float() / gain
    if t is not None:
        top = torch.maximum(top, t.abs().amax(1, keepdim=True))
    top = top.clamp_min(TINY) if floor is None else torch.maximum(top, floor * TOP).clamp_min_(TINY)
    scale.copy_((top / TOP).view(-1))
    out[:, : x.shape[1]].copy_((value * (TOP / top)).to(FP8))
    if more:
        end = torch.zeros(len(x), more, dtype=FP8, device=x.device)
        if t is not None:
            high, low = _parts(t * (TOP / top))
            end[:, : 3 * t.shape[1]] = torch.cat([high, high, low], 1).to(FP8)
        out[:, x.shape[1] :].copy_(end)


def join_tail(b: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """Write b [rows, T] (any strides) over its rows' `scale` (fp32 [rows], None: 1) as hi, lo, hi to `out`.

    `out` is fp8 [rows, tail_columns(T)]. Returns the gain, fp32 [1].
    """
    value = b.float() if scale is None else b.float() / scale.view(-1, 1)
    gain = (AIM / value.abs().max().clamp_min(AIM / MOST)).view(1)
    high, low = _parts(value * gain)
    end = torch.zeros_like(out)
    end[:, : 3 * b.shape[1]] = torch.cat([high, low, high], 1).to(FP8)
    out.copy_(end)
    return gain


def turn(rows: Tensor, out: Tensor) -> None:
    """Write the bytes of `rows` [R, C] to `out` [C, R]."""
    out.copy_(rows.t())


def _parts(value: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) in fp32, each of them an fp8 number; together they are `value` to some 8 bits."""
    high = value.to(FP8).float()
    return high, (value - high).to(FP8).float()
