"""Processor, memory and surroundings of this machine, read without any compiled library but psutil; nothing fails."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

# Names of Linux's /proc/cpuinfo that decide how fast products are; others are not worth a line.
EXTENSIONS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "neon", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
BF16 = ("avx512_bf16", "amx_bf16", "bf16")
# Which of Windows' IsProcessorFeaturePresent numbers means what (winnt.h); none tells of bf16.
_WINDOWS = {38: "sse4_2", 39: "avx", 40: "avx2", 41: "avx512f", 19: "neon", 43: "asimddp"}
_APPLE = {"AdvSIMD": "neon", "FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}
_NO_LIMIT = 1 << 60
_V1_USED = "memory.usage_in_bytes"
_SYSCTLS = ("machdep.cpu.brand_string", "iogpu.wired_limit_mb", *(f"hw.optional.arm.{name}" for name in _APPLE))


@dataclass(frozen=True)
class Cpu:
    """`cores` are physical, `threads` those that this process may run on; `extensions` is None where unreadable."""

    name: str | None = None
    cores: int | None = None
    threads: int | None = None
    extensions: tuple[str, ...] | None = None

    @property
    def has_bf16(self) -> bool | None:
        """Whether it multiplies bf16 itself; None where its extensions cannot be read in full."""
        if self.extensions is None or (sys.platform == "win32" and not set(BF16) & set(self.extensions)):
            return None
        return bool(set(BF16) & set(self.extensions))


@dataclass(frozen=True)
class Memory:
    """Bytes of ordinary memory; `limit` is the container's or cgroup's, None where there is none."""

    total: int | None = None
    available: int | None = None
    swap_total: int | None = None
    swap_used: int | None = None
    limit: int | None = None
    limit_used: int | None = None


def apple_facts(notes: list[str]) -> dict[str, str]:
    """What macOS's sysctl says of the chip; empty elsewhere."""
    if sys.platform != "darwin":
        return {}
    try:
        said = subprocess.run(["sysctl", *_SYSCTLS], capture_output=True, text=True, timeout=2, check=False).stdout
    except (OSError, subprocess.SubprocessError) as error:
        notes.append(f"sysctl does not answer ({type(error).__name__})")
        return {}
    return dict(line.split(": ", 1) for line in said.splitlines() if ": " in line)


def read_cpu(notes: list[str], root: Path, facts: Mapping[str, str]) -> Cpu:
    """The processor; `facts` are those of `apple_facts`."""
    try:
        cores = psutil.cpu_count(logical=False)
    except (OSError, RuntimeError, ValueError):
        cores = None
    if cores is None:
        notes.append("the number of cores cannot be read")
    name, extensions = _named(root, facts)
    if extensions is None:
        notes.append("the processor's vector extensions cannot be read")
    return Cpu(
        name or platform.processor() or platform.machine() or None, cores, _usable_threads(root, notes), extensions
    )


def _named(root: Path, facts: Mapping[str, str]) -> tuple[str | None, tuple[str, ...] | None]:
    if sys.platform == "darwin":
        arm = tuple(ours for name, ours in _APPLE.items() if facts.get(f"hw.optional.arm.{name}") == "1")
        return facts.get("machdep.cpu.brand_string"), arm or None
    if sys.platform == "win32":
        return _windows_name(), _windows_extensions()
    try:
        said = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, None
    name = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", said, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", said, re.M)
    has = set(flags[1].split()) if flags else set()
    has |= {"neon"} if "asimd" in has else set()
    return name[1].strip() if name else None, tuple(e for e in EXTENSIONS if e in has) if flags else None


