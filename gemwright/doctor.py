"""`gemwright doctor`: looks at the machine, measures it where asked, and says what it is and what to mind."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gemwright.engines.backends import AskLlama, LlamaBuild, TorchBuild, torch_build
from gemwright.errors import GemwrightError
from gemwright.findings import Finding, Seen, findings
from gemwright.gpus import Gpu
from gemwright.machine import Machine, inspect
from gemwright.rigs import Probes, Rig, read_probes, this_machine, write_probes

GIB = 1 << 30
Report = Callable[[str], None]


@dataclass(frozen=True)
class Diagnosis:
    """The machine, what was measured (now or before), what is installed, and the warnings."""

    machine: Machine
    probes: Probes | None
    torch: TorchBuild | None
    llama: LlamaBuild
    rig: Rig
    warnings: list[Finding]
    fresh: bool = False

    def row(self) -> dict[str, Any]:
        """As one JSON object."""
        age = None if self.probes is None else max(0.0, time.time() - self.probes.measured_at)
        parts = ("machine", "probes", "torch", "llama", "rig")
        row: dict[str, Any] = {name: part and asdict(part) for name in parts for part in [getattr(self, name)]}
        return row | {"probes_age_s": age, "warnings": [asdict(finding) for finding in self.warnings]}


def diagnose(*, probe: bool = True, fresh: bool = False, report: Report = lambda what: None) -> Diagnosis:
    """Look at this machine; with `probe` measure what has not been measured yet, with `fresh` measure again.

    What is being measured is told to `report`. Torch is imported only for it.
    """
    asked = AskLlama()
    machine = inspect()
    probes, llama = read_probes(machine), asked.answer()
    measured = probe and (fresh or probes is None)
    if measured:
        probes = _measured(machine, report)
    build = torch_build()
    seen = Seen(machine, probes, build, llama, sys.platform == "win32")
    # What is none must be said, lest `this_machine` look for it again.
    rig = this_machine(probes or Probes(), machine)
    return Diagnosis(machine, probes, build, llama, rig, findings(seen), measured)


def _measured(machine: Machine, report: Report) -> Probes:
    """Measure and keep; a folder that cannot be written costs the keeping alone."""
    from gemwright.kernels.probe import measure
    from gemwright.model.pinned import can_lock

    probes = measure(machine, can_lock, report)
    try:
        write_probes(machine, probes)
    except GemwrightError as error:
        return replace(probes, notes=(*probes.notes, f"the measurements could not be kept: {error.what}"))
    return probes


def shown(found: Diagnosis) -> str:
    """One screen for a person."""
    lines = [*_parts(found), "", *_measurements(found), "", *_warnings(found)]
    return "\n".join(lines)


def _parts(found: Diagnosis) -> list[str]:
    machine, cpu = found.machine, found.machine.cpu
    inside = "WSL, " * machine.is_wsl + "in a container" * machine.is_container
    rows = [("System", ", ".join(filter(None, (machine.os, inside.strip(", ")))))]
    rows += [("GPU", _card(gpu)) for gpu in machine.gpus] or [("GPU", "none found")]
    count = f"{_said(cpu.cores)} cores, {_said(cpu.threads)} threads"
    rows.append(("CPU", f"{cpu.name or 'unknown'}: {count}" + _extensions(cpu.extensions)))
    free = f"{_gib(machine.ram_available_bytes)} free of {_gib(machine.ram_total_bytes)}"
    limit = f", this container's limit {_gib(machine.memory_limit_bytes)}" if machine.memory_limit_bytes else ""
    swap = "no swap" if machine.swap_total_bytes == 0 else f"swap {_gib(machine.swap_total_bytes)}"
    rows.append(("RAM", f"{free}{limit}; {swap}"))
    disk = f"{_gb(machine.disk_free_bytes)} free of {_gb(machine.disk_total_bytes)}"
    rows.append(("Disk", f"{disk} ({machine.model_folder})"))
    torch, llama = found.torch, found.llama
    built = (
        f", CUDA {torch.cuda}" if torch and torch.cuda else f", ROCm {torch.hip}" if torch and torch.hip else ", CPU"
    )
    rows.append(("PyTorch", f"{torch.version}{built}" if torch else "not installed"))
    offload = "CPU" if not llama.gpus else ", ".join(llama.gpus)
    rows.append(("llama.cpp", f"xllamacpp {llama.version}, {offload}" if llama.gpus is not None else f"{llama.why}"))
    return [f"{name:<10} {text}" for name, text in rows]


def _card(gpu: Gpu) -> str:
    words = [gpu.name]
    if gpu.memory_total_bytes:
        words.append(f"{_gib(gpu.memory_free_bytes)} free of {_gib(gpu.memory_total_bytes)}")
    if gpu.pcie_lanes_now:
        words.append(f"PCIe Gen {_said(gpu.pcie_gen_slot or gpu.pcie_gen_now)} x{gpu.pcie_lanes_now}")
    if gpu.capability:
        words.append(f"compute capability {gpu.capability[0]}.{gpu.capability[1]}")
    if gpu.driver:
        words.append(f"driver {gpu.driver}")
    return ", ".join(words)


def _extensions(names: tuple[str, ...] | None) -> str:
    """Those that decide: the widest vectors, and bf16."""
    telling = [name for name in names or () if name.startswith(("avx2", "avx512f", "amx", "neon", "sve"))]
    telling += [name for name in names or () if name in ("bf16", "avx512_bf16", "i8mm")]
    return f" ({' '.join(telling)})" if telling else ""


def _measurements(found: Diagnosis) -> list[str]:
    probes = found.probes
    if probes is None:
        return ["Not measured yet: 'gemwright doctor' does it in some seconds."]
    rows: list[tuple[str, str]] = []

    def add(name: str, value: float | None, unit: str, each: float, note: str = "") -> None:
        if value is not None:
            rows.append((name, f"{value / each:,.1f} {unit}{note}"))

    add("RAM, copy", probes.ram_bytes_s, "GB/s", 1e9, " read and written")
    add("CPU, fp32", probes.cpu_fp32_flops, "GFLOP/s", 1e9)
    add("CPU, bf16", probes.cpu_bf16_flops, "GFLOP/s", 1e9)
    around = " (cache bypassed)" if probes.disk_cache_bypassed else " (perhaps from the system's cache)"
    add("Disk, read", probes.disk_read_bytes_s, "GB/s", 1e9, around)
    add("RAM to GPU", probes.link_to_gpu_bytes_s, "GB/s", 1e9, " pinned")
    add("GPU to RAM", probes.link_from_gpu_bytes_s, "GB/s", 1e9, " pinned")
    add("both at once", probes.link_both_bytes_s, "GB/s", 1e9, " together")
    add("RAM to GPU", probes.link_pageable_bytes_s, "GB/s", 1e9, " pageable")
    tried = f" (tried {_gib(probes.pinned_tried_bytes)})"
    add("pinned block", probes.largest_pinned_bytes, "GiB", GIB, tried)
    add("GPU, copy", probes.gpu_memory_bytes_s, "GB/s", 1e9, " read and written")
    for shape, rate in probes.gpu_bf16_flops.items():
        add("GPU, bf16", rate, "TFLOP/s", 1e12, f" at {shape}")
    if found.fresh:
        when = f"Measured now, in {probes.took_s:.1f} s"
    else:
        when = f"Measured {_age(time.time() - probes.measured_at)} ago; --fresh measures again"
    return [when, *(f"  {name:<13} {text}" for name, text in rows), *(f"  note: {note}" for note in probes.notes)]


def _warnings(found: Diagnosis) -> list[str]:
    reasons = {"M001"} & {finding.code for finding in found.warnings}
    notes = [note for note in found.machine.notes if not (reasons and note.startswith(("NVIDIA", "AMD")))]
    lines = [f"note: {note}" for note in notes]
    for finding in found.warnings:
        lines += [f"{finding.code}  {finding.what}", f"      {finding.fix}"]
    return lines or ["No warnings."]


def _age(seconds: float) -> str:
    """A rough span of time."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / GIB:.1f} GiB"


def _gb(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.0f} GB"


def _said(value: object) -> str:
    return "?" if value is None else str(value)


def save(found: Diagnosis, path: Path) -> None:
    """Keep the machine's profile as a rig file that `--rig` takes."""
    from gemwright.rigs import save_rig

    save_rig(found.rig, path)
