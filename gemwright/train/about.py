"""Where a run was made: machine, versions, the state of the current folder's git, the command; kept in `about.json`."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from gemwright import __version__
from gemwright.errors import GemwrightError
from gemwright.machine import inspect
from gemwright.report import command, say
from gemwright.run_records import read_object
from gemwright.runs import RunFolder, write_json

GIT_S = 2.0
_PACKAGES = ("torch", "numpy", "gguf", "xllamacpp", "safetensors", "pydantic", "triton")
# Names of settings, and shapes of values, that are nobody's business.
_SECRET_NAME = re.compile(r"--[\w-]*(token|key|secret|password)", re.IGNORECASE)
_SECRET = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|AKIA|AIza|xox[bap]-)[\w-]{8,}|(?<=://)[^/@\s]+(?=@)")


def add_session(run: RunFolder, step: int, steps_planned: int) -> None:
    """Note that this process works on the run from `step` on; a disk that refuses is said aloud and stops nothing."""
    try:
        known = _known(run)
        sessions = [*known.get("sessions", []), session(step)]
        write_json(run.path / "about.json", {"steps_planned": steps_planned, "sessions": sessions})
    except GemwrightError as error:
        say(f"what this run is made on could not be noted: {error}")


def session(step: int) -> dict[str, Any]:
    """What is known of this process and its machine now, with nothing measured."""
    now = datetime.now().astimezone()
    return {
        "begun": now.isoformat(timespec="seconds"),
        "time_zone": now.tzname(),
        "from_step": step,
        "command": command("gemwright", *without_secrets(sys.argv[1:])),
        "versions": versions(),
        "git": git_state(Path.cwd()),
        "machine": _machine(),
    }


def without_secrets(words: Sequence[str]) -> list[str]:
    """The command line with every value that is, or is called, a secret replaced by ***."""
    shown, hide = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        named = _SECRET_NAME.fullmatch(name) is not None
        shown.append("***" if hide else f"{name}=***" if named and equals else _SECRET.sub("***", word))
        hide = named and not equals and not hide
    return shown


def versions() -> dict[str, str]:
    """Of Python, this program and the packages that decide what a run computes, read without importing them."""
    found = {"gemwright": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it, or None where `folder` is in no repository or git is missing."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *words: str) -> str | None:
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_S,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def _machine() -> dict[str, Any]:
    """CPU, RAM and cards; no names of folders or of people."""
    seen = inspect()
    cards = [
        {key: value for key, value in asdict(gpu).items() if key in ("name", "memory_total_bytes", "driver")}
        for gpu in seen.gpus
    ]
    return {
        "os": seen.os,
        "cpu": seen.cpu.name,
        "cores": seen.cpu.cores,
        "threads": seen.cpu.threads,
        "ram_bytes": seen.usable_ram_bytes,
        "gpus": cards,
        "wsl": seen.is_wsl,
        "container": seen.is_container,
    }


def _known(run: RunFolder) -> dict[str, Any]:
    """What earlier processes noted; nothing where the file is damaged."""
    about = read_object(run.path / "about.json", [])
    return about if isinstance(about.get("sessions", []), list) else {}
