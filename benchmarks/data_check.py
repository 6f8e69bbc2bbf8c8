"""What `gemwright data check` costs, how many near duplicates it finds, and how long packing takes.

    python benchmarks/data_check.py                  # a file of 1 GB, 3,000 pairs, a million examples
    python benchmarks/data_check.py --gb 0.1 --pairs 300

The file's rows are conversations of random words of the demo's data, half of them Russian. A pair is a text and a
copy of it with some words replaced; what they share is counted exactly (Jaccard, over pieces of eight characters).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    from gemwright.machine import inspect

    rng, words = random.Random(0), vocabulary()
    cost = checking(rng, words, int(options.gb * 1e9))
    found, pack_s = likeness(rng, words, options.pairs), packing(options.examples)
    cpu, load = inspect().cpu.name or "CPU", os.getloadavg()[0]
    lines = "".join(f"| {share:.2f} | {hits} of {count} |\n" for share, (hits, count) in sorted(found.items()))
    size, seconds = cost["bytes"] / 1e6, cost["seconds"]
    flags = f"--gb {options.gb:g} --pairs {options.pairs} --examples {options.examples}"
    text = f"""# Checking and packing data, {date.today().isoformat()}

`python benchmarks/data_check.py {flags}` on {cpu}, one core, load {load:.1f}; Python {platform.python_version()}.

`gemwright data check` of {size:,.0f} MB of JSONL ({cost["read"]:,} conversations): {seconds:.0f} s,
{size / seconds:.0f} MB/s, peak {cost["peak_rss_bytes"] / 1e6:.0f} MB. Rows of 1,024 tokens for {options.examples:,}
examples of 20 to 900 laid out in {pack_s:.2f} s.

| shared, to the nearest 0.05 | near duplicates found |
|---|---|
{lines}"""
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"data_check_{'-'.join(cpu.lower().split()[:2])}_{date.today().isoformat()}.md"
    (options.out / name).write_text(text, encoding="utf-8")
    print(text)


def vocabulary() -> tuple[list[str], list[str]]:
    """Words of the demo's data: all, and the Cyrillic ones."""
    from gemwright.data.cldr import split_path
    from gemwright.data.read import iter_examples

    examples = iter_examples(split_path("train"))
    words = sorted({word for e in examples for turn in e.messages for word in turn["content"].split()})
    return words, [word for word in words if "а" <= word[0].lower() <= "я"]


def checking(rng: random.Random, words: tuple[list[str], list[str]], size: int) -> dict[str, float]:
    """Seconds and peak memory of the verb over a file of `size` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path, written = Path(folder) / "rows.jsonl", 0
        with path.open("w", encoding="utf-8") as file:
            while written < size:
                turns = [" ".join(rng.choices(words[rng.random() < 0.5], k=rng.randint(5, 120))) for _ in "ab"]
                row = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)]
                line = json.dumps({"messages": row}, ensure_ascii=False) + "\n"
                written += len(line.encode())
                file.write(line)
        start = time.perf_counter()
        command = [sys.executable, "-m", "gemwright", "data", "check", str(path), "--json"]
        done = subprocess.run(command, capture_output=True, check=False, encoding="utf-8")
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"bytes": written, "read": json.loads(done.stdout)["read"], "seconds": seconds, "peak_rss_bytes": peak}


def likeness(rng: random.Random, words: tuple[list[str], list[str]], pairs: int) -> dict[float, tuple[int, int]]:
    """(found, of) pairs by what they share, to the nearest 0.05."""
    from gemwright.data.duplicates import Fingerprints
    from gemwright.data.shapes import entry_of

    found: dict[float, list[bool]] = defaultdict(list)
    for _ in range(pairs):
        text = rng.choices(words[0], k=rng.randint(30, 200))
        changed = list(text)
        for at in rng.sample(range(len(text)), k=rng.randint(1, max(1, len(text) // 8))):
            changed[at] = rng.choice(words[0])
        both, seen = [" ".join(text), " ".join(changed)], Fingerprints()
        for each in both:
            seen.add(entry_of({"prompt": "x", "completion": each}, "row"))
        one, other = ({each[i : i + 8] for i in range(len(each) - 7)} for each in both)
        share = len(one & other) / len(one | other)
        found[round(share * 20) / 20].append(bool(seen.pairs()[1]))
    return {share: (sum(hits), len(hits)) for share, hits in found.items()}


def packing(count: int) -> float:
    """Seconds to lay out `count` examples, the median of three."""
    import numpy as np

    from gemwright.train.batches import pack

    class Lengths(list):  # what a store knows of its examples
        lengths = np.random.default_rng(0).integers(20, 900, count).astype(np.uint32)

        def __len__(self) -> int:
            return count

    times = []
    for seed in range(3):
        start = time.perf_counter()
        pack(Lengths(), 1024, seed, 0)
        times.append(time.perf_counter() - start)
    return sorted(times)[1]


if __name__ == "__main__":
    main()
