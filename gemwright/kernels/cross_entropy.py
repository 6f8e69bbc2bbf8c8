"""Cross-entropy over a large tied head, chunked over its rows, with the gradient in the same pass.

Each chunk of rows is read once: its logits give both the running normaliser and the running sum of softmax-weighted
rows, rescaled when the maximum moves (the online softmax of Milakov and Gimelshein 2018, arXiv 1805.02867). Neither
a full logits tensor nor a second pass over the head exists. Order is fixed, so the result is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemwright.kernels.products import product
from gemwright.layout import FILL_STEP, rounded

ROWS = 8192
# Of a position's probability, by the dtype of products: what bf16 rounds changes its gradient more than either.
LEFT_OUT = {torch.float32: 2.0**-14, torch.bfloat16: 2.0**-10}
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Running:
    """What a pass over the head carries along for M positions, each fp32 [M, 1].

    `top` highest logit so far, `total` sum of exp(logit - top), `right` the logit of the target, `shrink` the factor by
    which the last chunk's new maximum scales all earlier sums.
    """

    top: Tensor
    total: Tensor
    right: Tensor
    shrink: Tensor

    @classmethod
    def start(cls, count: int, device: torch.device) -> Running:
        """Before the first chunk."""
        zeros = torch.zeros(3, count, 1, dtype=torch.float32, device=device)
        return cls(torch.full_like(zeros[0], -torch.inf), *zeros)


def softmax_chunk(logits: Tensor, target: Tensor, start: int, running: Running) -> None:
    """Turn `logits` [M, R] of head rows start..start+R into weights exp(logit - top), in place, and update `running`.

    `target` int64 [M]; those outside of these rows, negative ones among them, leave `right` alone.
    """
    highest = torch.maximum(running.top, logits.amax(-1, keepdim=True).float())
    local = (target - start).unsqueeze(1)
    here = (local >= 0) & (local < logits.shape[1])
    picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)).float()
    running.right.copy_(torch.where(here, picked, running.right))
    torch.exp(running.top - highest, out=running.shrink)
    # exp2 takes a third of the time of exp on a CPU, and a conversion of its own less than a sum of two dtypes.
    weight = logits.float().sub_(highest).mul_(LOG2_E).exp2_()
    running.total.mul_(running.shrink).add_(weight.sum(-1, keepdim=True))
    running.top.copy_(highest)
    logits.copy_(weight)  # does nothing where it is in fp32 already, and so the same


SoftmaxChunk = Callable[[Tensor, Tensor, int, Running], None]


def linear_cross_entropy(
    h_MD: Tensor,
    rows: Callable[[int, int], Tensor],
    vocab: int,
    target_M: Tensor,
    own: Callable[[Tensor], Tensor] | None = None,
    *,
    chunk: int = ROWS,
    softmax: SoftmaxChunk = softmax_chunk,
    left_out: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Return (nll [M] fp32 in nats, and with `own` dh [M, D] fp32 = d(sum of nll)/dh, else None).

    `rows(a, b)` gives head rows a..b as [b-a, D] in h's dtype, valid until the next call; `own` the rows of int64 ids;
    `target_M` int64 in 0..vocab, or negative where a position is ignored: its loss and gradient are zero. `left_out`
    is the share of a position's probability that its gradient may leave out: where a chunk holds next to nothing of
    it, as most do once a model knows what it says, it is not multiplied (which a device would have to be asked for).
    """
    count, width = h_MD.shape
    ignored = (target_M < 0).unsqueeze(1)
    running = Running.start(count, h_MD.device)
    right = target_M.clamp(min=0)
    if own is not None:
        dh = torch.zeros(count, width, dtype=torch.float32, device=h_MD.device)
        skipping = _Skipping(left_out / vocab, h_MD, own(right), ignored) if left_out else None
    for start in range(0, vocab, chunk):
        stop = min(start + chunk, vocab)
        head = rows(start, stop)
        logits = product(h_MD, head)
        softmax(logits, target_M, start, running)
        if own is not None:
            dh.mul_(running.shrink)
            if skipping is None:
                _accumulate(dh, logits, head)
            else:
                skipping.accumulate(dh, logits, head, stop, running)
        del logits  # before the next, which takes as much
    nll = (running.total.log() + running.top - running.right).masked_fill_(ignored, 0).squeeze(1)
    if own is None:
        return nll, None
    # Rounded as `rows` are: a certain position's own row and its share of all cancel.
    return nll, dh.div_(running.total).sub_(own(right).to(h_MD.dtype)).masked_fill_(ignored, 0)


def _accumulate(dh: Tensor, weight: Tensor, head: Tensor) -> None:
    """dh += weight head, in fp32 throughout where the device's products can add to it."""
    if dh.is_cuda and weight.dtype != torch.float32:
        torch.addmm(dh, weight, head, out_dtype=torch.float32, out=dh)
    else:
        dh.add_(torch.mm(weight, head))


class _Skipping:
    """`_accumulate` for those positions to which a chunk still matters, `missing` being what the others leave out."""

    def __init__(self, left_out: float, h: Tensor, right: Tensor, ignored: Tensor) -> None:
        self.left_out = left_out  # for each row of the head
        self.missing = torch.zeros_like(ignored, dtype=torch.float32)
        # A position's probabilities sum to at least exp of its target's logit, which comes with any chunk.
        self.least = torch.linalg.vecdot(h.float(), right.float()).unsqueeze(1).masked_fill_(ignored, torch.inf)

    def accumulate(self, dh: Tensor, weight: Tensor, head: Tensor, stop: int, running: Running) -> None:
        """Of the chunk that ends with row `stop`."""
        total = torch.maximum(running.total, (self.least - running.top).exp_())
        self.missing.mul_(running.shrink)
        would = self.missing + weight.sum(-1, keepdim=True, dtype=torch.float32)
        excess, order = (would - total * (self.left_out * stop)).squeeze(1).sort(descending=True, stable=True)
        count = rounded(int((excess > 0).sum()), FILL_STEP)
        if count >= len(dh):
            return _accumulate(dh, weight, head)
        rest, order = order[count:], order[:count]
        self.missing[rest] = would[rest]
        if count:
            dh.index_add_(0, order, torch.mm(weight[order], head).float())
