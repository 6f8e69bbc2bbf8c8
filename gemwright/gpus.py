"""The graphics cards of this machine, asked of the NVIDIA driver, the kernel (AMD) or macOS; nothing here fails."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

T = TypeVar("T")
NVIDIA, AMD = "0x10de", "0x1002"
# Bytes a second of one PCIe lane by generation, line coding taken off (PCI-SIG base specifications).
LANE_BYTES_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}


@dataclass(frozen=True)
class Gpu:
    """One card; what could not be read is None.

    `pcie_gen_now` drops while a card idles; `pcie_gen_slot` is the most that card and slot do together, `pcie_gen_max`
    the most that the card does anywhere.
    """

    name: str
    vendor: Literal["nvidia", "amd", "apple"] = "nvidia"
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    pcie_gen_now: int | None = None
    pcie_gen_slot: int | None = None
    pcie_gen_max: int | None = None
    pcie_lanes_now: int | None = None
    pcie_lanes_max: int | None = None
    capability: tuple[int, int] | None = None
    driver: str | None = None
    power_limit_w: float | None = None
    driver_model: Literal["WDDM", "TCC", "MCDM"] | None = None

    @property
    def slot_bytes_s(self) -> float | None:
        """What the slot could carry one way, or None where it is not known."""
        lane, lanes = LANE_BYTES_S.get(self.pcie_gen_slot or self.pcie_gen_now or 0), self.pcie_lanes_now
        return lane * lanes if lane and lanes else None


def find_gpus(notes: list[str], root: Path = Path("/")) -> tuple[Gpu, ...]:
    """NVIDIA's and AMD's cards; why there are none goes to `notes`."""
    return _nvidia(notes, root) + _amd(notes, root)


def throttling() -> str | None:
    """Why NVIDIA's cards hold their clocks back now (heat or power), or None where they do not or do not say."""
    nvml = _quietly(_nvml)
    if nvml is None or _quietly(lambda: nvml.nvmlInit() or True) is None:
        return None
    # Bits of NVML's clocks event reasons: hardware slowdown, software and hardware heat, power brake.
    names = {0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat", 0x80: "power supply"}
    for index in range(_quietly(nvml.nvmlDeviceGetCount) or 0):
        bits = _quietly(partial(_throttle_bits, nvml, index))
        for bit, name in names.items():
            if isinstance(bits, int) and bits & bit:
                return name
    return None


def _throttle_bits(nvml: ModuleType, index: int) -> object:
    return nvml.nvmlDeviceGetCurrentClocksThrottleReasons(nvml.nvmlDeviceGetHandleByIndex(index))


def _nvml() -> ModuleType:
    """The one import of nvidia-ml-py."""
    import pynvml

    module: ModuleType = pynvml
    return module


def _nvidia(notes: list[str], root: Path) -> tuple[Gpu, ...]:
    seated = len(_pci_displays(root, NVIDIA))
    here = f", though {seated} of its cards {'is' if seated == 1 else 'are'} in a slot" if seated else ""
    try:
        nvml = _nvml()
    except Exception as error:
        notes.append(f"NVIDIA: nvidia-ml-py cannot be imported ({_line(error)}){here}")
        return ()
    try:
        nvml.nvmlInit()
    except Exception as error:
        notes.append(f"NVIDIA: the driver does not answer ({_line(error)}){here}")
        return ()
    try:
        cards = [_nvidia_card(nvml, i, notes) for i in range(nvml.nvmlDeviceGetCount())]
        if not cards:
            notes.append(f"NVIDIA: the driver shows no card{here}")
        return tuple(card for card in cards if card)
    except Exception as error:
        notes.append(f"NVIDIA: the driver lists no cards ({_line(error)}){here}")
        return ()
    finally:
        _quietly(nvml.nvmlShutdown)


def _nvidia_card(nvml: ModuleType, index: int, notes: list[str]) -> Gpu | None:
    try:
        card = nvml.nvmlDeviceGetHandleByIndex(index)
    except Exception as error:
        notes.append(f"NVIDIA card {index}: {_line(error)}")
        return None
    label = f"NVIDIA card {index}"

    def ask(what: str, call: str, *words: Any) -> Any:
        try:
            return getattr(nvml, call)(*words)
        except Exception as error:
            notes.append(f"{label}: {what} cannot be read ({_line(error)})")
            return None

    name = _text(ask("its name", "nvmlDeviceGetName", card)) or label
    memory = ask("memory", "nvmlDeviceGetMemoryInfo", card)
    capability = ask("compute capability", "nvmlDeviceGetCudaComputeCapability", card)
    limit = ask("power limit", "nvmlDeviceGetEnforcedPowerLimit", card)
    slot = ask("PCIe generation", "nvmlDeviceGetMaxPcieLinkGeneration", card)
    own = _quietly(lambda: nvml.nvmlDeviceGetGpuMaxPcieLinkGeneration(card))
    return Gpu(
        name,
        "nvidia",
        _whole(memory and memory.total),
        _whole(memory and memory.free),
        _whole(ask("PCIe generation now", "nvmlDeviceGetCurrPcieLinkGeneration", card)),
        _whole(slot),
        _whole(own) or _whole(slot),
        _whole(ask("PCIe lanes now", "nvmlDeviceGetCurrPcieLinkWidth", card)),
        _whole(ask("PCIe lanes", "nvmlDeviceGetMaxPcieLinkWidth", card)),
        (int(capability[0]), int(capability[1])) if capability else None,
        _text(ask("driver version", "nvmlSystemGetDriverVersion")),
        limit / 1000 if isinstance(limit, int) and limit > 0 else None,
        _driver_model(nvml, card),
    )


def _driver_model(nvml: ModuleType, card: object) -> Literal["WDDM", "TCC", "MCDM"] | None:
    """Windows alone has one: under WDDM the system may move video memory to RAM without a word."""
    if sys.platform != "win32":
        return None
    known: dict[int, Literal["WDDM", "TCC", "MCDM"]] = {0: "WDDM", 1: "TCC", 2: "MCDM"}
    now = _quietly(lambda: nvml.nvmlDeviceGetCurrentDriverModel(card))
    return known.get(now) if isinstance(now, int) else None


def _amd(notes: list[str], root: Path) -> tuple[Gpu, ...]:
    found = []
    for device in _pci_displays(root, AMD):
        total, used = (_number(device / f"mem_info_vram_{what}") for what in ("total", "used"))
        if total is None:
            notes.append(f"AMD: a card is in slot {device.name}, but the amdgpu driver does not show its memory")
        name = _read(device / "product_name") or f"AMD GPU {_read(device / 'device') or ''}".strip()
        gen_now, gen_max = (_generation(_read(device / f"{which}_link_speed")) for which in ("current", "max"))
        lanes_now, lanes_max = (_number(device / f"{which}_link_width") for which in ("current", "max"))
        free = total - used if total is not None and used is not None else None
        found.append(Gpu(name, "amd", total, free, gen_now, gen_now, gen_max, lanes_now, lanes_max))
    return tuple(found)


def _pci_displays(root: Path, vendor: str) -> list[Path]:
    """The PCI devices of class display that `vendor` made."""
    try:
        devices = sorted((root / "sys/bus/pci/devices").iterdir())
    except OSError:
        return []
    return [d for d in devices if _read(d / "vendor") == vendor and (_read(d / "class") or "").startswith("0x03")]


def _generation(speed: str | None) -> int | None:
    """The PCIe generation of "8.0 GT/s PCIe"."""
    match = re.match(r"([\d.]+) ?GT/s", speed or "")
    speeds = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
    return speeds.get(float(match[1])) if match else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text and text.isdecimal() else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _text(value: object) -> str | None:
    """Older bindings answer in bytes."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return text if isinstance(text, str) else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _quietly(call: Callable[[], T]) -> T | None:
    """What a driver may not know at all (older ones lack the call) is not worth a note."""
    try:
        return call()
    except Exception:
        return None
