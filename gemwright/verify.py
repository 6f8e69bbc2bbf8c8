"""`gemwright plan --verify`: runs what was planned for a moment and sets measured beside predicted."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gemwright.errors import InputError
from gemwright.plan.answer import Work
from gemwright.plan.ask import Asked


def verify(asked: Asked, model: str | None, rig: str | None) -> Asked:
    """The same answer with what a moment of it took. Raises InputError where it was asked of another machine."""
    work = asked.work
    if model is None or rig is not None or work is None:
        raise InputError(
            "only one model on this machine can be run", where="--verify", fix="Name a model, and no --rig."
        )
    if work.purpose == "tune":
        rows, measured = _tune(asked.result, model, work)
    else:
        rows, measured = _run(asked.result, model, work.context)
    width = max(len(name) for name, *_ in rows)
    lines = [
        f"  {name:<{width}}  predicted {p:>9.3f}, measured {m:>9.3f} {unit} ({m / p - 1:+.0%})"
        for name, p, m, unit in rows
    ]
    return replace(asked, result=asked.result | {"measured": measured}, lines=[*asked.lines, "", *lines])


Rows = list[tuple[str, float, float, str]]


def _tune(said: dict[str, Any], model: str, work: Work) -> tuple[Rows, dict[str, Any]]:
    from gemwright.train.config import TrainConfig
    from gemwright.train.verify import measure_tune

    config = TrainConfig(
        data=Path("random"),
        model=model,
        out=Path("nowhere"),
        seq=work.seq,
        tokens_per_step=work.tokens_per_step,
        rank=work.rank,
        vram=work.vram_bytes,
    )
    got = measure_tune(config)
    rows: Rows = [("tokens a second", said["tokens_per_s"], got.tokens_per_s, "tokens/s")]
    if said["peak_device_bytes"]:
        rows.append(("video memory", said["peak_device_bytes"] / 2**30, got.device_bytes / 2**30, "GiB"))
    rows.append(("RAM", said["peak_host_bytes"] / 2**30, got.host_bytes / 2**30, "GiB"))
    return rows, asdict(got)


def _run(said: dict[str, Any], model: str, context: int) -> tuple[Rows, dict[str, Any]]:
    from gemwright.engines.measure import measure_run
    from gemwright.weights.pull import resolve_model

    got = measure_run(resolve_model(model), context)
    rows: Rows = [
        ("written", said["tokens_per_s"], got.decode_tokens_per_s, "tokens/s"),
        ("read", said["prefill_tokens_per_s"], got.prefill_tokens_per_s, "tokens/s"),
        ("RAM", said["peak_host_bytes"] / 2**30, got.host_bytes / 2**30, "GiB"),
    ]
    return rows, asdict(got)
