"""The forward and backward of one optimizer step, layer by layer over all its micro-batches.

Layer-major: every row of the step passes a layer while that layer is on the device, forward and backward, so that the
cost of bringing it there is shared. Reads top to bottom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemwright.kernels.cross_entropy import linear_cross_entropy
from gemwright.kernels.norm import rms_norm, rms_norm_backward
from gemwright.model.decoder import Gemma
from gemwright.model.layer import LayerPass, packed_attention
from gemwright.train.batches import Row

HEAD_POSITIONS = 1024


@dataclass(frozen=True)
class StepLoss:
    """Mean negative log-likelihood in nats over the `labelled` targets of a step of `tokens` tokens."""

    loss: float
    labelled: int
    tokens: int


@torch.inference_mode()
def forward_backward(model: Gemma, rows: Sequence[Row], *, recompute: bool, seed: int = 0) -> StepLoss:
    """Add to `model.lora.grad` the gradient of the mean loss over all labelled tokens of the step.

    With `recompute` only layer inputs are kept and each layer's forward runs again in the backward, with the same
    dropout. `seed` drives dropout alone.
    """
    spec, residency, lora = model.spec, model.residency, model.lora
    states = [residency.embed(row.ids) for row in rows]
    inputs: list[list[Tensor]] = []
    passes: list[list[LayerPass]] = []

    def layer_pass(layer: int, r: int) -> LayerPass:
        own_seed = (seed * spec.layers + layer) * len(rows) + r
        return LayerPass(spec, layer, rows[r].tables[spec.is_global(layer)], lora, own_seed)

    for layer in range(spec.layers):
        weights, whole = residency.layer(layer), spec.is_global(layer)
        inputs.append(states)
        visits = [layer_pass(layer, r) for r in range(len(rows))]
        states = [
            visit.forward(x, weights, packed_attention(row.blocks[whole]))
            for visit, x, row in zip(visits, states, rows, strict=True)
        ]
        passes.append([] if recompute else visits)
        residency.release(layer)

    labelled = sum(len(row.targets) for row in rows)
    total, gradients = 0.0, []
    for x, row in zip(states, rows, strict=True):
        nll, dx = _head(model, x, row, 1.0 / labelled)
        total += nll
        gradients.append(dx)

    for layer in reversed(range(spec.layers)):
        weights, whole = residency.layer(layer), spec.is_global(layer)
        below = []
        for r, row in enumerate(rows):
            visit = layer_pass(layer, r) if recompute else passes[layer][r]
            if recompute:
                visit.forward(inputs[layer][r], weights, packed_attention(row.blocks[whole]))
            dx_below = visit.backward(gradients[r], weights, row.blocks[whole])
            if dx_below is not None:
                below.append(dx_below)
        gradients, inputs[layer], passes[layer] = below, [], []
        residency.release(layer)
    return StepLoss(total / labelled, labelled, sum(len(row.ids) for row in rows))


def _head(model: Gemma, x_ND: Tensor, row: Row, weight: float) -> tuple[float, Tensor]:
    """Summed nll of a row's targets, and the gradient of `weight` times it with respect to x [N, D]."""
    residency, eps = model.residency, model.spec.norm_eps
    dx = torch.zeros_like(x_ND)
    total = 0.0
    for start in range(0, len(row.at), HEAD_POSITIONS):
        at, targets = row.at[start : start + HEAD_POSITIONS], row.targets[start : start + HEAD_POSITIONS]
        x_MD = x_ND.index_select(0, at)
        h_MD, rstd = rms_norm(x_MD, residency.final_norm, eps)
        nll, dh = linear_cross_entropy(h_MD, residency.head_rows, residency.vocab, targets)
        if dh is None:
            raise RuntimeError("the head gave no gradient")
        dx.index_copy_(0, at, rms_norm_backward(dh.mul_(weight), x_MD, rstd, residency.final_norm))
        total += float(nll.sum())
    return total, dx
