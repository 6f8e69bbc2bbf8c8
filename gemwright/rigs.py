"""Rigs to plan for: the shipped catalogue, a file, or this machine with what was measured on it."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gemwright.errors import InputError, needed
from gemwright.gpus import Gpu
from gemwright.host import Cpu
from gemwright.machine import Machine, inspect
from gemwright.rig_file import Rig, RigCpu, RigGpu, parse_rig, rig_toml
from gemwright.runs import atomic_path, home, write_json

__all__ = ["Probes", "Rig", "RigCpu", "RigGpu", "load_rig", "read_probes", "rig_names", "save_rig", "this_machine"]
RIGS = Path(__file__).with_suffix("")
# What is assumed where neither a probe nor the catalogue knows; each is on the careful side of a desktop of 2020 on.
ASSUMED_RAM_BYTES_S, ASSUMED_DISK_BYTES_S, ASSUMED_LINK_BYTES_S = 25e9, 0.5e9, 6e9
ASSUMED_GPU_FLOPS, ASSUMED_GPU_BYTES_S, ASSUMED_RAM_BYTES = 10e12, 200e9, 16 << 30
ASSUMED_WATTS_IDLE, ASSUMED_WATTS_CPU = 60.0, 100.0
# Of what a slot could carry, what copies reach: 6.5 of 7.9 GB/s (Gen 3 x8), 55 of 63 GB/s (Gen 5 x16).
LINK_SHARE = 0.83
# Both ways together beside one way: 78 GB/s to 55 measured on an H100, Gen 5 x16.
BOTH_WAYS = 1.4
# Products in fp32 a core reaches a cycle through a good library, by its widest extension, at 3.5 GHz.
_CYCLE_FLOPS = {"avx512f": 36, "avx2": 22, "avx": 11, "neon": 14}
_CLOCK_HZ = 3.5e9


@dataclass(frozen=True)
class Probes:
    """What `kernels.probe` measured here, and when (seconds since 1970); None where it could not."""

    measured_at: float = 0.0
    gpu: str = ""
    link_to_gpu_bytes_s: float | None = None
    link_from_gpu_bytes_s: float | None = None
    link_both_bytes_s: float | None = None
    link_pageable_bytes_s: float | None = None
    largest_pinned_bytes: int | None = None
    pinned_tried_bytes: int | None = None
    gpu_memory_bytes_s: float | None = None
    gpu_bf16_flops: dict[str, float] = field(default_factory=dict)
    ram_bytes_s: float | None = None
    cpu_bf16_flops: float | None = None
    cpu_fp32_flops: float | None = None
    disk_read_bytes_s: float | None = None
    disk_cache_bypassed: bool | None = None
    torch: str = ""
    took_s: float = 0.0
    notes: tuple[str, ...] = ()


def rig_names() -> list[str]:
    """The catalogue."""
    return sorted(file.stem for file in RIGS.glob("*.toml"))


def load_rig(name_or_path: str | Path) -> Rig:
    """A rig of the catalogue by its name, or one in a TOML file; InputError names file, field and unit."""
    names, path = rig_names(), Path(name_or_path)
    if str(name_or_path) in names:
        rig = _read(RIGS / f"{name_or_path}.toml")
        return replace(rig, basis=dict.fromkeys(rig.basis, "catalogue"))
    if path.suffix == ".toml" or path.is_file():
        return _read(path)
    near = difflib.get_close_matches(str(name_or_path).lower(), names, n=3, cutoff=0.4)
    offer = f"Nearest: {', '.join(near)}" if near else f"Known: {', '.join(names)}"
    raise InputError("no rig of this name", where=" ".join(str(name_or_path).split())[:80], fix=f"{offer}; or a .toml.")


def _read(path: Path) -> Rig:
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise InputError("no such file", where=path, fix="Give a rig file, or a name of the catalogue.") from None
    except OSError as error:
        raise InputError(f"cannot read it: {error.strerror or error}", where=path, fix="Check the path.") from error
    except UnicodeDecodeError:
        raise InputError("not UTF-8", where=path, fix="Save it as UTF-8.") from None
    return parse_rig(text, path)


def read_probes(machine: Machine) -> Probes | None:
    """What `gemwright doctor` measured on this machine with these parts, or None."""
    try:
        said = json.loads(probe_file(machine).read_text(encoding="utf-8"))
        known = {f.name for f in fields(Probes)}
        return _probes({key: value for key, value in said.items() if key in known})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none yet, or damaged: as if never measured
        return None


def _probes(said: dict[str, Any]) -> Probes:
    """Raises ValueError or TypeError where a figure is none."""
    shapes = said.get("gpu_bf16_flops", {})
    rates = {name: said[name] for name in said if name.endswith(("_bytes_s", "_flops")) and name != "gpu_bf16_flops"}
    for name, value in [*rates.items(), *shapes.items()]:
        if value is not None and not 0 < float(value) < 1e18:
            raise ValueError(name)
    return Probes(**said | {"measured_at": float(said["measured_at"]), "notes": tuple(map(str, said.get("notes", ())))})


def write_probes(machine: Machine, probes: Probes) -> Path:
    """Keep what was measured until the parts change."""
    file = probe_file(machine)
    write_json(file, asdict(probes))
    return file


def probe_file(machine: Machine) -> Path:
    """Where the measurements of a machine with these parts are kept."""
    parts = [str(machine.cpu.name), *(f"{gpu.name} {gpu.driver}" for gpu in machine.gpus)]
    return home() / "probes" / f"{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:16]}.json"


def this_machine(probes: Probes | None = None, machine: Machine | None = None) -> Rig:
    """This machine as a rig: what was measured here (`probes`, or those kept), else the catalogue's for the same card,
    else what is assumed; `basis` says which for each figure.
    """
    machine = machine or inspect()
    return _Builder(machine, probes or read_probes(machine) or Probes()).rig()


def twin(gpu: Gpu) -> Rig | None:
    """The catalogue's rig with the same card (name and, within a tenth, memory)."""
    for name in rig_names():
        rig = load_rig(name)
        if rig.gpu is None or _card(rig.gpu.name) != _card(gpu.name):
            continue
        total = gpu.memory_total_bytes
        if total is None or abs(total - rig.gpu.vram_bytes) <= rig.gpu.vram_bytes / 10 or gpu.vendor == "apple":
            return rig
    return None


