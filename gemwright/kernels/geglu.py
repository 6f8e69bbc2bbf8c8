"""GeGLU with the tanh approximation: gelu(gate) * up, forward and backward; gate_up [N, 2F] holds gate, then up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def geglu(gate_up: Tensor, out: Tensor) -> Tensor | None:
    """Write gelu(gate) * up into `out` [N, F]; what is returned goes to the backward as `kept`, if still at hand.

    Source: Shazeer 2020 (arXiv 2002.05202), Hendrycks and Gimpel 2016 (arXiv 1606.08415).
    """
    gate, up = gate_up.chunk(2, dim=1)
    activated = F.gelu(gate, approximate="tanh")
    torch.mul(activated, up, out=out)
    return activated


def geglu_backward(
    dwide: Tensor, gate_up: Tensor, kept: Tensor | None, out: Tensor, wide: Tensor | None = None
) -> None:
    """Write the gradient of gate_up into `out` [N, 2F], and gelu(gate) * up into `wide` [N, F] where given.

    `out` may be `gate_up` itself.
    """
    gate, up = gate_up.chunk(2, dim=1)
    activated = F.gelu(gate, approximate="tanh") if kept is None else kept
    if wide is not None:
        torch.mul(activated, up, out=wide)
    half, through_up = gate.shape[1], dwide * up
    torch.mul(dwide, activated, out=out[:, half:])
    out[:, :half] = torch.ops.aten.gelu_backward(through_up, gate, approximate="tanh")
