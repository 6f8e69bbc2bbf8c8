"""Fits a step into a GPU: every byte itemised before anything is loaded, then the fastest arrangement under the budget.

An arrangement says which layers are resident, what each layer's forward keeps and where, how many tokens pass at once.
Time is estimated from the card's measured speed and that of its link; memory by the live tensors of `model.layer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from gemwright.errors import DoesNotFit
from gemwright.kernels.attend import LONG
from gemwright.model.fp8 import product_bytes, scratch_bytes
from gemwright.model.layer import Keep
from gemwright.model.lora import TAIL_STEP, parameters
from gemwright.model.residency import GROUPS
from gemwright.report import size
from gemwright.spec import ModelSpec
from gemwright.train.batches import ROW_STEP

MIB = 1 << 20
# What PyTorch's matrix library takes for itself, and what its allocator cannot hand out again between blocks.
LIBRARY_BYTES = 72 * MIB
SLACK = 0.02
MICRO_TOKENS = 8192
CHUNKS = (8192, 4096, 2048, 1024)
HOST_SHARE = 0.7
# How much faster than in bf16 the products of a layer are in fp8, their rounding and that of the weights included.
FP8_GAIN = 1.5
# Of the layers, how many are tried as residents.
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


class Card(NamedTuple):
    """What a GPU does here: products in FLOP/s, copies over its link in bytes/s each way."""

    flops: float
    link: float


@dataclass(frozen=True)
class Job:
    """What has to fit: the model's bytes by layer, the adapters, the rows of a step."""

    spec: ModelSpec
    layer_bytes: int
    embed_bytes: int
    rank: int
    targets: tuple[str, ...]
    seq: int
    rows: int
    labelled: float = 1.0
    deterministic: bool = False
    fp8: bool = False

    @property
    def row_tokens(self) -> int:
        """A packed row, filled up."""
        return -(-self.seq // ROW_STEP) * ROW_STEP

    def tail(self, group: str) -> int:
        """Columns that the adapters add to a group's input."""
        width = self.rank * sum(part in self.targets for part in GROUPS[group])
        return -(-width // TAIL_STEP) * TAIL_STEP


@dataclass(frozen=True)
class Arrangement:
    """How a step is laid out; `items` are its bytes on the device by name, `predicted_bytes` their peak."""

    resident: int
    slots: int
    keep: tuple[Keep, ...]
    on_host: tuple[bool, ...]
    joined: int
    chunk: int
    positions: int
    head_rows: int
    items: dict[str, int] = field(default_factory=dict)
    host_bytes: int = 0
    step_s: float = 0.0

    @property
    def predicted_bytes(self) -> int:
        """The most that PyTorch will hold on the device."""
        return sum(self.items.values())

    def summary(self) -> dict[str, object]:
        """What a run folder keeps of it."""
        kept: dict[str, int] = {}
        for keep, away in zip(self.keep, self.on_host, strict=True):
            key = f"{keep.name.lower()}, {'host' if away else 'device'}"
            kept[key] = kept.get(key, 0) + 1
        return {
            "resident_layers": self.resident,
            "layers_keep": kept,
            "rows_a_micro_batch": self.joined,
            "chunk_tokens": self.chunk,
            "predicted_device_bytes": self.predicted_bytes,
            "device_items": self.items,
            "activation_host_bytes": self.host_bytes,
            "predicted_step_s": self.step_s,
        }


def arrange(
    job: Job,
    budget: int,
    card: Card,
    host_free: int,
    *,
    residency: str = "auto",
    keeps: Sequence[Keep] = (Keep.INPUT, Keep.NARROW, Keep.HEADS, Keep.PRODUCTS),
) -> Arrangement:
    """The fastest arrangement that fits `budget` bytes of the device and leaves enough of `host_free`.

    `residency` "resident" or "streamed" and fewer `keeps` narrow the choice.

    Raises DoesNotFit naming the bytes of the smallest arrangement.
    """
    best: Arrangement | None = None
    smallest: Arrangement | None = None
    shares = {"auto": SHARES, "resident": (1.0,), "streamed": (0.0,)}[residency]
    for candidate in _candidates(job, budget, host_free, shares, keeps):
        made = _estimate(job, candidate, card)
        if smallest is None or made.predicted_bytes < smallest.predicted_bytes:
            smallest = made
        if made.predicted_bytes <= budget and (best is None or made.step_s < best.step_s * 0.995):
            best = made
    if best is None:
        if smallest is None:
            raise RuntimeError("no arrangement was tried")
        raise DoesNotFit(
            f"this fine-tune needs at least {size(smallest.predicted_bytes)} of video memory, {size(budget)} are given",
            where="--vram",
            fix=f"Give --vram {smallest.predicted_bytes / 2**30 + 0.005:.2f}GiB, or a smaller --seq or --rank.",
        )
    return best


def _candidates(
    job: Job, budget: int, host_free: int, shares: Sequence[float], keeps: Sequence[Keep]
) -> Iterator[Arrangement]:
    """Arrangements worth a look; each takes as many layers on the device as the budget still holds."""
    layers, tokens = job.spec.layers, job.rows * job.row_tokens
    joins = sorted(
        {max(1, min(job.rows, n // job.row_tokens)) for n in (MICRO_TOKENS, MICRO_TOKENS // 2, 1)}, reverse=True
    )
    for joined in joins:
        micro = joined * job.row_tokens
        for chunk in sorted({min(c, micro) for c in CHUNKS}, reverse=True):
            for host in [keep for keep in keeps if keep < Keep.PRODUCTS] or [Keep.INPUT]:
                host_bytes = kept_bytes(job, host) * tokens * (layers - 2)
                if host > Keep.INPUT and host_bytes > HOST_SHARE * host_free:
                    continue
                for device in keeps:
                    yield from _filled(job, budget, joined, chunk, host, device, shares)


def _filled(
    job: Job, budget: int, joined: int, chunk: int, host: Keep, device: Keep, shares: Sequence[float]
) -> Iterator[Arrangement]:
    layers, tokens = job.spec.layers, job.rows * job.row_tokens
    for share in shares:
        resident = round(share * layers)
        slots = min(2, layers - resident)
        # The backward begins with the last layers, so they stay; of a long row even they are too much.
        here = 2 if 2 * kept_bytes(job, device) * tokens < budget // 16 else 0
        while True:
            keep, on_host = _placed(layers, here, host, device)
            positions, head_rows = min(MICRO_TOKENS, chunk), 8192 if chunk >= 4096 else 4096
            plan = Arrangement(resident, slots, keep, on_host, joined, chunk, positions, head_rows)
            plan = itemise(job, plan)
            spare = budget - plan.predicted_bytes
            more = max(0, min(layers - here, int(spare / (1 + SLACK)) // max(1, kept_bytes(job, device) * tokens)))
            if not more:
                yield plan
                break
            here += more


def _placed(layers: int, here: int, host: Keep, device: Keep) -> tuple[tuple[Keep, ...], tuple[bool, ...]]:
    """The last `here` layers keep on the device, where the backward begins; those below wait on the host."""
    keep = tuple(device if i >= layers - here else host for i in range(layers))
    return keep, tuple(i < layers - here for i in range(layers))


def kept_bytes(job: Job, keep: Keep) -> int:
    """Bytes a token that a layer leaves for its backward, its input among them."""
    spec, qkv, heads = job.spec, _qkv(job.spec), job.spec.heads * job.spec.head_dim
    values = spec.hidden
    if keep >= Keep.NARROW:
        values += heads + job.tail("o") + 2 * spec.hidden
    if keep >= Keep.HEADS:
        values += qkv
    if keep >= Keep.PRODUCTS:
        values += 2 * spec.mlp
    statistics = 4 + (4 * spec.heads if keep >= Keep.NARROW else 0)
    return 2 * values + statistics


def itemise(job: Job, plan: Arrangement) -> Arrangement:
    """The same arrangement with its bytes: what is held throughout, and the peak of what comes and goes."""
    spec, shapes = job.spec, job.spec.linear_shapes
    groups = {g: (sum(shapes[p][0] for p in parts), shapes[parts[0]][1]) for g, parts in GROUPS.items()}
    trained = parameters(spec, job.rank, job.targets)
    copies = sum(job.tail(g) * (rows + cols) for g, (rows, cols) in groups.items()) * spec.layers
    tokens, micro = job.rows * job.row_tokens, plan.joined * job.row_tokens
    here = sum(kept_bytes(job, k) for k, away in zip(plan.keep, plan.on_host, strict=True) if not away) * tokens
    items = {
        "embedding and head, packed": job.embed_bytes,
        "resident layers, packed": plan.resident * job.layer_bytes,
        "ring of layers, packed": plan.slots * job.layer_bytes,
        "one layer, unpacked": scratch_bytes(spec, {g: job.tail(g) for g in GROUPS})
        if job.fp8
        else 2 * sum(rows * (cols + job.tail(g)) for g, (rows, cols) in groups.items()),
        "head rows, unpacked": 2 * plan.head_rows * spec.hidden,
        "norms": 4 * (spec.layers * sum(spec.norm_shapes.values()) + spec.hidden),
        "adapters, gradients, optimizer": 16 * trained + 2 * copies,
        "activations kept on the GPU": here,
        "tokens, positions, rotation": tokens * (4 * 2 * spec.head_dim + 40),
        "work space of a layer, activations in transit": max(
            layer_peak(job, plan, micro, tokens), head_peak(job, plan, tokens)
        ),
        "matrix library": LIBRARY_BYTES,
    }
    items["allocator"] = int(SLACK * sum(items.values()))
    host = sum(kept_bytes(job, k) for k, away in zip(plan.keep, plan.on_host, strict=True) if away) * tokens
    return replace(plan, items=items, host_bytes=host)


def _qkv(spec: ModelSpec) -> int:
    return (spec.heads + 2 * spec.kv_heads) * spec.head_dim


def layer_peak(job: Job, plan: Arrangement, micro: int, tokens: int) -> int:
    """The most that one visit holds besides what is kept on the GPU, activations on their way out or in among it."""
    spec, n, c = job.spec, micro, min(plan.chunk, micro)
    d, f, qkv, out = spec.hidden, spec.mlp, _qkv(spec), spec.heads * spec.head_dim
    t_qkv, t_o, t_wide, t_down = (job.tail(group) for group in GROUPS)
    v, rotated, long = spec.kv_heads * spec.head_dim, (spec.heads + spec.kv_heads) * spec.head_dim, n > c
    away = [keep for keep, host in zip(plan.keep, plan.on_host, strict=True) if host]
    moved = kept_bytes(job, away[0]) // 2 if away else d
    # In fp8 a product's rounded input comes for its time; its result has no tail.
    rounded = [product_bytes(c, w, t) // 2 for w, t in ((f, t_down), (2 * f, t_wide), (qkv, t_qkv))] if job.fp8 else []
    down_in, wide_in, qkv_in = rounded or (0, 0, 0)
    last = max(c * f + product_bytes(c, d, t_down) // 2, wide_in + c * d) if job.fp8 else c * (f + t_down)
    heads = rotated + v if long else rotated + qkv
    held = heads + out + t_o
    wide = (d + t_wide) + 2 * f + (f + t_down)
    flash = (4 * out + 2 * v) if n <= LONG else (4 * out + 2 * v) // spec.kv_heads
    again = {Keep.INPUT: held, Keep.NARROW: heads, Keep.HEADS: heads - qkv if not long else heads}
    peaks = []
    for keep, host in set(zip(plan.keep, plan.on_host, strict=True)):
        narrow = 0 if keep > Keep.INPUT else 2 * d
        new = again.get(keep, heads - qkv)
        known = (kept_bytes(job, keep) // 2 - d) if host else 0
        more = n * new - c * 2 * f * (keep == Keep.PRODUCTS)
        after = more + c * (narrow + d + wide + d) + last + (n * out if long else 0)
        between = more + n * (out + t_o * (not long) + rotated + v + flash)
        end = n * heads + n * (rotated + v) + c * 2 * (qkv + d + t_qkv) + qkv_in
        backward = max(after, between, end)
        coming = max(2 * (moved * tokens if away else 0), known * n + d * n)
        peaks.append(backward + d * tokens + coming)
        kept = 0 if host else -(kept_bytes(job, keep) // 2 - d) * n
        start = n * (rotated + qkv + (v if long else 0) + 2 * out + t_o)
        then = (
            n * (out + t_o + d + (kept_bytes(job, keep) // 2 - d if keep > Keep.INPUT else 0))
            + c * (narrow + d + wide)
            + down_in
        )
        going = (moved * 2 * n if away else 0) + d * tokens
        peaks.append(max(start, then + kept) + going)
    return 2 * max(peaks)


def head_peak(job: Job, plan: Arrangement, tokens: int) -> int:
    """Logits of a piece of positions and rows, and the gradient's sum in fp32."""
    positions = min(plan.positions, tokens)
    d = job.spec.hidden
    return 2 * 2 * tokens * d + positions * (2 * plan.head_rows + 4 * d * 2 + 2 * d)


def _estimate(job: Job, plan: Arrangement, card: Card) -> Arrangement:
    """With the seconds of a step: the longest of computing, weights coming, activations going or coming, each way."""
    spec, tokens = job.spec, job.rows * job.row_tokens
    weights = {part: rows * cols for part, (rows, cols) in spec.linear_shapes.items()}
    a_pass = 2 * sum(weights.values()) * tokens / card.flops / (FP8_GAIN if job.fp8 else 1)
    again = {
        Keep.INPUT: 1.0,
        Keep.NARROW: 1 - (weights["o"] + weights["down"]) / sum(weights.values()),
        Keep.HEADS: (weights["gate"] + weights["up"]) / sum(weights.values()),
        Keep.PRODUCTS: 0.0,
    }
    attention = 4 * min(job.seq, spec.window) * spec.heads * spec.head_dim * tokens / card.flops
    each = job.layer_bytes / card.link
    streamed = spec.layers - plan.resident
    moved = plan.host_bytes / card.link
    up = max(spec.layers * (a_pass * 1.1 + attention), streamed * each, moved)
    computed = sum(a_pass * (1.15 + again[k]) + attention * (2.5 + (k < Keep.NARROW)) for k in plan.keep)
    down = max(computed, streamed * each + moved)
    head = 4 * spec.vocab * spec.hidden * tokens * job.labelled / card.flops
    pieces = -(-tokens // min(plan.chunk, tokens))
    step_s = up + down + head + spec.layers * pieces * 6e-4
    return replace(plan, step_s=step_s)


def described(plan: Arrangement, layers: int) -> str:
    """One line for people."""
    kept: dict[str, int] = {}
    for keep, away in zip(plan.keep, plan.on_host, strict=True):
        key = f"{keep.name.lower()} {'in RAM' if away else 'on the GPU'}"
        kept[key] = kept.get(key, 0) + 1
    places = ", ".join(f"{count} keep {what}" for what, count in kept.items())
    return f"{plan.resident} of {layers} layers resident; {places}"
