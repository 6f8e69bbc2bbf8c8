"""Cards read from a fake driver and fake /sys files; a broken driver is a sentence, never an error."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemwright import gpus
from gemwright.gpus import Gpu, find_gpus

GIB = 1 << 30


class NvmlError(Exception):
    """As nvidia-ml-py's."""


class FakeNvml:
    """The seed's card: a Gen 4 x8 card, idle, in a Gen 3 slot. `broken` calls raise."""

    def __init__(self, *broken: str, count: int = 1, name: object = "NVIDIA GeForce RTX 4060 Ti") -> None:
        self.broken, self.count, self.name = broken, count, name
        self.open = False

    def __getattr__(self, call: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetCount": lambda: self.count,
            "nvmlDeviceGetName": lambda card: self.name,
            "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(total=8 * GIB, free=7 * GIB),
            "nvmlDeviceGetCudaComputeCapability": lambda card: (8, 9),
            "nvmlDeviceGetEnforcedPowerLimit": lambda card: 160_000,
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda card: 3,
            "nvmlDeviceGetGpuMaxPcieLinkGeneration": lambda card: 4,
            "nvmlDeviceGetCurrPcieLinkGeneration": lambda card: 1,
            "nvmlDeviceGetCurrPcieLinkWidth": lambda card: 8,
            "nvmlDeviceGetMaxPcieLinkWidth": lambda card: 8,
            "nvmlSystemGetDriverVersion": lambda: b"581.42",
            "nvmlDeviceGetCurrentDriverModel": lambda card: 0,
            "nvmlInit": self._begin,
            "nvmlShutdown": self._end,
        }
        if call in self.broken:
            return self._refuse
        return answers[call]

    def _begin(self) -> None:
        self.open = True

    def _end(self) -> None:
        self.open = False

    def _refuse(self, *words: object) -> None:
        raise NvmlError("Insufficient\nPermissions")


def found(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, root: Path) -> tuple[tuple[Gpu, ...], list[str]]:
    notes: list[str] = []
    monkeypatch.setattr(gpus, "_nvml", lambda: nvml)
    return find_gpus(notes, root), notes


def seat(root: Path, slot: str, **files: str) -> None:
    """A PCI device in a fake /sys."""
    folder = root / "sys/bus/pci/devices" / slot
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def test_the_seeds_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml = FakeNvml()
    (card,), notes = found(monkeypatch, nvml, tmp_path)
    assert notes == [] and not nvml.open
    assert (card.name, card.capability, card.driver) == ("NVIDIA GeForce RTX 4060 Ti", (8, 9), "581.42")
    assert (card.memory_total_bytes, card.memory_free_bytes, card.power_limit_w) == (8 * GIB, 7 * GIB, 160.0)
    assert (card.pcie_gen_now, card.pcie_gen_slot, card.pcie_gen_max) == (1, 3, 4)
    assert (card.pcie_lanes_now, card.pcie_lanes_max, card.driver_model) == (8, 8, None)
    assert card.slot_bytes_s == pytest.approx(7.88e9)


def test_windows_says_its_driver_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    (card,), _ = found(monkeypatch, FakeNvml(), tmp_path)
    assert card.driver_model == "WDDM"


def test_several_cards_and_names_in_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cards, _ = found(monkeypatch, FakeNvml(count=2, name=b"Tesla T4"), tmp_path)
    assert [card.name for card in cards] == ["Tesla T4", "Tesla T4"]


CALLS = ("Name", "MemoryInfo", "CudaComputeCapability", "EnforcedPowerLimit", "MaxPcieLinkGeneration")


@pytest.mark.parametrize("call", [*CALLS, "CurrPcieLinkGeneration", "CurrPcieLinkWidth", "MaxPcieLinkWidth"])
def test_a_sensor_that_refuses_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str) -> None:
    (card,), notes = found(monkeypatch, FakeNvml(f"nvmlDeviceGet{call}"), tmp_path)
    assert card.name and len(notes) == 1
    assert "cannot be read (Insufficient Permissions)" in notes[0]


def test_an_old_driver_that_does_not_know_a_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (card,), notes = found(monkeypatch, FakeNvml("nvmlDeviceGetGpuMaxPcieLinkGeneration"), tmp_path)
    assert card.pcie_gen_max == 3 and notes == []


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"])
def test_a_broken_driver_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str) -> None:
    seat(tmp_path, "0000:01:00.0", vendor="0x10de", **{"class": "0x030000"})
    seat(tmp_path, "0000:01:00.1", vendor="0x10de", **{"class": "0x040300"})
    cards, notes = found(monkeypatch, FakeNvml(call), tmp_path)
    assert cards == () and len(notes) == 1
    assert notes[0].startswith("NVIDIA") and "\n" not in notes[0]
    assert call == "nvmlDeviceGetHandleByIndex" or "though 1 of its cards is in a slot" in notes[0]


def test_without_nvidia_ml_py(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notes: list[str] = []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_gpus(notes, tmp_path) == ()
    assert "nvidia-ml-py cannot be imported" in notes[0]


def test_no_cards_behind_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert found(monkeypatch, FakeNvml(count=0), tmp_path) == ((), ["NVIDIA: the driver shows no card"])


def test_amd_from_sysfs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"vendor": "0x1002", "class": "0x030000", "product_name": "AMD Radeon RX 7900 XT"}
    memory = {"mem_info_vram_total": str(20 * GIB), "mem_info_vram_used": str(GIB)}
    link = {"current_link_speed": "8.0 GT/s PCIe", "max_link_speed": "16.0 GT/s PCIe"}
    lanes = {"current_link_width": "8", "max_link_width": "16"}
    seat(tmp_path, "0000:03:00.0", **files, **memory, **link, **lanes)
    seat(tmp_path, "0000:04:00.0", vendor="0x1002", device="0x744c", **{"class": "0x038000"})
    (first, second), notes = found(monkeypatch, FakeNvml(count=0), tmp_path)
    assert (first.vendor, first.memory_free_bytes) == ("amd", 19 * GIB)
    assert (first.pcie_gen_slot, first.pcie_gen_max, first.pcie_lanes_now, first.pcie_lanes_max) == (3, 4, 8, 16)
    assert second.name == "AMD GPU 0x744c" and second.memory_total_bytes is None
    assert any("0000:04:00.0" in note for note in notes)
