"""What a run folder tells of its run, however that ended: nothing missing or damaged stops the reading."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from gemwright.errors import InputError, MachineError
from gemwright.runs import Lines, RunFolder

RunState = Literal["running", "done", "stopped", "failed", "killed"]
# What makes a folder with a config.json a run's; other programs have such files too.
_MARKS = ("metrics.jsonl", "lock", "about.json", "summary.json", "checkpoints")
# What `delete` leaves when the adapter is to stay: it, and where it came from.
KEPT_WITH_ADAPTER = ("adapter", "adapter.gguf", "config.json", "summary.json", "about.json")


@dataclass(frozen=True)
class RunRecord:
    """A run at a glance; what cannot be known is None, and `damaged` names the files that could not be read.

    Losses in nats a labelled token: `loss_last` is the mean of the last tenth of the steps, `evaluation_loss` the last
    on validation data, `best_loss` the best of those. `killed` means that no process is at work and none said goodbye.
    """

    path: Path
    state: RunState
    reason: str | None
    begun: str | None
    model: str | None
    data: str | None
    steps: int
    steps_planned: int | None
    loss_first: float | None
    loss_last: float | None
    evaluation_loss: float | None
    best_loss: float | None
    best_step: int | None
    tokens_per_s: float | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    seconds: float | None
    checkpoints: tuple[int, ...]
    disk_bytes: int
    damaged: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """As JSON; a loss that is no number is null."""
        return {key: plain(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class RunFiles:
    """The files of a run as they are: `record` sums up what `config`, `about` and the rows of the logs say."""

    record: RunRecord
    config: dict[str, Any]
    about: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def plain(value: Any) -> Any:
    """`value` as strict JSON has it: paths as text, and null for what is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def is_run(path: Path) -> bool:
    """Whether a fine-tune has begun in `path`."""
    return (path / "config.json").is_file() and any((path / name).exists() for name in _MARKS)


def find_runs(folder: Path) -> list[Path]:
    """Runs in `folder`, or in folders of it, or `folder` itself; InputError where there is no such folder."""
    if not folder.is_dir():
        raise InputError(
            "no such folder", where=folder, fix="Give the folder that holds your runs: gemwright runs list FOLDER."
        )
    configs = [folder / "config.json", *folder.glob("*/config.json"), *folder.glob("*/*/config.json")]
    return sorted(path.parent for path in configs if is_run(path.parent))


def read_run(path: Path) -> RunFiles:
    """All that is in a run's folder; InputError where `path` is none."""
    if not is_run(path):
        raise InputError("not a run folder", where=path, fix="See 'gemwright runs list'.")
    folder, damaged = RunFolder(path), list[str]()
    config, about = (read_object(path / name, damaged) for name in ("config.json", "about.json"))
    summary = read_object(path / "summary.json", damaged)
    metrics, evaluations = folder.metrics(), folder.evaluations()
    last, best, best_step = _evaluated(evaluations)
    record = RunRecord(
        path,
        _state(folder, summary),
        _text(summary.get("reason")),
        _begun(path, about),
        _model(config),
        _text(config.get("data")),
        _whole(summary.get("steps")) or max((_whole(row.get("step")) or 0 for row in metrics), default=0),
        _whole(about.get("steps_planned")) or _whole(config.get("max_steps")),
        *_losses(metrics),
        last,
        best,
        best_step,
        _number(summary.get("tokens_per_s")) or _speed(metrics),
        _most(metrics, "rss_bytes", summary.get("peak_rss_bytes")),
        _most(metrics, "device_bytes", summary.get("peak_device_bytes")),
        _number(summary.get("seconds")) or (sum(_number(row.get("step_s")) or 0.0 for row in metrics) or None),
        tuple(_checkpoint_steps(folder.checkpoints)),
        disk_bytes(path),
        tuple(damaged),
    )
    return RunFiles(record, config, about, metrics, evaluations, Lines(path / "samples.jsonl").rows())


def _state(folder: RunFolder, summary: dict[str, Any]) -> RunState:
    if folder.is_at_work():
        return "running"
    said = summary.get("state", "done" if "steps" in summary else None)
    return said if said in ("done", "stopped", "failed") else "killed"


