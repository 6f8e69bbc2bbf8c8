"""The forward and backward of one optimizer step, layer by layer over all its micro-batches.

Layer-major: every row of the step passes a layer while that layer is on the device, forward and backward, so that the
cost of bringing it there is shared. Reads top to bottom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemwright.kernels.cross_entropy import LEFT_OUT, ROWS, linear_cross_entropy
from gemwright.kernels.dispatch import rms_norm, rms_norm_backward, softmax_chunk
from gemwright.layout import FEW, Keep
from gemwright.model.activations import Activations, OnDevice
from gemwright.model.decoder import Gemma
from gemwright.model.layer import LayerPass, everywhere
from gemwright.train.batches import Row


@dataclass(frozen=True)
class Work:
    """How a step's work is laid out; it changes time and memory, and results by no more than rounding.

    `keep` says what each layer's forward leaves (one for all, or one a layer), `chunk` how many tokens pass what is
    wide in a layer at once, `positions` and `head_rows` how large a piece of the logits exists at once.
    """

    keep: Sequence[Keep] | Keep = Keep.ALL
    chunk: int = 1 << 30
    positions: int = 512
    head_rows: int = ROWS

    def kept(self, layer: int) -> Keep:
        """What layer `layer` keeps."""
        return self.keep if isinstance(self.keep, Keep) else self.keep[layer]


@dataclass(frozen=True)
class StepLoss:
    """A step of `tokens` tokens with `labelled` targets; `nll` is the sum of their losses, where it was computed."""

    nll: Tensor
    labelled: int
    tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats a target; waits for the device."""
        return float(self.nll) / self.labelled


DEFAULT = Work()


@torch.inference_mode()
def forward_backward(
    model: Gemma,
    rows: Sequence[Row],
    work: Work = DEFAULT,
    store: Activations | None = None,
    *,
    seed: int = 0,
    weight: Tensor | None = None,
) -> StepLoss:
    """Add to `model.lora.grad` the gradient of the mean loss over all labelled tokens of the step.

    What a layer does not keep is computed again in the backward, with the same dropout; `seed` drives dropout alone.
    `weight` (fp32 []), where given, is one over the number of labelled tokens.
    """
    spec, residency, lora = model.spec, model.residency, model.lora
    store = OnDevice() if store is None else store
    labelled = sum(row.labelled for row in rows)
    states = [residency.embed(row.ids) for row in rows]
    visits: list[list[LayerPass]] = []

    for layer in range(spec.layers):
        weights, whole = residency.layer(layer), spec.is_global(layer)
        last = layer == spec.layers - 1
        visits.append([])
        for r, row in enumerate(rows):
            number = (seed * spec.layers + layer) * len(rows) + r
            visit = LayerPass(spec, layer, row.tables[whole], row.attention[whole], lora, seed=number, chunk=work.chunk)
            x = states[r]
            wanted = row.at if last and _few(row) else None
            states[r] = visit.forward(x, weights, wanted, work.kept(layer))
            store.put(layer, r, x, visit)
            visits[layer].append(visit)
            del x
        residency.release(layer)

    store.fetch(spec.layers - 1)
    nll, gradients = torch.zeros((), device=states[0].device), states
    for r, row in enumerate(rows):  # each state gives way to its gradient
        if not _few(row):
            states[r] = states[r].index_select(0, row.at)
        gradients[r] = _head(model, states[r], row.targets, 1.0 / labelled if weight is None else weight, work, nll)
        if not _few(row):
            gradients[r] = everywhere(gradients[r], row.at, len(row.ids))

    for layer in reversed(range(spec.layers)):
        weights = residency.layer(layer)
        store.fetch(layer - 1)
        for r in range(len(rows)):
            visit = visits[layer][r]
            x = store.take(layer, r, visit)
            dx = visit.backward(gradients[r], x, weights)
            if dx is not None:
                gradients[r] = dx
            del x, dx, visit
        visits[layer] = []
        residency.release(layer)
    return StepLoss(nll, labelled, sum(row.tokens for row in rows))


@torch.inference_mode()
def forward_states(model: Gemma, rows: Sequence[Row], work: Work = DEFAULT) -> list[Tensor]:
    """For each of `rows` the states [M, D] before the final norm at its `at`; no dropout, and nothing is kept.

    The rows pass each layer together.
    """
    spec, residency, lora = model.spec, model.residency, model.lora
    dropout = 0.0 if lora is None else lora.dropout
    states = [residency.embed(row.ids) for row in rows]
    try:
        if lora is not None:
            lora.dropout = 0.0
        for layer in range(spec.layers):
            weights, whole = residency.layer(layer), spec.is_global(layer)
            for r, row in enumerate(rows):
                visit = LayerPass(spec, layer, row.tables[whole], row.attention[whole], lora, chunk=work.chunk)
                wanted = row.at if layer == spec.layers - 1 and _few(row) else None
                states[r] = visit.forward(states[r], weights, wanted, Keep.INPUT)
                del visit
            residency.release(layer)
    finally:
        if lora is not None:
            lora.dropout = dropout
    return [x if _few(row) else x.index_select(0, row.at) for x, row in zip(states, rows, strict=True)]


@torch.inference_mode()
def forward_loss(model: Gemma, rows: Sequence[Row], work: Work = DEFAULT) -> StepLoss:
    """The loss of the labelled tokens of `rows`; see `forward_states`."""
    spec, residency = model.spec, model.residency
    states = forward_states(model, rows, work)
    nll = torch.zeros((), device=states[0].device)
    for x, row in zip(states, rows, strict=True):
        for part, target in zip(torch.split(x, work.positions), torch.split(row.targets, work.positions), strict=True):
            h, _ = rms_norm(part, residency.final_norm, spec.norm_eps)
            each, _ = linear_cross_entropy(
                h,
                residency.head_rows,
                residency.vocab,
                target,
                chunk=work.head_rows,
                softmax=softmax_chunk,
            )
            nll.add_(each.sum())
    return StepLoss(nll, sum(row.labelled for row in rows), sum(row.tokens for row in rows))


def _few(row: Row) -> bool:
    """Whether so few positions carry a label that the last layer had better leave the others out."""
    return len(row.at) < FEW * len(row.ids)


def _head(model: Gemma, x_MD: Tensor, target_M: Tensor, weight: float | Tensor, work: Work, nll: Tensor) -> Tensor:
    """The gradient of `weight` times a row's summed loss with respect to x [M, D]; the sum is added to `nll`."""
    residency, eps = model.residency, model.spec.norm_eps
    gradient = torch.empty_like(x_MD)
    left_out = LEFT_OUT[x_MD.dtype] if x_MD.device.type == "cpu" else 0.0
    pieces = (torch.split(x, work.positions) for x in (x_MD, target_M, gradient))
    for x, target, dx in zip(*pieces, strict=True):
        h, rstd = rms_norm(x, residency.final_norm, eps)
        each, dh = linear_cross_entropy(
            h,
            residency.head_rows,
            residency.vocab,
            target,
            residency.own_rows,
            chunk=work.head_rows,
            softmax=softmax_chunk,
            left_out=left_out,
        )
        if dh is None:
            raise RuntimeError("the head gave no gradient")
        rms_norm_backward(dh.mul_(weight), x, rstd, residency.final_norm, out=dx)
        nll.add_(each.sum())
    return gradient
