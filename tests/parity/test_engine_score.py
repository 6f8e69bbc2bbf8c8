"""llama.cpp's forced-token log-probabilities against our own decoder's, and against themselves in other ways."""

import dataclasses
from pathlib import Path

import pytest
import torch

from gemwright.engines.llamacpp import LlamaCpp
from gemwright.engines.protocol import Sampling
from gemwright.engines.pytorch import PyTorch
from gemwright.model.decoder import Gemma
from gemwright.spec import BOS, SPECS
from gemwright.weights.gguf_reader import open_gguf
from gemwright.weights.model_file import open_model
from gemwright.weights.random_model import write_random_gguf

TEXT = (
    "Water boils at 100 °C at sea level. Вода кипит при ста градусах на уровне моря. 水在海平面一百度沸腾。\n"
    "def double(x):\n    return 2 * x\n\nThe quick brown fox jumps over the lazy dog, and the dog does not mind at all."
)


@pytest.fixture(scope="module")
def exact_model(tmp_path_factory: pytest.TempPathFactory, real_model: Path) -> Path:
    """Random unquantized weights, so that only the order of sums and the fp16 cache tell two ways apart."""
    path = tmp_path_factory.mktemp("exact") / "random.gguf"
    small = {"layers": 7, "hidden": 64, "mlp": 128, "heads": 2, "kv_heads": 1, "head_dim": 32, "query_scalar": 32}
    spec = dataclasses.replace(SPECS["270m"], name="tiny", **small)
    write_random_gguf(path, spec, qtype="F32", seed=1, tokenizer_from=open_gguf(real_model))
    return path


def test_forced_tokens_have_their_unbiased_log_probability(exact_model: Path) -> None:
    with LlamaCpp(exact_model, context=512, parallel=2) as engine:
        ids = [BOS, *engine.encode(TEXT)]
        theirs = engine.score(ids)
    ours = Gemma.load(open_model(exact_model), dtype=torch.float32).log_probs(ids).tolist()
    assert theirs == pytest.approx(ours, abs=5e-3)


def test_scores_of_the_real_model_agree_with_our_decoder(real_model: Path) -> None:
    """llama.cpp rounds activations to 8 bits for its products, which moves single values, hardly the mean."""
    with LlamaCpp(real_model, context=512, parallel=2) as fast, PyTorch(real_model, context=512) as exact:
        ids = [BOS, *fast.encode(TEXT)]
        assert exact.encode(TEXT) == ids[1:]
        ours, theirs = exact.score(ids), fast.score(ids)
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    assert sum(gaps) / len(gaps) < 0.3
    assert abs(sum(ours) - sum(theirs)) / len(gaps) < 0.1


def test_slots_and_start_change_nothing(exact_model: Path) -> None:
    with LlamaCpp(exact_model, context=512, parallel=3) as engine:
        ids = [BOS, *engine.encode(TEXT)]
        done: list[int] = []
        whole = engine.score(ids, on_progress=done.append)
        late = engine.score(ids, start=len(ids) - 6)
        assert engine.score(ids[:1]) == []
    with LlamaCpp(exact_model, context=512, parallel=1) as engine:
        single = engine.score(ids)
    assert done[-1] == len(whole) == len(ids) - 1
    assert len(late) == 6
    assert single == pytest.approx(whole, abs=5e-3)
    assert late == pytest.approx(whole[-6:], abs=5e-3)


def test_the_greedy_token_has_the_highest_score(real_model: Path) -> None:
    with LlamaCpp(real_model, context=512) as engine:
        prompt = [BOS, *engine.encode("The capital of France is the city of")]
        answer = engine.generate(prompt, Sampling(max_tokens=1, temperature=0))
        best = engine.encode(answer.text)
        scores = {id_: engine.score([*prompt, id_])[-1] for id_ in (*best, 818, 5279, 236764)}
    assert max(scores, key=lambda id_: scores[id_]) == best[0]


def test_bytes_that_end_no_character_are_scored(exact_model: Path) -> None:
    """A no-break space and rarer characters are tokens of one byte each, for which llama.cpp gives no text yet."""
    with LlamaCpp(exact_model, context=64) as engine:
        ids = [BOS, *engine.encode("1\u00a0000 𓀀 ok")]
        theirs = engine.score(ids)
    assert sum(0x80 <= id_ - 238 <= 0xFF for id_ in ids) >= 5
    ours = Gemma.load(open_model(exact_model), dtype=torch.float32).log_probs(ids).tolist()
    assert theirs == pytest.approx(ours, abs=5e-3)
