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

ROWS = 8192
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
    *,
    gradient: bool = True,
    own: Callable[[Tensor], Tensor] | None = None,
    chunk: int = ROWS,
    softmax: SoftmaxChunk = softmax_chunk,
) -> tuple[Tensor, Tensor | None]:
    """Return (nll [M] fp32 in nats, dh [M, D] fp32 = d(sum of nll)/dh, or None).

    `rows(a, b)` gives head rows a..b as [b-a, D] in h's dtype, valid until the next call; `target_M` int64 in 0..vocab,
    or negative where a position is ignored: its loss and gradient are zero. `own` gives the head rows of int64 ids,
    which spares the search for them where a device must not be asked what it holds.
    """
    count, width = h_MD.shape
    running = Running.start(count, h_MD.device)
    dh = torch.zeros(count, width, dtype=torch.float32, device=h_MD.device) if gradient else None
    found = torch.zeros_like(dh) if dh is not None and own is None else None
    for start in range(0, vocab, chunk):
        stop = min(start + chunk, vocab)
        head = rows(start, stop)
        logits = product(h_MD, head)
        softmax(logits, target_M, start, running)
        if dh is not None:
            _accumulate(dh.mul_(running.shrink), logits, head)
        if found is not None:
            here = ((target_M >= start) & (target_M < stop)).nonzero().squeeze(1)
            found[here] = head[target_M[here] - start].float()
        del logits  # before the next, which takes as much
    ignored = (target_M < 0).unsqueeze(1)
    nll = (running.total.log() + running.top - running.right).masked_fill_(ignored, 0).squeeze(1)
    if dh is None:
        return nll, None
    dh.div_(running.total)
    if found is not None:
        dh.sub_(found)
    elif own is not None:
        dh.sub_(own(target_M.clamp(min=0)))
    return nll, dh.masked_fill_(ignored, 0)


def _accumulate(dh: Tensor, weight: Tensor, head: Tensor) -> None:
    """dh += weight head, in fp32 throughout where the device's products can add to it."""
    if dh.is_cuda and weight.dtype != torch.float32:
        torch.addmm(dh, weight, head, out_dtype=torch.float32, out=dh)
    else:
        dh.add_(torch.mm(weight, head))
