"""One fine-tune in a process of its own, with a fault on order; started from a server that has everything imported."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th call of `where` (forward_backward, update, fsync, replace, ...): see `_faulty`."""

    kind: str
    where: str = ""
    at: int = 1
    words: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """How a process ended: its exit code (minus a signal's number) and what it said."""

    code: int
    said: str

    @property
    def errors(self) -> list[str]:
        """The lines that a person reads as failure."""
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


CONTEXT: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
if sys.platform != "win32":
    parts = ["gemwright.train.loop", "gemwright.__main__", "gemwright.cli", "torch._dynamo", "pytest"]
    CONTEXT.set_forkserver_preload([*parts, "matplotlib.figure", "matplotlib.backends.backend_agg"])


def start(words: list[str], log: Path, fault: Fault | None = None) -> BaseProcess:
    """Begin `gemwright` with `words`; what it says goes to `log`."""
    process: BaseProcess = CONTEXT.Process(target=child, args=(words, log, fault))
    process.start()
    return process


def run(words: list[str], log: Path, fault: Fault | None = None, limit_s: float = 120) -> Done:
    """`start` and wait."""
    process = start(words, log, fault)
    return wait(process, log, limit_s)


def wait(process: BaseProcess, log: Path, limit_s: float = 120) -> Done:
    """The end of a process; one that does not end is killed and fails the test."""
    process.join(limit_s)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"still at work after {limit_s} s: {log.read_text(encoding='utf-8')}")
    return Done(process.exitcode, log.read_text(encoding="utf-8") if log.is_file() else "")


def child(words: list[str], log: Path, fault: Fault | None) -> None:
    """The process: the real command line, its stderr in a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    import torch

    torch.set_num_threads(1)
    if fault is not None:
        _faulty(fault)
    from gemwright.__main__ import main

    main(words)


def _faulty(fault: Fault) -> None:
    from gemwright.train.optimizer import Optimizer
    from gemwright.train.setup import Setup

    place: Any = {"forward_backward": Setup, "update": Optimizer}.get(fault.where, os)
    if fault.where == "backward":
        from gemwright.model.layer import LayerPass

        place = LayerPass
    if fault.kind == "clock":
        _move_clock(fault.words["seconds"])
        return
    if fault.kind == "readonly_user":
        os.setgid(65534)
        os.setuid(65534)
        return
    real, calls = getattr(place, fault.where), iter(range(1, 1 << 60))

    def faulty(*args: Any, **kwargs: Any) -> Any:
        number = next(calls)
        if fault.kind == "slow" and number >= fault.at:
            start_s = time.perf_counter()
            result = real(*args, **kwargs)
            time.sleep((fault.words["times"] - 1) * max(0.05, time.perf_counter() - start_s))
            return result
        if fault.kind == "pause":
            time.sleep(fault.words["seconds"])
        if number == fault.at:
            _strike(fault)
        return real(*args, **kwargs)

    setattr(place, fault.where, faulty)


def _strike(fault: Fault) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "memory":
        raise MemoryError
    if fault.kind == "torch":
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory")
    if fault.kind == "input":
        path = Path(fault.words["path"])
        path.write_bytes(fault.words["content"])
    if fault.kind == "eio":
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def _move_clock(seconds: float) -> None:
    """The machine's clock jumps by `seconds` a little after the start, as when it is set while a run is going on."""
    real: Callable[[], float] = time.time
    begun = time.monotonic()
    time.time = lambda: real() + (seconds if time.monotonic() - begun > 0.5 else 0.0)
