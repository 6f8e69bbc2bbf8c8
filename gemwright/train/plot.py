"""What a run looks like: loss, learning rate, speed and memory in one PNG; the losses of several runs in another."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemwright.errors import MachineError
from gemwright.report import say
from gemwright.runs import RunFolder, atomic_path
from gemwright.train.background import in_background

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 1500
FIRST_S, EVERY_S = 10.0, 30.0
# Drawing takes at most this share of the time, however slow the machine.
SHARE = 0.005
PALE, DARK, WARM, GREY = "#a9c0dc", "#1f4e8c", "#c2571a", "#777777"
_COLUMNS = ("step", "loss", "lr", "tokens", "step_s", "rss_bytes", "device_bytes")


class Plots:
    """Keeps `plot.png` of a run up to date, drawn beside the training; a disk that refuses it stops nothing."""

    def __init__(self, run: RunFolder, budget_bytes: int | None = None) -> None:
        self._run, self._budget = run, budget_bytes
        self._columns = {name: array("d") for name in _COLUMNS}
        self._evaluations = [(row["step"], row["loss"]) for row in run.evaluations()]
        for row in run.metrics():
            self._add(row)
        self._drawing: Future[float] | None = None
        self._next_s, self._has_failed = time.monotonic() + FIRST_S, False

    def after_step(self, row: Mapping[str, Any]) -> None:
        """Take a row of the metrics; draw where the last drawing is long enough ago."""
        self._add(row)
        if time.monotonic() >= self._next_s:
            self._draw()

    def after_evaluation(self, row: Mapping[str, Any]) -> None:
        """Take a row of the evaluations; it is drawn with the next steps."""
        self._evaluations.append((row["step"], row["loss"]))

    def finish(self) -> None:
        """Draw all of it and wait."""
        self._settle()
        self._draw()
        self._settle()

    def _add(self, row: Mapping[str, Any]) -> None:
        for name, column in self._columns.items():
            column.append(row.get(name, math.nan))

    def _draw(self) -> None:
        if self._drawing is not None and not self._drawing.done():
            return
        self._settle()
        columns = {name: column[:] for name, column in self._columns.items()}
        evaluations = list(self._evaluations)

        def draw() -> float:
            start = time.thread_time()
            draw_run(columns, evaluations, self._run.plot, self._budget)
            return time.thread_time() - start

        self._next_s, self._drawing = math.inf, in_background(draw)
        self._drawing.add_done_callback(self._set_next)

    def _set_next(self, drawn: Future[float]) -> None:
        took_s = drawn.result() if drawn.exception() is None else 0.0
        self._next_s = time.monotonic() + max(EVERY_S, took_s / SHARE)

    def _settle(self) -> None:
        drawing, self._drawing = self._drawing, None
        try:
            if drawing is not None:
                drawing.result()
        except MachineError as error:
            if not self._has_failed:
                say(f"the plot could not be drawn: {error}")
            self._has_failed = True


def draw_run(
    columns: Mapping[str, Sequence[float]],
    evaluations: Sequence[tuple[int, float]],
    path: Path,
    budget_bytes: int | None = None,
) -> None:
    """Four panels over the steps, from the metrics as columns and (step, loss) of evaluations. Raises MachineError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), dpi=110, layout="constrained")
    (loss, speed), (rate, memory) = figure.subplots(2, 2, sharex=True)
    steps, losses = columns["step"], columns["loss"]
    _losses(loss, steps, losses, evaluations)
    per_s = [t / s if s else math.nan for t, s in zip(columns["tokens"], columns["step_s"], strict=True)]
    _line(speed, *thinned(steps, per_s), PALE, "each step")
    _line(speed, *thinned(steps, smoothed(per_s)), DARK, "smoothed", width=2.0)
    speed.set(title="Speed", ylabel="tokens a second", ylim=(0, _top(per_s)))
    speed.legend(frameon=False, loc="lower right")
    _line(rate, *thinned(steps, columns["lr"]), WARM, "", width=2.0)
    rate.set(title="Learning rate", xlabel="step", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _memory(memory, columns, budget_bytes)
    for axes in (loss, speed, rate, memory):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(path.absolute().parent.name, fontsize=13, fontweight="bold")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _losses(
    axes: Axes, steps: Sequence[float], losses: Sequence[float], evaluations: Sequence[tuple[int, float]]
) -> None:
    smooth = smoothed(losses)
    _line(axes, *thinned(steps, losses), PALE, "training, each step")
    _line(axes, *thinned(steps, smooth), DARK, "training, smoothed", width=2.0)
    if evaluations:
        at, found = zip(*evaluations, strict=True)
        axes.plot(at, found, color=WARM, marker="o", markersize=4 if len(at) < 60 else 2, label="validation")
    axes.set(title="Loss", ylabel="nats a labelled token")
    # One wild step must not flatten the rest: the smoothed curve and the validation decide the range.
    seen = [v for v in (*smooth, *(loss for _, loss in evaluations)) if math.isfinite(v)]
    if seen:
        low, high = min(seen), max(seen)
        margin = max(0.35 * (high - low), 0.02 * abs(high), 1e-6)
        axes.set_ylim(max(0.0, low - margin), high + margin)
    axes.legend(frameon=False, loc="upper right")


def _memory(axes: Axes, columns: Mapping[str, Sequence[float]], budget_bytes: int | None) -> None:
    steps, gib = columns["step"], 2.0**30
    _line(axes, *thinned(steps, [count / gib for count in columns["rss_bytes"]]), DARK, "RAM of this process", 2.0)
    if any(columns["device_bytes"]):
        held = [count / gib for count in columns["device_bytes"]]
        _line(axes, *thinned(steps, held), WARM, "video memory held", width=2.0)
        if budget_bytes:
            axes.axhline(budget_bytes / gib, color=WARM, linestyle="--", linewidth=1, label="its budget")
    axes.set(title="Memory", xlabel="step", ylabel="GiB", ylim=(0, None))
    axes.legend(frameon=False, loc="center left")


def draw_losses(runs: Mapping[str, tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]], path: Path) -> None:
    """The smoothed losses of several runs, by name as (metrics, evaluations), over the tokens seen; MachineError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, (metrics, evaluations) in runs.items():
        seen, total = {}, 0
        for row in metrics:
            total += row.get("tokens", 0)
            seen[row.get("step")] = total
        smooth = smoothed([row.get("loss", math.nan) for row in metrics])
        (line,) = axes.plot(*thinned(list(seen.values()), smooth[: len(seen)]), linewidth=1.8, label=name)
        rows = [row for row in evaluations if row.get("step") in seen]
        at = [seen[row["step"]] for row in rows]
        axes.plot(at, [row["loss"] for row in rows], color=line.get_color(), marker="o", markersize=4, linestyle=":")
    has_points = any(evaluations for _, evaluations in runs.values())
    axes.set(title="Loss", xlabel="tokens seen", ylabel="nats a labelled token", xlim=(0, None))
    axes.legend(frameon=False, title="smoothed; dots: validation" if has_points else "smoothed")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean that forgets over a fiftieth of all values (ten at least); what is no number is left out."""
    keep = 1 - 1 / max(10.0, len(values) / 50)
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight if weight else math.nan)
    return smooth


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS of a curve: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(steps) <= MOST_POINTS:
        return list(steps), list(values)
    stretch = math.ceil(2 * len(steps) / MOST_POINTS)
    chosen: list[int] = []
    for start in range(0, len(steps), stretch):
        finite = [i for i in range(start, min(start + stretch, len(steps))) if math.isfinite(values[i])]
        if finite:
            chosen += sorted({min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)})
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], color: str, label: str, width: float = 1.0) -> None:
    marker = "o" if len(x) < 12 else None
    axes.plot(x, y, color=color, linewidth=width, label=label or None, marker=marker, markersize=4)


def _top(values: Sequence[float]) -> float | None:
    """A little above what all but the wildest hundredth reach."""
    seen = sorted(v for v in values if math.isfinite(v))
    return 1.15 * seen[min(len(seen) - 1, int(0.99 * len(seen)))] if seen else None
