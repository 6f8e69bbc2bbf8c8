"""What plans said and runs did on this machine, so that the next plan is nearer: a line a run, a median of ratios."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gemwright.runs import home

Kind = Literal["device", "host", "seconds"]
FEWEST, MOST = 3, 20
# A ratio beyond these is a broken line or another program's doing, not something to learn from.
LOWEST, HIGHEST = 0.25, 4.0


@dataclass(frozen=True)
class Seen:
    """One prediction and what came of it: bytes, or seconds a step, on `device` with a model of `size`."""

    kind: Kind
    device: str
    size: str
    predicted: float
    measured: float


def history_file() -> Path:
    """Where this machine's lines are kept."""
    return home() / "plans.jsonl"


def remember(rows: list[Seen], file: Path | None = None) -> None:
    """Append lines; a folder that cannot be written is no reason to fail a run."""
    file = file or history_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    except OSError:
        return


def recall(file: Path | None = None) -> list[Seen]:
    """All lines that are whole and sensible, oldest first."""
    file = file or history_file()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [row for row in map(_read, lines) if row is not None]


def _read(line: str) -> Seen | None:
    try:
        said: Mapping[str, Any] = json.loads(line)
        row = Seen(said["kind"], said["device"], said["size"], float(said["predicted"]), float(said["measured"]))
    except (ValueError, KeyError, TypeError):
        return None
    sensible = row.predicted > 0 and row.measured > 0 and LOWEST <= row.measured / row.predicted <= HIGHEST
    return row if sensible and row.kind in ("device", "host", "seconds") else None


def correction(rows: list[Seen], kind: Kind, device: str) -> tuple[float, int]:
    """(factor for a prediction of `kind` on `device`, lines it rests on); 1 where there are fewer than three."""
    ratios = [row.measured / row.predicted for row in rows if row.kind == kind and row.device == device][-MOST:]
    return (statistics.median(ratios), len(ratios)) if len(ratios) >= FEWEST else (1.0, len(ratios))
