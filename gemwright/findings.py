"""What `gemwright doctor` warns of: each code is defined here, once, and explained in docs/doctor.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gemwright.engines.backends import LlamaBuild, TorchBuild
from gemwright.gpus import Gpu
from gemwright.machine import Machine
from gemwright.rigs import Probes

GIB = 1 << 30
# The 27B in Q4_0 is a file of 15.2 GB; tuning it, 1 x 2,048 tokens a step, held 19 to 20 GiB of RAM
# (benchmarks/results/train_gpu_nvidia-h100-80gb-hbm3_2026-11-25.md).
NEEDED_27B_BYTES = 20 * GIB
BF16_SINCE = (8, 0)
FREE_VRAM_SHARE = 0.8
SWAP_USED_BYTES = GIB // 2
DISK_FREE_BYTES, DISK_SLOW_BYTES_S = 20_000_000_000, 0.4e9
# Drivers of this number on come with CUDA 13 (NVIDIA, CUDA compatibility).
CUDA_13_DRIVER = 580
LLAMA_INDEX = "https://xorbitsai.github.io/xllamacpp/whl"


@dataclass(frozen=True)
class Seen:
    """Everything that a check may look at."""

    machine: Machine
    probes: Probes | None
    torch: TorchBuild | None
    llama: LlamaBuild
    windows: bool = False


@dataclass(frozen=True)
class Finding:
    """One warning: its stable code, what is so, and what can be done."""

    code: str
    what: str
    fix: str


Check = Callable[[Seen], Iterator[tuple[str, str]]]
CHECKS: dict[str, Check] = {}


def findings(seen: Seen) -> list[Finding]:
    """All warnings about a machine, by code."""
    return [Finding(code, what, fix) for code, check in CHECKS.items() for what, fix in check(seen)]


def _code(code: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[code] = check
        return check

    return register


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def _nvidia(seen: Seen) -> list[Gpu]:
    return [gpu for gpu in seen.machine.gpus if gpu.vendor == "nvidia"]


@_code("M001")
def no_gpu(seen: Seen) -> Iterator[tuple[str, str]]:
    """No graphics card was found, and why."""
    if not seen.machine.gpus:
        why = "; ".join(n for n in seen.machine.notes if n.startswith(("NVIDIA", "AMD"))) or "nothing answers"
        inside = "give it to this container (docker: --gpus all)" if seen.machine.is_container else "install its driver"
        yield f"no GPU was found ({why})", f"Where there is one, {inside}; without one the CPU does the work."


@_code("M002")
def no_bf16(seen: Seen) -> Iterator[tuple[str, str]]:
    """A card too old for bf16."""
    for gpu in _nvidia(seen):
        if gpu.capability and gpu.capability < BF16_SINCE:
            major, minor = gpu.capability
            what = f"{gpu.name} (compute capability {major}.{minor}) has no bf16, and Gemma 3 overflows fp16"
            yield what, "It can run models in llama.cpp; 'tune' takes the CPU."


@_code("M003")
def narrow_slot(seen: Seen) -> Iterator[tuple[str, str]]:
    """A slot that gives the card fewer lanes or an older generation than it can use."""
    for gpu in seen.machine.gpus:
        gen, lanes = gpu.pcie_gen_slot or gpu.pcie_gen_now, gpu.pcie_lanes_now
        slower = gen is not None and gpu.pcie_gen_max is not None and gen < gpu.pcie_gen_max
        fewer = lanes is not None and gpu.pcie_lanes_max is not None and lanes < gpu.pcie_lanes_max
        if not (slower or fewer):
            continue
        has = f"Gen {gen or '?'} x{lanes or '?'}"
        could = f"Gen {gpu.pcie_gen_max or gen or '?'} x{gpu.pcie_lanes_max or lanes or '?'}"
        speed = f", at most {gpu.slot_bytes_s / 1e9:.1f} GB/s" if gpu.slot_bytes_s else ""
        idle = " (an AMD card may show less while it idles)" if gpu.vendor == "amd" else ""
        fix = "The slot nearest the processor is usually the full one; streaming copes, with more tokens a step."
        yield f"{gpu.name} sits in a {has} slot{speed}; the card can do {could}{idle}", fix


@_code("M004")
def limited_memory(seen: Seen) -> Iterator[tuple[str, str]]:
    """A container or control group that may use less than the machine has."""
    limit, total = seen.machine.memory_limit_bytes, seen.machine.ram_total_bytes
    if limit is not None and (total is None or limit < total):
        of = f" of the machine's {_gib(total)}" if total else ""
        yield f"this container or control group may use {_gib(limit)}{of}", "Raise it (docker: --memory) if you may."


@_code("M005")
def wsl_pins_little(seen: Seen) -> Iterator[tuple[str, str]]:
    """WSL locks little memory for a GPU."""
    probes = seen.probes
    largest, tried = (probes.largest_pinned_bytes, probes.pinned_tried_bytes) if probes else (None, None)
    if largest is not None and tried is not None and largest < tried:
        where = "WSL" if seen.machine.is_wsl else "this system"
        yield (
            f"{where} locked {_gib(largest)} of RAM for the GPU and refused {_gib(tried)}",
            "Use 'tune --source pageable'; gemwright falls back to it and says so.",
        )
    elif seen.machine.is_wsl and largest is None and seen.machine.gpus:
        yield (
            "WSL is known to lock only about 1 GiB of RAM for a GPU (microsoft/WSL #14078); not measured here",
            "Run 'gemwright doctor' to measure it; 'tune --source pageable' does without.",
        )


@_code("M006")
def little_free_vram(seen: Seen) -> Iterator[tuple[str, str]]:
    """Much of the video memory is taken already."""
    for gpu in seen.machine.gpus:
        total, free = gpu.memory_total_bytes, gpu.memory_free_bytes
        if total and free is not None and gpu.vendor != "apple" and free < FREE_VRAM_SHARE * total:
            what = f"{_gib(total - free)} of {_gib(total)} of {gpu.name} are taken; by what is not known here"
            yield what, "Close what draws or computes on it (browsers, games, other models); nvidia-smi lists some."


@_code("M007")
def sysmem_fallback(seen: Seen) -> Iterator[tuple[str, str]]:
    """Windows may move video memory to RAM without a word."""
    for gpu in _nvidia(seen):
        if (seen.windows and gpu.driver_model in ("WDDM", "MCDM", None)) or seen.machine.is_wsl:
            yield (
                f"the Windows driver may move {gpu.name}'s memory to RAM where it runs short, ten times slower and "
                "silently (CUDA sysmem fallback; on unless switched off, and not readable from here)",
                "NVIDIA Control Panel, Manage 3D settings, CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback.",
            )
            return


@_code("M008")
def swap(seen: Seen) -> Iterator[tuple[str, str]]:
    """Swap that is in use, or none at all."""
    total, used = seen.machine.swap_total_bytes, seen.machine.swap_used_bytes
    if total == 0 and not seen.machine.os.startswith("Darwin"):  # macOS makes swap when it needs some
        yield "there is no swap: what does not fit into RAM is killed", "Leave more room, or add some GB of swap."
    elif total and used and used > SWAP_USED_BYTES:
        yield f"{_gib(used)} of swap are in use: RAM has been short", "Close programs; swapped pages make steps crawl."


@_code("M009")
def disk(seen: Seen) -> Iterator[tuple[str, str]]:
    """A disk that is nearly full or slow."""
    free, speed = seen.machine.disk_free_bytes, seen.probes.disk_read_bytes_s if seen.probes else None
    if free is not None and free < DISK_FREE_BYTES:
        yield (
            f"{free / 1e9:.1f} GB are free in {seen.machine.model_folder}; the 27B in Q4_0 takes 15.2 GB",
            "Free some, or set GEMWRIGHT_HOME to a folder of a larger disk.",
        )
    if speed is not None and speed < DISK_SLOW_BYTES_S:
        took = 15.2e9 / speed
        yield (
            f"the disk of {seen.machine.model_folder} reads {speed / 1e9:.2f} GB/s: the 27B loads in {took:.0f} s",
            "Set GEMWRIGHT_HOME to a folder on an SSD.",
        )


@_code("M010")
def llama_without_gpu(seen: Seen) -> Iterator[tuple[str, str]]:
    """A llama.cpp that cannot use the card that is there."""
    if not seen.machine.gpus:
        return
    if seen.llama.gpus is None:
        yield f"llama.cpp (xllamacpp) does not start: {seen.llama.why}", f"Install it again: {llama_line(seen)}"
    elif not seen.llama.gpus:
        name = seen.machine.gpus[0].name
        what = f"llama.cpp (xllamacpp {seen.llama.version}) has no GPU backend, though {name} is there"
        yield what, f"Install one: {llama_line(seen)}"


def llama_line(seen: Seen) -> str:
    """The line that installs llama.cpp for the first card (docs/engines.md)."""
    vendor = seen.machine.gpus[0].vendor if seen.machine.gpus else None
    if vendor == "apple":
        return "pip install --force-reinstall xllamacpp"
    kind = "vulkan" if vendor == "amd" else "cu132" if _driver_major(seen) >= CUDA_13_DRIVER else "cu128"
    return f"pip install xllamacpp --force-reinstall --index-url {LLAMA_INDEX}/{kind}"


def _driver_major(seen: Seen) -> int:
    number = next((gpu.driver for gpu in _nvidia(seen) if gpu.driver), "0").partition(".")[0]
    return int(number) if number.isdecimal() else 0


@_code("M011")
def torch_without_cuda(seen: Seen) -> Iterator[tuple[str, str]]:
    """A PyTorch that cannot use the NVIDIA card that is there."""
    if not _nvidia(seen) or (seen.torch and seen.torch.cuda):
        return
    kind = "cu130" if _driver_major(seen) >= CUDA_13_DRIVER else "cu126"
    line = f"pip install torch --force-reinstall --index-url https://download.pytorch.org/whl/{kind}"
    said = f"PyTorch {seen.torch.version} is built without CUDA" if seen.torch else "PyTorch is not installed"
    yield f"{said}, though {_nvidia(seen)[0].name} is there: 'tune' takes the CPU", f"Install it: {line}"


@_code("M012")
def small_ram(seen: Seen) -> Iterator[tuple[str, str]]:
    """RAM that the 27B does not fit into."""
    ram = seen.machine.usable_ram_bytes
    if ram is not None and ram < NEEDED_27B_BYTES:
        what = f"{_gib(ram)} of RAM are less than the {_gib(NEEDED_27B_BYTES)} that the 27B needs in 4 bits"
        yield what, "The 12B (7 GB) and smaller fit; 'gemwright plan' says what does."


@_code("M013")
def cpu_without_bf16(seen: Seen) -> Iterator[tuple[str, str]]:
    """A processor that computes bf16 in pieces."""
    if seen.machine.cpu.has_bf16 is False:
        name = seen.machine.cpu.name or "the processor"
        yield (
            f"{name} has no bf16 arithmetic",
            "'tune' on the CPU measures whether bf16 or fp32 is quicker, and takes that (--precision auto).",
        )


@_code("M014")
def untested_vendor(seen: Seen) -> Iterator[tuple[str, str]]:
    """A card that training does not know."""
    for gpu in seen.machine.gpus:
        if gpu.vendor != "nvidia":
            what = f"'tune' uses NVIDIA cards only as tested; {gpu.name} serves llama.cpp"
            yield (
                what,
                "'tune' takes the CPU (or ROCm's PyTorch, which nobody has tried)."
                if (gpu.vendor == "amd")
                else "'tune' takes the CPU.",
            )
