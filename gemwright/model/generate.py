"""Choosing tokens one after another from our own decoder, for use inside training and where llama.cpp is not wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gemwright.model.cache import KVCache
from gemwright.model.decoder import Gemma
from gemwright.spec import END_OF_TURN, EOS

STOPS = (EOS, END_OF_TURN)


class Choice(Protocol):
    """How a token is chosen; temperature 0 is greedy, and top_k 0, top_p 1, min_p 0, penalty 1 switch a rule off."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def seed(self) -> int | None: ...


def generate(model: Gemma, ids: Sequence[int], choice: Choice) -> Iterator[int]:
    """Yield new token ids until a stop token (not yielded), `max_tokens`, or the end of the context."""
    cache, rng = KVCache(model.spec), torch.Generator()
    if choice.seed is None:
        rng.seed()
    else:
        rng.manual_seed(choice.seed)
    seen, step = list(ids), list(ids)
    for _ in range(min(choice.max_tokens, model.spec.context - len(ids))):
        logits = model.logits(step, cache, last=True)[0]
        token = choose(logits, seen, choice, rng)
        if token in STOPS:
            return
        yield token
        seen.append(token)
        step = [token]


def choose(logits: Tensor, seen: Sequence[int], choice: Choice, rng: torch.Generator) -> int:
    """One token id from fp32 logits [vocab]; rules apply in llama.cpp's order: penalty, top-k, top-p, min-p, heat.

    Sources: repetition penalty, Keskar et al. 2019 (arXiv 1909.05858); top-p, Holtzman et al. 2020 (arXiv 1904.09751);
    min-p, Nguyen et al. 2024 (arXiv 2407.01082).
    """
    if choice.repetition_penalty != 1.0:
        at = torch.tensor(sorted(set(seen)), dtype=torch.long)
        old = logits[at]
        penalised = torch.where(old > 0, old / choice.repetition_penalty, old * choice.repetition_penalty)
        logits = logits.index_copy(0, at, penalised)
    if choice.temperature == 0:
        return int(logits.argmax())
    values, order = logits.sort(descending=True, stable=True)
    if choice.top_k:
        values, order = values[: choice.top_k], order[: choice.top_k]
    p = torch.softmax(values, 0)
    allowed = p.cumsum(0) - p < choice.top_p
    allowed &= p >= choice.min_p * p[0]
    values = values.masked_fill(~allowed, -torch.inf) / choice.temperature
    return int(order[torch.multinomial(torch.softmax(values, 0), 1, generator=rng)])
