"""An adapter that `tune` wrote means the same everywhere: in our decoder, in PEFT and in llama.cpp."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from reference import OLD_NAME, transformers_model

from gemwright.data.read import read_examples
from gemwright.engines.open import open_engine
from gemwright.engines.protocol import Sampling
from gemwright.errors import InputError
from gemwright.model.decoder import Gemma
from gemwright.spec import SPECS
from gemwright.text.chat import Message, encode_example, render_prompt
from gemwright.text.tokenizer import Tokenizer
from gemwright.train.config import TrainConfig
from gemwright.train.loop import TuneResult, tune
from gemwright.weights.gguf_reader import open_gguf
from gemwright.weights.model_file import open_model
from gemwright.weights.peft_files import read_peft_adapter
from gemwright.weights.random_model import write_random_gguf

ASK = "Write the date 2024-05-17 in full, in German."
GREEDY = Sampling(max_tokens=16, temperature=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the demo's data."""
    whole = Path(__file__).parents[2] / "gemwright" / "data" / "cldr" / "train.jsonl"
    path = tmp_path_factory.mktemp("data") / "some.jsonl"
    path.write_text("".join(whole.read_text(encoding="utf-8").splitlines(keepends=True)[:60]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def real_run(real_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    """A few steps on the real model, at a rate that moves it."""
    settings = {"data": data, "model": real_model, "out": tmp_path_factory.mktemp("real") / "run", "rank": 8}
    return tune(TrainConfig(**settings, max_steps=6, seq=256, tokens_per_step=256, lr=3e-3))


def ids_of(model: Path, data: Path, count: int = 6) -> tuple[list[int], list[bool]]:
    """The first examples in one sequence, as if they were one long conversation, and which ids are targets."""
    encode = Tokenizer.from_model(open_gguf(model)).encode
    ids, labelled = list[int](), list[bool]()
    for example in read_examples(data)[:count]:
        own, flags = encode_example([Message(turn["role"], turn["content"]) for turn in example.messages], encode)
        ids, labelled = ids + own[1 if ids else 0 :], labelled + flags[1 if labelled else 0 :]
    return ids, labelled


def ours_with(model: Path, run: TuneResult | None) -> Gemma:
    """Our decoder in fp32, with the adapter of `run` read back from disk."""
    ours = Gemma.load(open_model(model), torch.float32)
    if run is not None:
        adapter = read_peft_adapter(run.adapter, ours.spec)
        ours.load_adapter(adapter.pairs, adapter.scale, adapter.magnitudes)
    return ours


def test_a_few_steps_lower_the_loss_of_the_real_model(real_run: TuneResult) -> None:
    assert real_run.loss_last < 0.8 * real_run.loss_first


@OLD_NAME
@torch.inference_mode()
def test_peft_computes_what_we_compute(real_model: Path, data: Path, real_run: TuneResult) -> None:
    from peft import PeftModel

    ids, _ = ids_of(real_model, data, 2)
    ours = ours_with(real_model, real_run)
    mine = ours.logits(ids)
    ours.load_adapter(None)
    without = ours.logits(ids)
    del ours
    model = PeftModel.from_pretrained(transformers_model(open_model(real_model)), real_run.adapter)
    theirs = model(input_ids=torch.tensor([ids])).logits[0]
    assert float((mine - without).abs().max()) > 1
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-3)


def test_llamacpp_answers_otherwise_and_scores_as_we_do(real_model: Path, data: Path, real_run: TuneResult) -> None:
    """Packed weights: llama.cpp rounds activations to 8 bits, which moves single values, hardly the mean."""
    ids, labelled = ids_of(real_model, data, 3)
    with open_engine(real_model, adapter=real_run.run, context=512, threads=1) as engine:
        prompt = render_prompt([Message("user", ASK)], engine.encode)
        with_it, answer = engine.score(ids), engine.generate(prompt, GREEDY).text
        engine.load_adapter(None)
        without, plain_answer = engine.score(ids), engine.generate(prompt, GREEDY).text
    ours = ours_with(real_model, real_run).log_probs(ids).tolist()
    assert answer != plain_answer
    learned = [at for at, flag in enumerate(labelled[1:]) if flag]
    with_mean, without_mean = (sum(values[at] for at in learned) / len(learned) for values in (with_it, without))
    assert with_mean > without_mean + 0.3
    assert abs(sum(with_it) - sum(ours)) / len(ours) < 0.15 < 0.3 < abs(sum(with_it) - sum(without)) / len(ours)


@pytest.fixture(scope="module")
def exact_model(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random unpacked weights, so that only the order of sums and the fp16 cache tell llama.cpp and us apart."""
    path = tmp_path_factory.mktemp("exact") / "exact.gguf"
    small = {"layers": 7, "hidden": 64, "mlp": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "query_scalar": 32}
    spec = dataclasses.replace(SPECS["270m"], name="tiny", **small)
    write_random_gguf(path, spec, qtype="F32", seed=1, tokenizer_from=open_gguf(real_model))
    return path


@pytest.fixture(scope="module")
def exact_run(exact_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    return tune(exact_settings(exact_model, data, tmp_path_factory.mktemp("exact") / "run"))


def exact_settings(model: Path, data: Path, out: Path, **kind: bool) -> TrainConfig:
    settings = {"data": data, "model": model, "out": out, "rank": 4, "alpha": 6, "precision": "fp32", "lr": 2e-2}
    return TrainConfig(**settings, max_steps=8, seq=256, tokens_per_step=256, **kind)


@pytest.mark.parametrize("rslora", [False, True], ids=("plain", "rslora"))
def test_log_probabilities_are_the_same_in_every_engine_and_form(
    exact_model: Path, data: Path, exact_run: TuneResult, tmp_path: Path, rslora: bool
) -> None:
    ids = ids_of(exact_model, data)[0][:48]
    tuned = tune(exact_settings(exact_model, data, tmp_path / "run", rslora=True)) if rslora else exact_run
    ours, without = (ours_with(exact_model, run).log_probs(ids).tolist() for run in (tuned, None))
    assert max(abs(a - b) for a, b in zip(ours, without, strict=True)) > 0.5
    for form in (tuned.run, tuned.adapter, tuned.adapter_gguf):
        with open_engine(exact_model, adapter=form, context=512, threads=1) as engine:
            assert engine.score(ids) == pytest.approx(ours, abs=1e-2), form
    for form in (tuned.run, tuned.adapter_gguf):
        with open_engine(exact_model, engine="pytorch", adapter=form, context=512) as engine:
            assert engine.score(ids) == pytest.approx(ours, abs=0.1)


@OLD_NAME
@torch.inference_mode()
def test_dora_is_the_same_in_peft_and_our_engine_and_refused_by_llamacpp(
    exact_model: Path, data: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    tuned = tune(exact_settings(exact_model, data, tmp_path / "run", dora=True))
    assert tuned.adapter_gguf is None and not (tuned.run / "adapter.gguf").exists()
    ids = ids_of(exact_model, data)[0][:48]
    ours, without = ours_with(exact_model, tuned), ours_with(exact_model, None)
    assert float((ours.logits(ids) - without.logits(ids)).abs().max()) > 0.5
    model = PeftModel.from_pretrained(transformers_model(open_model(exact_model)), tuned.adapter)
    theirs = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours.logits(ids), theirs, rtol=0, atol=2e-3)
    for form in (tuned.run, tuned.adapter):
        with open_engine(exact_model, engine="pytorch", adapter=form, context=512) as engine:
            assert engine.score(ids) == pytest.approx(ours.log_probs(ids).tolist(), abs=0.1)
        with pytest.raises(InputError, match=r"adapter: llama\.cpp cannot run a DoRA adapter\. Use --engine pytorch"):
            open_engine(exact_model, adapter=form, context=512, threads=1)
    with open_engine(exact_model, context=512, threads=1) as engine:
        with pytest.raises(InputError, match="DoRA"):
            engine.load_adapter(tuned.run)
        assert len(engine.score(ids)) == len(ids) - 1
