"""The watch over step times: no alarm for noise, a warning within ten steps of a lasting slowness, its cause."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.train.watch import Machine, Reading, Watch, likely_cause

GIB = 2**30
CALM = Reading(0.0, 20 * GIB, 64 * GIB, 0, 0, 4e9, 0.05)


def drive(watch: Watch, steps: list[tuple[float, int]]) -> None:
    for seconds, tokens in steps:
        watch.after_step({"step_s": seconds, "tokens": tokens, "waiting": 0.0})


def noisy(rng: random.Random, count: int, times: float = 1.0, jitter: float = 0.3) -> list[tuple[float, int]]:
    """Steps of 512 to 1024 tokens whose time is a fixed part, a part by tokens, and lognormal noise."""
    steps = []
    for _ in range(count):
        tokens = rng.choice((1024, 1024, 1024, 512, 900))
        steps.append((times * (0.2 + tokens / 2000) * rng.lognormvariate(0, jitter), tokens))
    return steps


@given(st.integers(0, 2**32), st.floats(1.0, 50.0))
@settings(max_examples=60)
def test_noise_is_no_alarm(seed: int, first: float) -> None:
    """300 steps with 30% of lognormal jitter, a long first step, and single steps of ten times as long."""
    rng, said = random.Random(seed), list[str]()
    steps = noisy(rng, 300)
    for at in rng.sample(range(20, 300, 10), 5):
        steps[at] = (10 * steps[at][0], steps[at][1])
    drive(Watch(lambda: CALM, said.append), [(first, 1024), *steps])
    assert said == []


@given(st.integers(0, 2**32), st.integers(10, 200))
@settings(max_examples=60)
def test_five_fold_is_warned_of_within_ten_steps_and_once(seed: int, calm: int) -> None:
    rng, said = random.Random(seed), list[str]()
    watch = Watch(lambda: CALM, said.append)
    drive(watch, noisy(rng, calm + 1))
    drive(watch, noisy(rng, 10, times=5))
    assert len(said) == 1 and "times as long as before" in said[0]
    drive(watch, noisy(rng, 100, times=5))
    assert len(said) == 1
    drive(watch, noisy(rng, 15))
    assert len(said) == 2 and "usual time again" in said[1]
    drive(watch, noisy(rng, 10, times=6))
    assert len(said) == 3


def test_steps_with_fewer_or_more_tokens_are_no_alarm() -> None:
    said: list[str] = []
    watch = Watch(lambda: CALM, said.append)
    drive(watch, [(1.0, 1000)] * 20 + [(0.9, 100)] * 20 + [(10.0, 10_000)] * 20)
    assert said == []


DURING = replace(CALM, at_s=10.0)


@pytest.mark.parametrize(
    ("now", "waiting", "said"),
    [
        (replace(DURING, swapped_in_bytes=2 * GIB, available_bytes=GIB), 0.0, "swap"),
        (replace(DURING, available_bytes=GIB), 0.0, "RAM is short"),
        (replace(DURING, page_faults=50_000), 0.0, "read from disk"),
        (replace(DURING, device_free_bytes=2**20), 0.5, "video memory is full"),
        (replace(DURING, throttling="heat"), 0.0, "GPU holds back (heat)"),
        (replace(DURING, on_battery=True), 0.0, "battery"),
        (replace(DURING, cpu_hz=1.2e9), 0.0, "1.2 instead of 4.0 GHz"),
        (replace(DURING, others=0.9), 0.0, "other programs use 90%"),
        (DURING, 0.4, "over the link"),
        (DURING, 0.0, "show no cause"),
    ],
)
def test_the_cause_is_named_from_evidence(now: Reading, waiting: float, said: str) -> None:
    assert said in likely_cause(CALM, now, waiting)


def test_this_machine_can_be_read() -> None:
    machine = Machine()
    reading = machine.read()
    assert 0 < reading.available_bytes <= reading.total_bytes and reading.at_s > 0
    assert reading.device_free_bytes is None and reading.throttling is None
