"""The catalogue, rig files in every state of disrepair, and this machine as a rig."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.errors import InputError
from gemwright.gpus import Gpu
from gemwright.host import Cpu
from gemwright.machine import Machine
from gemwright.rig_file import FIGURES, Rig, RigCpu, RigGpu, parse_rig, rig_toml
from gemwright.rigs import (
    RIGS,
    Probes,
    load_rig,
    probe_file,
    read_probes,
    rig_names,
    save_rig,
    this_machine,
    twin,
    write_probes,
)

GIB = 1 << 30
NAMES = {
    "rtx4060ti-8gb rtx4060ti-8gb-pcie4 rtx3060-12gb rtx3090-24gb a4000-16gb a4000-20gb rtx4090-24gb rtx5090-32gb "
    "t4-16gb l4-24gb a100-80gb h100-80gb macbook-m2-16gb macbook-m2-24gb macbook-m3-64gb macbook-m3-128gb cpu-only"
}
SEED = (RIGS / "rtx4060ti-8gb.toml").read_text(encoding="utf-8")
SEED_CARD = Gpu("NVIDIA GeForce RTX 4060 Ti", "nvidia", 8188 << 20, 7 * GIB, 1, 3, 4, 8, 8, (8, 9), "581.42", 160.0)
DESK = Machine((SEED_CARD,), Cpu("i9", 10, 20, ("avx", "avx2")), "Linux", 64 * GIB, 48 * GIB, 0, 0)


def test_the_catalogue_is_whole() -> None:
    assert set(rig_names()) == set(" ".join(NAMES).split())


@pytest.mark.parametrize("name", rig_names())
def test_every_rig_is_sound_and_says_its_sources(name: str) -> None:
    rig = load_rig(name)
    assert rig.name == name and rig.about
    wanted = {f.to for f in FIGURES if rig.gpu or f.table != "gpu"}
    assert set(rig.basis) == set(rig.sources) == wanted and set(rig.basis.values()) == {"catalogue"}
    for source in rig.sources.values():
        assert re.match(r"(vendor|measured|estimated|assumed): \w", source)
    if rig.gpu and not rig.unified:
        assert rig.gpu.link_bytes_s < rig.gpu.memory_bytes_s and rig.gpu.capability
    again = parse_rig(rig_toml(rig), "again")
    assert again.gpu == rig.gpu and again.cpu == rig.cpu and again.ram_bytes == rig.ram_bytes


def test_the_seeds_rig() -> None:
    rig = load_rig("rtx4060ti-8gb")
    assert rig.gpu is not None
    assert (rig.gpu.vram_bytes, rig.gpu.link_bytes_s) == (pytest.approx(8188 << 20, rel=1e-4), 6.5e9)
    assert (rig.cpu.cores, rig.cpu.threads, rig.ram_bytes) == (10, 20, 64 * GIB)
    assert load_rig("cpu-only").gpu is None and load_rig("macbook-m2-16gb").unified


def test_the_measured_figures_are_those_of_the_results() -> None:
    gpu = load_rig("h100-80gb").gpu
    assert gpu is not None
    assert (gpu.bf16_flops, gpu.link_bytes_s, gpu.link_both_bytes_s) == (687e12, 55e9, 78e9)
    row = (Path(__file__).parents[2] / "benchmarks/results").glob("kernels_gpu_*.jsonl")
    assert '"gb_s": 3003.4' in next(iter(row)).read_text().splitlines()[0] and gpu.memory_bytes_s == 3003e9


@pytest.mark.parametrize(
    ("name", "offered"),
    [("rtx4060ti", "rtx4060ti-8gb"), ("RTX3090", "rtx3090-24gb"), ("h100", "h100-80gb"), ("macbook", "macbook-m2")],
)
def test_an_unknown_rig_offers_the_nearest(name: str, offered: str) -> None:
    with pytest.raises(InputError, match=offered) as refused:
        load_rig(name)
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)


def test_a_name_like_none_lists_all() -> None:
    with pytest.raises(InputError, match="Known: a100-80gb, "):
        load_rig("§§\n§")


CHANGES: list[tuple[str, str, str]] = [
    (r"^link_gb_s = .*\n", "", "gpu.link_gb_s is missing; it is a number of GB/s"),
    (r"(link_gb_s = \{ value =) 6.5", r"\1 -3", "gpu.link_gb_s is -3 GB/s; it must be from 0.05 to 5000 GB/s"),
    (r"(vram_gib = \{ value =) [\d.]+", r"\1 8188", "gpu.vram_gib is 8188 GiB; it must be from 0.5 to 2048 GiB"),
    (r"(ram_gb_s = \{ value =) \d+", r"\1 nan", "host.ram_gb_s is nan; it must be a number of GB/s"),
    (r"(disk_gb_s = \{ value =) [\d.]+", r"\1 inf", "host.disk_gb_s is inf; it must be a number of GB/s"),
    (r"(watts_load = \{ value =) \d+", r'\1 "270 W"', "host.watts_load is '270 W'; it must be a number of W"),
    (r"(watts_load = \{ value =) \d+", r"\1 true", "host.watts_load is True; it must be a number of W"),
    (r"(watts_load = \{ value =) \d+", r"\1 9", "host.watts_load is less than host.watts_idle (W)"),
    (r"(cores = \{ value =) \d+", r"\1 2.5", "cpu.cores is 2.5 cores; it must be a whole number from 1 to 4096 cores"),
    (r"(threads = \{ value =) \d+", r"\1 4", "cpu.threads is fewer than cpu.cores"),
    (r"(threads = \{ value =) \d+", r"\1 0", "cpu.threads is 0 threads"),
    (r"(ram_available_gib = \{ value =) \d+", r"\1 65", "host.ram_available_gib is more than host.ram_gib (GiB)"),
    (r"(desktop_gib = \{ value =) [\d.]+", r"\1 8", "gpu.desktop_gib leaves nothing of gpu.vram_gib (GiB)"),
    (r"(link_both_gb_s = \{ value =) [\d.]+", r"\1 14", "gpu.link_both_gb_s is not one to two times gpu.link_gb_s"),
    (r"^capability = .*", 'capability = "ada"', "gpu.capability is 'ada'; it must be a CUDA compute capability"),
    (r"^capability = .*", "capability = 8.9", "gpu.capability is 8.9; it must be"),
    (r"^link_gb_s", "link_gbs", "gpu.'link_gbs' is not a field of a rig; is gpu.link_gb_s meant?"),
    (r"^\[host\]$", "[hosts]", "'hosts' is not a field of a rig; is host meant?"),
    (r'source = "measured: [^"]*"', 'source = "a friend"', "gpu.link_gb_s.source is 'a friend'; it must begin with"),
    (r'source = "measured: [^"]*"', "source = 3", "gpu.link_gb_s.source is 3"),
    (r'^name = "rtx4060ti-8gb"$', "", "name is missing"),
    (r'^name = "rtx4060ti-8gb"$', r'name = "a\\nb"', "name is 'a\\nb'; it must be a line of text"),
    (r"^unified = false", 'unified = "no"', "unified is 'no'; it must be true or false"),
    (r"^unified = false", "unified = true\ncpu2 = 1", "'cpu2' is not a field of a rig; is cpu meant?"),
    (r"^name = \"rtx.*", "= 3", "not TOML: "),
]


@pytest.mark.parametrize(("pattern", "instead", "said"), CHANGES)
def test_a_bad_rig_file_is_one_line_with_field_and_unit(tmp_path: Path, pattern: str, instead: str, said: str) -> None:
    text, count = re.subn(pattern, instead, SEED, count=1, flags=re.M)
    assert count == 1
    (tmp_path / "desk.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as refused:
        load_rig(tmp_path / "desk.toml")
    line = str(refused.value)
    assert line.startswith(str(tmp_path / "desk.toml")) and said in line and "\n" not in line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_rig(tmp_path / "gone.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(InputError, match="not UTF-8"):
        load_rig(tmp_path / "latin.toml")
    with pytest.raises(InputError, match="cannot read it"):
        (tmp_path / "folder.toml").mkdir()
        load_rig(tmp_path / "folder.toml")


def test_bare_numbers_are_assumed(tmp_path: Path) -> None:
    bare = re.sub(r"\{ value = ([^,]+), source = .* \}", r"\1", SEED)
    (tmp_path / "desk.toml").write_text(bare, encoding="utf-8")
    rig = load_rig(tmp_path / "desk.toml")
    assert set(rig.basis.values()) == {"assumed"} and rig.gpu == load_rig("rtx4060ti-8gb").gpu


amounts = st.floats(min_value=0.1, max_value=1.0)
letters = st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp", "Zs")).filter(str.isprintable)
words = st.text(letters | st.just(" "), max_size=40).map(lambda text: f"x{text}")


@st.composite
def rigs(draw: st.DrawFn) -> Rig:
    unified = draw(st.booleans())
    cores, ram = draw(st.integers(1, 64)), draw(st.integers(GIB, 512 * GIB))
    gpu = None
    if unified or draw(st.booleans()):
        link, vram = 1e11 * draw(amounts), draw(st.integers(GIB, ram))
        both = link * (1 + draw(amounts))
        capability = draw(st.none() | st.tuples(st.integers(1, 12), st.integers(0, 9)))
        gpu = RigGpu(draw(words), vram, 1e15 * draw(amounts), 1e12 * draw(amounts), link, both, capability)
    to = {f.to for f in FIGURES if gpu or f.table != "gpu"}
    word = draw(st.sampled_from(("measured", "assumed", "catalogue")))
    source = f"{word}: {draw(words)}"
    return Rig(
        draw(words),
        gpu,
        RigCpu(draw(words), cores, cores * draw(st.integers(1, 4)), 1e12 * draw(amounts), 1e12 * draw(amounts)),
        ram,
        ram // draw(st.integers(1, 4)),
        1e11 * draw(amounts),
        1e10 * draw(amounts),
        unified,
        50 * draw(amounts),
        50 + 500 * draw(amounts),
        draw(st.integers(0, GIB - 1)) if gpu else 0,
        basis=dict.fromkeys(to, word),
        sources=dict.fromkeys(to, source),
    )


def plain(rig: Rig) -> dict[str, Any]:
    parts = {"": rig, "gpu.": rig.gpu, "cpu.": rig.cpu}
    return {
        f"{prefix}{name}": value
        for prefix, part in parts.items()
        if part
        for name, value in vars(part).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


@given(rigs())
@settings(max_examples=60)
def test_what_is_written_is_read_back(rig: Rig) -> None:
    again = parse_rig(rig_toml(rig), "file")
    assert plain(again) == pytest.approx(plain(rig), rel=1e-12)
    assert (again.name, again.unified, again.basis, again.sources) == (rig.name, rig.unified, rig.basis, rig.sources)
    whole = ("ram_bytes", "ram_available_bytes", "desktop_bytes")
    assert [getattr(again, name) for name in whole] == [getattr(rig, name) for name in whole]


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just({"value": 3})
fields = st.sampled_from([f.key for f in FIGURES] + ["name", "capability", "source", "other"])
tables = st.dictionaries(
    st.sampled_from(["gpu", "cpu", "host", "name", "unified", "x"]), st.dictionaries(fields, leaves)
)


@given(st.text() | tables.map(lambda t: "\n".join(_toml(t))))
@settings(max_examples=150)
def test_any_text_is_a_rig_or_one_line(text: str) -> None:
    try:
        parse_rig(text, "file")
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 400


def _toml(said: dict[str, Any]) -> list[str]:
    lines = []
    for table, inside in said.items():
        lines.append(f"[{table}]")
        for key, value in inside.items():
            shown = "{ value = 3 }" if isinstance(value, dict) else f'"{value}"' if value is None else repr(value)
            lines.append(f"{key} = {shown.lower() if isinstance(value, (bool, float)) else shown}")
    return lines


@given(st.integers(0, len(SEED) - 1), st.characters(codec="utf-8"))
@settings(max_examples=100)
def test_one_wrong_character_is_a_rig_or_one_line(at: int, letter: str) -> None:
    try:
        parse_rig(SEED[:at] + letter + SEED[at + 1 :], "file")
    except InputError as error:
        assert "\n" not in str(error)


def test_this_machine_without_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMWRIGHT_HOME", str(tmp_path))
    rig = this_machine(None, DESK)
    assert rig.gpu is not None
    assert rig.gpu.vram_bytes == 8188 << 20 and rig.desktop_bytes == (8188 << 20) - 7 * GIB
    assert rig.gpu.link_bytes_s == pytest.approx(6.5e9, rel=0.02)  # from the slot
    assert rig.gpu.bf16_flops == 37.5e12
    said = {"gpu.vram_bytes": "measured", "gpu.bf16_flops": "catalogue", "gpu.link_bytes_s": "assumed"}
    assert {name: rig.basis[name] for name in said} == said
    assert rig.basis["ram_bytes_s"] == "assumed" and rig.ram_available_bytes == 48 * GIB
    parse_rig(rig_toml(rig), "saved")


def test_measurements_come_first_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMWRIGHT_HOME", str(tmp_path))
    rates = {"gpu_memory_bytes_s": 2.6e11, "ram_bytes_s": 3e10, "disk_read_bytes_s": 2e9, "cpu_fp32_flops": 9e11}
    link = {"link_to_gpu_bytes_s": 6.4e9, "link_both_bytes_s": 1.2e10}
    probes = Probes(measured_at=1.0, gpu_bf16_flops={"a": 3e13, "b": 4e13}, notes=("so",), **rates, **link)
    write_probes(DESK, probes)
    assert read_probes(DESK) == probes
    rig = this_machine(machine=DESK)
    assert rig.gpu is not None and (rig.gpu.bf16_flops, rig.gpu.link_both_bytes_s) == (4e13, 1.2e10)
    assert rig.basis["gpu.link_both_bytes_s"] == rig.basis["ram_bytes_s"] == "measured"
    assert rig.basis["cpu.bf16_flops"] == "assumed" and rig.cpu.bf16_flops == 4.5e11
    other = replace(DESK, gpus=(replace(SEED_CARD, driver="590.1"),))
    assert read_probes(other) is None
    assert this_machine(Probes(), DESK).basis["ram_bytes_s"] == "assumed"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{",
        "\xff",
        '{"measured_at": 1, "ram_bytes_s": -1}',
        '{"measured_at": 1, "ram_bytes_s": "x"}',
        '{"measured_at": 1, "gpu_bf16_flops": {"a": 0}}',
        '{"measured_at": 1, "gpu_bf16_flops": 3}',
    ],
)
def test_damaged_measurements_are_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GEMWRIGHT_HOME", str(tmp_path))
    file = probe_file(DESK)
    file.parent.mkdir()
    file.write_bytes(text.encode("latin-1"))
    assert read_probes(DESK) is None


def test_a_newer_versions_measurements_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMWRIGHT_HOME", str(tmp_path))
    file = probe_file(DESK)
    file.parent.mkdir()
    file.write_text('{"measured_at": 2, "npu_bytes_s": 3}')
    assert read_probes(DESK) == Probes(measured_at=2.0)


@pytest.mark.parametrize(
    ("name", "gib", "rig"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 8, "rtx4060ti-8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 16, None),
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090-24gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
        ("NVIDIA H100 80GB HBM3", 80, "h100-80gb"),
        ("NVIDIA H100 PCIe", 80, None),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 40, None),
        ("Tesla T4", 15, "t4-16gb"),
        ("NVIDIA RTX 4000 Ada Generation", 20, "a4000-20gb"),
        ("NVIDIA RTX 4000 SFF Ada Generation", 20, None),
    ],
)
def test_the_same_card_in_the_catalogue(name: str, gib: int, rig: str | None) -> None:
    twin_rig = twin(Gpu(name, memory_total_bytes=gib * GIB))
    assert (twin_rig.name if twin_rig else None) == rig


def test_apple_and_a_card_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMWRIGHT_HOME", str(tmp_path))
    mac = Machine((Gpu("Apple M2", "apple", 16 * GIB),), Cpu("Apple M2", 8, 8, ("neon",)), "Darwin", 24 * GIB, 20 * GIB)
    rig = this_machine(machine=mac)
    assert rig.unified and rig.gpu is not None and rig.gpu.link_bytes_s == rig.ram_bytes_s and rig.desktop_bytes == 0
    assert rig.basis["gpu.vram_bytes"] == "assumed" and rig.basis["gpu.bf16_flops"] == "catalogue"
    parse_rig(rig_toml(rig), "saved")
    silent = Machine((Gpu("mystery"),), Cpu(), "Linux")
    rig = this_machine(machine=silent)
    assert rig.gpu is not None and set(rig.basis.values()) == {"assumed"}
    parse_rig(rig_toml(rig), "saved")


def test_saving(tmp_path: Path) -> None:
    save_rig(load_rig("h100-80gb"), tmp_path / "deep" / "x.toml")
    assert tomllib.loads((tmp_path / "deep" / "x.toml").read_text(encoding="utf-8"))["name"] == "h100-80gb"
    assert load_rig(tmp_path / "deep" / "x.toml").basis["gpu.link_bytes_s"] == "measured"
