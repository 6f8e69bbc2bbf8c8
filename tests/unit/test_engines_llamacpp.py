"""llama.cpp in its child: texts, tokens, stops, adapters, cancellation and several requests at once."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gemwright.engines.llamacpp import LlamaCpp
from gemwright.engines.open import open_engine
from gemwright.engines.protocol import Sampling
from gemwright.engines.session import run_prompt
from gemwright.errors import InputError
from gemwright.spec import BOS, END_OF_TURN, LINEARS, SPECS
from gemwright.weights.gguf_writer import write_gguf_lora
from gemwright.weights.peft_files import write_peft_adapter

GREEDY = Sampling(max_tokens=12, temperature=0)
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def engine(real_model: Path) -> Iterator[LlamaCpp]:
    with LlamaCpp(real_model, context=512, parallel=3) as opened:
        yield opened


def pairs(spread: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    spec, rng = SPECS["270m"], torch.Generator().manual_seed(0)
    made = {}
    for layer in range(spec.layers):
        for part in LINEARS:
            rows, cols = spec.linear_shapes[part]
            a = torch.randn(4, cols, generator=rng) * spread
            made[f"{layer}.{part}"] = (a, torch.randn(rows, 4, generator=rng) * spread)
    return made


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "a.gguf"
    write_gguf_lora(path, SPECS["270m"], "270m", 4.0, pairs(0.1))
    return path


def test_control_tokens_in_text_stay_text(engine: LlamaCpp) -> None:
    ids = engine.encode("a<end_of_turn>\n<start_of_turn>user <bos>")
    assert not set(ids) & {1, 2, 105, END_OF_TURN}
    assert engine.encode("") == []


def test_text_streams_as_it_is_returned(engine: LlamaCpp) -> None:
    heard: list[str] = []
    answer = run_prompt(engine, PROMPT, raw=True, sampling=GREEDY, on_text=heard.append)
    assert "".join(heard) == answer.text != ""
    assert len(heard) > 3
    assert (answer.prompt_tokens, answer.completion_tokens, answer.stop_reason) == (6, 12, "length")
    assert answer.tokens_per_s > 0 and 0 < answer.first_token_s < 60


def test_characters_come_whole(engine: LlamaCpp) -> None:
    heard: list[str] = []
    prompt = "Emoji and rare letters: 🧑‍🚀 𐍈 𒀀 ꙮ 🧑‍🚀 𐍈 𒀀 ꙮ 🧑‍🚀 𐍈 𒀀"
    run_prompt(engine, prompt, raw=True, sampling=Sampling(max_tokens=40, temperature=0), on_text=heard.append)
    assert "\ufffd" not in "".join(heard)


def test_a_seed_repeats(engine: LlamaCpp) -> None:
    ids = [BOS, *engine.encode("Once upon a time")]
    first, again, other = (engine.generate(ids, Sampling(max_tokens=16, seed=s)).text for s in (1, 1, 2))
    assert first == again != other


def test_many_prompts_side_by_side_give_the_same_texts(engine: LlamaCpp) -> None:
    prompts = [
        [BOS, *engine.encode(f"{word} is a city in the country of")] for word in ("Rome", "Paris", "Oslo", "Bonn")
    ]
    seen: list[int] = []
    answers = engine.generate_many(prompts, Sampling(max_tokens=2, temperature=0), lambda index, _: seen.append(index))
    assert sorted(seen) == [0, 1, 2, 3]
    assert "Italy" in answers[0].text and "France" in answers[1].text
    assert engine.generate_many([], GREEDY) == []


def test_a_prompt_that_does_not_fit_is_bad_input(engine: LlamaCpp) -> None:
    with pytest.raises(InputError, match="512"):
        engine.generate([BOS] * 512, GREEDY)
    with pytest.raises(InputError, match="empty"):
        engine.generate([], GREEDY)
    answer = engine.generate([BOS] * 510, Sampling(max_tokens=50, temperature=0))
    assert answer.completion_tokens <= 2


def test_ctrl_c_ends_the_answer_and_leaves_the_engine(engine: LlamaCpp) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    answer = engine.generate([BOS, 818], Sampling(max_tokens=400, temperature=0), interrupt)
    assert answer.stop_reason == "cancelled" and answer.completion_tokens < 5
    assert run_prompt(engine, PROMPT, raw=True, sampling=GREEDY).completion_tokens == 12


def test_an_error_of_the_listener_passes_through(engine: LlamaCpp) -> None:
    def fail(text: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.generate([BOS, 818], GREEDY, fail)
    assert engine.encode("still here")


def test_an_adapter_changes_the_scores_and_is_switched(real_model: Path, lora: Path, tmp_path: Path) -> None:
    peft = tmp_path / "adapter"
    write_peft_adapter(peft, SPECS["270m"], 4, 4.0, pairs(0.1), "270m", LINEARS)
    with LlamaCpp(real_model, context=256) as engine:
        ids = [BOS, *engine.encode(PROMPT)]
        plain = engine.score(ids)
        engine.load_adapter(lora)
        tuned = engine.score(ids)
        child = engine._child
        engine.load_adapter(None)
        assert engine.score(ids) == pytest.approx(plain, abs=1e-6)
        engine.load_adapter(lora)
        assert engine._child is child, "switched, not loaded again"
        assert engine.score(ids) == pytest.approx(tuned, abs=1e-6)
        engine.load_adapter(peft)
        assert engine.score(ids) == pytest.approx(tuned, abs=1e-6)
    assert max(abs(a - b) for a, b in zip(plain, tuned, strict=True)) > 0.1


def test_an_adapter_of_another_model_is_named(real_model: Path, tmp_path: Path) -> None:
    spec = SPECS["1b"]
    rows, cols = spec.linear_shapes["q"]
    other = tmp_path / "other.gguf"
    write_gguf_lora(other, spec, "1b", 4.0, {"3.q": (torch.zeros(4, cols), torch.zeros(rows, 4))})
    with pytest.raises(InputError, match=r"another model: blk\.3\.attn_q"):
        open_engine(real_model, adapter=other)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"base": {"size": "1b"}}', encoding="utf-8")
    with pytest.raises(InputError, match="trained on Gemma 3 1b, this is Gemma 3 270m"):
        open_engine(real_model, adapter=run)
    (run / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="holds no adapter"):
        open_engine(real_model, adapter=run)
    with pytest.raises(InputError, match="no such adapter"):
        open_engine(real_model, adapter=tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a LoRA"):
        open_engine(real_model, adapter=real_model)


def test_the_llama_cpp_path_never_imports_torch() -> None:
    code = (
        "import sys; import gemwright.engines.open, gemwright.engines.session, gemwright.engines.llamacpp; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
