"""Messages and progress for a person, all on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 10.0


def say(text: str) -> None:
    """One line for the person, apart from the data on stdout."""
    print(text, file=sys.stderr, flush=True)


def command(*parts: object) -> str:
    """`parts` as a line that can be pasted into this machine's shell."""
    words = [str(part) for part in parts]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def size(count: float) -> str:
    """`count` bytes in a unit that a person reads: 241 MB, 1.4 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def bytes_of(text: str) -> int:
    """The bytes that "8GiB", "7500 MB" or "8589934592" name. Raises ValueError."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ").strip()
    unit = text.strip()[len(number) :].strip().lower()
    if unit not in units:
        raise ValueError(f"{unit!r} is no unit of memory: use GiB or GB")
    return int(float(number) * units[unit])


def duration(seconds: float) -> str:
    """`seconds` as 42 s or 4 min 05 s."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class Progressing:
    """One bar from 0 to 1 with a text beside it; off a terminal a line at each new phase and every ten seconds."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase, self._said_at = "", 0.0

    def __enter__(self) -> Progressing:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description:12}"), BarColumn(24), TaskProgressColumn(), TimeElapsedColumn())
            text = TextColumn("{task.fields[text]}")
            self._bar = Progress(*columns, text, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=1.0, text="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            say(text)

    def update(self, phase: str, fraction: float, text: str = "") -> None:
        """Show that `fraction` (0 to 1) of the whole is done, that `phase` is going on, and `text` about it."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=fraction, description=phase, text=text)
        elif phase != self._phase or time.monotonic() - self._said_at >= LINE_EVERY_S or fraction >= 1.0:
            say(f"{phase:12} {fraction:4.0%}  {text}".rstrip())
            self._said_at = time.monotonic()
        self._phase = phase
