"""GeGLU with the tanh approximation: gelu(gate) * up, forward and backward. Shapes: [N, F] each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def geglu(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return (gelu(gate) * up, gelu(gate)); the second is kept for the backward.

    Source: Shazeer 2020 (arXiv 2002.05202), Hendrycks and Gimpel 2016 (arXiv 1606.08415).
    """
    activated = F.gelu(gate, approximate="tanh")
    return activated * up, activated


def geglu_backward(dy: Tensor, gate: Tensor, up: Tensor, activated: Tensor, out: Tensor) -> None:
    """Write the gradients of gate and up into the halves of `out` [N, 2F]; `dy` is overwritten."""
    half = gate.shape[-1]
    torch.mul(dy, activated, out=out[:, half:])
    out[:, :half] = torch.ops.aten.gelu_backward(dy.mul_(up), gate, approximate="tanh")
