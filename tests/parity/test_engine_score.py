"""llama.cpp's forced-token log-probabilities against our own decoder's, and against themselves in other ways."""

from pathlib import Path

import pytest

from gemwright.engines.llamacpp import LlamaCpp
from gemwright.engines.protocol import Sampling
from gemwright.engines.pytorch import PyTorch
from gemwright.spec import BOS

TEXT = (
    "Water boils at 100 °C at sea level. Вода кипит при ста градусах на уровне моря. 水在海平面一百度沸腾。\n"
    "def double(x):\n    return 2 * x\n\nThe quick brown fox jumps over the lazy dog, and the dog does not mind at all."
)


def test_scores_agree_with_our_decoder(real_model: Path) -> None:
    """llama.cpp rounds activations to 8 bits for its products, which moves single values, hardly the mean."""
    with LlamaCpp(real_model, context=512, parallel=2) as fast, PyTorch(real_model, context=512) as exact:
        ids = [BOS, *fast.encode(TEXT)]
        assert exact.encode(TEXT) == ids[1:]
        ours, theirs = exact.score(ids), fast.score(ids)
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    assert sum(gaps) / len(gaps) < 0.1
    assert abs(sum(ours) - sum(theirs)) / len(gaps) < 0.03


def test_slots_and_start_change_nothing_that_matters(real_model: Path) -> None:
    with LlamaCpp(real_model, context=512, parallel=3) as engine:
        ids = [BOS, *engine.encode(TEXT)]
        done: list[int] = []
        whole = engine.score(ids, on_progress=done.append)
        late = engine.score(ids, start=len(ids) - 6)
        assert engine.score(ids[:1]) == []
    with LlamaCpp(real_model, context=512, parallel=1) as engine:
        single = engine.score(ids)
    assert done[-1] == len(whole) == len(ids) - 1
    assert len(late) == 6
    assert sum(whole) / len(whole) == pytest.approx(sum(single) / len(single), abs=0.03)
    assert late == pytest.approx(whole[-6:], abs=0.4)


def test_the_greedy_token_has_the_highest_score(real_model: Path) -> None:
    with LlamaCpp(real_model, context=512) as engine:
        prompt = [BOS, *engine.encode("The capital of France is the city of")]
        answer = engine.generate(prompt, Sampling(max_tokens=1, temperature=0))
        best = engine.encode(answer.text)
        scores = {id_: engine.score([*prompt, id_])[-1] for id_ in (*best, 818, 5279, 236764)}
    assert max(scores, key=lambda id_: scores[id_]) == best[0]
