"""The loss curve of a run as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemwright.runs import atomic_path


def plot_loss(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss (each step and smoothed) and learning rate over the tokens seen."""
    from matplotlib.figure import Figure

    seen, total = [], 0
    for row in metrics:
        total += row["tokens"]
        seen.append(total)
    losses = [row["loss"] for row in metrics]
    smooth, total_loss, weight = [], 0.0, 0.0
    for loss in losses:
        if math.isfinite(loss):
            total_loss, weight = 0.9 * total_loss + loss, 0.9 * weight + 1
        smooth.append(total_loss / weight if weight else math.nan)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(seen, losses, color="#9db7d5", linewidth=1, label="each step")
    axes.plot(seen, smooth, color="#1f4e8c", linewidth=2, label="smoothed")
    axes.set(xlabel="tokens seen", ylabel="loss (nats a labelled token)", ylim=(0, None), xlim=(0, None))
    axes.grid(alpha=0.25)
    right = axes.twinx()
    right.plot(
        seen, [row["lr"] for row in metrics], color="#c06a2b", linewidth=1, linestyle="--", label="learning rate"
    )
    right.set(ylabel="learning rate", ylim=(0, None))
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right", frameon=False)
    for spine in ("top",):
        axes.spines[spine].set_visible(False)
        right.spines[spine].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
