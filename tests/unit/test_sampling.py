"""Choosing a token: each rule against a plain reference, seeds, greed, and where a generation ends."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gemwright.engines.protocol import Sampling
from gemwright.model.decoder import Gemma
from gemwright.model.generate import choose, generate
from gemwright.spec import END_OF_TURN, EOS
from gemwright.weights.model_file import open_model

OFF = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0)
Choice = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.just(0),
)


def penalised(logits: list[float], seen: list[int], choice: Sampling) -> dict[int, float]:
    scores = dict(enumerate(logits))
    for token in set(seen):
        factor = choice.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    return scores


def plain(logits: list[float], seen: list[int], choice: Sampling) -> dict[int, float]:
    """Probability of each token that may be drawn, written out rule by rule on Python lists."""
    scores = penalised(logits, seen, choice)
    kept = sorted(scores, key=lambda t: (-scores[t], t))[: choice.top_k or None]
    total = sum(math.exp(scores[t]) for t in kept)
    chance = {t: math.exp(scores[t]) / total for t in kept}
    nucleus, before = [], 0.0
    for token in kept:
        if before < choice.top_p - 1e-6:
            nucleus.append(token)
        before += chance[token]
    allowed = [t for t in nucleus if chance[t] >= choice.min_p * chance[kept[0]]]
    heated = {t: math.exp(scores[t] / choice.temperature) for t in allowed}
    return {t: value / sum(heated.values()) for t, value in heated.items()}


def draws(logits: torch.Tensor, seen: list[int], choice: Sampling, count: int) -> Counter[int]:
    rng = torch.Generator().manual_seed(7)
    return Counter(choose(logits, seen, choice, rng) for _ in range(count))


@settings(max_examples=60)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True),
    seen=st.lists(st.integers(0, 1), max_size=3),
    choice=Choice,
)
def test_only_tokens_that_the_rules_allow(logits: list[int], seen: list[int], choice: Sampling) -> None:
    scores = [value / 10 for value in logits]
    ranked = sorted(penalised(scores, seen, choice).values())
    # A penalty may make two scores equal, of which fp32 and fp64 then prefer one each.
    assume(all(high - low > 1e-4 for low, high in itertools.pairwise(ranked)))
    allowed = plain(scores, seen, choice)
    assert draws(torch.tensor(scores), seen, choice, 30).keys() <= allowed.keys()


@pytest.mark.parametrize(
    "choice",
    [
        OFF,
        replace(OFF, temperature=2.0),
        replace(OFF, top_k=3),
        replace(OFF, top_p=0.8),
        replace(OFF, min_p=0.3),
        replace(OFF, repetition_penalty=1.8),
        replace(OFF, top_k=5, top_p=0.9, min_p=0.1, temperature=0.7, repetition_penalty=1.2),
    ],
)
def test_frequencies_are_the_probabilities(choice: Sampling) -> None:
    logits = [1.0, 0.4, 2.0, -1.0, 1.5, -0.2]
    wanted, count = plain(logits, [2, 3], choice), 4000
    drawn = draws(torch.tensor(logits), [2, 3], choice, count)
    assert drawn.keys() <= wanted.keys()
    for token, p in wanted.items():
        assert abs(drawn[token] / count - p) <= 4.5 * math.sqrt(p * (1 - p) / count) + 1e-9


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.5, -1.0])
    greedy = replace(OFF, temperature=0.0)
    assert choose(logits, [1], greedy, torch.Generator()) == 1
    assert choose(logits, [1], replace(greedy, repetition_penalty=1.5), torch.Generator()) == 2
    below = torch.tensor([-1.0, -1.2])
    assert choose(below, [0], replace(greedy, repetition_penalty=1.5), torch.Generator()) == 1
    assert torch.equal(logits, torch.tensor([1.0, 3.0, 2.5, -1.0]))


def test_rules_that_leave_one_token_leave_the_likeliest() -> None:
    logits = torch.tensor([0.0, 5.0, 4.9])
    for choice in (replace(OFF, top_k=1), replace(OFF, top_p=1e-6), replace(OFF, min_p=1.0)):
        assert draws(logits, [], choice, 50) == {1: 50}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Gemma:
    return Gemma.load(open_model(tiny_model), torch.float32)


def test_a_seed_gives_the_same_tokens_again(model: Gemma) -> None:
    choice = replace(OFF, max_tokens=12, seed=11)
    first = list(generate(model, [2, 100, 200], choice))
    assert first == list(generate(model, [2, 100, 200], choice)) and len(first) == 12
    assert first != list(generate(model, [2, 100, 200], replace(choice, seed=12)))
    unseeded = replace(choice, seed=None)
    assert list(generate(model, [2, 100, 200], unseeded)) != list(generate(model, [2, 100, 200], unseeded))


def test_greedy_generation_is_the_argmax_of_the_whole_sequence(model: Gemma) -> None:
    ids = [2, 100, 200]
    made = list(generate(model, ids, replace(OFF, temperature=0.0, max_tokens=6)))
    for at in range(len(made)):
        assert made[at] == int(model.logits([*ids, *made[:at]], last=True).argmax())


@pytest.mark.parametrize("stop", [EOS, END_OF_TURN])
def test_a_stop_token_ends_it_and_is_not_given(model: Gemma, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    script = iter([500, 501, stop, 502])

    def logits(step: list[int], cache: object, *, last: bool) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([next(script)]), 1000).float()

    monkeypatch.setattr(model, "logits", logits)
    assert list(generate(model, [2], replace(OFF, temperature=0.0, max_tokens=10))) == [500, 501]


def test_it_ends_at_the_end_of_the_context(model: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "spec", replace(model.spec, context=8))
    assert len(list(generate(model, [2, 5, 6, 7, 8], replace(OFF, max_tokens=100)))) == 3
