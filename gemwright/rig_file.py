"""A rig as a small TOML file: its fields with their units and sources, read with suspicion, and written."""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from gemwright.errors import InputError

GIB, GIGA, TERA = float(1 << 30), 1e9, 1e12


@dataclass(frozen=True)
class RigGpu:
    """A graphics card. `bf16_flops` is what long runs of dense products sustain; `memory_bytes_s` counts what a copy
    reads and writes; `link_bytes_s` is one way from pinned RAM; `link_both_bytes_s` both ways together, both busy."""

    name: str
    vram_bytes: int
    bf16_flops: float
    memory_bytes_s: float
    link_bytes_s: float
    link_both_bytes_s: float
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class RigCpu:
    """A processor; both rates are sustained over all cores."""

    name: str
    cores: int
    threads: int
    bf16_flops: float
    fp32_flops: float


@dataclass(frozen=True)
class Rig:
    """A machine to plan for. With `unified` memory the GPU's is part of RAM. `ram_bytes_s` counts what a copy reads and
    writes. `basis` says "measured", "catalogue" or "assumed" for each figure ("gpu.link_bytes_s", "ram_bytes", ...);
    `sources` says where it comes from.
    """

    name: str
    gpu: RigGpu | None
    cpu: RigCpu
    ram_bytes: int
    ram_available_bytes: int
    ram_bytes_s: float
    disk_bytes_s: float
    unified: bool = False
    watts_idle: float = 60.0
    watts_load: float = 160.0
    desktop_bytes: int = 0
    about: str = ""
    basis: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Figure:
    """A number of a rig file: where it goes, its unit, what is not absurd, how many of ours one of it is."""

    table: str
    key: str
    unit: str
    low: float
    high: float
    to: str
    each: float = 1.0
    whole: bool = False


FIGURES = (
    _Figure("gpu", "vram_gib", "GiB", 0.5, 2048, "gpu.vram_bytes", GIB, True),
    _Figure("gpu", "bf16_tflops", "TFLOP/s", 0.01, 20_000, "gpu.bf16_flops", TERA),
    _Figure("gpu", "device_gb_s", "GB/s", 1, 50_000, "gpu.memory_bytes_s", GIGA),
    _Figure("gpu", "link_gb_s", "GB/s", 0.05, 5_000, "gpu.link_bytes_s", GIGA),
    _Figure("gpu", "link_both_gb_s", "GB/s", 0.05, 10_000, "gpu.link_both_bytes_s", GIGA),
    _Figure("gpu", "desktop_gib", "GiB", 0, 64, "desktop_bytes", GIB, True),
    _Figure("cpu", "cores", "cores", 1, 4096, "cpu.cores", 1, True),
    _Figure("cpu", "threads", "threads", 1, 8192, "cpu.threads", 1, True),
    _Figure("cpu", "bf16_gflops", "GFLOP/s", 0.1, 1e6, "cpu.bf16_flops", GIGA),
    _Figure("cpu", "fp32_gflops", "GFLOP/s", 0.1, 1e6, "cpu.fp32_flops", GIGA),
    _Figure("host", "ram_gib", "GiB", 0.25, 65_536, "ram_bytes", GIB, True),
    _Figure("host", "ram_available_gib", "GiB", 0.01, 65_536, "ram_available_bytes", GIB, True),
    _Figure("host", "ram_gb_s", "GB/s", 0.1, 10_000, "ram_bytes_s", GIGA),
    _Figure("host", "disk_gb_s", "GB/s", 0.001, 1_000, "disk_bytes_s", GIGA),
    _Figure("host", "watts_idle", "W", 0.1, 100_000, "watts_idle"),
    _Figure("host", "watts_load", "W", 0.1, 100_000, "watts_load"),
)
_BASES = {
    "vendor": "catalogue",
    "measured": "measured",
    "estimated": "catalogue",
    "assumed": "assumed",
    "catalogue": "catalogue",
}


def parse_rig(text: str, where: object) -> Rig:
    """The rig that a TOML text describes (docs/doctor.md); `where` is named in errors."""
    try:
        said = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        what = " ".join(str(error).split())[:120]
        raise InputError(f"not TOML: {what}", where=where, fix="Mend that line.") from None
    return _Reader(said, where).rig()


