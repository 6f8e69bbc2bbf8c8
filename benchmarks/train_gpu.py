"""LoRA on packed Gemma 3 of any size on one GPU, beside what the same GPU does with the matrix products alone.

    python benchmarks/train_gpu.py                            # the table of issue sizes and caps
    python benchmarks/train_gpu.py --only 27b:4x2048:8 4b     # some of it: size[:batch x sequence[:cap]]
    python benchmarks/train_gpu.py --more                     # other formats, sources, slower links, no cap

Weights are random, in the true shapes. Every configuration is a process of its own, in which it runs under
`torch.cuda.set_per_process_memory_fraction` after the limit (three passes of products over every linear, flash
attention, the head on all positions) and in turns with its resident twin (no cap, nothing streamed or offloaded, each
layer keeping what it keeps under the cap), since a card at its power limit slows by a percent while it warms. Beyond
8,192 tokens a row the limit counts the attention of 8,192 only. Every position has a label. Runs from the source tree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RANK, GIB = 16, 2**30
# Seconds of steps that are not counted, three at least.
WARM_S = 4.0
# Steps of more tokens: the second alone is counted. The first compiles, and touches its memory for the first time.
LONG = 16_384
COLUMNS = ("case", "tokens/s", "of resident", "of the limit", "limit tokens/s", "waiting", "peak GiB", "predicted")
COLUMNS = (*COLUMNS, "host GiB", "step s (spread)", "predicted s")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L4": 121e12}


@dataclass(frozen=True)
class Case:
    size: str
    batch: int
    sequence: int
    cap_gib: float | None = 8.0
    quantization: str = "Q4_0"
    residency: str = "auto"
    source: str = "auto"
    recompute: str = "auto"
    link_copies: int = 1
    compute: str = "bf16"
    cold: bool = False

    @property
    def name(self) -> str:
        cap = "none" if self.cap_gib is None else f"{self.cap_gib:g}"
        extra = [v for v, d in ((self.quantization, "Q4_0"), (self.source, "auto"), (self.compute, "bf16")) if v != d]
        extra += (
            ["cold"] * self.cold
            + [f"{self.link_copies} copies"] * (self.link_copies > 1)
            + [self.residency] * (self.residency != "auto")
        )
        return " ".join([f"{self.size}:{self.batch}x{self.sequence}:{cap}", *extra])


TABLE = [
    Case("27b", 4, 2048),
    Case("27b", 1, 2048),
    Case("27b", 1, 2048, 6.0),
    Case("27b", 64, 128),
    Case("12b", 4, 2048),
    Case("12b", 1, 2048),
    Case("4b", 4, 2048),
    Case("4b", 1, 2048),
    Case("4b", 1, 131_072),
    Case("12b", 1, 65_536),
    Case("27b", 1, 32_768),
]
MORE = [
    Case("27b", 4, 2048, residency="streamed"),
    Case("27b", 4, 2048, quantization="Q4_K_M"),
    Case("12b", 4, 2048, quantization="Q8_0"),
    Case("12b", 1, 2048, source="pinned"),
    Case("12b", 1, 2048, source="pageable"),
    Case("12b", 4, 2048, source="pageable"),
    Case("12b", 4, 2048, source="mapped", cold=True),
    Case("12b", 4, 2048, source="pageable", cold=True),
    Case("4b", 4, 2048, residency="streamed"),
    Case("27b", 4, 2048, None),
    Case("27b", 1, 2048, None),
    Case("4b", 4, 2048, None),
    Case("12b", 4, 2048, 24.0),
    Case("1b", 4, 2048),
    Case("270m", 4, 2048),
    Case("12b", 1, 2048, link_copies=4),
    Case("12b", 4, 2048, link_copies=8),
]


def resident(case: Case) -> Case:
    """The same work with nothing streamed and no cap."""
    return replace(case, cap_gib=None, residency="resident", source="auto", link_copies=1, cold=False)


def model_path(case: Case, folder: Path) -> Path:
    from gemwright.spec import SPECS
    from gemwright.weights.random_model import write_random_gguf

    path = folder / f"{case.size}-{case.quantization}.gguf"
    if not path.exists():
        write_random_gguf(path, SPECS[case.size], case.quantization)
    return path


def limit_s(case: Case) -> tuple[float, float]:
    """(seconds of a step's products, attention and head alone, FLOP/s of these products)."""
    import torch

    from gemwright.kernels.attend import plan
    from gemwright.layout import GROUPS
    from gemwright.spec import SPECS
    from gemwright.train.setup import median_s

    spec, device, bf16 = SPECS[case.size], torch.device("cuda"), torch.bfloat16
    tokens = case.batch * case.sequence
    rows = min(tokens, 8192)
    products, flops = 0.0, 0
    for parts in GROUPS.values():
        out, width = sum(spec.linear_shapes[p][0] for p in parts), spec.linear_shapes[parts[0]][1]
        w = torch.randn(out, width, device=device, dtype=bf16) * 0.02
        x, y = torch.randn(rows, width, device=device, dtype=bf16), torch.empty(rows, out, device=device, dtype=bf16)
        forward = median_s(partial(torch.mm, x, w.t(), out=y))
        products += 2 * forward + median_s(partial(torch.mm, y, w, out=torch.empty_like(x)))
        flops += 3 * 2 * rows * out * width
    attention, length = 0.0, min(case.sequence, rows)
    for window in (spec.window, None):
        share = sum(spec.is_global(i) == (window is None) for i in range(spec.layers))
        made = plan([length] * (rows // length), window, device, bf16)
        q = torch.randn(rows, spec.heads, spec.head_dim, device=device, dtype=bf16) / 16
        k, v = (torch.randn(rows, spec.kv_heads, spec.head_dim, device=device, dtype=bf16) for _ in range(2))
        out, kept = made.forward(q, k, v)
        back = median_s(partial(made.backward, out, q, k, v, out, kept))
        attention += share * (2 * median_s(partial(made.forward, q, k, v)) + back)
    head = torch.randn(16_384, spec.hidden, device=device, dtype=bf16)
    h = torch.randn(rows, spec.hidden, device=device, dtype=bf16)
    logits = h @ head.t()
    a_chunk = median_s(partial(torch.mm, h, head.t(), out=logits)) + median_s(partial(torch.mm, logits, head))
    step = spec.layers * products + attention + a_chunk * spec.vocab / len(head)
    return step * tokens / rows, flops / products


def forget_pages(path: Path) -> None:
    """Have the system's page cache drop a file (Linux), which nothing may have mapped."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def slow_link(setup, copies: int) -> None:
    """Copy every layer and every activation several times, as if the link were so many times slower."""
    source, store = setup.model.residency._source, setup.store
    whole = source.copy

    def copy(layer, slot, ready):
        for _ in range(copies - 1):
            whole(layer, slot, ready)
        return whole(layer, slot, ready)

    source.copy = copy
    store.copies = copies


def config_of(case: Case, file):
    from gemwright.train.config import TrainConfig

    return TrainConfig(
        data="none",
        model=str(file.path),
        out="none",
        seq=case.sequence,
        tokens_per_step=case.batch * case.sequence,
        rank=RANK,
        vram=None if case.cap_gib is None else int(case.cap_gib * GIB),
        residency=case.residency,
        source=case.source,
        recompute=case.recompute,
        compute=case.compute,
    )


def planned(case: Case, file, device):
    from gemwright.train.setup import plan_for

    return plan_for(config_of(case, file), file, device, link_share=1 / case.link_copies)


def run(case: Case, like: Case, folder: Path, steps: int, limit: tuple[float, float], aside_s: float | None) -> dict:
    """Measure `case`, its layers keeping what they keep in `like`; None for `aside_s`: the command began earlier."""
    import psutil
    import torch

    from gemwright.plan.training import estimate, itemise
    from gemwright.train.batches import Encoded
    from gemwright.train.memory import peak_rss_bytes
    from gemwright.train.optimizer import Optimizer
    from gemwright.train.setup import card_here, job_of, new_lora, on_gpu, use_expandable_segments
    from gemwright.weights.model_file import open_model

    use_expandable_segments()
    if case.cold:
        forget_pages(model_path(case, folder))
    device, file = torch.device("cuda", 0), open_model(model_path(case, folder))
    best_s, flops = limit
    torch.cuda.empty_cache()
    tokens = case.batch * case.sequence
    config = config_of(case, file)
    start = time.perf_counter()
    plan = planned(like, file, device)
    if case != like:
        plan = replace(planned(case, file, device), keep=plan.keep, on_host=(False,) * file.spec.layers)
        job = job_of(config, file)
        plan = estimate(job, itemise(job, plan), card_here(device))
    lora = new_lora(config, file, device, torch.bfloat16)
    setup = on_gpu(plan, config, file, lora, device, torch.bfloat16)
    if case.link_copies > 1:
        slow_link(setup, case.link_copies)
    torch.cuda.synchronize()
    ready_s = time.perf_counter() - start
    draw = torch.Generator().manual_seed(0)
    documents = [
        Encoded(torch.randint(0, file.spec.vocab, (case.sequence,), generator=draw).tolist(), [True] * case.sequence)
        for _ in range(case.batch)
    ]
    optimizer, times, waits, losses = Optimizer(lora, 0.0, 1.0), [], [], []
    rows = setup.rows([[document] for document in documents])
    warm = None if tokens <= LONG else 1
    while warm is None or len(times) < warm + steps:
        start = time.perf_counter()
        done = setup.forward_backward(rows, 0)
        rows = setup.rows([[document] for document in documents])
        losses.append(done.loss)
        optimizer.update(1e-4, losses[-1])
        times.append(time.perf_counter() - start)
        if len(times) == 1:
            first_s = time.time() - psutil.Process().create_time()
        waits.append(setup.waited_s())
        if warm is None and len(times) >= 3 and sum(times) >= WARM_S:
            warm = len(times)
    step_s = statistics.median(times[warm:])
    peaks = torch.cuda.memory_stats(device)
    name = torch.cuda.get_device_name(device)
    peak_flops = next((value for key, value in PEAK_FLOPS.items() if key in name), flops)
    executed = products_of(file.spec, plan, tokens)
    source_kind = setup.model.residency.source_kind
    setup.close()
    return {
        **asdict(case),
        "case": case.name,
        "tokens_per_s": tokens / step_s,
        "step_s": step_s,
        "step_s_spread": [min(times[warm:]), max(times[warm:])],
        "step_times_s": times[warm:],
        "first_step_s": times[0],
        "ready_s": ready_s,
        "command_to_first_step_s": None if aside_s is None else first_s - aside_s,
        "waiting_share": statistics.median(waits[warm:]) / step_s,
        "limit_tokens_per_s": tokens / best_s,
        "share_of_limit": best_s / step_s,
        "limit_flops": flops,
        "hfu": executed / step_s / peak_flops,
        "peak_allocated_bytes": peaks["allocated_bytes.all.peak"],
        "peak_reserved_bytes": peaks["reserved_bytes.all.peak"],
        "predicted_peak_bytes": plan.predicted_bytes,
        "predicted_step_s": plan.step_s,
        "peak_host_bytes": peak_rss_bytes(),
        "file_bytes": file.bytes(),
        "source_kind": source_kind,
        "plan": plan.summary(),
        "card": card_here(device)._asdict(),
        "losses": losses,
        "device": name,
    }


def products_of(spec, plan, tokens: int) -> float:
    """FLOPs of the products that a step really runs."""
    from gemwright.layout import Keep

    weights = {part: rows * cols for part, (rows, cols) in spec.linear_shapes.items()}
    whole = sum(weights.values())
    again = {Keep.INPUT: whole, Keep.NARROW: whole - weights["o"] - weights["down"], Keep.PRODUCTS: 0}
    again[Keep.HEADS] = weights["gate"] + weights["up"]
    layers = sum(2 * whole + again[keep] for keep in plan.keep)
    return 2.0 * tokens * (layers + 2 * spec.vocab * spec.hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "gemwright-random")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--compute", default="bf16")
    parser.add_argument("--no-resident", action="store_true", help="leave the resident twin of each case out")
    parser.add_argument("--turns", type=int, default=2, help="how often a case and its twin take turns")
    parser.add_argument("--time-limit", type=float, default=1e9, help="start no case after so many seconds")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.models.mkdir(parents=True, exist_ok=True)
    if options.case:
        for row in run_all([Case(**case) for case in json.loads(options.case)], options):
            print(json.dumps(row), flush=True)
        return
    begun = time.perf_counter()
    cases = [replace(case, compute=options.compute) for case in [*TABLE, *(MORE if options.more else [])]]
    if options.only:
        cases = [case for case in cases if any(case.name.startswith(wanted) for wanted in options.only)]
    rows: list[dict] = []
    twins: list[dict] = []
    for case in cases:
        if time.perf_counter() - begun > options.time_limit:
            print(f"{case.name}: left out, no time", file=sys.stderr)
            continue
        wanted = not options.no_resident and case.sequence <= 8192
        turns = child([case, resident(case)] * options.turns if wanted else [case], options)
        row = together(turns[::2] if wanted else turns)
        if wanted and "error" not in row:
            twins.append(together(turns[1::2]))
            ratios = [twin["step_s"] / own["step_s"] for own, twin in zip(turns[::2], turns[1::2], strict=True)]
            row |= {"ratio_to_resident": twins[-1]["step_s"] / row["step_s"], "ratios": ratios}
        rows.append(row)
        print(json.dumps(row), flush=True)
    if rows:
        write([*rows, *twins], options)


def together(turns: list[dict]) -> dict:
    """The first turn's row, with the times of all."""
    first = turns[0]
    if "error" in first or len(turns) == 1:
        return first
    times = [step_s for turn in turns for step_s in turn["step_times_s"]]
    step_s = statistics.median(times)
    slower = step_s / first["step_s"]
    return first | {
        "step_s": step_s,
        "step_times_s": times,
        "step_s_spread": [min(times), max(times)],
        "tokens_per_s": first["tokens_per_s"] / slower,
        "share_of_limit": first["share_of_limit"] / slower,
        "hfu": first["hfu"] / slower,
        "waiting_share": statistics.median(turn["waiting_share"] for turn in turns),
        "peak_reserved_bytes": max(turn["peak_reserved_bytes"] for turn in turns),
        "peak_allocated_bytes": max(turn["peak_allocated_bytes"] for turn in turns),
    }


def run_all(cases: list[Case], options: argparse.Namespace) -> list[dict]:
    """The cases of one process, one after another; its limit is measured once, before them."""
    import gc

    start = time.perf_counter()
    model_path(cases[0], options.models)
    limit, rows = limit_s(cases[0]), []
    for case in cases:  # of which only the first begins with the process
        aside_s = None if rows else time.perf_counter() - start
        rows.append(run(case, cases[0], options.models, options.steps, limit, aside_s))
        gc.collect()
    return rows


def child(cases: list[Case], options: argparse.Namespace) -> list[dict]:
    """Run cases in a process of their own; a row each, with `error` where it failed."""
    wanted = json.dumps([asdict(case) for case in cases])
    command = [sys.executable, __file__, "--case", wanted, "--models", str(options.models)]
    steps = options.steps if cases[0].batch * cases[0].sequence <= LONG else 1
    done = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{cases[0].name}: failed: {done.stderr[-1500:]}", file=sys.stderr)
        return [{**asdict(cases[0]), "case": cases[0].name, "error": last}]
    rows = [json.loads(line) for line in done.stdout.strip().splitlines()]
    for row in rows:
        peak, predicted = row["peak_reserved_bytes"] / GIB, row["predicted_peak_bytes"] / GIB
        since_s = row["command_to_first_step_s"]
        since = f"first {row['first_step_s']:.1f} after {row['ready_s']:.1f}"
        since += "" if since_s is None else f", {since_s:.1f} from the command"
        print(
            f"{row['case']:34} {row['tokens_per_s']:8.0f} tok/s  share {row['share_of_limit']:.2f}  "
            f"waiting {row['waiting_share']:.2f}  peak {peak:.2f} (predicted {predicted:.2f}) GiB  "
            f"host {row['peak_host_bytes'] / GIB:.1f}  step {row['step_s']:.3f} "
            f"(predicted {row['predicted_step_s']:.3f})  {since}",
            file=sys.stderr,
        )
    return rows


def write(rows: list[dict], options: argparse.Namespace) -> None:
    import torch

    device = next((row["device"] for row in rows if "device" in row), "gpu")
    slug = "-".join(device.lower().split())
    stem = options.out / f"train_gpu_{slug}_{date.today().isoformat()}"
    options.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = "".join(table_line(row) for row in rows)
    text = f"""# LoRA on packed Gemma 3 on one GPU, {date.today().isoformat()}

`python benchmarks/train_gpu.py` on {device}; Python {platform.python_version()},
PyTorch {torch.__version__}. Random weights in the true shapes, rank {RANK} on all linears, every position
labelled, {options.steps} timed steps a turn after {WARM_S:g} s of others (one after one for more than {LONG:,}
tokens), {options.turns} turns with the resident twin; in brackets the ratio of each turn. Cases are
size:batch x sequence:cap in GiB. Peak: what PyTorch reserved; host: the process's resident memory at most, the mapped
file counted in.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
{lines}
"""
    stem.with_suffix(".md").write_text(text, encoding="utf-8")


def table_line(row: dict) -> str:
    if "error" in row:
        return f"| {row['case']} | {row['error']} | | | | | | | | | |\n"
    ratio = row.get("ratio_to_resident")
    low, high = row["step_s_spread"]
    values = (
        row["case"],
        f"{row['tokens_per_s']:,.0f}",
        f"{ratio:.3f} ({', '.join(f'{r:.3f}' for r in row['ratios'])})" if ratio else "",
        f"{row['share_of_limit']:.2f}",
        f"{row['limit_tokens_per_s']:,.0f}",
        f"{row['waiting_share']:.2f}",
        f"{row['peak_reserved_bytes'] / GIB:.2f}",
        f"{row['predicted_peak_bytes'] / GIB:.2f}",
        f"{row['peak_host_bytes'] / GIB:.1f}",
        f"{row['step_s']:.3f} ({low:.3f} to {high:.3f})",
        f"{row['predicted_step_s']:.3f}",
    )
    return "| " + " | ".join(values) + " |\n"


if __name__ == "__main__":
    main()
