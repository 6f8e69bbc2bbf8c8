"""Every warning where it belongs and nowhere else; the measurements on this machine; the command as a process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemwright import doctor
from gemwright.doctor import Diagnosis, diagnose, shown
from gemwright.engines import backends
from gemwright.engines.backends import AskLlama, LlamaBuild, TorchBuild, read_answer, torch_build
from gemwright.findings import CHECKS, Seen, findings
from gemwright.gpus import Gpu
from gemwright.host import Cpu
from gemwright.kernels import disk, probe
from gemwright.kernels.probe import largest_pinned, measure
from gemwright.machine import Machine, inspect
from gemwright.rigs import Probes, load_rig

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
CARD = Gpu("NVIDIA GeForce RTX 4060 Ti", "nvidia", 8 * GIB, 8 * GIB - 1, 1, 4, 4, 8, 8, (8, 9), "581.42", 160.0)
CPU = Cpu("AMD Ryzen 9 9950X", 16, 32, ("avx2", "avx512f", "avx512_bf16"))
SOUND = Machine(
    (CARD,), CPU, "Linux 6.8", 64 * GIB, 48 * GIB, 8 * GIB, 0, model_folder="/m", disk_free_bytes=500 * 10**9
)
FAST = Probes(measured_at=1.0, disk_read_bytes_s=3e9, largest_pinned_bytes=GIB, pinned_tried_bytes=GIB)
SEEN = Seen(SOUND, FAST, TorchBuild("2.13.0+cu130", "13.0"), LlamaBuild("1", ("CUDA0 (RTX)",)))
Run = Callable[..., subprocess.CompletedProcess[str]]


def card(**changes: Any) -> Seen:
    return replace(SEEN, machine=replace(SOUND, gpus=(replace(CARD, **changes),)))


def machine(**changes: Any) -> Seen:
    return replace(SEEN, machine=replace(SOUND, **changes))


def test_a_sound_machine_has_no_warnings() -> None:
    assert findings(SEEN) == []


APPLE = {"gpus": (Gpu("Apple M2", "apple", 10 * GIB, GIB),)}
CASES: list[tuple[str, Seen, str]] = [
    ("M001", machine(gpus=(), notes=("NVIDIA: the driver does not answer (x)",)), "the driver does not answer (x)"),
    ("M001", machine(gpus=()), "nothing answers"),
    ("M002", card(capability=(7, 5)), "compute capability 7.5"),
    ("M003", card(pcie_gen_slot=3), "sits in a Gen 3 x8 slot, at most 7.9 GB/s; the card can do Gen 4 x8"),
    ("M003", card(pcie_lanes_now=4), "Gen 4 x4 slot"),
    ("M003", card(pcie_gen_slot=None, pcie_gen_now=None, pcie_lanes_now=4), "Gen ? x4 slot"),
    ("M004", machine(memory_limit_bytes=32 * GIB), "32.0 GiB of the machine's 64.0 GiB"),
    ("M005", replace(SEEN, probes=replace(FAST, pinned_tried_bytes=2 * GIB)), "refused 2.0 GiB"),
    ("M006", card(memory_free_bytes=6 * GIB), "2.0 GiB of 8.0 GiB"),
    ("M007", replace(card(driver_model="WDDM"), windows=True), "sysmem fallback"),
    ("M008", machine(swap_total_bytes=0), "no swap"),
    ("M008", machine(swap_used_bytes=GIB), "1.0 GiB of swap"),
    ("M009", machine(disk_free_bytes=10**10), "10.0 GB are free"),
    ("M009", replace(SEEN, probes=replace(FAST, disk_read_bytes_s=1.5e8)), "reads 0.15 GB/s: the 27B loads in 101 s"),
    ("M010", replace(SEEN, llama=LlamaBuild("1", ())), "no GPU backend"),
    ("M010", replace(SEEN, llama=LlamaBuild(None, None, "ImportError")), "does not start: ImportError"),
    ("M011", replace(SEEN, torch=TorchBuild("2.13.0+cpu")), "2.13.0+cpu is built without CUDA"),
    ("M011", replace(SEEN, torch=None), "PyTorch is not installed"),
    ("M012", machine(ram_total_bytes=16 * GIB), "16.0 GiB of RAM"),
    ("M013", machine(cpu=replace(CPU, extensions=("avx2",))), "no bf16 arithmetic"),
    ("M014", machine(**APPLE), "Apple M2 serves llama.cpp"),
]


@pytest.mark.parametrize(("code", "seen", "said"), CASES)
def test_a_warning_and_no_other(code: str, seen: Seen, said: str) -> None:
    (found,) = findings(seen)
    assert found.code == code and said in found.what
    assert found.fix and "\n" not in found.what + found.fix


@pytest.mark.parametrize(
    "seen",
    [
        card(pcie_gen_now=1),  # it idles
        card(memory_free_bytes=None, capability=None, pcie_lanes_max=None),
        machine(swap_total_bytes=0, os="Darwin 24.1"),
        machine(memory_limit_bytes=64 * GIB),
        replace(card(driver_model="TCC"), windows=True),
        replace(SEEN, probes=None),
        machine(cpu=Cpu()),
        machine(ram_total_bytes=None, swap_total_bytes=None, disk_free_bytes=None),
    ],
)
def test_what_is_no_reason_to_warn(seen: Seen) -> None:
    assert findings(seen) == []


def test_wsl() -> None:
    codes = [found.code for found in findings(replace(machine(is_wsl=True), probes=None))]
    assert codes == ["M005", "M007"]


@pytest.mark.parametrize(
    ("gpu", "llama", "torch"),
    [
        (CARD, "whl/cu132", "whl/cu130"),
        (replace(CARD, driver="550.120"), "whl/cu128", "whl/cu126"),
        (replace(CARD, driver=None), "whl/cu128", "whl/cu126"),
        (Gpu("RX 7900", "amd"), "whl/vulkan", None),
        (Gpu("Apple M2", "apple"), "--force-reinstall xllamacpp", None),
    ],
)
def test_install_lines_go_with_card_and_driver(gpu: Gpu, llama: str, torch: str | None) -> None:
    bare = replace(machine(gpus=(gpu,)), torch=TorchBuild("2.13.0"), llama=LlamaBuild("1", ()))
    fixes = {found.code: found.fix for found in findings(bare)}
    assert llama in fixes["M010"]
    assert torch is None or torch in fixes["M011"]
    if gpu.vendor != "apple":
        line = fixes["M010"].removeprefix("Install one: ")
        assert line in (ROOT / "docs/engines.md").read_text(encoding="utf-8")


def test_every_code_is_documented_once() -> None:
    page = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (M\d{3}) \|", page, re.M) == list(CHECKS)
    assert {code for code, _, _ in CASES} == set(CHECKS)


def test_every_field_and_rig_is_documented() -> None:
    from gemwright.rig_file import FIGURES
    from gemwright.rigs import rig_names

    page = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
    assert [f.key for f in FIGURES if f"`{f.key}`" not in page] == []
    assert [name for name in rig_names() if f"`{name}`" not in page] == []


def test_the_screen_of_the_seeds_machine() -> None:
    seed = Machine(
        (replace(CARD, pcie_gen_slot=3),),
        CPU,
        "Linux",
        64 * GIB,
        48 * GIB,
        0,
        0,
        None,
        True,
        True,
        None,
        "/m",
        10**12,
        10**12,
    )
    full = Probes(
        time.time() - 7300, CARD.name, 6.4e9, 6.5e9, 9e9, 3e9, 8 * GIB, 16 * GIB, 2.6e11, {"4x4x4": 3.7e13}, 3e10
    )
    full = replace(full, cpu_fp32_flops=1e12, disk_read_bytes_s=3e9, disk_cache_bypassed=False, notes=("the disk",))
    found = Diagnosis(seed, full, None, LlamaBuild(None, None, "gone"), load_rig("cpu-only"), findings(SEEN))
    text = shown(found)
    for part in (
        "System     Linux, WSL, in a container",
        "PCIe Gen 3 x8, compute capability 8.9, driver 581.42",
        "no swap",
        "PyTorch    not installed",
        "llama.cpp  gone",
        "Measured 2 hours ago",
        "RAM to GPU    6.4 GB/s pinned",
        "RAM to GPU    3.0 GB/s pageable",
        "pinned block  8.0 GiB (tried 16.0 GiB)",
        "GPU, bf16     37.0 TFLOP/s at 4x4x4",
        "(perhaps from the system's cache)",
        "note: the disk",
        "No warnings.",
    ):
        assert part in text, part
    assert max(map(len, text.splitlines())) < 160


def test_locked_memory_is_tried_in_steps_and_never_beyond() -> None:
    tried: list[int] = []

    def lock(size: int) -> bool:
        tried.append(size)
        return size <= GIB

    assert largest_pinned(8 * GIB, lock) == (GIB, 2 * GIB)
    assert tried == [GIB // 4, GIB // 2, GIB, 2 * GIB]
    assert largest_pinned(GIB + 5, lambda size: True) == (GIB, GIB)
    assert largest_pinned(GIB // 8, lock) == (0, 0)
    assert largest_pinned(8 * GIB, lambda size: True, limit_s=0.0) == (GIB // 4, GIB // 4)


def test_measuring_this_machine(tmp_path: Path) -> None:
    import torch

    steps: list[str] = []
    threads = torch.get_num_threads()
    found = measure(inspect(folder=tmp_path / "new"), lambda size: True, steps.append)
    assert torch.get_num_threads() == threads and steps[:2] == ["RAM and CPU", "disk"]
    for value in (found.ram_bytes_s, found.cpu_bf16_flops, found.cpu_fp32_flops, found.disk_read_bytes_s):
        assert value is not None and 1e7 < value < 1e14
    assert list((tmp_path / "new").iterdir()) == []
    if not torch.cuda.is_available():
        assert found.gpu == "" and found.link_to_gpu_bytes_s is None and found.gpu_bf16_flops == {}


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card as torch shows it; what is timed on it is replaced by each test."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD.name)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(probe, "_link", lambda device: (6e9, 6.5e9, 9e9, 3e9))
    monkeypatch.setattr(probe, "_device_copy_bytes_s", lambda device: 2.6e11)
    monkeypatch.setattr(probe, "_gpu_flops", lambda device, *shape: 3e13)


def test_a_card_is_measured(fake_cuda: None, tmp_path: Path) -> None:
    found = measure(replace(SOUND, model_folder=str(tmp_path), ram_available_bytes=4 * GIB), lambda size: size <= GIB)
    assert (found.gpu, found.largest_pinned_bytes, found.pinned_tried_bytes) == (CARD.name, GIB, 2 * GIB)
    assert (found.link_to_gpu_bytes_s, found.link_both_bytes_s, found.gpu_memory_bytes_s) == (6e9, 9e9, 2.6e11)
    assert found.gpu_bf16_flops == dict.fromkeys(("x".join(map(str, s)) for s in probe.SHAPES), 3e13)
    assert found.notes == ()


def test_a_full_or_broken_card_leaves_the_rest(
    fake_cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(*given: object) -> float:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(probe, "_link", full)
    monkeypatch.setattr(probe, "_gpu_flops", full)
    here = replace(SOUND, model_folder=str(tmp_path))
    found = measure(here, lambda size: False)
    assert found.link_to_gpu_bytes_s is None and found.gpu_memory_bytes_s == 2.6e11 and found.gpu_bf16_flops == {}
    assert found.ram_bytes_s and len(found.notes) == 1 + len(probe.SHAPES) and "\n" not in "".join(found.notes)
    monkeypatch.setattr(torch.cuda, "current_device", full)
    found = measure(here, lambda size: False)
    assert found.gpu == "" and found.ram_bytes_s and "the GPU could not be measured" in found.notes[0]


def test_disks_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk.read_bytes_s(tmp_path, GIB) == (None, False, "the disk is too full to be measured")
    (tmp_path / "file").touch()
    speed, _, why = disk.read_bytes_s(tmp_path / "file", None)
    assert speed is None and why and "could not be measured" in why
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    speed, bypassed, why = disk.read_bytes_s(tmp_path / "x", None)
    assert speed and not bypassed and why == "the disk's figure may come from the system's cache"


def test_what_pytorch_and_llamacpp_are_without_loading_them() -> None:
    import torch

    build = torch_build()
    assert build is not None and (build.version, build.cuda) == (torch.__version__, torch.version.cuda)
    said = AskLlama().answer()
    assert said.version and said.gpus is not None


def test_a_llamacpp_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_answer("", "Traceback\nImportError: libcuda.so.1", 1).why == "ImportError: libcuda.so.1"
    assert read_answer("noise\n", "", -11).why == "it ended with -11"
    monkeypatch.setattr(backends, "PATIENCE_S", 0.0)
    assert AskLlama().answer() == LlamaBuild(None, None, "it did not answer")
    monkeypatch.setattr(backends.sys, "executable", "/nowhere/python")
    assert "no process could be started" in (AskLlama().answer().why or "")


def test_measurements_that_cannot_be_kept_are_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").touch()
    monkeypatch.setenv("GEMWRIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("gemwright.kernels.probe.measure", lambda *given: FAST)
    found = diagnose()
    assert found.fresh and found.probes is not None and "could not be kept" in found.probes.notes[-1]


KEYS = {"machine", "probes", "probes_age_s", "torch", "llama", "rig", "warnings", "saved"}


def test_the_command(gemwright: Run, tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    done = gemwright("doctor", "--no-probe", "--json", GEMWRIGHT_HOME=home)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert set(row) == KEYS and row["probes"] is None and row["machine"]["cpu"]["threads"]
    assert all(set(w) == {"code", "what", "fix"} and w["code"] in CHECKS for w in row["warnings"])
    saved = tmp_path / "desk.toml"
    done = gemwright("doctor", "--save", saved, "--json", GEMWRIGHT_HOME=home)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["probes"]["ram_bytes_s"] > 0 and row["saved"] == str(saved)
    assert load_rig(saved).basis["ram_bytes_s"] == "measured"
    assert "next: gemwright plan --rig" in done.stderr
    again = gemwright("doctor", GEMWRIGHT_HOME=home)
    assert again.returncode == 0 and "ago; --fresh measures again" in again.stdout
    refused = gemwright("doctor", "--no-probe", "--fresh")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


def test_a_profile_that_cannot_be_written_is_one_line(gemwright: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = gemwright("doctor", "--no-probe", "--save", tmp_path / "file" / "x.toml")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr


def test_without_measuring_it_imports_little(tmp_path: Path) -> None:
    code = (
        "import sys; from gemwright.doctor import diagnose, shown; print(shown(diagnose(probe=False)));"
        "print([m for m in ('torch', 'numpy', 'xllamacpp') if m in sys.modules])"
    )
    environment = os.environ | {"GEMWRIGHT_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"
    assert doctor.__doc__
