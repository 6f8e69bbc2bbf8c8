"""Processor, memory, limits and surroundings read from fake /proc, /sys and cgroup files, and from fake systems."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from gemwright import host, machine
from gemwright.gpus import Gpu
from gemwright.host import Cpu
from gemwright.machine import inspect

GIB = 1 << 30
KIB = 1 << 10
ZEN4 = "model name\t: AMD Ryzen 9 7950X\nflags\t\t: fpu sse4_2 avx avx2 avx512f avx512_bf16\n\nprocessor : 1\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake Linux of 64 GiB without a container around it."""
    for name in ("WSL_DISTRO_NAME", "container"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    put(tmp_path, "proc/cpuinfo", ZEN4)
    kib = {"MemTotal": 64 * GIB, "MemFree": GIB, "MemAvailable": 48 * GIB, "SwapTotal": 8 * GIB, "SwapFree": 7 * GIB}
    put(tmp_path, "proc/meminfo", "".join(f"{name}:   {count // KIB} kB\n" for name, count in kib.items()))
    put(tmp_path, "proc/version", "Linux version 6.8.0-45-generic (buildd@x)")
    put(tmp_path, "proc/1/cgroup", "0::/init.scope\n")
    put(tmp_path, "proc/self/cgroup", "0::/user.slice/user-1000.slice\n")
    return tmp_path


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_a_plain_desktop(root: Path) -> None:
    seen = inspect(root=root, folder=root / "models/not/yet")
    assert seen.cpu.name == "AMD Ryzen 9 7950X"
    assert seen.cpu.extensions == ("sse4_2", "avx", "avx2", "avx512f", "avx512_bf16") and seen.cpu.has_bf16
    assert (seen.ram_total_bytes, seen.ram_available_bytes) == (64 * GIB, 48 * GIB)
    assert (seen.swap_total_bytes, seen.swap_used_bytes) == (8 * GIB, GIB)
    assert (seen.memory_limit_bytes, seen.is_wsl, seen.is_container) == (None, False, False)
    assert seen.disk_free_bytes and seen.disk_total_bytes and seen.disk_free_bytes <= seen.disk_total_bytes
    assert seen.usable_ram_bytes == 64 * GIB


def test_nothing_readable_is_notes_not_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: (_ for _ in ()).throw(PermissionError()))
    seen = inspect(root=tmp_path / "nowhere", folder=tmp_path)
    assert (seen.ram_total_bytes, seen.cpu.cores, seen.cpu.extensions, seen.disk_free_bytes) == (None,) * 4
    assert seen.cpu.has_bf16 is None and seen.usable_ram_bytes is None
    for words in ("size of RAM", "number of cores", "vector extensions", "disk of"):
        assert any(words in note for note in seen.notes), words


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"user.slice/user-1000.slice/memory.max": "max", "user.slice/memory.max": str(8 * GIB)}, 8 * GIB),
        ({"user.slice/user-1000.slice/memory.max": str(4 * GIB), "user.slice/memory.max": str(8 * GIB)}, 4 * GIB),
        ({"memory.max": str(16 * GIB)}, 16 * GIB),
        ({"unified/user.slice/memory.max": str(2 * GIB)}, 2 * GIB),
        ({"user.slice/user-1000.slice/memory.max": "max"}, None),
        ({"user.slice/memory.max": "nonsense"}, None),
        ({"user.slice/memory.max": str(128 * GIB)}, None),  # more than there is
    ],
)
def test_cgroup_v2(root: Path, files: dict[str, str], limit: int | None) -> None:
    for name, text in files.items():
        put(root, f"sys/fs/cgroup/{name}", text + "\n")
    assert inspect(root=root).memory_limit_bytes == limit


@pytest.mark.parametrize("folder", ["memory/docker/abc", "memory"])
def test_cgroup_v1_by_its_path_or_as_the_root_that_a_container_sees(root: Path, folder: str) -> None:
    put(root, "proc/self/cgroup", "12:cpu:/docker/abc\n7:memory:/docker/abc\n0::/\n")
    put(root, f"sys/fs/cgroup/{folder}/memory.limit_in_bytes", f"{6 * GIB}\n")
    put(root, f"sys/fs/cgroup/{folder}/memory.usage_in_bytes", f"{5 * GIB}\n")
    put(root, f"sys/fs/cgroup/{folder}/memory.stat", f"cache 9\ntotal_inactive_file {2 * GIB}\n")
    seen = inspect(root=root)
    assert (seen.memory_limit_bytes, seen.usable_ram_bytes) == (6 * GIB, 6 * GIB)
    assert seen.ram_available_bytes == 3 * GIB  # the page cache gives way