def _card(name: str) -> str:
    """A card's name without its maker and the form it comes in: "NVIDIA H100 80GB HBM3" is "h100"."""
    noise = r"nvidia|geforce|laptop gpu|generation|tesla|sxm\d?|hbm\d?e?|\d+ ?gb|[^a-z0-9 ]"
    mobile = " mobile" if "laptop" in name.casefold() else ""
    return " ".join(re.sub(noise, " ", name.casefold()).split()) + mobile


class _Builder:
    """Takes each figure from the first that knows it, and notes which that was."""

    def __init__(self, machine: Machine, probes: Probes) -> None:
        self.machine, self.probes = machine, probes
        measured = [gpu for gpu in machine.gpus if gpu.name == probes.gpu]
        self.card = max(measured or machine.gpus, key=lambda gpu: gpu.memory_total_bytes or 0, default=None)
        self.twin = twin(self.card) if self.card else None
        self.basis: dict[str, str] = {}
        self.sources: dict[str, str] = {}

    def take(self, name: str, measured: float | None, assumed: float, why: str, how: str = "read here") -> float:
        """`measured`, else the twin's figure where it depends on the card, else `assumed` (`why`)."""
        if measured is not None:
            self.say(name, "measured", how)
            return measured
        if self.twin is not None and name.startswith(("gpu.", "watts_")):
            self.say(name, "catalogue", self.twin.name)
            part = self.twin.gpu if name.startswith("gpu.") else self.twin
            return float(getattr(part, name.removeprefix("gpu.")))
        self.say(name, "assumed", why)
        return assumed

    def whole(self, name: str, read: int | None, assumed: int, why: str) -> int:
        return int(self.take(name, read, assumed, why))

    def rig(self) -> Rig:
        machine, probes = self.machine, self.probes
        ram = self.whole("ram_bytes", machine.usable_ram_bytes, ASSUMED_RAM_BYTES, "the size of RAM is not readable")
        free = self.whole("ram_available_bytes", machine.ram_available_bytes, ram * 3 // 4, "three quarters of RAM")
        ram_s = self.take("ram_bytes_s", probes.ram_bytes_s, ASSUMED_RAM_BYTES_S, "a desktop's", "doctor")
        disk_s = self.take("disk_bytes_s", probes.disk_read_bytes_s, ASSUMED_DISK_BYTES_S, "a SATA SSD's", "doctor")
        gpu = self.gpu(ram, ram_s) if self.card else None
        desktop = 0
        unified = self.card is not None and self.card.vendor == "apple"
        if self.card is not None and not unified:
            total, left = self.card.memory_total_bytes, self.card.memory_free_bytes
            taken = total - left if total is not None and left is not None else None
            desktop = self.whole("desktop_bytes", taken, 512 << 20, "a desktop's share")
            desktop = min(desktop, needed(gpu).vram_bytes - 1)
        idle = self.take("watts_idle", None, ASSUMED_WATTS_IDLE, "a desktop's")
        limit = self.card.power_limit_w if self.card else None
        more = limit if limit is not None else 150.0 if self.card else 0.0
        basis = "the card's power limit and a processor's" if limit is not None else "a desktop's"
        load = self.take("watts_load", None, idle + more + ASSUMED_WATTS_CPU, basis)
        return Rig(
            name="this machine",
            gpu=gpu,
            cpu=self.cpu(),
            ram_bytes=ram,
            ram_available_bytes=min(free, ram),
            ram_bytes_s=ram_s,
            disk_bytes_s=disk_s,
            unified=unified,
            watts_idle=idle,
            watts_load=load,
            desktop_bytes=desktop,
            basis=self.basis,
            sources=self.sources,
        )

    def cpu(self) -> RigCpu:
        read, probes = self.machine.cpu, self.probes
        threads = self.whole("cpu.threads", read.threads, 4, "a small desktop's")
        cores = self.whole("cpu.cores", read.cores, max(1, threads // 2), "two threads a core")
        rate = guessed_flops(read, min(cores, threads))
        fp32 = self.take("cpu.fp32_flops", probes.cpu_fp32_flops, rate, "from cores and vector extensions", "doctor")
        half = fp32 * (1.5 if read.has_bf16 else 0.5)
        why = "from fp32 and whether bf16 is in hardware"
        bf16 = self.take("cpu.bf16_flops", probes.cpu_bf16_flops, half, why, "doctor")
        return RigCpu(read.name or "unknown processor", min(cores, threads), threads, bf16, fp32)

    def gpu(self, ram: int, ram_s: float) -> RigGpu:
        card, probes, small = needed(self.card), self.probes, "a small card's"
        vram = self.whole("gpu.vram_bytes", card.memory_total_bytes, 8 << 30, "not readable")
        if card.vendor == "apple":
            vram = min(vram, ram)
            self.say("gpu.vram_bytes", "assumed", "Metal's usual share of memory, or iogpu.wired_limit_mb")
        by_shape = sorted(probes.gpu_bf16_flops.values())  # the largest varies most from probe to probe
        flops = by_shape[len(by_shape) // 2] if by_shape else None
        rate = self.take("gpu.bf16_flops", flops, ASSUMED_GPU_FLOPS, small, "doctor")
        memory = self.take("gpu.memory_bytes_s", probes.gpu_memory_bytes_s, ASSUMED_GPU_BYTES_S, small, "doctor")
        link, both = self.link(card, ram_s)
        return RigGpu(card.name, vram, rate, memory, link, both, card.capability)

    def link(self, card: Gpu, ram_s: float) -> tuple[float, float]:
        """One way and both; the slot that the card sits in says more than the catalogue, which knows another's."""
        probes, slot, one, two = self.probes, card.slot_bytes_s, "gpu.link_bytes_s", "gpu.link_both_bytes_s"
        if card.vendor == "apple":
            for name in (one, two):
                self.say(name, "assumed", "one memory, as fast as a copy in it")
            return ram_s, ram_s
        if probes.link_to_gpu_bytes_s is None and slot is not None:
            link, lanes = LINK_SHARE * slot, card.pcie_lanes_now
            self.say(one, "assumed", f"{LINK_SHARE:.0%} of PCIe Gen {card.pcie_gen_slot or card.pcie_gen_now} x{lanes}")
        else:
            link = self.take(one, probes.link_to_gpu_bytes_s, ASSUMED_LINK_BYTES_S, "Gen 3 x8", "doctor")
        both = self.take(two, probes.link_both_bytes_s, BOTH_WAYS * link, "", "doctor")
        if self.basis[two] != "measured" and self.basis[one] != "catalogue":
            both = BOTH_WAYS * link
            self.say(two, "assumed", f"{BOTH_WAYS} times one way")
        return link, min(max(both, link), 2 * link)

    def say(self, name: str, basis: str, why: str) -> None:
        self.basis[name], self.sources[name] = basis, f"{basis}: {why}"


def guessed_flops(cpu: Cpu, cores: int) -> float:
    """fp32 products a second of so many cores, by the widest vector extension."""
    has = cpu.extensions or ()
    each = next((rate for name, rate in _CYCLE_FLOPS.items() if name in has), 6)
    return cores * each * _CLOCK_HZ


def save_rig(rig: Rig, path: Path) -> None:
    """Write `rig` as a TOML file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(rig_toml(rig), encoding="utf-8")
