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
from gemwright.model.residency import LayerWeights
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

    def visit(layer: int, r: int, x: Tensor, weights: LayerWeights) -> tuple[LayerPass, Tensor]:
        row, whole = rows[r], spec.is_global(layer)
        layer_pass = LayerPass(spec, layer, row.tables[whole], lora, (seed * spec.layers + layer) * len(rows) + r)
        wanted = row.at if layer == spec.layers - 1 else None
        return layer_pass, layer_pass.forward(x, weights, packed_attention(row.blocks[whole]), wanted)

    for layer in range(spec.layers):
        weights = residency.layer(layer)
        inputs.append(states)
        visits = [visit(layer, r, x, weights) for r, x in enumerate(states)]
        states = [y for _, y in visits]
        passes.append([] if recompute else [layer_pass for layer_pass, _ in visits])
        residency.release(layer)

    labelled = sum(row.labelled for row in rows)
    total, gradients = 0.0, []
    for x, row in zip(states, rows, strict=True):
        nll, dx = _head(model, x, row.targets, 1.0 / labelled)
        total += nll
        gradients.append(dx)

    for layer in reversed(range(spec.layers)):
        weights, below = residency.layer(layer), []
        for r, row in enumerate(rows):
            layer_pass = visit(layer, r, inputs[layer][r], weights)[0] if recompute else passes[layer][r]
            dx_below = layer_pass.backward(gradients[r], weights, row.blocks[spec.is_global(layer)])
            if dx_below is not None:
                below.append(dx_below)
        gradients, inputs[layer], passes[layer] = below, [], []
        residency.release(layer)
    return StepLoss(total / labelled, labelled, sum(row.tokens for row in rows))


def _head(model: Gemma, x_MD: Tensor, target_M: Tensor, weight: float) -> tuple[float, Tensor]:
    """Summed nll of a row's targets, and the gradient of `weight` times it with respect to x [M, D]."""
    residency, eps = model.residency, model.spec.norm_eps
    total, gradients = 0.0, []
    for x, target in zip(torch.split(x_MD, HEAD_POSITIONS), torch.split(target_M, HEAD_POSITIONS), strict=True):
        h, rstd = rms_norm(x, residency.final_norm, eps)
        nll, dh = linear_cross_entropy(h, residency.head_rows, residency.vocab, target)
        if dh is None:
            raise RuntimeError("the head gave no gradient")
        gradients.append(rms_norm_backward(dh.mul_(weight), x, rstd, residency.final_norm))
        total += float(nll.sum())
    return total, torch.cat(gradients)
