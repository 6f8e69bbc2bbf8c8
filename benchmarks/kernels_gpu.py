"""Each Triton kernel's bandwidth beside that of a device copy, and the host's time for a launch; one JSON line each.

    python3 benchmarks/kernels_gpu.py                                # all models, lengths and kernels
    python3 benchmarks/kernels_gpu.py --only unpack --out results    # also writes results/kernels_gpu.jsonl

Needs torch and triton only. Before each timed launch a buffer larger than the second-level cache is written, so every
kernel reads from device memory; events lie around the kernel alone. `gb_s` counts each byte read and each written once.
`of_copy` is the share of a 2 GB copy's bandwidth, `of_equal_copy` that of a copy of as many bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from torch import Tensor

from gemwright.kernels import triton_ops
from gemwright.kernels.cross_entropy import Running
from gemwright.kernels.triton_unpack import FORMATS, unpack

BF16, F32, EPS = torch.bfloat16, torch.float32, 1e-6
TOKENS, COPY_BYTES, FLUSH_BYTES, HOST_CALLS = (8192, 2048), 2 << 30, 256 << 20, 200
LOSS_ROWS, CHUNKS = 2048, (4096, 16384)


@dataclass(frozen=True)
class Model:
    """The sizes that matter here: hidden D, MLP F, heads H and K, head size E."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head: int


MODELS = {"27b": Model(5376, 21504, 32, 16, 128), "4b": Model(2560, 10240, 8, 4, 256)}


@dataclass(frozen=True)
class Case:
    """A launch and all tensors that it reads or writes once (in place: twice)."""

    name: str
    run: Callable[[], object]
    tensors: tuple[Tensor, ...]

    @property
    def moved_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors)


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def norm_cases(m: Model, n: int) -> Iterator[Case]:
    x, y, z = (rand(n, m.hidden) for _ in range(3))
    weight, rstd, ops = rand(m.hidden, dtype=F32), rand(n, 1, dtype=F32), triton_ops
    yield Case("rms_norm", partial(ops.rms_norm, x, weight, EPS, out=y), (x, y))
    yield Case("rms_norm+residual", partial(ops.rms_norm, x, weight, EPS, residual=y, out=z), (x, y, z))
    yield Case("norm_add_norm", partial(ops.norm_add_norm, x, y, weight, weight, EPS, out=z), (x, y, z, z))
    yield Case("rms_norm_backward", partial(ops.rms_norm_backward, x, y, rstd, weight, out=z), (x, y, z))
    added = partial(ops.rms_norm_backward, x, y, rstd, weight, add=z, out=z)
    yield Case("rms_norm_backward+add", added, (x, y, z, z))


