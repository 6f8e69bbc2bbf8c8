"""Why a run ends before its last step: a signal or a time limit, heard between two steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime, timedelta
from types import FrameType
from typing import Any

CTRL_C, SIGTERM = "Ctrl-C", "SIGTERM"
# What the process returns where a signal stopped the run: 128 and the signal's number.
EXIT_CODES = {CTRL_C: 130, SIGTERM: 143}


class Stop:
    """Within `with`, signals set `reason` instead of ending the process; a Ctrl-C after that ends it at once.

    The limits count from the construction, on a clock that nobody sets: changing the machine's time moves neither.
    """

    def __init__(self, until: str | None = None, max_hours: float | None = None) -> None:
        self._signal: str | None = None
        self._limits: dict[str, float] = {}
        if until:
            self._limits[f"--until {until}"] = clock_s() + seconds_until(until, datetime.now())
        if max_hours:
            self._limits[f"--max-hours {max_hours:g}"] = clock_s() + max_hours * 3600
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop now, or None."""
        return self._signal or next((name for name, at in self._limits.items() if clock_s() >= at), None)

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGBREAK", None)):
                # One that the caller has this process ignore, as a shell does for its background jobs, stays ignored.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGTERM and self._signal:
            raise KeyboardInterrupt
        self._signal = SIGTERM if number == signal.SIGTERM else CTRL_C
        with suppress(OSError):  # nobody may be listening; and `print` must not be entered twice
            os.write(2, b"\nstopping after this step; Ctrl-C ends at once\n")


def seconds_until(clock: str, now: datetime) -> float:
    """Seconds from `now` (local time) to the next HH:MM on the machine's clock, summer time taken into account."""
    hour, minute = map(int, clock.split(":"))
    at = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    if at <= now:
        at += timedelta(days=1)
    return at.timestamp() - now.timestamp()


def clock_s() -> float:
    """Seconds on a clock that goes on while the machine sleeps, where the system has one."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
