"""Measures this machine in seconds: link, video memory, products, RAM and disk; for `gemwright doctor`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemwright.kernels.disk import read_bytes_s
from gemwright.machine import Machine
from gemwright.rigs import Probes

T = TypeVar("T")
MIB = 1 << 20
BLOCK_BYTES = 256 * MIB
# Rows, width and outputs of a product: a square one, and those of the 4B's and the 27B's MLP as a step has them.
SHAPES = ((4096, 4096, 4096), (2048, 2560, 20_480), (2048, 5376, 43_008))
SUSTAINED_S = 0.4
PINNED_LIMIT_S = 6.0
Report = Callable[[str], None]
TryLock = Callable[[int], bool]


def measure(machine: Machine, can_lock: TryLock, report: Report = lambda what: None) -> Probes:
    """Every figure that this machine gives; what it does not is None, with a sentence in `notes`.

    `can_lock(bytes)` says whether so much RAM can be locked for a GPU (`model.pinned`). Nothing raises but a fault.
    """
    started, notes = time.perf_counter(), list[str]()
    report("RAM and CPU")
    with _threads(min(machine.cpu.cores or 1, machine.cpu.threads or 1)):
        ram = _copy_bytes_s(notes)
        fp32, bf16 = (_cpu_flops(dtype) for dtype in (torch.float32, torch.bfloat16))
    report("disk")
    disk, bypassed, why = read_bytes_s(Path(machine.model_folder), machine.disk_free_bytes)
    notes += [why] if why else []
    card: dict[str, Any] = {}
    if torch.cuda.is_available():
        card = _tried(lambda: _card(machine, can_lock, report, notes), notes, "the GPU") or {}
    elif machine.gpus:
        notes.append("PyTorch finds no CUDA device: the GPU was not measured")
    return Probes(
        measured_at=time.time(),
        **card,
        ram_bytes_s=ram,
        cpu_bf16_flops=bf16,
        cpu_fp32_flops=fp32,
        disk_read_bytes_s=disk,
        disk_cache_bypassed=bypassed if disk else None,
        torch=torch.__version__,
        took_s=time.perf_counter() - started,
        notes=tuple(notes),
    )


def _card(machine: Machine, can_lock: TryLock, report: Report, notes: list[str]) -> dict[str, Any]:
    """The fields of Probes that a CUDA card gives."""
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    report("locked memory")
    # First: what the link's own buffers lock would count against a small limit.
    largest, tried = largest_pinned((machine.ram_available_bytes or 0) // 2, can_lock)
    report("GPU")
    to_gpu, from_gpu, both, pageable = _tried(lambda: _link(device), notes, "the link") or (None,) * 4
    memory = _tried(lambda: _device_copy_bytes_s(device), notes, "video memory")
    flops: dict[str, float] = {}
    for shape in SHAPES:
        label = "x".join(map(str, shape))
        rate = _tried(partial(_gpu_flops, device, *shape), notes, f"the product {label}")
        flops |= {label: rate} if rate else {}
    torch.cuda.empty_cache()
    return {
        "gpu": name,
        "largest_pinned_bytes": largest,
        "pinned_tried_bytes": tried,
        "link_to_gpu_bytes_s": to_gpu,
        "link_from_gpu_bytes_s": from_gpu,
        "link_both_bytes_s": both,
        "link_pageable_bytes_s": pageable,
        "gpu_memory_bytes_s": memory,
        "gpu_bf16_flops": flops,
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """All cores, whatever the environment says: the machine is measured, not this session."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def largest_pinned(bound: int, can_lock: TryLock, limit_s: float = PINNED_LIMIT_S) -> tuple[int, int]:
    """(largest block that could be locked, largest tried), in steps of two from 256 MiB up to `bound` bytes.

    Ends early where locking takes longer than `limit_s` in all: the next step would take twice as long.
    """
    largest = tried = 0
    size, started = BLOCK_BYTES, time.perf_counter()
    while size <= bound:
        tried = size
        if not can_lock(size):
            break
        largest = size
        if time.perf_counter() - started > limit_s / 3:
            break
        size *= 2
    return largest, tried


def _tried(work: Callable[[], T], notes: list[str], what: str) -> T | None:
    """What `work` gives, or None and a note: a card that is full or broken must not end the rest."""
    try:
        return work()
    except RuntimeError as error:  # torch's out of memory and CUDA errors
        notes.append(f"{what} could not be measured ({' '.join(str(error).split())[:100]})")
        return None


def _link(device: torch.device) -> tuple[float, float, float, float]:
    """Bytes a second: pinned to the GPU, from it, both together while both are busy, pageable to the GPU."""
    pinned, back = (torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    plain = torch.zeros(BLOCK_BYTES, dtype=torch.uint8)
    there, other = (torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    up, down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def both() -> None:
        with torch.cuda.stream(up):
            there.copy_(pinned, non_blocking=True)
        with torch.cuda.stream(down):
            back.copy_(other, non_blocking=True)

    to_gpu = BLOCK_BYTES / _seconds(lambda: there.copy_(pinned, non_blocking=True), device)
    from_gpu = BLOCK_BYTES / _seconds(lambda: back.copy_(other, non_blocking=True), device)
    together = 2 * BLOCK_BYTES / _seconds(both, device)
    return to_gpu, from_gpu, together, BLOCK_BYTES / _seconds(lambda: there.copy_(plain), device)


def _device_copy_bytes_s(device: torch.device) -> float:
    """Bytes a second that a copy within video memory reads and writes."""
    x = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * BLOCK_BYTES / _seconds(lambda: y.copy_(x), device, at_once=8)


def _gpu_flops(device: torch.device, rows: int, width: int, outputs: int) -> float:
    """Sustained bf16 FLOP/s of one product: back to back, as the card's power limit has it."""
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    w = torch.randn(outputs, width, device=device, dtype=torch.bfloat16)
    y = torch.empty(rows, outputs, device=device, dtype=torch.bfloat16)
    once = _seconds(lambda: torch.mm(x, w.T, out=y), device, repeats=3)
    count = max(1, min(500, round(SUSTAINED_S / once)))
    return 2 * rows * width * outputs / _seconds(lambda: torch.mm(x, w.T, out=y), device, repeats=1, at_once=count)


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 5, at_once: int = 1) -> float:
    """Seconds of one `work` on the device, waiting included: the median of `repeats` rounds after one uncounted."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(at_once):
            work()
        torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started) / at_once)
    return median(times[1:])


def _copy_bytes_s(notes: list[str]) -> float | None:
    """Bytes a second that a copy in RAM reads and writes, on PyTorch's threads: the best of some."""
    try:
        x, y = torch.ones(BLOCK_BYTES // 4), torch.zeros(BLOCK_BYTES // 4)
    except RuntimeError:  # the allocator's
        notes.append("too little RAM is free to measure its speed")
        return None
    return 2 * BLOCK_BYTES / min(_cpu_seconds(lambda: y.copy_(x)) for _ in range(5))


def _cpu_flops(dtype: torch.dtype) -> float:
    """FLOP/s of square products the best of some, of a size that takes a moment on this CPU."""
    side = 512
    while True:
        x: Tensor = torch.randn(side, side).to(dtype)
        torch.mm(x, x)
        took = _cpu_seconds(partial(torch.mm, x, x))
        if took > 0.03 or side >= 4096:
            break
        side *= 2
    count = max(1, min(8, round(SUSTAINED_S / took)))
    best = min([took] + [_cpu_seconds(partial(torch.mm, x, x)) for _ in range(count)])
    return 2 * side**3 / best


def _cpu_seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
