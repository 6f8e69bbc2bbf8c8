"""Samples: the likeliest continuation, as the model alone would give it, whatever else lies in the row."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemwright.errors import InputError
from gemwright.model.decoder import Gemma
from gemwright.model.generate import generate
from gemwright.runs import RunFolder
from gemwright.text.tokenizer import Tokenizer
from gemwright.train.batches import Encoded
from gemwright.train.config import TrainConfig
from gemwright.train.loop import tune
from gemwright.train.samples import MAX_TOKENS, PROMPTS, continue_greedily, first_prompts, read_prompts
from gemwright.train.setup import Setup, set_up
from gemwright.weights.model_file import open_model

GREEDY: Any = SimpleNamespace(
    max_tokens=12, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0
)


@pytest.fixture
def setup(tiny_model: Path) -> Setup:
    """A model with adapters that change it, and dropout that must not."""
    config = TrainConfig(
        data=Path("a"), model=tiny_model, out=Path("b"), rank=4, seq=256, precision="fp32", dropout=0.5
    )
    made = set_up(config, open_model(tiny_model), torch.device("cpu"), torch.float32)
    made.lora.master.copy_(0.2 * torch.randn(made.lora.master.shape, generator=torch.Generator().manual_seed(1)))
    made.lora.refresh()
    return made


def test_several_prompts_at_once_are_each_continued_as_alone(setup: Setup, tiny_model: Path) -> None:
    encode = Tokenizer.from_model(open_model(tiny_model)).encode
    prompts = [[2, *encode(text)] for text in ("The capital of France", "Столица Франции это", "a")]
    alone = Gemma(setup.model.residency, setup.lora)
    setup.lora.dropout = 0.0
    wanted = [list(generate(alone, ids, GREEDY)) for ids in prompts]
    setup.lora.dropout = 0.5
    assert continue_greedily(setup, prompts, 12) == wanted and setup.lora.dropout == 0.5
    assert all(len(ids) == 12 for ids in wanted)


def test_a_stop_ends_one_and_not_the_others(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemwright.train import samples

    free = continue_greedily(setup, [[2, 5], [2, 9]], 6)
    monkeypatch.setattr(samples, "STOPS", (free[0][2],))
    first, second = continue_greedily(setup, [[2, 5], [2, 9]], 6)
    assert first == free[0][: free[0].index(free[0][2])]
    assert second == free[1][: free[1].index(free[0][2])] if free[0][2] in free[1] else second == free[1]


def test_prompts_of_a_file(tmp_path: Path, tiny_model: Path) -> None:
    encode = Tokenizer.from_model(open_model(tiny_model)).encode
    file = tmp_path / "prompts.txt"
    file.write_text("Hello there\n\n  Привет \n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(file, encode, 128)] == ["Hello there", "Привет"]
    file.write_text("\nword " * 3 + "word " * 200, encoding="utf-8")
    with pytest.raises(InputError, match=r"prompts\.txt:\d+: the prompt has \d+ tokens"):
        read_prompts(file, encode, 128)
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(file, encode, 128)
    with pytest.raises(InputError, match="--sample-prompts"):
        read_prompts(tmp_path / "nowhere.txt", encode, 128)


def test_prompts_of_the_data_end_where_the_first_answer_begins() -> None:
    examples = [Encoded(list(range(n)), [i >= n - 2 for i in range(n)]) for n in (8, 400, 9, 10, 11)]
    prompts = first_prompts(examples, lambda ids: " ".join(map(str, ids)), MAX_TOKENS + 100)
    assert [len(prompt.ids) for prompt in prompts] == [6, 7, 8] and len(prompts) == PROMPTS


def test_a_run_writes_them_and_nothing_else_changes(tiny_model: Path, tmp_path: Path) -> None:
    """With and without a file of prompts the training is the same, and every evaluation leaves a row a prompt."""
    data, prompts = tmp_path / "data.jsonl", tmp_path / "prompts.txt"
    rows = [{"prompt": f"{n} times seven", "completion": str(7 * n)} for n in range(1, 12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts.write_text("Привет\n", encoding="utf-8")
    small = {"data": data, "model": tiny_model, "rank": 4, "seq": 96, "max_steps": 4, "holdout": 2, "eval_every": 2}
    one = tune(TrainConfig(**small, out=tmp_path / "one"))
    other = tune(TrainConfig(**small, out=tmp_path / "other", sample_prompts=prompts))
    losses = [[row["loss"] for row in RunFolder.open(run.run).metrics()] for run in (one, other)]
    assert losses[0] == losses[1]
    written = [json.loads(line) for line in (other.run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["prompt"]) for row in written] == [(2, "Привет"), (4, "Привет")]
    assert len((one.run / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == 4


def test_sample_prompts_need_something_to_evaluate_on() -> None:
    with pytest.raises(InputError, match="--sample-prompts"):
        TrainConfig(data=Path("a"), model="270m", out=Path("b"), sample_prompts=Path("c"))
