"""A layer's products in bf16 and in fp8, and what its weights cost a visit; one JSON line each.

    python3 benchmarks/fp8_gpu.py                                  # 27B, 12B and 4B at 8,192 and 2,048 tokens
    python3 benchmarks/fp8_gpu.py --models 27b --out results       # also writes results/fp8_gpu.jsonl

Needs torch, triton, gguf and psutil only. Each product is what `model.lora.Linear` does with it, adapters of `--rank`
for all linears included: in bf16 one product with the adapters' columns, in fp8 the rounding of its input besides.
"fast" is without fp32 sums in between; "error" is relative to fp32, "size" the part of the exact product that is there
(below 1 where sums lose what they cut off). A line "layer" adds up forward, backward, what the backward computes again
where the outputs of attention and MLP are kept (qkv and gate_up), and two visits of the first type of weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from torch import Tensor

from gemwright.kernels.dispatch import join_tail, quantise_rows, turn
from gemwright.kernels.fp8 import new_rows
from gemwright.kernels.triton_unpack import FORMATS
from gemwright.layout import GROUPS, group_sizes
from gemwright.model import fp8
from gemwright.model.fp8 import Fp8Scratch, Fp8Weight
from gemwright.model.unpacked import unpack
from gemwright.spec import SPECS

BF16, DEVICE, TOKENS = torch.bfloat16, torch.device("cuda"), (8192, 2048)
COMPUTED_AGAIN = ("qkv", "gate_up")


def rand(*shape: int, size: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=BF16, device=DEVICE).mul_(size)


def ms(run: Callable[[], object], repeats: int) -> float:
    """The median of `repeats` timed one by one, after three that are not."""
    for _ in range(3):
        run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs)


def packed_layer(shapes: dict[str, tuple[int, int]], qtype: str) -> dict[str, Tensor]:
    """Random bytes whose fp16 scales are finite."""
    form, made = FORMATS[qtype], {}
    for part, (rows, cols) in shapes.items():
        raw = torch.randint(0, 256, (rows * cols // form.values, form.size), dtype=torch.uint8, device=DEVICE)
        for at in {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q6_K": [208]}.get(qtype, [0, 2]):
            raw[:, at + 1] &= 0xBF
        made[part] = raw.view(rows, -1)
    return made


def weights_of(name: str, tail: dict[str, int], qtype: str, repeats: int) -> dict[str, float]:
    """Milliseconds of a visit: unpacking to bf16; to fp8, with the transposition, and the adapters' columns."""
    spec = SPECS[name]
    raw, scratch = packed_layer(spec.linear_shapes, qtype), Fp8Scratch(spec, tail, DEVICE)
    wide = {
        g: torch.empty(rows, cols + tail[g], dtype=BF16, device=DEVICE) for g, (rows, cols) in scratch.sizes.items()
    }

    def to_bf16() -> None:
        for group, parts in GROUPS.items():
            row = 0
            for part in parts:
                unpack(raw[part], qtype, wide[group][row : row + len(raw[part]), : spec.linear_shapes[part][1]])
                row += len(raw[part])

    def to_fp8() -> None:
        for group, parts in GROUPS.items():
            scratch.fill(0, group, [(raw[part], qtype) for part in parts])

    def turned() -> None:
        for group, (rows, cols) in scratch.sizes.items():
            turn(scratch._normal[group][:, :cols], scratch._turned[group][:, :rows])

    b = {g: rand(rows, tail[g], size=0.01) for g, (rows, _) in scratch.sizes.items()}

    def joined() -> None:
        for group, (_, cols) in scratch.sizes.items():
            join_tail(b[group], scratch._scales[0, group], scratch._normal[group][:, cols:])

    return {
        "bf16_ms": ms(to_bf16, repeats),
        "fp8_ms": ms(to_fp8, repeats),
        "turn_ms": ms(turned, repeats),
        "join_ms": ms(joined, repeats),
    }


