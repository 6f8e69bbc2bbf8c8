"""The validation loss is the training loss of the same tokens, without dropout, whatever memory it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gemwright.errors import InputError
from gemwright.text.tokenizer import Tokenizer
from gemwright.train.batches import Encoded
from gemwright.train.config import TrainConfig
from gemwright.train.prepare import prepare
from gemwright.train.setup import Setup, set_up
from gemwright.train.step import Work, forward_backward, forward_loss
from gemwright.train.validate import hold_out, validate
from gemwright.weights.model_file import open_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Encoded]:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    turns = [{"prompt": "hello there " * n, "completion": "да " * (15 - n)} for n in range(1, 13)]
    path.write_text("\n".join(map(json.dumps, turns)), encoding="utf-8")
    encode = Tokenizer.from_model(open_model(tiny_model)).encode
    return [*prepare(path, encode=encode, train_on="model", seq=96).examples]


@pytest.fixture
def setup(tiny_model: Path) -> Setup:
    settings = {"data": "a.jsonl", "model": tiny_model, "out": "run", "rank": 4, "dropout": 0.5, "precision": "fp32"}
    made = set_up(TrainConfig(**settings), open_model(tiny_model), CPU, torch.float32)
    made.lora.master.copy_(torch.randn(made.lora.master.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
    made.lora.refresh()
    return made


def test_it_is_the_loss_of_training(setup: Setup, examples: list[Encoded]) -> None:
    rows = setup.rows([examples[:5], examples[5:]])
    alone = forward_loss(setup.model, rows)
    again = forward_loss(setup.model, rows, Work(chunk=16, positions=5))
    dropped = forward_backward(setup.model, rows, seed=3)
    assert setup.lora.dropout == 0.5
    setup.lora.grad.zero_()
    setup.lora.dropout = 0.0
    trained = forward_backward(setup.model, rows)
    assert alone.loss == trained.loss and (alone.labelled, alone.tokens) == (trained.labelled, trained.tokens)
    assert again.loss == pytest.approx(alone.loss, rel=1e-6) and dropped.loss != pytest.approx(alone.loss, rel=1e-5)


def test_every_labelled_token_counts_once_however_many_pass_together(setup: Setup, examples: list[Encoded]) -> None:
    gradient = setup.lora.grad.clone()
    found = [validate(setup, examples, 96, rows, lambda: None) for rows in (1, 2, 9)]
    labelled = sum(sum(example.labelled[1:]) for example in examples)
    assert all(one is not None and one.labelled == labelled for one in found)
    losses = [one.loss for one in found if one is not None]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6) and torch.equal(setup.lora.grad, gradient)
    assert validate(setup, examples, 96, 1, lambda: "Ctrl-C") is None


def test_what_is_held_out_is_not_trained_on(examples: list[Encoded]) -> None:
    kept, out = hold_out(examples, 4, seed=1)
    assert len(kept) == 8 and len(out) == 4
    assert sorted(map(id, [*kept, *out])) == sorted(map(id, examples))
    assert [*hold_out(examples, 4, seed=1)[1]] == [*out] != [*hold_out(examples, 4, seed=2)[1]]
    assert [*kept[2:5]] == [kept[2], kept[3], kept[4]]
    with pytest.raises(InputError, match="cannot hold out 12 of 12"):
        hold_out(examples, 12, seed=1)