class _Reader:
    """Takes a rig out of parsed TOML field by field, and complains by name and unit."""

    def __init__(self, said: dict[str, Any], where: object) -> None:
        self.said, self.where = said, where
        self.basis: dict[str, str] = {}
        self.sources: dict[str, str] = {}

    def rig(self) -> Rig:
        has_gpu = "gpu" in self.said
        tables = ("gpu", "cpu", "host") if has_gpu else ("cpu", "host")
        self.no_others(self.said, {"name", "about", "unified", *tables}, "")
        values: dict[str, float] = {}
        for table in tables:
            inside = self.table(table)
            texts = {"gpu": {"name", "capability"}, "cpu": {"name"}, "host": set()}[table]
            self.no_others(inside, {f.key for f in FIGURES if f.table == table} | texts, f"{table}.")
            values |= {f.to: self.figure(inside, f) for f in FIGURES if f.table == table}
        unified = self.said.get("unified", False)
        if not isinstance(unified, bool):
            self.complain("unified", f"is {unified!r:.40}; it must be true or false")
        rig = self.built(values, unified, has_gpu)
        self.sensible(rig)
        return rig

    def built(self, values: dict[str, Any], unified: bool, has_gpu: bool) -> Rig:
        parts: dict[str, dict[str, Any]] = {"gpu": {}, "cpu": {}, "": {}}
        for to, value in values.items():
            part, _, name = to.rpartition(".")
            parts[part][name] = value
        gpu = None
        if has_gpu:
            gpu = RigGpu(self.text("gpu", "name"), **parts["gpu"], capability=self.capability())
        cpu = RigCpu(self.text("cpu", "name"), **parts["cpu"])
        about = self.text("", "about") if "about" in self.said else ""
        name = self.text("", "name")
        return Rig(name, gpu, cpu, unified=unified, about=about, **parts[""], basis=self.basis, sources=self.sources)

    def sensible(self, rig: Rig) -> None:
        """Figures that contradict each other."""
        gpu = rig.gpu
        wrong = [
            (rig.cpu.threads < rig.cpu.cores, "cpu.threads", "is fewer than cpu.cores"),
            (rig.ram_available_bytes > rig.ram_bytes, "host.ram_available_gib", "is more than host.ram_gib (GiB)"),
            (rig.watts_load < rig.watts_idle, "host.watts_load", "is less than host.watts_idle (W)"),
            (rig.unified and gpu is None, "unified", "is true, but there is no [gpu]"),
        ]
        if gpu is not None:
            both = gpu.link_both_bytes_s / gpu.link_bytes_s
            wrong += [
                (not 0.99 <= both <= 2.01, "gpu.link_both_gb_s", "is not one to two times gpu.link_gb_s (GB/s)"),
                (rig.desktop_bytes >= gpu.vram_bytes, "gpu.desktop_gib", "leaves nothing of gpu.vram_gib (GiB)"),
                (rig.unified and gpu.vram_bytes > rig.ram_bytes, "gpu.vram_gib", "is more than host.ram_gib (GiB)"),
            ]
        for bad, name, what in wrong:
            if bad:
                self.complain(name, what)

    def figure(self, inside: Mapping[str, Any], f: _Figure) -> float:
        name, said = f"{f.table}.{f.key}", inside.get(f.key)
        if said is None:
            self.complain(name, f"is missing; it is a number of {f.unit}")
        source = "assumed: given without a source"
        if isinstance(said, dict):
            self.no_others(said, {"value", "source"}, f"{name}.")
            source, said = said.get("source", source), said.get("value")
        if isinstance(said, bool) or not isinstance(said, (int, float)) or not math.isfinite(said):
            self.complain(name, f"is {said!r:.40}; it must be a number of {f.unit}")
        if not f.low <= said <= f.high or (f.each == 1 and f.whole and said != int(said)):
            kind = "a whole number " if f.each == 1 and f.whole else ""
            self.complain(name, f"is {said!r:.40} {f.unit}; it must be {kind}from {f.low:g} to {f.high:g} {f.unit}")
        word = source.partition(":")[0] if isinstance(source, str) else ""
        if word not in _BASES or not source.partition(":")[2].strip():
            self.complain(f"{name}.source", f"is {source!r:.40}; it must begin with one of {', '.join(_BASES)} and ':'")
        self.basis[f.to], self.sources[f.to] = _BASES[word], source
        return round(said * f.each) if f.whole else float(said * f.each)

    def table(self, name: str) -> dict[str, Any]:
        inside = self.said.get(name)
        if not isinstance(inside, dict):
            self.complain(f"[{name}]", "is missing" if inside is None else "must be a table")
        return inside

    def text(self, table: str, key: str) -> str:
        value = (self.said[table] if table else self.said).get(key)
        name = f"{table}.{key}".lstrip(".")
        if value is None:
            self.complain(name, "is missing; it is a text")
        if not isinstance(value, str) or not value.strip() or len(value) > 200 or not value.isprintable():
            self.complain(name, f"is {value!r:.40}; it must be a line of text")
        return value

    def capability(self) -> tuple[int, int] | None:
        value = self.said["gpu"].get("capability")
        if value is None:
            return None
        match = re.fullmatch(r"(\d{1,2})\.(\d)", value, re.ASCII) if isinstance(value, str) else None
        if match is None:
            self.complain("gpu.capability", f'is {value!r:.40}; it must be a CUDA compute capability such as "8.9"')
        return int(match[1]), int(match[2])

    def no_others(self, inside: Mapping[str, Any], known: set[str], prefix: str) -> None:
        for key in inside:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; is {prefix}{near[0]} meant?" if near else ""
                self.complain(f"{prefix}{key[:40]!r}", f"is not a field of a rig{hint}")

    def complain(self, name: str, what: str) -> NoReturn:
        line = " ".join(f"{name} {what}".split())
        raise InputError(line, where=self.where, fix="See docs/doctor.md for the fields.")


def rig_toml(rig: Rig) -> str:
    """`rig` as a TOML text that `parse_rig` reads back."""
    lines = [f"name = {_quoted(rig.name)}", f"about = {_quoted(rig.about)}"] if rig.about else []
    lines = lines or [f"name = {_quoted(rig.name)}"]
    lines.append(f"unified = {str(rig.unified).lower()}")
    for table in ("gpu", "cpu", "host"):
        part: Any = {"gpu": rig.gpu, "cpu": rig.cpu, "host": rig}[table]
        if part is None:
            continue
        lines += ["", f"[{table}]"]
        lines += [f"name = {_quoted(part.name)}"] if table != "host" else []
        if table == "gpu" and part.capability:
            lines.append(f'capability = "{part.capability[0]}.{part.capability[1]}"')
        for f in (f for f in FIGURES if f.table == table):
            value = getattr(part if "." in f.to else rig, f.to.rpartition(".")[2])
            source = rig.sources.get(f.to, "assumed: given without a source")
            shown = value if f.each == 1 else _plain(value / f.each)
            lines.append(f"{f.key} = {{ value = {shown}, source = {_quoted(source)} }}")
    return "\n".join(lines) + "\n"


def _plain(value: float) -> str:
    return repr(float(value))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
