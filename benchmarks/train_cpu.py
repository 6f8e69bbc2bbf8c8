"""LoRA on the real Gemma 3 270M on a CPU: gemwright beside transformers + PEFT, and beside the matrix products alone.

    python benchmarks/train_cpu.py                      # ours and the peer, in fp32, and bf16 where the CPU has it
    python benchmarks/train_cpu.py --rounds 1 --steps 2 # a quick look

Each contestant is a process of its own with the same documents in the same order. In one precision at a time they take
turns, so that a noisy machine is noisy for all; a step before each turn is not counted, since a process that waited has
lost its caches, and a busy machine may have taken its memory. The peer gets rows of 256 tokens with documents end to
end (no padding to speak of, and no mask between documents, which is in its favour). Tokens are counted without padding,
of whole documents, and so are the products alone, though gemwright computes what documents begin with in common once
and what comes after their last target not at all.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RANK, ROW, ROWS, RATE = 16, 256, 4, 1e-3
OURS = ("gemwright bf16", "gemwright fp32")
PEERS = ("transformers+peft bf16", "transformers+peft fp32")
LIMITS = ("products bf16", "products fp32")


def documents(model: Path) -> Iterator[list]:
    """Endless steps: each a list of ROWS rows, each a list of encoded examples of the demo's data."""
    from gemwright.data.cldr import split_path
    from gemwright.text.tokenizer import Tokenizer
    from gemwright.train.batches import pack
    from gemwright.train.prepare import prepare
    from gemwright.weights.model_file import open_model

    encode = Tokenizer.from_model(open_model(model)).encode
    examples = prepare(split_path("train"), encode, "model", seq=ROW).examples
    epoch = 0
    while True:
        rows = pack(examples, ROW, 0, epoch)
        for start in range(0, len(rows) - ROWS + 1, ROWS):
            yield [[examples[i] for i in row] for row in rows[start : start + ROWS]]
        epoch += 1


def our_step(model: Path, precision: str) -> Callable[[list], float]:
    from gemwright.model.decoder import Gemma
    from gemwright.model.lora import LoRA
    from gemwright.model.precision import choose_dtype
    from gemwright.train.batches import make_row
    from gemwright.train.memory import keep_freed_memory
    from gemwright.train.optimizer import Optimizer
    from gemwright.train.step import forward_backward
    from gemwright.weights.model_file import open_model

    keep_freed_memory()
    file, dtype = open_model(model), choose_dtype(precision)
    gemma = Gemma.load(file, dtype)
    gemma.lora = LoRA(file.spec, RANK, RANK, dtype=dtype)
    optimizer = Optimizer(gemma.lora, 0.0, 1.0)

    def step(rows: list) -> float:
        row = make_row(file.spec, [document for row in rows for document in row])
        loss = forward_backward(gemma, [row]).loss
        optimizer.update(RATE, loss)
        return loss

    return step


