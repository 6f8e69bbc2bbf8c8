"""How near `gemwright plan` comes: predicted against measured bytes and seconds on this machine.

    python benchmarks/plan_accuracy.py                 # running and tuning on the CPU
    python benchmarks/plan_accuracy.py --gpu           # tuning on the GPU, random weights in the true shapes
    python benchmarks/plan_accuracy.py --gpu --only 27b --half held-out
    python benchmarks/plan_accuracy.py --gpu --rows a.jsonl b.jsonl   # the table and plot of earlier runs together

Rows of `train_gpu.py` may be among these; their speeds were looked at while formulas were made, so none is held out.

Every case is a process of its own; on a GPU it imports what it needs while the one before it runs. Cases with which
the formulas were fitted are marked; the others are held out. Run `gemwright doctor` first: the plan goes by its probes.
Writes `plan_accuracy_<hardware>_<date>.jsonl`, a table beside it and a plot.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
GIB = 2**30


@dataclass(frozen=True)
class Case:
    purpose: str
    size: str
    quantization: str = "Q4_0"
    context: int = 4096
    seq: int = 1024
    batch: int = 1
    rank: int = 16
    cap_gib: float | None = None
    residency: str = "auto"
    device: str = "cpu"
    held_out: bool = True


RUN = [
    Case("run", "270m", "Q4_K_M", 4096, held_out=False),
    Case("run", "270m", "Q4_K_M", 32_768, held_out=False),
    Case("run", "270m", "Q4_K_M", 1024, held_out=False),
    Case("run", "270m", "Q4_K_M", 16_384, held_out=False),
    Case("run", "1b", "Q4_0", 4096, held_out=False),
    Case("run", "1b", "Q8_0", 4096, held_out=False),
    Case("run", "1b", "Q4_K_M", 4096, held_out=False),
    Case("run", "1b", "Q5_0", 8192, held_out=False),
    Case("run", "1b", "F16", 2048, held_out=False),
    Case("run", "1b", "Q4_0", 32_768, held_out=False),
    Case("run", "4b", "Q4_0", 4096, held_out=False),
    Case("run", "4b", "Q4_K_M", 4096, held_out=False),
    Case("run", "4b", "Q8_0", 16_384, held_out=False),
]
TUNE = [
    Case("tune", "270m", "Q4_K_M", seq=1024, held_out=False),
    Case("tune", "270m", "Q4_K_M", seq=256, batch=2, held_out=False),
    Case("tune", "270m", "Q4_K_M", seq=2048, rank=64),
    Case("tune", "270m", "Q4_K_M", seq=512, batch=8, rank=8),
    Case("tune", "1b", "Q4_0", seq=256, held_out=False),
    Case("tune", "1b", "Q8_0", seq=512, rank=32),
]


FORMATS = {"12b": ("Q4_0", "Q8_0"), "27b": ("Q4_0", "Q4_K_M")}


def gpu_cases() -> list[Case]:
    """Sizes, lengths, batches, ranks, caps, residencies and formats; first those fitted with, then those held out."""

    def case(size: str, turn: int, *rest) -> Case:
        kinds = FORMATS.get(size, ("Q4_0", "Q4_K_M", "Q8_0"))
        return Case("tune", size, kinds[turn % len(kinds)], 0, *rest)

    cases = []
    shapes = [(128, 16), (512, 4), (2048, 1), (2048, 4), (8192, 1), (32_768, 1)]
    others = [(256, 8), (1024, 2), (4096, 1), (384, 13), (16_384, 1)]
    sizes = ("270m", "1b", "4b", "12b", "27b")
    for size in sizes:
        for index, (seq, batch) in enumerate(shapes):
            cap, rank = (6.0, 8.0, 12.0, 24.0)[(index + len(size)) % 4], (8, 16, 64, 128)[index % 4]
            how = "streamed" if index % 3 == 2 else "auto"
            cases.append(case(size, index, seq, batch, rank, cap, how, "cuda", False))
        cases.append(case(size, 0, 2048, 2, 16, None, "resident", "cuda", False))
        cases.append(case(size, 0, 1024, 4, 32, 8.0, "auto", "cuda", False))
    for turn, size in enumerate(sizes):
        for index, (seq, batch) in enumerate(others):
            cap, rank = (8.0, None, 6.0, 24.0, 12.0)[(index + turn) % 5], (32, 8, 128, 16, 48)[(index + 2 * turn) % 5]
            how = "streamed" if (index + turn) % 4 == 3 else "resident" if cap is None else "auto"
            cases.append(case(size, index + turn + 1, seq, batch, rank, cap, how, "cuda", True))
    return cases


def model_path(case: Case, folder: Path) -> Path:
    from gemwright.spec import SPECS
    from gemwright.weights.gguf_reader import open_gguf
    from gemwright.weights.pull import resolve_model
    from gemwright.weights.random_model import write_random_gguf

    if case.size == "270m" and case.device == "cpu":
        return Path(resolve_model("270m"))
    path = folder / f"{case.size}-{case.quantization}.gguf"
    if not path.exists():
        real = open_gguf(resolve_model("270m")) if case.purpose == "run" else None
        write_random_gguf(path, SPECS[case.size], case.quantization, tokenizer_from=real)
    return path


def measure(case: Case, folder: Path) -> list[dict]:
    """Rows of one case: bytes on the device, bytes in RAM, seconds."""
    from gemwright.plan.answer import Work, answer
    from gemwright.plan.model_bytes import weigh
    from gemwright.rigs import this_machine

    path = model_path(case, folder)
    vram = None if case.cap_gib is None else int(case.cap_gib * GIB)
    tokens = case.seq * case.batch
    work = Work(case.purpose, case.seq, tokens, case.rank, max(case.context, 1), vram, case.residency)
    said = answer(case.size, weigh(path), this_machine(), work, hint=False)
    if not said.fits:
        return [row("device", case, 0, 0) | {"error": said.what}]
    if case.purpose == "run":
        from gemwright.engines.measure import measure_run

        got = measure_run(path, case.context)
        return [
            row("host", case, said.host_bytes, got.host_bytes),
            row("decode", case, 1 / said.tokens_per_s, 1 / got.decode_tokens_per_s),
            row("prefill", case, 1 / said.prefill_tokens_per_s, 1 / got.prefill_tokens_per_s),
        ]
    from gemwright.train.config import TrainConfig
    from gemwright.train.verify import measure_tune

    config = TrainConfig(
        data=Path("random"),
        model=path,
        out=Path("nowhere"),
        seq=case.seq,
        tokens_per_step=case.seq * case.batch,
        rank=case.rank,
        vram=vram,
        residency=case.residency,
        device=case.device,
    )
    got = measure_tune(config, 3 if tokens <= 8192 else 1)
    tokens = case.seq * case.batch
    rows = [
        row("host", case, said.host_bytes, got.host_bytes),
        row("seconds", case, tokens / said.tokens_per_s, tokens / got.tokens_per_s),
    ]
    return rows + ([row("device", case, said.device_bytes, got.device_bytes)] if got.device_bytes else [])


def row(kind: str, case: Case, predicted: float, measured: float) -> dict:
    return {
        "kind": kind,
        "config": asdict(case),
        "predicted_bytes" if kind in ("host", "device") else "predicted_s": predicted,
        "measured_bytes" if kind in ("host", "device") else "measured_s": measured,
        "held_out": case.held_out,
    }


def rows_of(line: dict) -> list[dict]:
    """A row as it is, or those that a row of `train_gpu.py` amounts to."""
    if "kind" in line:
        return [line]
    shape = {"context": 0, "seq": line["sequence"], "batch": line["batch"], "cap_gib": line["cap_gib"]}
    case = Case(
        "tune", line["size"], line["quantization"], **shape, residency=line["residency"], device="cuda", held_out=False
    )
    device = row("device", case, line["predicted_peak_bytes"], line["peak_reserved_bytes"])
    return [device, row("seconds", case, line["predicted_step_s"], line["step_s"])]


def values(found: dict) -> tuple[float, float]:
    """(predicted, measured) of a row."""
    unit = "bytes" if "predicted_bytes" in found else "s"
    return found[f"predicted_{unit}"], found[f"measured_{unit}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], help="sizes")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "gemwright-random")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--half", choices=("both", "fitted", "held-out"), default="both")
    parser.add_argument("--rows", nargs="*", type=Path, default=[])
    parser.add_argument("--time-limit", type=float, default=1e9, help="start no case after so many seconds")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.models.mkdir(parents=True, exist_ok=True)
    if options.rows:
        lines = [line for path in options.rows for line in path.read_text(encoding="utf-8").splitlines()]
        write([found for line in lines for found in rows_of(json.loads(line))], options)
        return
    if options.case:
        import gemwright.train.verify  # noqa: F401

        sys.stdin.readline()  # our turn
        print(json.dumps(measure(Case(**json.loads(options.case)), options.models)))
        return
    cases = gpu_cases() if options.gpu else [*RUN, *TUNE]
    cases = [case for case in cases if not options.only or case.size in options.only]
    if options.half != "both":
        cases = [case for case in cases if case.held_out == (options.half == "held-out")]
    for case in cases:
        model_path(case, options.models)
    rows: list[dict] = []
    begun, children = time.perf_counter(), []
    for index, case in enumerate(cases):
        if time.perf_counter() - begun > options.time_limit:
            print(f"{label(case)}: left out, no time", file=sys.stderr)
            break
        running = children.pop() if children else child(case, options)
        if options.gpu:  # the next imports meanwhile
            children += [child(following, options) for following in cases[index + 1 : index + 2]]
        out, errors = running.communicate("\n")
        if running.returncode:
            last = (errors.strip().splitlines() or ["no output"])[-1]
            print(f"{label(case)}: {last}", file=sys.stderr)
            continue
        for found in json.loads(out.strip().splitlines()[-1]):
            rows.append(found)
            predicted, measured = values(found)
            if measured:
                print(f"{label(case):44} {found['kind']:8} {predicted / measured - 1:+7.1%}", file=sys.stderr)
    for waiting in children:
        waiting.kill()
    write(rows, options)


def child(case: Case, options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--models", str(options.models)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, encoding="utf-8")


def label(case: Case) -> str:
    if case.purpose == "run":
        return f"run {case.size} {case.quantization} context {case.context}"
    cap = "" if case.cap_gib is None else f" cap {case.cap_gib:g} GiB"
    return f"tune {case.size} {case.quantization} {case.batch}x{case.seq} rank {case.rank}{cap} {case.residency}"


def write(rows: list[dict], options: argparse.Namespace) -> None:
    name = hardware()
    stem = options.out / f"plan_accuracy_{'-'.join(name.lower().split())}_{date.today().isoformat()}"
    options.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".jsonl").write_text("".join(json.dumps(found) + "\n" for found in rows), encoding="utf-8")
    good = [found for found in rows if "error" not in found]
    summary = "".join(summary_line(good, kind, held) for kind in kinds(good) for held in (False, True))
    lines = "".join(case_line(found) for found in good)
    text = f"""# Predicted against measured, {date.today().isoformat()}

