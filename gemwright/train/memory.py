"""How much memory this process has taken, and how much it may take for keeping things unpacked."""

from __future__ import annotations

import ctypes
import sys

import psutil

from gemwright.machine import available_ram_bytes


def peak_rss_bytes() -> int:
    """The most ordinary memory that this process has held so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """The ordinary memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def spare_bytes() -> int:
    """Half of the memory that is free now: what may go into unpacked weights and kept activations."""
    return available_ram_bytes() // 2


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks for the next step instead of giving each back to the system; whether it does.

    Every step takes and frees the same buffers, and fetching them from the system anew costs a page fault per 4 KiB:
    5% of a step. Other C libraries (macOS, Windows, musl) keep blocks of this size by their own rules.
    """
    trim_threshold, mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 2**25))
