"""Runs as text for a terminal: a table of many, all of one, several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemwright.report import command, duration, size
from gemwright.run_records import RunFiles, RunRecord

NOTHING = "-"
# Where a run lies and when it was written say nothing of how it differs from another.
_NO_DIFFERENCE = ("out", "threads")


def table(records: Sequence[RunRecord]) -> list[str]:
    """A line a run under a line of headings."""
    heads = ("run", "state", "steps", "loss", "validation", "tokens/s", "time", "disk", "model", "begun")
    rows = [
        (
            str(one.path),
            one.state,
            f"{one.steps}/{one.steps_planned}" if one.steps_planned else str(one.steps),
            _arrow(one),
            _loss(one.best_loss),
            _rate(one.tokens_per_s),
            _time(one.seconds),
            size(one.disk_bytes),
            one.model or NOTHING,
            (one.begun or NOTHING)[:16].replace("T", " "),
        )
        for one in records
    ]
    return aligned([heads, *rows])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines with the columns below one another."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def story(run: RunFiles) -> list[str]:
    """All that a person asks of a run."""
    one, config = run.record, run.config
    session = _last(run.about.get("sessions"))
    lines = [f"{one.path}: {one.state}{f' ({one.reason})' if one.reason else ''}", ""]
    facts = [
        ("model", _model(one, config)),
        ("data", _data(config)),
        ("steps", f"{one.steps}{f' of {one.steps_planned}' if one.steps_planned else ''} in {_time(one.seconds)}"),
        ("loss", _arrow(one)),
        ("validation", _validation(one)),
        ("speed", f"{_rate(one.tokens_per_s)} tokens/s"),
        ("memory", _memory(one)),
        ("settings", _settings(config)),
        ("plan", _plan(config.get("plan"))),
        ("begun", _begun(one, run.about)),
        ("machine", _machine(session.get("machine"))),
        ("versions", _words(session.get("versions"))),
        ("git", _git(session.get("git"))),
        ("command", session.get("command") or NOTHING),
        ("checkpoints", ", ".join(f"step {step}" for step in one.checkpoints) or NOTHING),
        ("plot", str(one.path / "plot.png") if (one.path / "plot.png").is_file() else NOTHING),
        ("disk", size(one.disk_bytes)),
    ]
    lines += [f"{name:<12} {text}" for name, text in facts if text != NOTHING]
    if one.damaged:
        lines.append(f"{'damaged':<12} {', '.join(one.damaged)}")
    return lines + _samples(run.samples)


def next_command(one: RunRecord, model: str | None) -> str:
    """What to do with a run in its state."""
    if one.state == "done":
        pytorch = () if (one.path / "adapter.gguf").is_file() else ("--engine", "pytorch")
        return command("gemwright", "chat", "--model", model or "MODEL", "--adapter", one.path, *pytorch)
    return command("gemwright", "runs", "show" if one.state == "running" else "resume", one.path)


def differences(runs: Sequence[RunFiles]) -> dict[str, list[Any]]:
    """Settings that are not the same in all `runs`, each with its value in every run (None: not there)."""
    flat = [_flat(run.config) | _flat({"git": _last(run.about.get("sessions")).get("git")}) for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    values = {name: [one.get(name) for one in flat] for name in names if name not in _NO_DIFFERENCE}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def side_by_side(runs: Sequence[RunFiles]) -> list[str]:
    """What differs between runs, then what came of each."""
    records = [run.record for run in runs]
    rows = [["", *(str(one.path) for one in records)]]
    rows += [[name, *map(_value, values)] for name, values in differences(runs).items()]
    rows.append([""] * (len(runs) + 1))
    for name, show in (
        ("state", lambda one: one.state),
        ("steps", lambda one: str(one.steps)),
        ("loss", _arrow),
        ("validation", _validation),
        ("tokens/s", lambda one: _rate(one.tokens_per_s)),
        ("memory", _memory),
        ("time", lambda one: _time(one.seconds)),
        ("disk", lambda one: size(one.disk_bytes)),
    ):
        rows.append([name, *(show(one) for one in records)])
    return aligned(rows)


def _value(value: Any) -> str:
    text = NOTHING if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"…{text[-39:]}"


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Leaves of nested objects by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


def _last(sessions: Any) -> dict[str, Any]:
    return sessions[-1] if isinstance(sessions, list) and sessions and isinstance(sessions[-1], dict) else {}


def _loss(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _arrow(one: RunRecord) -> str:
    return NOTHING if one.loss_first is None else f"{one.loss_first:.3f} -> {_loss(one.loss_last)}"


def _validation(one: RunRecord) -> str:
    if one.evaluation_loss is None:
        return NOTHING
    return f"{_loss(one.evaluation_loss)}, best {_loss(one.best_loss)} after step {one.best_step}"


def _rate(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return duration(seconds) if seconds < 3600 else f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def _memory(one: RunRecord) -> str:
    parts = [(one.peak_rss_bytes, "of RAM"), (one.peak_device_bytes, "of video memory")]
    return ", ".join(f"{size(count)} {of}" for count, of in parts if count) or NOTHING


def _model(one: RunRecord, config: Mapping[str, Any]) -> str:
    base = config.get("base")
    sha = base.get("sha256") if isinstance(base, dict) else None
    named = f"Gemma 3 {one.model or NOTHING}, {config.get('model')}"
    return f"{named}{f', sha256 {sha[:12]}' if isinstance(sha, str) else ''}"


def _data(config: Mapping[str, Any]) -> str:
    sha = config.get("data_sha256")
    counts = f"{config.get('examples', '?')} examples"
    if config.get("validation_examples"):
        counts += f" and {config['validation_examples']} to measure on"
    return f"{config.get('data')}: {counts}{f', sha256 {sha[:12]}' if isinstance(sha, str) else ''}"


def _settings(config: Mapping[str, Any]) -> str:
    names = ("rank", "alpha", "lr", "schedule", "seq", "tokens_per_step", "epochs", "dropout", "seed", "compute")
    return ", ".join(f"{name} {_value(config[name])}" for name in names if config.get(name) is not None) or NOTHING


def _plan(plan: Any) -> str:
    return _words(plan) if isinstance(plan, dict) else NOTHING


def _begun(one: RunRecord, about: Mapping[str, Any]) -> str:
    sessions = about.get("sessions")
    again = len(sessions) - 1 if isinstance(sessions, list) and sessions else 0
    return f"{one.begun or NOTHING}{f', gone on with {again} times' if again else ''}"


def _words(facts: Any) -> str:
    if not isinstance(facts, dict):
        return NOTHING
    return ", ".join(f"{name} {_value(value)}" for name, value in facts.items() if value is not None) or NOTHING


def _machine(facts: Any) -> str:
    if not isinstance(facts, dict):
        return NOTHING
    cards = [str(card.get("name")) for card in facts.get("gpus") or [] if isinstance(card, dict)]
    ram = facts.get("ram_bytes")
    parts = [*cards, facts.get("cpu"), f"{facts.get('cores')} cores", f"{size(ram)} of RAM" if ram else None]
    return ", ".join(str(part) for part in [*parts, facts.get("os")] if part)


def _git(state: Any) -> str:
    if not isinstance(state, dict) or not state.get("commit"):
        return NOTHING
    return f"{state['commit']}{', with changes' if state.get('dirty') else ''}"


def _samples(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    if not samples:
        return []
    step = samples[-1].get("step")
    lines = ["", f"what it writes after step {step}:"]
    for row in samples:
        if row.get("step") == step:
            lines += [f"  > {_short(row.get('prompt'))}", f"    {_short(row.get('text'))}"]
    return lines


def _short(text: Any) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else f"{line[:199]}…"
