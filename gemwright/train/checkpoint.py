"""Checkpoints of a run: safetensors and JSON, whole or absent, written beside the training, found without help."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemwright.errors import GemwrightError, InputError
from gemwright.report import say
from gemwright.runs import atomic_path
from gemwright.train.background import in_background
from gemwright.weights.digest import sha256_file
from gemwright.weights.hf_folder import read_safetensors, write_safetensors

ADAPTER, OPTIMIZER, STATE, MANIFEST = "adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FORMAT = 1


@dataclass
class State:
    """Where a fine-tune stands after `step` updates: with the tensors of adapter and optimizer all it goes on from.

    The order of examples and the dropout are functions of the seed and the step, so no generator has a state. `tokens`
    and `seconds` are those of all steps that were not the first of their process; `used_s` is the time of all work.
    `best_step` is 0 before the first evaluation, `worse` counts the evaluations since the best.
    """

    step: int = 0
    epoch: float = 0.0
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    used_s: float = 0.0
    evaluated_step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    worse: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """All of a run at one moment: `adapter` and `optimizer` tensors in RAM, and `state.json`'s parts.

    `origin` is what the run was started from, which must not change under it; `arrangement` how a GPU's memory was laid
    out (None on a CPU).
    """

    state: State
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    origin: Mapping[str, Any]
    arrangement: Mapping[str, Any] | None = None


class Checkpoints:
    """The folder `checkpoints/` of a run, of which the last `keep` and the best stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep
        self._writing: Future[None] | None = None

    def newest(self) -> Checkpoint | None:
        """The newest complete one, or None; each damaged one that is passed over is named."""
        for step in reversed(self.steps()):
            found = self.read(step)
            if found is not None:
                return found
        return None

    def steps(self) -> list[int]:
        """The steps of all that are there, whole or not."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(name) for name in names if name.isdigit())

    def read(self, step: int) -> Checkpoint | None:
        """The one of a step, or None (said aloud) where a file of it is missing or not what was written."""
        path = self.path(step)
        try:
            _verify(path)
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if state["format"] != FORMAT:
                raise InputError(f"has the format {state['format']!r}, not {FORMAT}", where=path / STATE)
            adapter, optimizer = read_safetensors(path / ADAPTER), read_safetensors(path / OPTIMIZER)
            return Checkpoint(State(**state["state"]), adapter, optimizer, state["origin"], state["arrangement"])
        except (OSError, ValueError, TypeError, KeyError, InputError) as error:
            say(f"passed over a checkpoint that is not whole: {error}")
            return None

    def path(self, step: int) -> Path:
        """Where the one of a step lies."""
        return self.folder / f"step-{step:08d}"

    @property
    def is_writing(self) -> bool:
        """Whether one is being written now."""
        return self._writing is not None and not self._writing.done()

    def begin(self, make: Callable[[], Checkpoint]) -> None:
        """Write what `make` gives beside the caller, after what is being written; an earlier failure is said aloud."""
        self.settle()
        self._writing = in_background(lambda: self._write(make()))

    def settle(self) -> bool:
        """Wait for what is being written; whether it is whole on disk. A failure is said aloud, once."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
            return True
        except (GemwrightError, OSError, MemoryError) as error:
            say(f"the checkpoint could not be saved: {error} Training goes on; the next is tried at its time.")
            return False

    def finish(self, make: Callable[[], Checkpoint]) -> None:
        """Write the last one and wait for it; raises MachineError where the disk refuses."""
        self.settle()
        self._write(make())

    def _write(self, checkpoint: Checkpoint) -> None:
        state, path = checkpoint.state, self.path(checkpoint.state.step)
        parts = {"format": FORMAT, "state": vars(state), "origin": checkpoint.origin}
        with atomic_path(path) as part:
            part.mkdir()
            write_safetensors(part / ADAPTER, checkpoint.adapter)
            write_safetensors(part / OPTIMIZER, checkpoint.optimizer)
            _write_json(part / STATE, parts | {"arrangement": checkpoint.arrangement})
            _write_json(part / MANIFEST, {"files": {name: _entry(part / name) for name in (ADAPTER, OPTIMIZER, STATE)}})
        self._prune(state.step, state.best_step)

    def _prune(self, newest: int, best: int) -> None:
        """Remove what is neither among the last nor the best, nor of this history: past `newest` all are damaged."""
        last = [step for step in self.steps() if step <= newest][-self._keep :]
        for step in self.steps():
            if step not in (*last, best):
                leaving = self.folder / f".{self.path(step).name}.{os.getpid()}.part"
                with suppress(OSError):  # it stays, and is tried again after the next
                    self.path(step).rename(leaving)  # so that one half removed is not taken for one
                    shutil.rmtree(leaving, ignore_errors=True)


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in RAM that later updates leave alone."""
    return {name: torch.empty_like(tensor, device="cpu").copy_(tensor.detach()) for name, tensor in tensors.items()}


def _entry(file: Path) -> dict[str, object]:
    return {"sha256": sha256_file(file), "bytes": file.stat().st_size}


def _verify(path: Path) -> None:
    """InputError where a file is not as the manifest says."""
    files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name in (ADAPTER, OPTIMIZER, STATE):
        if files[name] != _entry(path / name):
            raise InputError("is not what was written (SHA-256 or size differ)", where=path / name)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