def products_of(rows: int, cols: int, t: int, n: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a group's product each way, for `n` tokens."""
    w, b, a = rand(rows, cols + t, size=0.02), rand(rows, t, size=0.01), rand(t, cols, size=0.01)
    room, dy, y = rand(n, cols + t), rand(n, rows), torch.empty(n, rows, dtype=BF16, device=DEVICE)
    x, low = room[:, :cols], room[:, cols:]
    scale, normal, turned = torch.empty(rows, device=DEVICE), new_rows(rows, cols, t, w), new_rows(cols, rows, t, w)
    quantise_rows(w[:, :cols], normal[:, :cols], scale)
    weight = Fp8Weight(normal, turned, scale, torch.ones(1, cols, device=DEVICE))
    rows8, own = (
        {"forward": new_rows(n, cols, t, w), "backward": new_rows(n, rows, t, w)},
        torch.empty(n, device=DEVICE),
    )
    one = torch.ones(1, device=DEVICE)

    def back_bf16() -> Tensor:
        both = torch.mm(dy, w)
        return both[:, :cols].addmm_(both[:, cols:], a)

    runs: dict[str, tuple[Callable[[], object], Callable[[], Tensor], Callable[[], object]]] = {
        "forward": (
            lambda: torch.mm(room, w.t(), out=y),
            lambda: weight.product(x, y, low, b),
            lambda: quantise_rows(x, rows8["forward"], own, None, low, one),
        ),
        "backward": (
            back_bf16,
            lambda: weight.back(dy, torch.mm(dy, b), a),
            lambda: quantise_rows(dy, rows8["backward"], own, scale, low, one),
        ),
    }
    some = slice(0, 256)
    right = {
        "forward": x[some].float() @ w[:, :cols].float().t() + low[some].float() @ b.float().t(),
        "backward": dy[some].float() @ w[:, :cols].float() + torch.mm(dy[some], b).float() @ a.float(),
    }
    made = {}
    for way, (bf16, in_fp8, rounding) in runs.items():
        times = {"bf16_ms": ms(bf16, repeats)}
        for key, fast in (("fp8", False), ("fp8_fast", True)):
            fp8.FAST_SUMS = 1 << 30 if fast else 0
            times[f"{key}_ms"] = ms(in_fp8, repeats)
            found, exact = in_fp8()[some].double(), right[way].double()
            times[f"{key}_error"] = float((found - exact).norm() / exact.norm())
            times[f"{key}_size"] = float((found * exact).sum() / exact.square().sum())
        fp8.FAST_SUMS = 8448
        made[way] = times | {"rounding_ms": ms(rounding, repeats)}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["27b", "12b", "4b"], choices=list(SPECS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--qtypes", nargs="+", default=["Q4_0", "Q4_K", "Q6_K"], choices=list(FORMATS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder for fp8_gpu.jsonl")
    options = parser.parse_args()
    lines: list[str] = []

    def tell(**fields: object) -> None:
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in fields.items()}
        lines.append(json.dumps(rounded))
        print(lines[-1], flush=True)

    tell(
        device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        python=sys.version.split()[0], repeats=options.repeats, rank=options.rank,
    )  # fmt: skip
    for name in options.models:
        tail = {group: -(-options.rank * len(parts) // 8) * 8 for group, parts in GROUPS.items()}
        visits = {qtype: weights_of(name, tail, qtype, options.repeats) for qtype in options.qtypes}
        for qtype, visit in visits.items():
            tell(what="weights", model=name, qtype=qtype, **visit)
        first = visits[options.qtypes[0]]
        for n in options.tokens:
            whole = {"bf16_ms": 2 * first["bf16_ms"]}
            fixed = 2 * (first["fp8_ms"] + 2 * first["join_ms"]) + first["turn_ms"]
            whole |= {key: fixed for key in ("fp8_ms", "fp8_fast_ms")}
            for group, (rows, cols) in group_sizes(SPECS[name]).items():
                for way, times in products_of(rows, cols, tail[group], n, options.repeats).items():
                    tell(
                        what="product", model=name, tokens=n, group=group, way=way, rows=rows, cols=cols, **times,
                        faster=times["bf16_ms"] / times["fp8_ms"],
                    )  # fmt: skip
                    count = 1 + (way == "forward" and group in COMPUTED_AGAIN)
                    whole = {key: total + count * times[key] for key, total in whole.items()}
            tell(what="layer", model=name, tokens=n, **whole, faster=whole["bf16_ms"] / whole["fp8_ms"])
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "fp8_gpu.jsonl").write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
