"""The loss on examples that are not trained on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from gemwright.errors import InputError
from gemwright.train.batches import Encoded, lengths_of, pack, targets_of
from gemwright.train.setup import Setup
from gemwright.train.step import forward_loss


@dataclass(frozen=True)
class Validation:
    """The mean loss in nats over all `labelled` tokens, and how long it took."""

    loss: float
    labelled: int
    seconds: float


def validate(
    setup: Setup, examples: Sequence[Encoded], seq: int, rows_at_once: int, stops: Callable[[], object]
) -> Validation | None:
    """Measure `examples`, in rows of up to `seq` tokens of which `rows_at_once` pass the model together, as in a step.

    None where `stops` said so in between.
    """
    start, nll, labelled = time.perf_counter(), 0.0, 0
    rows = pack(examples, seq, 0, 0)
    for first in range(0, len(rows), rows_at_once):
        if stops():
            return None
        packed = [[examples[i] for i in members] for members in rows[first : first + rows_at_once]]
        done = forward_loss(setup.model, setup.rows(packed), setup.work)
        nll, labelled = nll + float(done.nll), labelled + done.labelled
    return Validation(nll / labelled, labelled, time.perf_counter() - start)


class Chosen(Sequence[Encoded]):
    """Some of the examples, by their indices."""

    def __init__(self, examples: Sequence[Encoded], indices: Sequence[int]) -> None:
        self._examples, self._indices = examples, indices

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def lengths(self) -> NDArray[np.uint32]:
        """[examples] Tokens of each."""
        return lengths_of(self._examples)[np.asarray(self._indices, np.int64)]

    @property
    def targets(self) -> NDArray[np.uint32]:
        """[examples] Targets of each."""
        return targets_of(self._examples)[np.asarray(self._indices, np.int64)]

    @overload
    def __getitem__(self, at: int) -> Encoded: ...
    @overload
    def __getitem__(self, at: slice) -> Chosen: ...
    def __getitem__(self, at: int | slice) -> Encoded | Chosen:
        if isinstance(at, slice):
            return Chosen(self._examples, self._indices[at])
        return self._examples[self._indices[at]]


def hold_out(examples: Sequence[Encoded], count: int, seed: int) -> tuple[Chosen, Chosen]:
    """(training, held out) in their order; the same seed always holds out the same. InputError where none is left."""
    if count >= len(examples):
        raise InputError(
            f"cannot hold out {count} of {len(examples)} examples", where="--holdout", fix="Hold out fewer."
        )
    out = set(random.Random(seed).sample(range(len(examples)), count))
    kept = [index for index in range(len(examples)) if index not in out]
    return Chosen(examples, kept), Chosen(examples, sorted(out))