def test_cgroup_v1_without_a_limit(root: Path) -> None:
    put(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert inspect(root=root).memory_limit_bytes is None


@pytest.mark.parametrize("line", ["", "0", "7:memory", "0::/../../x", ":::"])
def test_damaged_cgroup_lines(root: Path, line: str) -> None:
    put(root, "proc/self/cgroup", line + "\n")
    assert inspect(root=root).memory_limit_bytes is None


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"user.slice/cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu/docker/abc/cpu.cfs_quota_us": "300000", "cpu/docker/abc/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "5 0"}, 16),
        ({"cpu.max": "6400000 100000"}, 16),
    ],
)
def test_a_cpu_quota(root: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    put(root, "proc/self/cgroup", "4:cpu,cpuacct:/docker/abc\n0::/user.slice\n")
    for name, text in files.items():
        put(root, f"sys/fs/cgroup/{name}", text + "\n")
    seen = inspect(root=root)
    assert seen.cpu.threads == threads and bool(threads < 16) == any("of 16 threads" in n for n in seen.notes)


def test_wsl(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, "proc/version", "Linux version 5.15.153.1-microsoft-standard-WSL2")
    assert inspect(root=root).is_wsl
    put(root, "proc/version", "Linux version 6.8")
    monkeypatch.setenv("WSL_DISTRO_NAME", "Ubuntu")
    assert inspect(root=root).is_wsl


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (".dockerenv", ""),
        ("run/.containerenv", ""),
        ("proc/1/cgroup", "9:memory:/docker/4f1\n"),
        ("proc/1/cgroup", "0::/kubepods.slice/pod1\n"),
    ],
)
def test_containers(root: Path, file: str, text: str) -> None:
    assert not inspect(root=root).is_container
    put(root, file, text)
    assert inspect(root=root).is_container


def test_arm_on_linux(root: Path) -> None:
    put(root, "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve\n")
    cpu = inspect(root=root).cpu
    assert cpu.extensions == ("neon", "asimddp", "i8mm", "bf16", "sve") and cpu.has_bf16


def a_mac(monkeypatch: pytest.MonkeyPatch, ram: int, *lines: str) -> None:
    said = ("machdep.cpu.brand_string: Apple M3 Max", "hw.optional.arm.FEAT_BF16: 1", "hw.optional.arm.AdvSIMD: 1")
    answer = SimpleNamespace(stdout="\n".join((*said, *lines)) + "\n")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(host.subprocess, "run", lambda words, **options: answer)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=ram, available=ram // 2))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=0, used=0))


@pytest.mark.parametrize(
    ("ram", "lines", "share"),
    [
        (24 * GIB, ("iogpu.wired_limit_mb: 0",), 16 * GIB),
        (64 * GIB, (), 48 * GIB),
        (24 * GIB, ("iogpu.wired_limit_mb: 20480",), 20 * GIB),
    ],
)
def test_apple_silicon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ram: int, lines: tuple[str, ...], share: int
) -> None:
    a_mac(monkeypatch, ram, *lines)
    seen = inspect(root=tmp_path, folder=tmp_path)
    (card,) = seen.gpus
    assert (card.vendor, card.name, card.memory_total_bytes) == ("apple", "Apple M3 Max", share)
    assert seen.unified_share_bytes == share and seen.cpu.extensions == ("neon", "bf16") and seen.cpu.has_bf16


def test_a_mac_whose_sysctl_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a_mac(monkeypatch, 16 * GIB)

    def refuse(words: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(words, 2)

    monkeypatch.setattr(host.subprocess, "run", refuse)
    seen = inspect(root=tmp_path, folder=tmp_path)
    assert seen.gpus[0].vendor == "apple" and any("sysctl" in note for note in seen.notes)


def test_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ctypes

    has = SimpleNamespace(IsProcessorFeaturePresent=lambda number: number in (39, 40))
    key = SimpleNamespace(
        HKEY_LOCAL_MACHINE=0,
        OpenKey=lambda root, path: path,
        QueryValueEx=lambda key, name: ("Intel(R) Core(TM) i9-10900K CPU @ 3.70GHz  ", 1),
    )
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=has), raising=False)
    monkeypatch.setitem(sys.modules, "winreg", key)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=50 * GIB))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=9 * GIB, used=0))
    monkeypatch.setattr(machine, "find_gpus", lambda notes, root: (Gpu("NVIDIA GeForce RTX 4060 Ti"),))
    seen = inspect(root=tmp_path, folder=tmp_path)
    assert seen.cpu.name == "Intel(R) Core(TM) i9-10900K CPU @ 3.70GHz"
    assert seen.cpu.extensions == ("avx", "avx2") and seen.cpu.has_bf16 is None
    assert (seen.ram_total_bytes, seen.swap_total_bytes) == (64 * GIB, 9 * GIB)


def test_windows_without_a_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "winreg", None)
    seen = inspect(root=tmp_path, folder=tmp_path)
    assert isinstance(seen.cpu, Cpu) and seen.cpu.extensions is None


def test_this_machine_is_read() -> None:
    seen = inspect()
    assert seen.cpu.threads and seen.cpu.threads <= (os.cpu_count() or 1)
    assert seen.ram_total_bytes == psutil.virtual_memory().total or seen.memory_limit_bytes
