"""What ends a run early: signals and limits, on a clock that setting the machine's does not move."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemwright.errors import InputError
from gemwright.train import stop as room
from gemwright.train.config import TrainConfig
from gemwright.train.stop import Stop, seconds_until


@given(st.datetimes(datetime(2001, 1, 1), datetime(2035, 1, 1)), st.integers(0, 23), st.integers(0, 59))
def test_until_is_the_next_time_of_that_name(now: datetime, hour: int, minute: int) -> None:
    seconds = seconds_until(f"{hour:02d}:{minute:02d}", now)
    assert 0 < seconds <= 25 * 3600  # a day has 25 hours where summer time ends
    at = datetime.fromtimestamp(now.timestamp() + seconds)
    assert (at.hour, at.minute, at.second) == (hour, minute, 0) or at - now <= timedelta(hours=25)


def test_until_minds_summer_time() -> None:
    code = """
import os, time; os.environ["TZ"] = "Europe/Berlin"; time.tzset()
from datetime import datetime
from gemwright.train.stop import seconds_until
print(*(seconds_until("07:00", datetime(2026, month, day, 22)) / 3600 for month, day in ((3, 28), (10, 24), (6, 1))))
"""
    if sys.platform == "win32":
        pytest.skip("Windows has no TZ for a process")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8.0", "10.0", "9.0"]


def test_limits_are_reached_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(room, "clock_s", lambda: now[0])
    limit = Stop(max_hours=0.5)
    now[0] += 1799
    assert limit.reason is None
    now[0] += 1
    assert limit.reason == "--max-hours 0.5"
    at = Stop(until=(datetime.now() + timedelta(minutes=2)).strftime("%H:%M"))
    assert at.reason is None
    now[0] += 121
    assert at.reason is not None and at.reason.startswith("--until ")


@pytest.mark.parametrize("moved_s", [-36_000.0, 36_000.0])
def test_a_clock_that_is_set_moves_no_limit(monkeypatch: pytest.MonkeyPatch, moved_s: float) -> None:
    limit = Stop(until=(datetime.now() + timedelta(hours=2)).strftime("%H:%M"), max_hours=1)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + moved_s)
    assert limit.reason is None
    monotonic = room.clock_s()
    monkeypatch.setattr(room, "clock_s", lambda: monotonic + 2 * 3600 + 60)
    assert limit.reason is not None


@pytest.mark.parametrize(("name", "value"), [("until", "7"), ("until", "24:00"), ("until", "07:60"), ("max_hours", 0)])
def test_a_limit_that_is_none_is_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: "):
        TrainConfig(**{"data": "a.jsonl", "model": "270m", "out": "run", name: value})


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"eval_every": 3}, "--eval-every"),
        ({"stop_after": 3}, "--stop-after"),
        ({"holdout": 1, "validation": "b"}, "--h"),
    ],
)
def test_settings_that_need_a_validation_set(settings: dict[str, object], where: str) -> None:
    with pytest.raises(InputError, match=where):
        TrainConfig(**({"data": "a.jsonl", "model": "270m", "out": "run"} | settings))


def test_signals_are_heard_and_given_back() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    try:
        with Stop() as heard:
            assert heard.reason is None
            signal.raise_signal(signal.SIGTERM)
            assert heard.reason == "SIGTERM"
            signal.raise_signal(signal.SIGTERM)  # a service that asks twice does not lose the save
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == before[1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with Stop() as once:
            signal.raise_signal(signal.SIGINT)
            assert once.reason == "Ctrl-C"
    finally:
        signal.signal(signal.SIGINT, before[0])


def test_what_is_ignored_stays_ignored_and_threads_are_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as heard:
            signal.raise_signal(signal.SIGINT)
            assert heard.reason is None
    finally:
        signal.signal(signal.SIGINT, before)
    reasons: list[str | None] = []

    def work() -> None:
        with Stop() as inside:
            reasons.append(inside.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reasons == [None]
