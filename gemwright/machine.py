"""This machine as it is now: cards, processor, memory, limits, disk; read in well under 0.2 s and never failing."""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from gemwright.gpus import Gpu, find_gpus
from gemwright.host import Cpu, Memory, apple_facts, in_container, in_wsl, read_cpu, read_memory
from gemwright.runs import home

__all__ = ["Cpu", "Gpu", "Machine", "available_ram_bytes", "inspect"]
# The part of unified memory that Metal lets the GPU use: 2/3, from 36 GiB on 3/4 (its recommendedMaxWorkingSetSize).
_LARGE_UNIFIED = 36 << 30


@dataclass(frozen=True)
class Machine:
    """What could be read; the rest is None, with a sentence in `notes`."""

    gpus: tuple[Gpu, ...]
    cpu: Cpu
    os: str
    ram_total_bytes: int | None = None
    ram_available_bytes: int | None = None
    swap_total_bytes: int | None = None
    swap_used_bytes: int | None = None
    memory_limit_bytes: int | None = None
    is_wsl: bool = False
    is_container: bool = False
    unified_share_bytes: int | None = None
    model_folder: str = ""
    disk_total_bytes: int | None = None
    disk_free_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def usable_ram_bytes(self) -> int | None:
        """RAM, or the container's part of it."""
        known = [count for count in (self.ram_total_bytes, self.memory_limit_bytes) if count is not None]
        return min(known, default=None)


def inspect(*, folder: Path | None = None, root: Path = Path("/")) -> Machine:
    """This machine; `folder` is where models are kept, `root` where Linux's /proc and /sys are."""
    notes: list[str] = []
    facts = apple_facts(notes)
    cpu, memory = read_cpu(notes, root, facts), read_memory(notes, root)
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    share = _unified_share(memory.total, facts) if apple else None
    gpus = (_apple_gpu(cpu, share, memory),) if apple else find_gpus(notes, root)
    folder = folder or home()
    disk_total, disk_free = _disk(folder, notes)
    return Machine(
        gpus,
        cpu,
        f"{platform.system()} {platform.release()}".strip(),
        memory.total,
        _available(memory),
        memory.swap_total,
        memory.swap_used,
        memory.limit if memory.limit and memory.limit < (memory.total or memory.limit + 1) else None,
        in_wsl(root),
        in_container(root),
        share,
        str(folder),
        disk_total,
        disk_free,
        tuple(notes),
    )


def available_ram_bytes() -> int:
    """What is free of RAM now, and of the container's part of it; 0 where that cannot be read."""
    return _available(read_memory([], Path("/"))) or 0


def _available(memory: Memory) -> int | None:
    """What is free of RAM and of the container's part of it."""
    left = [memory.available]
    if memory.limit is not None:
        left.append(max(0, memory.limit - (memory.limit_used or 0)))
    return min((count for count in left if count is not None), default=None)


def _unified_share(total: int | None, facts: dict[str, str]) -> int | None:
    limit = facts.get("iogpu.wired_limit_mb", "0").strip()
    if limit.isdecimal() and int(limit):
        return int(limit) << 20
    if total is None:
        return None
    return total * 3 // 4 if total > _LARGE_UNIFIED else total * 2 // 3


def _apple_gpu(cpu: Cpu, share: int | None, memory: Memory) -> Gpu:
    free = min(share, memory.available) if share is not None and memory.available is not None else None
    return Gpu(cpu.name or "Apple GPU", "apple", share, free)


def _disk(folder: Path, notes: list[str]) -> tuple[int | None, int | None]:
    """(size, free) of the file system that `folder` lies on, or will."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        usage = shutil.disk_usage(there)
    except (OSError, StopIteration) as error:
        notes.append(f"the disk of {folder} cannot be read ({type(error).__name__})")
        return None, None
    return usage.total, usage.free
