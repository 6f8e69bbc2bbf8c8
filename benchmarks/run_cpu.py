"""Measures what gemwright adds to llama.cpp: decode, prefill, first token and start, against the bare engine.

    python benchmarks/run_cpu.py --model 270m [--repeats 5]

The bare engine is xllamacpp's server, called directly in a process of its own (`run_cpu_bare.py`), same settings.
Both are loaded side by side and asked in turn, so that a slow moment of the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gemwright.engines.llamacpp import LlamaCpp, physical_cores
from gemwright.engines.protocol import Sampling
from gemwright.engines.session import Chat
from gemwright.weights.pull import resolve_model

RESULTS = Path(__file__).parent / "results"
DECODE, PREFILL, CONTEXT = 128, 1024, 4096
Row = dict[str, Any]


class Bare:
    """The parent's side of `run_cpu_bare.py`."""

    def __init__(self, model: Path, threads: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("run_cpu_bare.py")), str(model), str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, prompt: list[int], n_predict: int) -> Row:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"prompt": prompt, "n_predict": n_predict}) + "\n")
        self.process.stdin.flush()
        row: Row = json.loads(self.process.stdout.readline())
        return row

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def prompts(repeat: int, length: int) -> list[int]:
    """Ids that share no prefix with those of another repeat or length, so that no cache helps."""
    return [2] + [1000 + (repeat * 7919 + length * 6007 + at * 31) % 50_000 for at in range(length - 1)]


