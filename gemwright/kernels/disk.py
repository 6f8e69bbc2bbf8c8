"""How fast the disk under a folder reads a file that the system's cache does not hold."""

from __future__ import annotations

import mmap
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

_BLOCK, _BLOCKS = 8 << 20, 32
_LEAST_FREE = 4 << 30
_LONGEST_S = 3.0
_F_NOCACHE = 48  # macOS: <sys/fcntl.h>


def read_bytes_s(folder: Path, free: int | None) -> tuple[float | None, bool, str | None]:
    """(bytes a second of one reader going from front to back, whether the cache was bypassed, why not).

    Writes 256 MiB of noise into `folder` and removes it again; leaves a disk with under 4 GiB `free` alone.
    """
    if free is not None and free < _LEAST_FREE:
        return None, False, "the disk is too full to be measured"
    file = folder / f".gemwright-probe-{uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(file)
        return _read(file)
    except OSError as error:
        return None, False, f"the disk could not be measured ({error.strerror or error})"
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _write(file: Path) -> None:
    noise = os.urandom(_BLOCK)
    started = time.perf_counter()
    with file.open("wb") as out:
        for number in range(_BLOCKS):
            out.write(number.to_bytes(8, "little") + noise[8:])
            if time.perf_counter() - started > _LONGEST_S:
                break
        out.flush()
        os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(file: Path) -> tuple[float | None, bool, str | None]:
    handle, bypassed = _open(file)
    try:
        if not bypassed and sys.platform == "darwin":
            import fcntl

            bypassed = fcntl.fcntl(handle, _F_NOCACHE, 1) != -1
        # A direct read wants memory at the start of a page, which a mapping has.
        with mmap.mmap(-1, _BLOCK) as block:
            done, started = 0, time.perf_counter()
            while time.perf_counter() - started < _LONGEST_S and (count := _read_into(handle, block)):
                done += count
            took = time.perf_counter() - started
    finally:
        os.close(handle)
    if not done:
        return None, False, "the disk gave nothing back"
    return done / took, bypassed, None if bypassed else "the disk's figure may come from the system's cache"


def _open(file: Path) -> tuple[int, bool]:
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):  # file systems in memory have none
            return os.open(file, os.O_RDONLY | os.O_DIRECT), True
    return os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0)), False


def _read_into(handle: int, block: mmap.mmap) -> int:
    if hasattr(os, "readv"):
        return os.readv(handle, [block])
    got = os.read(handle, _BLOCK)
    return len(got)
