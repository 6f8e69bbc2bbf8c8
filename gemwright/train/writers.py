"""Copies a run's rows to TensorBoard or trackio, where asked for; both stay on this machine."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from gemwright.errors import InputError
from gemwright.report import say
from gemwright.runs import RunFolder
from gemwright.train.config import TrainConfig

_NUMBERS = ("loss", "lr", "grad_norm", "tokens_per_s", "step_s", "rss_bytes", "device_bytes", "waiting")
# What would have trackio, or the hub's client beneath it, talk to another machine.
_STAYS = ("TRACKIO_DIR", "TRACKIO_STORAGE_MODE")
_OFF = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "DO_NOT_TRACK": "1",
}
FINISH_S = 30.0


class Writer(Protocol):
    """Takes the rows of a run's logs as they are written."""

    def after_step(self, row: Mapping[str, Any]) -> None: ...
    def after_evaluation(self, row: Mapping[str, Any]) -> None: ...
    def after_sample(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def check_installed(config: TrainConfig) -> None:
    """InputError with the command that installs what is asked for and missing; imports nothing."""
    for name, wanted in (("tensorboard", config.tensorboard), ("trackio", config.trackio)):
        if wanted and importlib.util.find_spec(name) is None:
            fix = f'Install it with: {sys.executable} -m pip install "gemwright[{name}]".'
            raise InputError(f"{name} is not installed", where=f"--{name}", fix=fix)


def open_writers(config: TrainConfig, run: RunFolder, record: Mapping[str, Any], step: int) -> list[Writer]:
    """Those that `config` asks for, going on after `step`."""
    found: list[Writer] = []
    if config.tensorboard:
        found.append(TensorBoard(run, step))
    if config.trackio:
        found.append(Trackio(config.trackio, run, record))
    return found


class TensorBoard:
    """Event files in the run's `tensorboard/`; steps after `step`, of a process that was cut off, are hidden there."""

    def __init__(self, run: RunFolder, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = run.path / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None, flush_secs=30)

    def after_step(self, row: Mapping[str, Any]) -> None:
        """See `Writer`."""
        for name in _NUMBERS:
            self._writer.add_scalar(f"train/{name}", row[name], row["step"])

    def after_evaluation(self, row: Mapping[str, Any]) -> None:
        """See `Writer`."""
        self._writer.add_scalar("validation/loss", row["loss"], row["step"])
        self._writer.flush()

    def after_sample(self, row: Mapping[str, Any]) -> None:
        """See `Writer`."""
        self._writer.add_text(row["prompt"][:80], row["text"], row["step"])

    def close(self) -> None:
        """See `Writer`."""
        self._writer.close()


class Trackio:
    """trackio in a process of its own, whose environment names no server, no account and no network.

    It prints to its stdout, asks the Hugging Face Hub who is logged in, and heeds variables that send runs to a Space
    or a server: none of it may happen here. A trackio that fails is said aloud once and stops nothing.
    """

    def __init__(self, project: str, run: RunFolder, record: Mapping[str, Any]) -> None:
        asked = {"project": project, "name": run.path.absolute().name, "config": _flat(record)}
        self._child: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-m", "gemwright.train.trackio_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=local_environment(os.environ),
        )
        self._send(asked)

    def after_step(self, row: Mapping[str, Any]) -> None:
        """See `Writer`."""
        self._send({"step": row["step"], "metrics": {f"train/{name}": _finite(row[name]) for name in _NUMBERS}})

    def after_evaluation(self, row: Mapping[str, Any]) -> None:
        """See `Writer`."""
        self._send({"step": row["step"], "metrics": {"validation/loss": _finite(row["loss"])}})

    def after_sample(self, row: Mapping[str, Any]) -> None:
        """See `Writer`."""
        self._send({"step": row["step"], "metrics": {f"sample/{row['prompt'][:80]}": row["text"]}})

    def close(self) -> None:
        """See `Writer`."""
        child, self._child = self._child, None
        if child is None:
            return
        try:
            _end(child)
            if child.wait(FINISH_S) != 0:
                say("trackio ended with an error; the run's own files are whole")
        except (OSError, subprocess.TimeoutExpired):
            child.kill()
            child.wait()
            say("trackio did not finish; the run's own files are whole")

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._child is None or self._child.stdin is None:
            return
        try:
            self._child.stdin.write((json.dumps(message) + "\n").encode())
            self._child.stdin.flush()
        except OSError:
            with suppress(OSError):
                _end(self._child)
            self._child.wait()
            self._child = None
            say("trackio ended; the run goes on without it")


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.stdin is not None:
        child.stdin.close()


def local_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what sends anything away, or says who someone is."""
    return {
        name: value
        for name, value in environment.items()
        if (not name.startswith("TRACKIO_") or name in _STAYS) and name not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    } | _OFF


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if isinstance(value, (str, int, float, bool))}
