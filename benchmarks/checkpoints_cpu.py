"""What checkpoints cost a fine-tune of the real Gemma 3 270M on a CPU: how long a step waits, and slows beside one.

    python benchmarks/checkpoints_cpu.py            # 60 steps of the demo's data, a checkpoint every third

Steps with a checkpoint being written beside them and steps without one are of the same run, so that a noisy machine is
noisy for both. The share of waiting is given for this run and for a checkpoint every ten minutes, which is the default.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EVERY = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="270m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    from gemwright.data.cldr import split_path
    from gemwright.machine import inspect
    from gemwright.runs import RunFolder
    from gemwright.train.config import TrainConfig
    from gemwright.train.loop import tune

    settings = {"seq": 256, "tokens_per_step": 1024, "rank": 16, "threads": options.threads}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        config = TrainConfig(
            data=split_path("train"),
            model=options.model,
            out=Path(folder) / "run",
            max_steps=options.steps,
            save_every=EVERY,
            **settings,
        )
        run = RunFolder.open(tune(config).run)
        rows = run.metrics()[1:]  # the first step also unpacks
        size = sum(file.stat().st_size for file in next(run.checkpoints.iterdir()).iterdir())
    waits = [row["checkpoint_s"] for row in rows if row["checkpoint_s"]]
    beside = [row["step_s"] for row in rows if row["checkpoint_s"]]
    alone = [row["step_s"] for row in rows if not row["checkpoint_s"]]
    result = {
        "cpu": inspect().cpu.name,
        "system": platform.platform(),
        "settings": settings | {"steps": options.steps, "save_every": EVERY},
        "checkpoint_bytes": size,
        "wait_s": statistics.median(waits),
        "wait_s_most": max(waits),
        "step_s_alone": statistics.median(alone),
        "step_s_beside": statistics.median(beside),
        "waiting_here": sum(waits) / sum(row["step_s"] for row in rows),
        "waiting_every_600_s": statistics.median(waits) / 600,
    }
    slug = f"checkpoints_cpu_{'-'.join((result['cpu'] or 'cpu').lower().split())}_{date.today()}"
    text = (
        f"# Checkpoints of the 270M on a CPU, {date.today()}\n\n"
        f"`python benchmarks/checkpoints_cpu.py --threads {options.threads} --steps {options.steps}`, "
        f"{result['cpu']}, one run of {len(rows) + 1} steps.\n\n"
        f"- a checkpoint: {size / 1e6:.1f} MB; a step waits {result['wait_s'] * 1000:.1f} ms for it "
        f"(at most {result['wait_s_most'] * 1000:.1f})\n"
        f"- share of the time spent waiting: {result['waiting_here']:.3%} with one every {EVERY} steps, "
        f"{result['waiting_every_600_s']:.5%} with one every ten minutes\n"
        f"- a step takes {result['step_s_alone']:.2f} s, and {result['step_s_beside']:.2f} s with one being written "
        f"beside it ({len(alone)} and {len(beside)} steps, medians)\n\n"
        f"```json\n{json.dumps(result, indent=1)}\n```\n"
    )
    (options.out / f"{slug}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
