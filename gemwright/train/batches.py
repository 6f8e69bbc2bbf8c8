"""From examples to packed rows of tokens, in an order that is a pure function of seed, epoch and position."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemwright.data.store import Encoded as Encoded
from gemwright.kernels.attend import Attention
from gemwright.kernels.heads import Table
from gemwright.layout import FILL_STEP, label_step, rounded
from gemwright.model.decoder import plan_attention, rope_tables
from gemwright.spec import PAD, ModelSpec

CPU = torch.device("cpu")
OPEN_ROWS = 32
IGNORED = -100
_YOUNGEST = (1 << 40) - 1


@dataclass(frozen=True)
class Row:
    """One micro-batch: documents one after another, filled up to a whole step by one more of PAD tokens.

    ids [N] int64; `at` [M] positions whose next token is a target, and those `targets` [M], filled up to a whole
    step by unlabelled positions with IGNORED; attention and rotation tables as (local, global).
    `tokens` and `labelled` count without what was filled up; `tokens` are all those of all documents.
    """

    ids: Tensor
    at: Tensor
    targets: Tensor
    attention: tuple[Attention, Attention]
    tables: tuple[Table, Table]
    tokens: int
    labelled: int


class Rows(Sequence[list[int]]):
    """Rows of example indices, all in two arrays."""

    def __init__(self, indices: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self._indices, self._ends = indices, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        members: list[int] = self._indices[self._ends[at - 1] if at else 0 : self._ends[at]].tolist()
        return members


def rows_of(
    examples: Sequence[Encoded], seq: int, rows_per_step: int, seed: int, epoch: int, packing: bool = True
) -> Rows:
    """The rows of one epoch in their order, a pure function of the arguments; of the examples only lengths count."""
    return pack(examples, seq, seed, epoch) if packing else bucket(examples, rows_per_step, seed, epoch)


def pack(examples: Sequence[Encoded], seq: int, seed: int, epoch: int) -> Rows:
    """Shuffled, then each put into the fullest open row that still holds it, the oldest of equals (best fit).

    Where a new row is needed and OPEN_ROWS are open, the fullest is closed.
    """
    lengths = lengths_of(examples)
    order = _shuffled(len(lengths), _generator(seed, epoch))
    opened_by, places = [], np.empty(len(order), np.int64)  # the row of each in `order`, each row's place
    # An open row is one number: its tokens, and below them what is larger the older it is.
    rows: list[int] = []
    opened = closed = 0
    for size in lengths[order].tolist():
        at = bisect_right(rows, (seq - size) << 40 | _YOUNGEST)
        if at:
            row = rows.pop(at - 1)
        else:
            if len(rows) == OPEN_ROWS:
                places[_YOUNGEST - (rows.pop() & _YOUNGEST)] = closed
                closed += 1
            row = _YOUNGEST - opened
            opened += 1
        insort(rows, row + (size << 40))
        opened_by.append(_YOUNGEST - (row & _YOUNGEST))
    for row in reversed(rows):
        places[_YOUNGEST - (row & _YOUNGEST)] = closed
        closed += 1
    placed = places[np.array(opened_by, np.int64)]
    return Rows(order[np.argsort(placed, kind="stable")], np.cumsum(np.bincount(placed, minlength=closed)))


def bucket(examples: Sequence[Encoded], rows_per_step: int, seed: int, epoch: int) -> Rows:
    """One example a row, a step of like lengths, the steps shuffled; last is what makes no whole step."""
    lengths = lengths_of(examples)
    generator = _generator(seed, epoch)
    order = _shuffled(len(lengths), generator)
    whole = order[: len(order) // rows_per_step * rows_per_step]
    by_step = whole[np.argsort(lengths[whole], kind="stable")].reshape(-1, rows_per_step)
    by_step = by_step[_shuffled(len(by_step), generator)]
    return Rows(np.concatenate([by_step.ravel(), order[len(whole) :]]), np.arange(1, len(order) + 1))


def targets_of(examples: Sequence[Encoded]) -> NDArray[np.uint32]:
    """[examples] Targets of each, which a store counts (`targets`) as a whole."""
    known: NDArray[np.uint32] | None = getattr(examples, "targets", None)
    return np.array([sum(example.labelled) for example in examples], np.uint32) if known is None else known


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _shuffled(count: int, generator: torch.Generator) -> NDArray[np.int64]:
    order: NDArray[np.int64] = torch.randperm(count, generator=generator).numpy()
    return order


def lengths_of(examples: Sequence[Encoded]) -> NDArray[np.uint32]:
    """[examples] Tokens of each, which a store knows (`lengths`) without reading them."""
    known: NDArray[np.uint32] | None = getattr(examples, "lengths", None)
    return np.array([len(example.ids) for example in examples], np.uint32) if known is None else known


def labelled_shares(examples: Sequence[Encoded]) -> tuple[float, float]:
    """Of all tokens the share that are targets, and the most that any example has, and so any row of them."""
    lengths, targets = lengths_of(examples), targets_of(examples)
    return float(targets.sum() / lengths.sum()), float((targets / lengths).max())


def make_row(
    spec: ModelSpec,
    documents: Sequence[Encoded],
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    full: int | None = None,
) -> Row:
    """Lay documents end to end; positions begin at 0 in each, and no label crosses from one to the next.

    The tensors are on `device`, for a model computing in `dtype`. `full` fills the row up to so many tokens and its
    labels in few sizes, so that nearly all rows have the same shapes. On a CPU a row is as short as it can be: what
    documents begin with in common (`shared`) is in it once, and what comes after a last target not at all.
    """
    tokens = sum(len(d.ids) for d in documents)
    short = device.type == "cpu" and full is None
    pasts = shared(documents) if short else [[] for _ in documents]
    parts = [(d, len(past), d.inputs if short else len(d.ids)) for d, past in zip(documents, pasts, strict=True)]
    own = sum(stop - n for _, n, stop in parts)
    fill = (full or rounded(own, FILL_STEP)) - own
    step = FILL_STEP if full is None else label_step(full)
    if fill:
        parts, pasts = [*parts, (Encoded([PAD] * fill, [False] * fill), 0, fill)], [*pasts, []]
    lengths = [stop - n for _, n, stop in parts]
    ids = torch.tensor([i for d, n, stop in parts for i in d.ids[n:stop]])
    learned = torch.tensor([flag for d, n, stop in parts for flag in [*d.labelled[1:], False][n:stop]])
    following = torch.tensor([i for d, n, stop in parts for i in [*d.ids[1:], PAD][n:stop]])
    at, spare = learned.nonzero()[:, 0], (~learned).nonzero()[:, 0]
    targets = following[at]
    spare = spare[: max(step, rounded(len(at), step)) - len(at)]
    positions = torch.cat([torch.arange(n, stop) for _, n, stop in parts])
    starts = zip(accumulate(lengths, initial=0), parts, strict=False)
    images = [(first + a, first + b) for first, (d, _, stop) in starts for a, b in d.images if b <= stop]
    at, padded = torch.cat([at, spare]), torch.cat([targets, torch.full_like(spare, IGNORED)])
    return Row(
        ids.to(device),
        at.to(device),
        padded.to(device),
        plan_attention(spec, lengths, device, dtype, uniform=full is not None, images=images, pasts=pasts),
        rope_tables(spec, positions.to(device)),
        tokens,
        len(targets),
    )


def shared(documents: Sequence[Encoded]) -> list[list[int]]:
    """For each document the rows of what it begins with as an earlier one does: it lies there and is computed once.

    A token whose next one is a target stays each document's own; so does the last, and all of one with images.
    """
    known: dict[tuple[int, int], int] = {}  # the row before (-1: none) and a token -> that token's row
    pasts: list[list[int]] = []
    end = 0
    for document in documents:
        free = 0 if document.images else [*document.labelled[1:], True].index(True)
        past: list[int] = []
        before = -1
        for token in document.ids[:free]:
            if (before, token) not in known:
                break
            before = known[before, token]
            past.append(before)
        for row, token in enumerate(document.ids[len(past) : free], end):
            known[before, token] = before = row
        end += document.inputs - len(past)
        pasts.append(past)
    return pasts


def steps(
    examples: Sequence[Encoded], seq: int, rows_per_step: int, seed: int, first: int = 0, packing: bool = True
) -> Iterator[tuple[float, list[list[Encoded]]]]:
    """Endless steps of up to `rows_per_step` rows of documents, from step `first` on, each with the epochs passed then.

    No step spans two epochs. A pure function of its arguments: the steps from `first` on are the same whoever asks.
    """
    passed_steps, epoch = 0, 0
    while True:
        rows = rows_of(examples, seq, rows_per_step, seed, epoch, packing)
        for start in range(0, len(rows), rows_per_step):
            if passed_steps >= first:
                chosen = rows[start : start + rows_per_step]
                passed = epoch + (start + len(chosen)) / len(rows)
                yield passed, [[examples[i] for i in members] for members in chosen]
            passed_steps += 1
        epoch += 1
