"""Notices steps that take several times as long as before, and names the likely cause from what the machine shows."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from gemwright.gpus import throttling
from gemwright.machine import available_ram_bytes
from gemwright.report import say, size

# Slow is a step of more than SLOW times the usual; over again when the last RECENT are under OVER times.
SLOW, OVER, RECENT, KNOWN, REMEMBERED = 2.5, 1.8, 5, 8, 101
READ_EVERY_S = 5.0
_SCARCE, _BUSY, _THROTTLED = 0.05, 0.5, 0.6


@dataclass(frozen=True)
class Reading:
    """The machine at one moment; counters grow, and what a system does not tell is None.

    `page_faults` are reads of the disk for this process's memory, `others` is the processors' share that other programs
    used since the last reading, `throttling` why a GPU holds its clocks back.
    """

    at_s: float
    available_bytes: int = 0
    total_bytes: int = 0
    swapped_in_bytes: int = 0
    page_faults: int | None = None
    cpu_hz: float | None = None
    others: float | None = None
    on_battery: bool = False
    device_free_bytes: int | None = None
    throttling: str | None = None


class Watch:
    """Told of every step, `after_step` warns once of a lasting slowness, and again only after it was over.

    A step counts as slow where both its seconds and its seconds a token are, so that neither short nor long steps
    mislead; the median of several steps decides, so that no single one does.
    """

    def __init__(self, read: Callable[[], Reading] | None = None, warn: Callable[[str], None] = say) -> None:
        self._read, self._warn = read or Machine().read, warn
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._per_token: deque[float] = deque(maxlen=REMEMBERED)
        self._waiting: deque[float] = deque(maxlen=REMEMBERED)
        self._recent: deque[tuple[float, float, float, float]] = deque(maxlen=RECENT)
        self._steps, self._is_slow = 0, False
        self._before = self._read()

    def after_step(self, row: Mapping[str, Any]) -> None:
        """Take a row of the metrics."""
        self._steps += 1
        if self._steps == 1:  # it also fills what is kept
            return
        seconds, per_token = row["step_s"], row["step_s"] / max(1, row["tokens"])
        waiting = float(row.get("waiting", 0.0))
        ratio = 1.0
        if len(self._seconds) >= KNOWN:
            ratio = min(seconds / statistics.median(self._seconds), per_token / statistics.median(self._per_token))
        self._recent.append((ratio, seconds, per_token, waiting))
        usual = statistics.median(ratio for ratio, *_ in self._recent)
        if ratio < SLOW and usual < SLOW:
            self._learn(seconds, per_token, waiting)
        if len(self._recent) == RECENT and not self._is_slow and usual >= SLOW:
            self._is_slow = True
            self._say(usual, seconds)
        elif self._is_slow and usual < OVER:
            self._is_slow = False
            self._warn("steps take their usual time again")

    def _learn(self, seconds: float, per_token: float, waiting: float) -> None:
        if self._is_slow:
            return
        self._seconds.append(seconds)
        self._per_token.append(per_token)
        self._waiting.append(waiting)
        now_s = time.monotonic()
        if now_s - self._before.at_s >= READ_EVERY_S:
            self._before = self._read()

    def _say(self, times: float, seconds: float) -> None:
        waiting = statistics.median(waiting for *_, waiting in self._recent)
        waited = statistics.median(self._waiting)
        why = likely_cause(self._before, self._read(), waiting - waited)
        self._warn(f"steps take {times:.1f} times as long as before ({seconds:.2f} s). {why}")


def likely_cause(before: Reading, now: Reading, waiting_more: float = 0.0) -> str:
    """What the readings before and during a slowness say of it, and what to do.

    `waiting_more` is by how much the share of a step grew in which the device waits for copies.
    """
    passed_s = max(1e-3, now.at_s - before.at_s)
    swapped = now.swapped_in_bytes - before.swapped_in_bytes
    faults = (now.page_faults or 0) - (before.page_faults or 0)
    is_scarce = 0 < now.available_bytes < _SCARCE * now.total_bytes
    if swapped / passed_s > 2**20:
        return (
            f"Likely cause: RAM is short and {size(swapped)} came back from swap in {passed_s:.0f} s "
            f"({size(now.available_bytes)} available). Close other programs."
        )
    if faults / passed_s > 200 or is_scarce:
        return (
            f"Likely cause: RAM is short ({size(now.available_bytes)} available), and what does not fit is read from "
            "disk again. Close other programs."
        )
    if now.device_free_bytes is not None and now.device_free_bytes < 2**27:
        return (
            f"Likely cause: video memory is full ({size(now.device_free_bytes)} free), and the driver may use RAM in "
            "its place. Close programs that use the GPU, or use a smaller --vram."
        )
    if now.throttling:
        return f"Likely cause: the GPU holds back ({now.throttling}). Let it cool, or look at its power supply."
    if now.on_battery and not before.on_battery:
        return "Likely cause: the machine runs on battery now. Plug it in."
    if now.cpu_hz and before.cpu_hz and now.cpu_hz < _THROTTLED * before.cpu_hz:
        return (
            f"Likely cause: the processor runs at {now.cpu_hz / 1e9:.1f} instead of {before.cpu_hz / 1e9:.1f} GHz, "
            "for heat or to save power. Let it cool, or look at its power settings."
        )
    if now.others is not None and now.others > _BUSY:
        return f"Likely cause: other programs use {now.others:.0%} of the processors. Stop them, or wait."
    if waiting_more > 0.2:
        return "Likely cause: weights arrive late over the link to the GPU. See whether other programs use it."
    return "RAM, swap, video memory, clocks and other programs show no cause; 'gemwright doctor --fresh' measures anew."


class Machine:
    """Takes readings of this machine, each in about a millisecond."""

    def __init__(self, device_free: Callable[[], int] | None = None) -> None:
        self._device_free = device_free
        self._process = psutil.Process()
        self._total = psutil.virtual_memory().total
        self._times = self._busy_s()

    def read(self) -> Reading:
        """The machine now."""
        return Reading(
            time.monotonic(),
            available_ram_bytes(),
            self._total,
            _swapped_in(),
            _page_faults(),
            _clock_hz(),
            self._others(),
            _is_on_battery(),
            self._device_free() if self._device_free else None,
            throttling() if self._device_free else None,
        )

    def _busy_s(self) -> tuple[float, float, float]:
        """(seconds on the clock, processor seconds of all programs, of this one)"""
        times, own = psutil.cpu_times(), self._process.cpu_times()
        busy_s = times.user + times.system + getattr(times, "nice", 0.0)
        return time.monotonic(), busy_s, own.user + own.system

    def _others(self) -> float | None:
        before, now = self._times, self._busy_s()
        passed_s = now[0] - before[0]
        if passed_s < 0.5:
            return None
        self._times = now
        busy = (now[1] - before[1]) - (now[2] - before[2])
        return max(0.0, min(1.0, busy / (passed_s * (os.cpu_count() or 1))))


def _swapped_in() -> int:
    try:
        return int(psutil.swap_memory().sin)
    except (OSError, RuntimeError):
        return 0


def _page_faults() -> int | None:
    """Times that this process waited for a page from the disk; None on Windows, which does not tell them apart."""
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _clock_hz() -> float | None:
    read = getattr(psutil, "cpu_freq", None)
    try:
        clock = read() if read else None
    except (OSError, RuntimeError, NotImplementedError):
        clock = None
    return clock.current * 1e6 if clock else None


def _is_on_battery() -> bool:
    read = getattr(psutil, "sensors_battery", None)
    try:
        found = read() if read else None
    except (OSError, RuntimeError, NotImplementedError):
        found = None
    return found is not None and found.power_plugged is False