def in_turn(repeats: int, **ways: Callable[[int], float]) -> dict[str, list[float]]:
    """Each way `repeats` times, in an order that turns round every time; one round before is thrown away."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        order = list(ways.items())
        for name, way in order if repeat % 2 else reversed(order):
            value = way(repeat)
            if repeat:
                found[name].append(value)
    return found


def spread(values: list[float]) -> Row:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def compare(what: str, found: dict[str, list[float]]) -> list[Row]:
    """A row for each way, with the median of its ratio to `bare` in the same round."""
    rows = []
    for name, values in found.items():
        ratios = [value / other for value, other in zip(values, found["bare"], strict=True)]
        gaps = [value - other for value, other in zip(values, found["bare"], strict=True)]
        rows.append({"what": what, "way": name, **spread(values), "ratio": spread(ratios), "delta": spread(gaps)})
    return rows


def in_process(model: Path, threads: int, repeats: int) -> list[Row]:
    """Decode, prefill and first token of an engine that is loaded, of a Chat, and of the bare server."""
    decode = Sampling(max_tokens=DECODE, temperature=0)
    one = Sampling(max_tokens=1, temperature=0)
    other = Bare(model, threads)
    with LlamaCpp(model, context=CONTEXT, threads=threads) as engine:

        def chat(repeat: int) -> float:
            return Chat(engine, decode).say(f"Tell a story of {repeat} friends").tokens_per_s

        rows = compare(
            "decode_tokens_per_s",
            in_turn(
                repeats,
                bare=lambda r: other.ask(prompts(r, 16), DECODE)["tokens_per_s"],
                engine=lambda r: engine.generate(prompts(r, 16), decode).tokens_per_s,
                chat=chat,
            ),
        )
        rows += compare(
            "prefill_tokens_per_s",
            in_turn(
                repeats,
                bare=lambda r: PREFILL / other.ask(prompts(r, PREFILL), 1)["first_token_s"],
                engine=lambda r: PREFILL / engine.generate(prompts(r, PREFILL), one).first_token_s,
            ),
        )
        rows += compare(
            "first_token_s",
            in_turn(
                2 * repeats,
                bare=lambda r: other.ask(prompts(r, 24), 1)["first_token_s"],
                engine=lambda r: engine.generate(prompts(r, 24), one).first_token_s,
            ),
        )
    other.close()
    return rows


def cold(model: Path, threads: int, repeats: int) -> list[Row]:
    """Whole processes: from their start to the first token, then decode and prefill as `gemwright run` reports them."""
    short = [f"The tale of {repeat} friends who went to the sea and" for repeat in range(repeats + 1)]
    long = [" ".join(str(1000 + (repeat * 7919 + at * 31) % 8999) for at in range(PREFILL)) for repeat in range(3)]
    with LlamaCpp(model, context=CONTEXT, threads=threads) as engine:
        ids = {text: [2, *engine.encode(text)] for text in short}
        for text in long[: repeats + 1]:
            # A number is five tokens with its space: cut where the prompt has the wanted length.
            cut = text[: len(text) * PREFILL // len(engine.encode(text))].rpartition(" ")[0]
            ids[cut] = [2, *engine.encode(cut)]
    long = [text for text in ids if text not in short]
    return (
        compare(
            "start_to_first_token_s",
            in_turn(
                2 * repeats,
                bare=lambda r: start_bare(model, threads, ids[short[r % len(short)]]),
                run=lambda r: start_run(model, threads, short[r % len(short)]),
            ),
        )
        + compare(
            "decode_of_a_process_tokens_per_s",
            in_turn(
                repeats,
                bare=lambda r: ask_bare(model, threads, ids[short[r]], DECODE)["tokens_per_s"],
                run=lambda r: ask_run(model, threads, short[r], DECODE)["tokens_per_s"],
            ),
        )
        + compare(
            "prefill_of_a_process_tokens_per_s",
            in_turn(
                repeats,
                bare=lambda r: prefill(ids[long[r % len(long)]], ask_bare(model, threads, ids[long[r % len(long)]], 1)),
                run=lambda r: prefill(ids[long[r % len(long)]], ask_run(model, threads, long[r % len(long)], 1)),
            ),
        )
    )


def prefill(ids: list[int], row: Row) -> float:
    assert row.get("prompt_tokens", len(ids)) == len(ids)
    return len(ids) / float(row["first_token_s"])


def ask_bare(model: Path, threads: int, ids: list[int], count: int) -> Row:
    process = Bare(model, threads)
    row = process.ask(ids, count)
    process.close()
    return row


def start_bare(model: Path, threads: int, ids: list[int]) -> float:
    begin = time.perf_counter()
    process = Bare(model, threads)
    process.ask(ids, 1)
    took = time.perf_counter() - begin
    process.close()
    return took


def run_command(model: Path, threads: int, text: str, count: int) -> list[str]:
    command = [sys.executable, "-m", "gemwright", "run", text, "--raw", "--model", str(model)]
    return [*command, "--max-tokens", str(count), "--temperature", "0", "--threads", str(threads)]


def ask_run(model: Path, threads: int, text: str, count: int) -> Row:
    command = [*run_command(model, threads, text, count), "--json"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    row: Row = json.loads(done.stdout)
    return row


def start_run(model: Path, threads: int, text: str) -> float:
    """Until the first byte of the answer is on stdout."""
    begin = time.perf_counter()
    command = run_command(model, threads, text, 1)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        process.stdout.read(1)
        took = time.perf_counter() - begin
        process.stdout.read()
    return took


def help_time(repeats: int) -> Row:
    def ask() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "gemwright", "--help"], capture_output=True, check=True)
        return time.perf_counter() - begin

    ask()
    return {"what": "help_s", "way": "gemwright --help", **spread([ask() for _ in range(2 * repeats)])}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(facts: Row, rows: list[Row]) -> str:
    lines = [
        "# `gemwright run` against the engine's own speed",
        "",
        f"Command: `{facts['command']}`. {facts['cpu']}, {facts['threads']} threads, {facts['system']}; "
        f"Python {facts['python']}, xllamacpp {facts['xllamacpp']}. Model: {facts['model']}. {facts['date']}. "
        f"Load of the machine at the start and end: {facts['load']}.",
        "",
        f"Decode is {DECODE} tokens after a prompt of 16, prefill a prompt of {PREFILL}, first token one of 24; "
        "greedy. `engine` and `chat` are in this process, `run` is the command `gemwright run` (of a process: with "
        "--json; start: until the first byte of its answer). Asked in turn; ratio and difference are of the same "
        "round (median, lowest to highest).",
        "",
        "| what | way | median | lowest to highest | ratio to bare | difference to bare | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio, delta = (
            ("", "") if "ratio" not in row or row["way"] == "bare" else map(say, (row["ratio"], row["delta"]))
        )
        lines.append(
            f"| {row['what']} | {row['way']} | {row['median']:.4g} | {row['min']:.4g} to {row['max']:.4g} "
            f"| {ratio} | {delta} | {row['n']} |"
        )
    return "\n".join(lines) + "\n"


def say(value: Row) -> str:
    return f"{value['median']:.4g} ({value['min']:.4g} to {value['max']:.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="270m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    asked = parser.parse_args()
    model = resolve_model(asked.model)
    before = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    rows = in_process(model, asked.threads, asked.repeats) + cold(model, asked.threads, asked.repeats)
    rows.append(help_time(asked.repeats))
    after = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    facts = {
        "command": f"python benchmarks/run_cpu.py --model {Path(asked.model).name} "
        f"--repeats {asked.repeats} --threads {asked.threads}",
        "cpu": cpu_name(),
        "threads": asked.threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "xllamacpp": version("xllamacpp"),
        "model": model.name,
        "date": date.today().isoformat(),
        "load": f"{before:.1f}, {after:.1f}",
    }
    slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['cpu']} {asked.threads}t".lower()).strip("-")
    target = RESULTS / f"run_cpu_{slug}_{facts['date']}"
    RESULTS.mkdir(exist_ok=True)
    lines = [json.dumps(facts | row) for row in rows]
    target.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(table(facts, rows), encoding="utf-8")
    print(table(facts, rows))


if __name__ == "__main__":
    main()