def head_cases(m: Model, n: int) -> Iterator[Case]:
    qkv, w = rand(n, (m.heads + 2 * m.kv_heads) * m.head), rand(m.head, dtype=F32)
    q, k, v = (rand(n, count, m.head) for count in (m.heads, m.kv_heads, m.kv_heads))
    table = rand(n, 1, m.head // 2, dtype=F32), rand(n, 1, m.head // 2, dtype=F32)
    rstd, out = (rand(n, m.heads, 1, dtype=F32), rand(n, m.kv_heads, 1, dtype=F32)), torch.empty_like(qkv)
    forward = partial(triton_ops.norm_rope, qkv, w, w, table, m.heads, m.kv_heads, EPS)
    yield Case("norm_rope", forward, (q, k, q, k, *table, *rstd))
    backward = partial(triton_ops.norm_rope_backward, q, k, v, qkv, rstd, w, w, table, out)
    yield Case("norm_rope_backward", backward, (q, k, v, q, k, out, *table, *rstd))


def mlp_cases(m: Model, n: int) -> Iterator[Case]:
    gate_up, wide, again = rand(n, 2 * m.mlp), rand(n, m.mlp), rand(n, m.mlp)
    out, backward = torch.empty_like(gate_up), triton_ops.geglu_backward
    yield Case("geglu", partial(triton_ops.geglu, gate_up, wide), (gate_up, wide))
    yield Case("geglu_backward", partial(backward, wide, gate_up, None, out), (wide, gate_up, out))
    yield Case("geglu_backward+wide", partial(backward, wide, gate_up, None, out, again), (wide, gate_up, out, again))


def softmax_cases() -> Iterator[Case]:
    target = torch.zeros(LOSS_ROWS, dtype=torch.int64, device="cuda")
    for chunk in CHUNKS:
        logits, running = rand(LOSS_ROWS, chunk), Running.start(LOSS_ROWS, target.device)
        run = partial(triton_ops.softmax_chunk, logits, target, 0, running)
        yield Case(f"softmax_chunk_{chunk}", run, (logits, logits))


def unpack_cases(m: Model) -> Iterator[Case]:
    """The gate and up matrices as one, into rows of exact length and into rows with a pitch."""
    rows, cols = 2 * m.mlp, m.hidden
    whole = torch.empty(rows, cols, dtype=BF16, device="cuda")
    part = torch.empty(rows, cols + 64, dtype=BF16, device="cuda")[:, :cols]
    for qtype, form in FORMATS.items():
        raw = torch.randint(0, 256, (rows, cols // form.values * form.size), dtype=torch.uint8, device="cuda")
        yield Case(f"unpack_{qtype}", partial(unpack, raw, qtype, whole), (raw, whole))
        yield Case(f"unpack_{qtype}+pitch", partial(unpack, raw, qtype, part), (raw, part))


def all_cases(models: list[str]) -> Iterator[tuple[str, int | None, Case]]:
    """(model, tokens, case); tokens None where they do not matter."""
    for name in models:
        for tokens in TOKENS:
            for group in (norm_cases, head_cases, mlp_cases):
                for case in group(MODELS[name], tokens):
                    yield name, tokens, case
        for case in unpack_cases(MODELS[name]):
            yield name, None, case
    for case in softmax_cases():
        yield "all", LOSS_ROWS, case


def host_cases() -> Iterator[Case]:
    """Each wrapper on a few tokens of the 27B, where the device keeps up with the host."""
    for group in (norm_cases, head_cases, mlp_cases):
        yield from group(MODELS["27b"], 8)
    raw, out = torch.zeros(8, 3024, dtype=torch.uint8, device="cuda"), rand(8, 5376)
    yield Case("unpack_Q4_0", partial(unpack, raw, "Q4_0", out), ())
    logits, target = rand(8, 4096), torch.zeros(8, dtype=torch.int64, device="cuda")
    running = Running.start(8, target.device)
    yield Case("softmax_chunk", partial(triton_ops.softmax_chunk, logits, target, 0, running), ())


def device_times_us(run: Callable[[], object], repeats: int, flush: Tensor) -> list[float]:
    """Microseconds of each of `repeats` launches, with nothing of its data in the cache."""
    for _ in range(3):
        run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in pairs:
        flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e3 for start, stop in pairs]


def host_us(run: Callable[[], object]) -> float:
    """Microseconds that the host spends on a call; meaningful where the device keeps up, so with few tokens."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        run()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / HOST_CALLS * 1e6


def copy_gb_s(moved_bytes: int, repeats: int, flush: Tensor) -> float:
    """Bandwidth of a device copy that reads half of `moved_bytes` and writes as much."""
    source = torch.empty(max(1, moved_bytes // 2), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return moved_bytes / statistics.median(device_times_us(lambda: target.copy_(source), repeats, flush)) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name holds this text")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="folder for kernels_gpu.jsonl")
    options = parser.parse_args()
    lines: list[str] = []

    def tell(**fields: object) -> None:
        lines.append(json.dumps(fields))
        print(lines[-1], flush=True)

    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    peak = copy_gb_s(COPY_BYTES, options.repeats, flush)
    tell(
        kernel="copy", device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        python=sys.version.split()[0], repeats=options.repeats, gb_s=round(peak, 1),
    )  # fmt: skip
    for model, tokens, case in all_cases(options.models):
        if options.only not in case.name:
            continue
        times = device_times_us(case.run, options.repeats, flush)
        middle = statistics.median(times)
        gb_s = case.moved_bytes / middle / 1e3
        equal = copy_gb_s(case.moved_bytes, options.repeats, flush)
        tell(
            kernel=case.name, model=model, tokens=tokens, mb=round(case.moved_bytes / 1e6, 1), us=round(middle, 1),
            us_fastest=round(min(times), 1), us_slowest=round(max(times), 1), gb_s=round(gb_s, 1),
            of_copy=round(gb_s / peak, 3), of_equal_copy=round(gb_s / equal, 3),
        )  # fmt: skip
    for case in host_cases():
        if options.only in case.name:
            tell(kernel=case.name, tokens=8, host_us=round(host_us(case.run), 1))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kernels_gpu.jsonl").write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