def _begun(path: Path, about: dict[str, Any]) -> str | None:
    """When the first process started, in its own time zone; for runs that did not write it down, by the file's time."""
    sessions = about.get("sessions")
    if isinstance(sessions, list) and sessions and isinstance(sessions[0], dict):
        return _text(sessions[0].get("begun"))
    with suppress(OSError):
        changed = (path / "config.json").stat().st_mtime
        return datetime.fromtimestamp(changed).astimezone().isoformat(timespec="seconds")
    return None


def _model(config: dict[str, Any]) -> str | None:
    base = config.get("base")
    if isinstance(base, dict) and base.get("size"):
        return f"{base['size']} {base.get('type') or ''}".strip()
    return _text(config.get("model"))


def _losses(metrics: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    losses = [loss for row in metrics if (loss := _number(row.get("loss"))) is not None]
    if not losses:
        return None, None
    last = losses[-max(1, len(losses) // 10) :]
    return losses[0], sum(last) / len(last)


def _evaluated(evaluations: Sequence[dict[str, Any]]) -> tuple[float | None, float | None, int | None]:
    """(last, best, the best's step)"""
    rows = [(loss, _whole(row.get("step"))) for row in evaluations if (loss := _number(row.get("loss"))) is not None]
    if not rows:
        return None, None, None
    best, step = min(((loss, step) for loss, step in rows if math.isfinite(loss)), default=(None, None))
    return rows[-1][0], best, step


def _speed(metrics: Sequence[dict[str, Any]]) -> float | None:
    """Tokens a second over all steps but the first, which also fills what is kept."""
    rows = [row for row in (metrics[1:] or metrics) if _number(row.get("step_s")) and _number(row.get("tokens"))]
    seconds = sum(row["step_s"] for row in rows)
    return sum(row["tokens"] for row in rows) / seconds if seconds else None


def _most(metrics: Sequence[dict[str, Any]], name: str, known: Any) -> int | None:
    return _whole(known) or max((_whole(row.get(name)) or 0 for row in metrics), default=0) or None


def _checkpoint_steps(folder: Path) -> list[int]:
    names = [path.parent.name.removeprefix("step-") for path in folder.glob("step-*/manifest.json")]
    return sorted(int(name) for name in names if name.isdecimal())


def read_object(file: Path, damaged: list[str]) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none, or (named in `damaged`) where it is damaged."""
    if not file.is_file():
        return {}
    with suppress(OSError, ValueError):
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    damaged.append(file.name)
    return {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _inside(path: Path) -> Iterator[Path]:
    """`path` and all below it; links are named, never followed."""
    yield path
    if path.is_dir() and not path.is_symlink():
        for folder, folders, files in os.walk(path, followlinks=False):
            yield from (Path(folder, name) for name in (*folders, *files))


def disk_bytes(path: Path) -> int:
    """What `path` and all below it take, links not followed."""
    total = 0
    for file in _inside(path):
        with suppress(OSError):
            total += 0 if file.is_dir() and not file.is_symlink() else file.lstat().st_size
    return total


def parts_to_delete(path: Path, keep_adapter: bool) -> list[Path]:
    """What `delete` would remove. Raises InputError where `path` is no run, is a link, or is at work now."""
    if path.is_symlink():
        raise InputError("is a link", where=path, fix=f"Give the run itself: {path.resolve()}.")
    if not is_run(path):
        raise InputError("not a run folder: nothing is removed", where=path, fix="See 'gemwright runs list'.")
    if RunFolder(path).is_at_work():
        raise InputError("this run is at work", where=path, fix="Stop it first (Ctrl-C where it runs).")
    if not keep_adapter:
        return [path]
    if not (path / "adapter").is_dir():
        raise InputError("has no adapter to keep", where=path, fix="Leave --keep-adapter out.")
    return sorted(part for part in path.iterdir() if part.name not in KEPT_WITH_ADAPTER)


def delete(path: Path, keep_adapter: bool) -> None:
    """Remove a run, or all of it but its adapter. Raises what `parts_to_delete` does, MachineError where it cannot be.

    The whole folder gets another name first, so that a removal that is cut off leaves nothing that looks like a run.
    """
    parts = parts_to_delete(path, keep_adapter)
    folder = RunFolder(path)
    folder.claim()
    folder.release()
    try:
        if not keep_adapter:
            absolute = path.absolute()
            parts = [absolute.rename(absolute.with_name(f".{absolute.name}.{os.getpid()}.part"))]
        for part in parts:
            shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
    except OSError as error:
        raise MachineError(
            f"cannot be removed: {error.strerror or error}", where=error.filename or path, fix="Remove it by hand."
        ) from error