def _usable_threads(root: Path, notes: list[str]) -> int | None:
    """Those that this process may run on, by its affinity and its control group's quota."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cgroup_threads(root) if sys.platform.startswith("linux") else None
    if threads is not None and quota is not None and quota < threads:
        notes.append(f"this container or control group may use {quota} of {threads} threads")
        return quota
    return threads


def _windows_name() -> str | None:
    try:
        import winreg

        key = winreg.OpenKey(  # type: ignore[attr-defined,unused-ignore]
            winreg.HKEY_LOCAL_MACHINE,  # type: ignore[attr-defined,unused-ignore]
            r"HARDWARE\DESCRIPTION\System\CentralProcessor\0",
        )
        return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()  # type: ignore[attr-defined,unused-ignore]
    except (ImportError, OSError):
        return None


def _windows_extensions() -> tuple[str, ...] | None:
    try:
        import ctypes

        has = ctypes.windll.kernel32.IsProcessorFeaturePresent  # type: ignore[attr-defined,unused-ignore]
        return tuple(name for number, name in _WINDOWS.items() if has(number))
    except (AttributeError, OSError):
        return None


def read_memory(notes: list[str], root: Path) -> Memory:
    """RAM, swap and the limit of the container or cgroup."""
    total = available = swap_total = swap_used = None
    if sys.platform.startswith("linux"):
        total, available, swap_total, swap_used = _meminfo(root)
    else:
        try:
            ram = psutil.virtual_memory()
            total, available = int(ram.total), int(ram.available)
            swap = psutil.swap_memory()
            swap_total, swap_used = int(swap.total), int(swap.used)
        except (OSError, RuntimeError) as error:
            notes.append(f"memory cannot be read in full ({type(error).__name__})")
    if total is None or available is None:
        notes.append("the size of RAM cannot be read")
    limit, used = _cgroup_limit(root) if sys.platform.startswith("linux") else (None, None)
    return Memory(total, available, swap_total, swap_used, limit, used)


def _meminfo(root: Path) -> tuple[int | None, int | None, int | None, int | None]:
    try:
        said = (root / "proc/meminfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, None, None, None
    kib = {name: int(count) for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", said, re.M)}

    def in_bytes(name: str) -> int | None:
        return kib[name] * 1024 if name in kib else None

    swap, free = in_bytes("SwapTotal"), in_bytes("SwapFree")
    return (
        in_bytes("MemTotal"),
        in_bytes("MemAvailable") or in_bytes("MemFree"),
        swap,
        swap - free if swap is not None and free is not None else None,
    )


def _cgroup_limit(root: Path) -> tuple[int | None, int | None]:
    """(bytes, bytes used) of the tightest memory limit over this process."""
    found: list[tuple[int, int | None]] = []
    for folder in _groups(root, "memory"):
        for limit_file, used_file in (("memory.max", "memory.current"), ("memory.limit_in_bytes", _V1_USED)):
            limit = _count(folder / limit_file)
            if limit is not None and 0 < limit < _NO_LIMIT:
                found.append((limit, _in_use(folder, used_file)))
    return min(found, key=lambda pair: pair[0], default=(None, None))


def _cgroup_threads(root: Path) -> int | None:
    """Processors that the tightest CPU quota over this process is worth, rounded up."""
    found = []
    for folder in _groups(root, "cpu"):
        quota, period = (*_words(folder / "cpu.max"), "", "")[:2]
        if not quota:
            quota, period = ("".join(_words(folder / f"cpu.cfs_{what}_us")) for what in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):
            found.append(-(-int(quota) // int(period)))
    return max(1, min(found)) if found else None


def _groups(root: Path, controller: str) -> list[Path]:
    """The control groups over this process, v2 and v1, up to the root one."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # A container often sees its own group as the root one, whatever path it is told.
    wanted = [("", "/"), (controller, "/")]
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            wanted += [("", path), ("unified", path)]
        elif controller in controllers.split(","):
            wanted += [(controller, path), (controllers, path)]
    folders: dict[Path, None] = {}
    for mount, path in wanted:
        steps = [part for part in path.split("/") if part not in ("", "..")]
        base = root / "sys/fs/cgroup" / mount
        folders |= dict.fromkeys(base.joinpath(*steps[:depth]) for depth in range(len(steps), -1, -1))
    return list(folders)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return []


def _in_use(folder: Path, used_file: str) -> int | None:
    """Bytes that the group holds, less the page cache that gives way."""
    used = _count(folder / used_file)
    try:
        stat = (folder / "memory.stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return used
    cache = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.M)
    return max(0, used - int(cache[1])) if used is not None and cache else used


def _count(path: Path) -> int | None:
    text = "".join(_words(path))
    return int(text) if text.isdecimal() else None


def in_wsl(root: Path) -> bool:
    """Whether this is Linux inside Windows."""
    if "WSL_DISTRO_NAME" in os.environ:
        return True
    try:
        return "microsoft" in (root / "proc/version").read_text(encoding="utf-8", errors="replace").casefold()
    except OSError:
        return False


def in_container(root: Path) -> bool:
    """Whether this is a container: what Docker, Podman, LXC and Kubernetes leave behind says so."""
    named = os.environ.get("container")  # noqa: SIM112 (systemd's and Podman's own spelling)
    if (root / ".dockerenv").exists() or (root / "run/.containerenv").exists() or named:
        return True
    try:
        said = (root / "proc/1/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(word in said for word in ("docker", "kubepods", "lxc", "containerd"))