def peer_step(model: Path, precision: str) -> Callable[[list], float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from gemwright.spec import LINEARS
    from gemwright.weights import names
    from gemwright.weights.model_file import open_model
    from gemwright.weights.quants import unpack

    file, dtype = open_model(model), {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    spec = file.spec
    config = Gemma3TextConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.mlp,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        query_pre_attn_scalar=spec.query_scalar,
        sliding_window=spec.window,
        max_position_embeddings=spec.context,
    )
    torch.set_default_dtype(dtype)
    base = Gemma3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for ours, stored in file.tensors.items():
            value = file.norm(ours) - 1 if "norm" in ours else unpack(stored.data, stored.qtype, dtype)
            base.get_parameter(names.to_hf(ours)).copy_(value)
    targets = [names.PARTS[part][1].rpartition(".")[2] for part in LINEARS]
    peer = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.0)
    )
    peer.train()
    adapters = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=RATE, weight_decay=0.0, fused=True)

    def step(rows: list) -> float:
        width = max(sum(len(d.ids) for d in row) for row in rows)
        ids, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -100)
        for r, row in enumerate(rows):
            flat = torch.tensor([i for d in row for i in d.ids])
            learned = torch.tensor([flag for d in row for flag in d.labelled])
            ids[r, : len(flat)] = flat
            labels[r, : len(flat)] = flat.masked_fill(~learned, -100)
        loss = peer(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def limit_step(precision: str) -> Callable[[list], float]:
    """The matrix products of one step and nothing else: two passes over every linear, two over the head's labels."""
    import torch

    from gemwright.kernels.products import product
    from gemwright.spec import SPECS

    spec, dtype = SPECS["270m"], {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    weights = [torch.randn(shape, dtype=dtype) for shape in spec.linear_shapes.values()]
    head = torch.randn(16_384, spec.hidden, dtype=dtype)

    def step(rows: list) -> float:
        tokens = sum(len(d.ids) for row in rows for d in row)
        labelled = sum(sum(d.labelled) for row in rows for d in row)
        for weight in weights:
            x, y = torch.randn(tokens, weight.shape[1], dtype=dtype), torch.randn(tokens, weight.shape[0], dtype=dtype)
            for _ in range(spec.layers):
                product(x, weight)
                torch.mm(y, weight, out=x)
        h = torch.randn(labelled, spec.hidden, dtype=dtype)
        for _ in range(spec.vocab // len(head)):
            torch.mm(product(h, head), head)
        return 0.0

    return step


def worker(name: str, model: Path, threads: int) -> None:
    """Answer each line (a number of steps) on stdin with one JSON line."""
    import torch

    from gemwright.train.memory import peak_rss_bytes

    torch.set_num_threads(threads)
    kind, precision = name.rsplit(" ", 1)
    makers = {"gemwright": our_step, "transformers+peft": peer_step}
    step = limit_step(precision) if kind == "products" else makers[kind](model, precision)
    stream = documents(model)
    for line in sys.stdin:
        steps = [next(stream) for _ in range(int(line))]
        start = time.perf_counter()
        losses = [step(rows) for rows in steps]
        seconds = time.perf_counter() - start
        tokens = sum(len(d.ids) for rows in steps for row in rows for d in row)
        print(
            json.dumps({"tokens": tokens, "s": seconds, "losses": losses, "peak_bytes": peak_rss_bytes()}), flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="steps a round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from gemwright.weights.pull import resolve_model

    model = options.model or resolve_model("270m")
    if options.worker:
        worker(options.worker, model, options.threads)
        return
    command = [sys.executable, __file__, "--model", str(model), "--threads", str(options.threads), "--worker"]
    rows: list[dict] = []
    for together in zip(OURS, PEERS, LIMITS, strict=True):
        if "fp32" in together[0] or has_bf16():
            rows += duel(together, command, options)
    rows.append(summary(rows, options))
    write(rows, options)


def has_bf16() -> bool:
    """Without bf16 arithmetic a step in bf16 takes hours, ours and theirs."""
    import torch

    from gemwright.model.precision import choose_dtype

    return choose_dtype("auto") == torch.bfloat16


def duel(names: tuple[str, ...], command: list[str], options: argparse.Namespace) -> list[dict]:
    """The rows of contestants that take turns."""
    children = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in names
    }

    def ask(name: str, steps: int) -> dict:
        child = children[name]
        child.stdin.write(f"{steps}\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())

    rows: list[dict] = []
    for name in names:
        ask(name, 1)  # loading and warm-up
    for turn in range(options.rounds):
        for name in names:
            ask(name, 1)
            row = {"contestant": name, "round": turn} | ask(name, options.steps)
            rows.append(row | {"tokens_per_s": row["tokens"] / row["s"]})
            print(f"round {turn + 1} {name:24} {rows[-1]['tokens_per_s']:8.1f} tokens/s", file=sys.stderr)
    for child in children.values():
        child.stdin.close()
        child.wait()
    return rows


def of(rows: list[dict], name: str, key: str) -> list[float]:
    return [row[key] for row in rows if row.get("contestant") == name]


def summary(rows: list[dict], options: argparse.Namespace) -> dict:
    ran = [[name for name in group if of(rows, name, "tokens_per_s")] for group in (OURS, PEERS, LIMITS)]
    speed = {name: statistics.median(of(rows, name, "tokens_per_s")) for group in ran for name in group}
    ours, peer, limit = (max(group, key=speed.__getitem__) for group in ran)
    a, b = of(rows, ours, "tokens_per_s"), of(rows, peer, "tokens_per_s")
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    peak = {name: max(of(rows, name, "peak_bytes")) for name in (*ran[0], *ran[1])}
    tails = {name: statistics.mean(of(rows, name, "losses")[-1]) for name in peak}
    versions = {name: __import__(name).__version__ for name in ("torch", "transformers", "peft")}
    return {
        "speed_ratio": statistics.median(ratios),
        "speed_ratio_spread": [ratios[0], ratios[-1]],
        "memory_ratio": peak[ours] / peak[peer],
        "share_of_limit": statistics.median(x / y for x, y in zip(a, of(rows, limit, "tokens_per_s"), strict=True)),
        "speed_ratio_fp32": speed[OURS[1]] / speed[PEERS[1]],
        "tokens_per_s": speed,
        "peak_bytes": peak,
        "loss_last_round": tails,
        "ours": ours,
        "peer": peer,
        "threads": options.threads,
        "rounds": options.rounds,
        "steps": options.steps,
        "rank": RANK,
        "tokens_a_step": ROW * ROWS,
        "cpu": cpu(),
        "bf16": OURS[0] in speed,
        "python": platform.python_version(),
        "versions": versions,
        "date": date.today().isoformat(),
    }


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "")
    return model + (" with AVX-512 bf16" if "avx512_bf16" in flags else "")


def write(rows: list[dict], options: argparse.Namespace) -> None:
    last = rows[-1]
    slug = "-".join(last["cpu"].lower().replace("(r)", "").split()) + f"-{options.threads}threads"
    stem = options.out / f"train_cpu_{slug}_{last['date']}"
    options.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = "".join(line(rows, name) for name in last["tokens_per_s"])
    low, high = last["speed_ratio_spread"]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    text = f"""# LoRA on Gemma 3 270M on a CPU, {last["date"]}

`python benchmarks/train_cpu.py --threads {options.threads} --rounds {options.rounds} --steps {options.steps}`
on {last["cpu"]}, {options.threads} threads; Python {last["python"]}, {versions}.
Real weights (Q4_K_M), the demo's data, rank {RANK} on all linears, {ROW * ROWS} tokens a step; contestants take turns.

| contestant | tokens/s, median | spread | peak GiB | loss, last round |
|---|---|---|---|---|
{table}
Against the faster peer ({last["peer"]}): speed ratio {last["speed_ratio"]:.2f} ({low:.2f} to {high:.2f}),
memory ratio {last["memory_ratio"]:.2f}. Share of what the matrix products alone reach: {last["share_of_limit"]:.2f}.
In fp32 against fp32: speed ratio {last["speed_ratio_fp32"]:.2f}.
"""
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(json.dumps(last))


def line(rows: list[dict], name: str) -> str:
    """One row of the readable table."""
    speeds, peaks = of(rows, name, "tokens_per_s"), of(rows, name, "peak_bytes")
    memory = "" if name in LIMITS else f"{max(peaks) / 2**30:.2f}"
    loss = "" if name in LIMITS else f"{statistics.mean(of(rows, name, 'losses')[-1]):.3f}"
    middle = f"{statistics.median(speeds):.0f}"
    return f"| {name} | {middle} | {min(speeds):.0f} to {max(speeds):.0f} | {memory} | {loss} |\n"


if __name__ == "__main__":
    main()