`python benchmarks/plan_accuracy.py{" --gpu" if options.gpu else ""}` on {name}; Python {platform.python_version()}.
Errors are predicted over measured, less one; held-out cases were never used to fit a constant.

| what | cases | worst | mean size | under by at most |
|---|---|---|---|---|
{summary}
| case | what | predicted | measured | error | held out |
|---|---|---|---|---|---|
{lines}
![Predicted against measured]({stem.name}.png)
"""
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(good, stem.with_suffix(".png"))


def hardware() -> str:
    from gemwright.machine import inspect

    machine = inspect()
    return machine.gpus[0].name if machine.gpus else str(machine.cpu.name)


def kinds(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(found["kind"] for found in rows))


def summary_line(rows: list[dict], kind: str, held_out: bool) -> str:
    some = [values(found) for found in rows if found["kind"] == kind and found["held_out"] == held_out]
    if not some:
        return ""
    errors = [predicted / measured - 1 for predicted, measured in some]
    worst, mean = max(errors, key=abs), statistics.mean(map(abs, errors))
    said = "held out" if held_out else "fitted"
    return f"| {kind}, {said} | {len(errors)} | {worst:+.1%} | {mean:.1%} | {max(0.0, -min(errors)):.1%} |\n"


def case_line(found: dict) -> str:
    predicted, measured = values(found)
    scale, unit = (GIB, "GiB") if "predicted_bytes" in found else (1, "s")
    numbers = f"{predicted / scale:.3f} {unit} | {measured / scale:.3f} {unit} | {predicted / measured - 1:+.1%}"
    held = "yes" if found["held_out"] else ""
    return f"| {label(Case(**found['config']))} | {found['kind']} | {numbers} | {held} |\n"


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    shown = kinds(rows)
    figure = Figure(figsize=(4 * len(shown), 4), dpi=110, layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        unit = "GiB" if kind in ("host", "device") else "s"
        scale = GIB if unit == "GiB" else 1
        for held, colour, name in ((False, "#9db7d5", "fitted"), (True, "#1f4e8c", "held out")):
            some = [values(found) for found in rows if found["kind"] == kind and found["held_out"] == held]
            axes.scatter([m / scale for _, m in some], [p / scale for p, _ in some], s=18, color=colour, label=name)
        every = [v / scale for found in rows if found["kind"] == kind for v in values(found)]
        ends = [min(every) * 0.8, max(every) * 1.2]
        axes.plot(ends, ends, color="#888888", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel=f"measured ({unit})", ylabel=f"predicted ({unit})", title=kind)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    main()
