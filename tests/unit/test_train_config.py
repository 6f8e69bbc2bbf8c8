"""Settings of a fine-tune and its learning rate: impossible ones are named before anything is loaded."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gemwright.errors import InputError
from gemwright.model.lora import LoRA
from gemwright.spec import LINEARS, SPECS
from gemwright.train.config import TrainConfig
from gemwright.train.optimizer import Optimizer, learning_rate


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**({"data": "a.jsonl", "model": "270m", "out": "run"} | settings))


def test_what_is_not_said() -> None:
    made = config()
    assert made.data == Path("a.jsonl") and made.targets == LINEARS and made.train_on == "model"
    assert made.scaled_alpha == made.rank == 16 and made.rows_per_step == 1
    assert config(alpha=32).scaled_alpha == 32.0


@pytest.mark.parametrize(("seq", "tokens", "rows"), [(256, 1024, 4), (300, 1024, 3), (2048, 1024, 1)])
def test_rows_of_a_step(seq: int, tokens: int, rows: int) -> None:
    assert config(seq=seq, tokens_per_step=tokens).rows_per_step == rows


def test_targets_as_one_string() -> None:
    assert config(targets="q, v").targets == ("q", "v")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rank", value) for value in (0, -1, 1.5, "many")),
        *(("lr", value) for value in (0, -1e-3, 1, math.nan, math.inf)),
        *(("epochs", value) for value in (0, -1, math.inf, math.nan)),
        *(("dropout", value) for value in (-0.1, 1, math.nan)),
        *(("seed", value) for value in (-1, 2**31)),
        *(("warmup", value) for value in (-0.1, 1.1, math.nan)),
        *(("alpha", value) for value in (0, math.inf)),
        *(("max_steps", 0), ("clip", 0), ("clip", math.nan), ("weight_decay", 1), ("seq", 15), ("tokens_per_step", 0)),
        *(("schedule", "steps"), ("patience", 0), ("rslora", "maybe"), ("dora", 2)),
        *(("train_on", "users"), ("recompute", "sometimes"), ("threads", 0), ("learning_rate", 1e-3)),
    ],
)
def test_an_impossible_setting_is_named(name: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        config(**{name: value})
    line = str(caught.value)
    assert line.startswith(f"--{name.replace('_', '-')}: {value!r} is not possible") and "\n" not in line


def test_it_cannot_be_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config().rank = 3


def test_the_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 100, 1e-3, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == pytest.approx(1e-3) == max(rates)
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4, rel=0.02) and min(rates[10:]) >= 1e-4
    assert rates[55] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5), rel=0.02)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)]
)
def test_schedules_share_the_warm_up(schedule: str, middle: float, last: float) -> None:
    rates = [learning_rate(step, 1100, 1.0, 1 / 11, schedule) for step in range(1100)]
    assert rates[:100] == [learning_rate(step, 1100, 1.0, 1 / 11) for step in range(100)]
    assert rates[99] == rates[100] == 1.0
    assert rates[600] == pytest.approx(middle) and rates[-1] == pytest.approx(last, abs=1e-3)


def test_a_linear_schedule_falls_evenly() -> None:
    rates = [learning_rate(step, 11, 1.0, 0.0, "linear") for step in range(11)]
    assert [round(a - b, 12) for a, b in pairwise(rates[1:])] == [0.09] * 9


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_rate_of_short_runs_is_one(steps: int, warmup: float, schedule: str) -> None:
    assert all(0 < learning_rate(step, steps, 1e-3, warmup, schedule) <= 1e-3 for step in range(steps))


@pytest.fixture
def lora() -> LoRA:
    return LoRA(SPECS["270m"], 1, 1.0, ("k",), dtype=torch.float32)


def plain_adamw(start: torch.Tensor, gradients: list[torch.Tensor], lr: float, decay: float) -> torch.Tensor:
    """The paper's algorithm 2, in fp64."""
    x = start.double()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g.double(), 0.999 * v + 0.001 * g.double() ** 2
        x = x - lr * (m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + decay * x)
    return x


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(lora: LoRA, decay: float) -> None:
    start, optimizer = lora.master.clone(), Optimizer(lora, decay, 1e9)
    gradients = [torch.randn(lora.grad.shape, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    for g in gradients:
        lora.grad.copy_(g)
        assert optimizer.update(1e-2, 1.0) == pytest.approx(float(g.norm()), rel=1e-5)
        assert not lora.grad.any()
    torch.testing.assert_close(lora.master.double(), plain_adamw(start, gradients, 1e-2, decay), rtol=1e-5, atol=1e-6)


def test_clipping_scales_the_whole_gradient(lora: LoRA) -> None:
    start, optimizer = lora.master.clone(), Optimizer(lora, 0.0, 0.5)
    gradients = [torch.full_like(lora.grad, 3.0), torch.full_like(lora.grad, 1e-6)]
    clipped = [g * min(1.0, 0.5 / float(g.norm())) for g in gradients]
    for g in gradients:
        lora.grad.copy_(g)
        optimizer.update(1e-2, 1.0)
    torch.testing.assert_close(lora.master.double(), plain_adamw(start, clipped, 1e-2, 0.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("gradient", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_numbers_that_are_none_change_nothing(lora: LoRA, gradient: float, loss: float) -> None:
    start, optimizer = lora.master.clone(), Optimizer(lora, 0.0, 1.0)
    for count in range(1, 7):
        lora.grad[3] = gradient
        optimizer.update(1e-2, loss)
        assert optimizer.skipped_in_a_row == count
    assert torch.equal(lora.master, start) and not lora.grad.any()
    lora.grad.fill_(1.0)
    optimizer.update(1e-2, 1.0)
    assert optimizer.skipped_in_a_row == 0 and not torch.equal(lora.master, start) and lora.master.isfinite().all()
