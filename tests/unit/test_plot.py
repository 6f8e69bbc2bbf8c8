"""Plots: a PNG from any rows, few or many, finite or not; curves thinned without losing their spikes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.errors import MachineError
from gemwright.runs import RunFolder
from gemwright.train.plot import MOST_POINTS, Plots, draw_losses, draw_run, smoothed, thinned

NAMES = ("step", "loss", "lr", "tokens", "step_s", "rss_bytes", "device_bytes")


def columns(count: int, loss: float = 2.0) -> dict[str, list[float]]:
    return {name: [{"step": i + 1.0, "loss": loss}.get(name, 5.0) for i in range(count)] for name in NAMES}


@pytest.mark.parametrize("count", [0, 1, 3, 20_000])
@pytest.mark.parametrize("loss", [2.0, math.nan])
def test_any_number_of_steps_is_drawn(tmp_path: Path, count: int, loss: float) -> None:
    draw_run(columns(count, loss), [(2, 1.5)] if count else [], tmp_path / "plot.png", 2**33)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=5000))
@settings(max_examples=30)
def test_thinning_keeps_the_extremes(values: list[float]) -> None:
    steps = list(range(len(values)))
    x, y = thinned(steps, values)
    seen = [v for v in values if math.isfinite(v)]
    assert len(x) == len(y) <= max(MOST_POINTS, 0) + 2 and x == sorted(x)
    if seen:
        kept = [v for v in y if math.isfinite(v)]
        assert (min(kept), max(kept)) == (min(seen), max(seen))
    assert all(values[at] == value or math.isnan(value) for at, value in zip(x, y, strict=True))


def test_smoothing_begins_at_the_first_value_and_skips_what_is_no_number() -> None:
    assert smoothed([3.0, math.nan, 3.0, 3.0]) == pytest.approx([3.0] * 4)
    assert math.isnan(smoothed([math.inf])[0])


def test_runs_are_drawn_together(tmp_path: Path) -> None:
    rows = [{"step": i, "loss": 1.0 / i, "tokens": 10} for i in range(1, 30)]
    draw_losses({"a": (rows, [{"step": 3, "loss": 2.0}]), "b": (rows[:1], []), "c": ([], [])}, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_disk_that_refuses_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    (run.path / "plot.png").mkdir()
    (run.path / "plot.png" / "full").touch()
    plots = Plots(run)
    plots.after_step({"step": 1, "loss": 1.0, "lr": 0.1, "tokens": 5, "step_s": 1.0, "rss_bytes": 1, "device_bytes": 0})
    plots.finish()
    plots.finish()
    assert capsys.readouterr().err.count("could not be drawn") == 1
    with pytest.raises(MachineError):
        draw_run(columns(1), [], run.plot)
    run.release()


def test_it_goes_on_from_what_is_logged(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    run.log({"step": 1, "loss": 1.0, "tokens": 5, "step_s": 0.5})
    run.evaluations_log.add({"step": 1, "loss": 1.2})
    plots = Plots(run)
    plots.finish()
    assert run.plot.is_file()
    run.release()
