"""What computing once what documents begin with in common saves a fine-tune on a CPU: steps with and without, in turns.

    python benchmarks/shared_beginnings.py           # the demo's questions; and each after 200 tokens of system text

The real 270M, LoRA rank 16, fp32. One process takes both kinds of step in turns over the same documents, ten of them a
step with the system text; tokens are those of whole documents. The first step of each kind is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import date
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.train_cpu import cpu, documents, our_step

# A system text comes after these tokens of the template: BOS, the turn's begin, its role, a newline.
OPENING, SYSTEM = 4, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    import torch

    from gemwright.train import batches
    from gemwright.weights.pull import resolve_model

    torch.set_num_threads(2)
    model = options.model or resolve_model("270m")
    step, whole = our_step(model, "fp32"), batches.shared
    text = torch.randint(1000, 200_000, (SYSTEM,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = []
    for system in (0, SYSTEM):
        for number, made in enumerate(islice(documents(model), options.steps + 1)):
            examples = [document for row in made for document in row]
            examples = [after(document, text) for document in examples[:10]] if system else examples
            tokens, took = sum(len(document.ids) for document in examples), {}
            for kind, share in (("apart", lambda some: [[] for _ in some]), ("shared", whole)):
                batches.shared = share
                start = time.perf_counter()
                step([examples])
                took[f"{kind}_s"] = time.perf_counter() - start
            own = tokens - sum(map(len, whole(examples)))
            if number:
                rows.append({"system_tokens": system, "tokens": tokens, "own_tokens": own, **took})
                rows[-1]["ratio"] = took["apart_s"] / took["shared_s"]
                print(json.dumps(rows[-1]), flush=True)
    ratios = {s: sorted(row["ratio"] for row in rows if row["system_tokens"] == s) for s in (0, SYSTEM)}
    rows.append({"cpu": cpu(), "threads": 2, "date": date.today().isoformat()})
    for system, found in ratios.items():
        rows[-1][f"ratio_{system}"] = [statistics.median(found), found[0], found[-1]]
    print(json.dumps(rows[-1]))
    path = options.out / f"shared_beginnings_{'-'.join(cpu().lower().split())}_{date.today().isoformat()}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def after(document, text: list[int]):
    """The document with a system text before its question."""
    from gemwright.train.batches import Encoded

    ids, flags = document.ids, document.labelled
    return Encoded([*ids[:OPENING], *text, *ids[OPENING:]], [False] * (OPENING + len(text)) + flags[OPENING:])


if __name__ == "__main__":
    main()
