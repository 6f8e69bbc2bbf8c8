"""Fits a step into a GPU: every byte itemised before anything is loaded, then the fastest arrangement under the budget.

An arrangement says which layers are resident, what each layer's forward keeps and where, how many tokens pass at once.
Time is estimated from the card's measured speed and that of its link; memory by the live tensors of `model.layer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, update_wrapper
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

from gemwright.errors import DoesNotFit, needed
from gemwright.layout import (
    FEW,
    GROUPS,
    LONG,
    ROW_STEP,
    TAIL_STEP,
    Keep,
    adapter_parameters,
    document_room,
    group_sizes,
    label_step,
    product_bytes,
    rounded,
    scratch_bytes,
)
from gemwright.report import size
from gemwright.spec import ModelSpec

T = TypeVar("T")
P = ParamSpec("P")
MIB = 1 << 20
# What PyTorch's matrix library takes for itself.
LIBRARY_BYTES = 72 * MIB
# What that takes again for steps that are replayed, whose memory is apart.
GRAPH_BYTES = 56 * MIB
# What the allocator cannot hand out again between blocks: of those that come and go, of those that stay a step, of all.
SLACK, KEPT_SLACK, MOST_SLACK = 0.22, 0.008, 0.025
MICRO_TOKENS = 8192
# Of them, how many meet the head at once: more are hardly faster, and take memory when it is fullest.
POSITIONS = 4096
# Of the tokens of chats, how many are targets, and of the row with the most of them, where nobody knows better.
CHAT_LABELLED = (0.3, 0.35)
CHUNKS = (8192, 4096, 2048, 1024)
HOST_SHARE = 0.7
# Bytes a second over a link that is busy both ways, beside those of one way.
BOTH_WAYS = 1.54
# Of the time that resident layers leave the link idle, what serves the streamed ones between them.
LENT = 0.65
# How much of the shorter of computing and copying is not hidden behind the longer.
HINDRANCE = 0.028
# Products of more rows times columns than these run faster, by this power of them.
PROBED_SIZE, SIZE_GAIN = 2048 * 1536, 0.05
# How fast attention and the thin products of adapters are beside other products.
ATTENTION_SHARE, ADAPTER_SHARE = 0.403, 1.5
# How long attention's backward takes, in forwards; how long the head, beside its products.
ATTENTION_BACK, HEAD = 2.34, 0.86
# What a layer costs the CPU that launches its kernels.
LAUNCH_UP_S, LAUNCH_DOWN_S = 0.6e-3, 1.3e-3
# The share of a step's other time from which on launching is left to a graph, and what then remains of it.
GRAPH_SHARE, GRAPHED = 0.25, 0.08
# What a step costs beside its layers: its rows are made and copied, the optimizer runs.
STEP_S, STEP_TOKEN_S = 5.1e-3, 6.8e-7
# Bytes of video memory that clipping, the optimizer and the adapters' copies read and write for a trained value.
UPDATE_BYTES = 60
# How much faster than in bf16 the products of a layer are in fp8, their rounding and that of the weights included.
FP8_GAIN = 1.5
# Of the layers, how many are tried as residents; of those that wait in RAM, how many as keeping one level less.
SHARES = tuple(i / 16 for i in range(17))
LESS = (0.25, 0.5, 0.75)
# An arrangement is better if it takes this share of the other's time, or less; if its layers keep unlike things, this.
GAIN, MIXED_GAIN = 0.998, 0.995
# Of the budget, what is left free for what no plan foresees.
RESERVE = 0.01


class Card(NamedTuple):
    """What a GPU does here: products in FLOP/s, copies over its link and within its memory in bytes/s."""

    flops: float
    link: float
    memory: float = 1e12


@dataclass(frozen=True)
class Job:
    """What has to fit: the model's bytes by layer, the adapters, the rows of a step.

    `labelled` is the share of all tokens that are targets, `labelled_most` that of the row with the largest.
    `ordered_on` are the card's multiprocessors where attention's backward is to add in a fixed order, else 0.
    """

    spec: ModelSpec
    layer_bytes: int
    embed_bytes: int
    rank: int
    targets: tuple[str, ...]
    seq: int
    rows: int
    labelled: float = 1.0
    labelled_most: float = 1.0
    ordered_on: int = 0
    dora: bool = False
    fp8: bool = False
    graphs: bool = True

    @property
    def row_tokens(self) -> int:
        """A packed row, filled up."""
        return rounded(self.seq, ROW_STEP)

    def tail(self, group: str) -> int:
        """Columns that the adapters add to a group's input."""
        return self._tails[group]

    @cached_property
    def _tails(self) -> Mapping[str, int]:
        widths = {group: self.rank * sum(p in self.targets for p in parts) for group, parts in GROUPS.items()}
        return {group: rounded(width, TAIL_STEP) for group, width in widths.items()}

    @cached_property
    def found(self) -> dict[Hashable, Any]:
        """What was computed of this job, by what it depends on: a search asks for the same again and again."""
        return {}


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
    graphed: bool = False

    @property
    def predicted_bytes(self) -> int:
        """The most that PyTorch will hold on the device."""
        return sum(self.items.values())

    def kinds(self) -> Mapping[tuple[Keep, bool], int]:
        """How many layers keep what, and whether on the host."""
        return _counted(self.keep, self.on_host)

    def summary(self) -> dict[str, object]:
        """What a run folder keeps of it."""
        kept = {f"{keep.name.lower()}, {'host' if away else 'device'}": n for (keep, away), n in self.kinds().items()}
        return {
            "resident_layers": self.resident,
            "layers_keep": kept,
            "rows_a_micro_batch": self.joined,
            "chunk_tokens": self.chunk,
            "predicted_device_bytes": self.predicted_bytes,
            "device_items": self.items,
            "activation_host_bytes": self.host_bytes,
            "predicted_step_s": self.step_s,
            "replayed_as_graph": self.graphed,
        }


@lru_cache(4096)
def _counted(keep: tuple[Keep, ...], on_host: tuple[bool, ...]) -> Mapping[tuple[Keep, bool], int]:
    return Counter(zip(keep, on_host, strict=True))


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
    search = _Search(job, int(budget * (1 - RESERVE)), card)
    shares = {"auto": SHARES, "resident": (1.0,), "streamed": (0.0,)}[residency]
    joins_fitting = 0
    for joined in _joins(job):
        fitting = 0
        for chunk in sorted({min(c, joined * job.row_tokens) for c in CHUNKS}, reverse=True):
            found = [
                search.look(_filled(job, search.budget, joined, chunk, host, device, shares))
                for host, device in _levels(job, host_free, keeps, joined, chunk)
            ]
            fitting += any(found)
            if fitting == 2:  # smaller chunks and micro-batches only cost more launches and another projection
                break
        joins_fitting += fitting > 0
        if joins_fitting == 2:
            break
    if search.best is None:
        least = budget_for(needed(search.smallest))
        raise DoesNotFit(
            f"this fine-tune needs at least {size(least)} of video memory, {size(budget)} are given",
            where="--vram",
            fix=f"Give --vram {least / 2**30 + 0.005:.2f}GiB, or a smaller --seq or --rank.",
        )
    joined, chunk = search.best.joined, search.best.chunk
    for host, device in _levels(job, host_free, keeps, joined, chunk):
        for less in LESS if host - 1 in keeps else ():
            search.look(_filled(job, search.budget, joined, chunk, host, device, shares, less), MIXED_GAIN)
    return search.best


@dataclass
class _Search:
    """The fastest arrangement within a budget so far, and the smallest of all."""

    job: Job
    budget: int
    card: Card
    best: Arrangement | None = None
    smallest: Arrangement | None = None

    def look(self, more_and_more: Iterable[Arrangement], gain: float = GAIN) -> bool:
        """Whether one of these, which differ by more and more resident layers, fits; not farther than they can win."""
        fits = False
        for plan in more_and_more:
            if self.smallest is None or plan.predicted_bytes < self.smallest.predicted_bytes:
                self.smallest = plan
            if plan.predicted_bytes > self.budget:
                continue
            fits, (step_s, graphed) = True, _seconds(self.job, plan, self.card, plan.resident)
            if self.best is None or step_s < self.best.step_s * gain:
                self.best = replace(plan, step_s=step_s, graphed=graphed)
            unhindered_s, _ = _seconds(self.job, plan, self.card, self.job.spec.layers)
            if unhindered_s >= self.best.step_s * gain and plan.keep[0] <= plan.keep[-1]:
                break
        return fits


def budget_for(plan: Arrangement) -> int:
    """The smallest budget in bytes under which `arrange` may choose `plan`."""
    return int(plan.predicted_bytes / (1 - RESERVE)) + 2


def _joins(job: Job) -> list[int]:
    """Numbers of rows worth making one micro-batch, the most first."""
    sizes = (MICRO_TOKENS, MICRO_TOKENS // 2, 1)
    return sorted({max(1, min(job.rows, size // job.row_tokens)) for size in sizes}, reverse=True)


def _levels(job: Job, host_free: int, keeps: Sequence[Keep], joined: int, chunk: int) -> Iterator[tuple[Keep, Keep]]:
    """What layers may keep in RAM and on the device, the least first."""
    layers, tokens = job.spec.layers, job.rows * job.row_tokens
    for host in [keep for keep in keeps if keep < Keep.PRODUCTS] or [Keep.INPUT]:
        host_bytes = kept_bytes(job, host, long=joined * job.row_tokens > chunk) * tokens * (layers - 2)
        if host == Keep.INPUT or host_bytes <= HOST_SHARE * host_free:
            yield from ((host, device) for device in keeps)


def _filled(
    job: Job,
    budget: int,
    joined: int,
    chunk: int,
    host: Keep,
    device: Keep,
    shares: Sequence[float],
    less: float = 0.0,
) -> Iterator[Arrangement]:
    """With more and more resident layers, until they alone are too many."""
    long = joined * job.row_tokens > chunk
    layers, each = job.spec.layers, kept_bytes(job, device, long=long) * job.rows * job.row_tokens
    positions, head_rows = min(POSITIONS, chunk), 8192 if chunk >= 4096 else 4096
    for share in shares:
        resident = round(share * layers)
        slots = min(2, layers - resident)
        # The backward begins with the last layers, so they stay; of a long row even they are too much.
        here = guess = 2 if 2 * each < budget // 16 else 0
        most, fitting = layers + 1, None
        while fitting is None or here < guess < most:  # `here` layers fit, `most` do not
            keep, on_host = _placed(layers, guess, host, device, less)
            plan = itemise(job, Arrangement(resident, slots, keep, on_host, joined, chunk, positions, head_rows))
            spare = budget - plan.predicted_bytes
            if spare >= 0 or fitting is None:
                here, fitting = guess, plan
            if spare < 0:
                most = guess
            room = int(spare / (1 + KEPT_SLACK)) // max(1, each) if spare >= 0 else (most - here) // 2
            guess = min(here + max(room, 1), most - 1)
        yield needed(fitting)
        if resident and needed(fitting).predicted_bytes > budget:
            return


@lru_cache(4096)
def _placed(
    layers: int, here: int, host: Keep, device: Keep, less: float = 0.0
) -> tuple[tuple[Keep, ...], tuple[bool, ...]]:
    """The last `here` layers keep on the device, where the backward begins; those below wait on the host.

    Of these a share, evenly spread, keeps one level `less`, so that the link keeps up.
    """
    away = layers - here
    below = Keep(host - 1) if less else host
    keep = (*(below if int((i + 1) * less) > int(i * less) else host for i in range(away)), *[device] * here)
    return keep, tuple(i < away for i in range(layers))


def _of_job(compute: Callable[Concatenate[Job, P], T]) -> Callable[Concatenate[Job, P], T]:
    """Compute once what depends on a job and on hashable values alone."""

    def remembered(job: Job, /, *values: P.args, **named: P.kwargs) -> T:
        key = (compute, values, *named.items())
        if key not in job.found:
            job.found[key] = compute(job, *values, **named)
        return cast(T, job.found[key])

    update_wrapper(remembered, compute)
    return remembered


@_of_job
def kept_bytes(job: Job, keep: Keep, *, long: bool = False) -> int:
    """Bytes a token that a layer leaves for its backward, its input among them.

    A `long` row, which passes in chunks, computes the joint projection again in any case.
    """
    spec, qkv, heads = job.spec, _qkv(job.spec), job.spec.heads * job.spec.head_dim
    values = spec.hidden
    if keep >= Keep.NARROW:
        values += heads + job.tail("o") + 2 * spec.hidden
    if keep >= Keep.HEADS and not long:
        values += qkv
    if keep >= Keep.PRODUCTS:
        values += 2 * spec.mlp
    statistics = 4 + (4 * spec.heads if keep >= Keep.NARROW else 0)
    return 2 * values + statistics


@_of_job
def _held(job: Job) -> dict[str, int]:
    """Items that no arrangement changes."""
    spec, groups = job.spec, group_sizes(job.spec)
    trained = adapter_parameters(spec, job.rank, job.targets, dora=job.dora)
    copies = 2 * sum(job.tail(g) * rows for g, (rows, _) in groups.items())
    normed = spec.layers * sum(rows for rows, _ in groups.values()) if job.dora else 0
    return {
        "one layer, unpacked": scratch_bytes(spec, {g: job.tail(g) for g in GROUPS})
        if job.fp8
        else 2 * sum(rows * (cols + job.tail(g)) for g, (rows, cols) in groups.items()),
        "norms": 4 * (spec.layers * sum(spec.norm_shapes.values()) + spec.hidden),
        "adapters, gradients, optimizer": 18 * trained + 8 * normed + copies,
    }


def itemise(job: Job, plan: Arrangement) -> Arrangement:
    """The same arrangement with its bytes: what is held throughout, and the peak of what comes and goes."""
    held, tokens, micro = _held(job), job.rows * job.row_tokens, plan.joined * job.row_tokens
    kept, long = {False: 0, True: 0}, plan.chunk < micro
    for (keep, away), count in plan.kinds().items():
        kept[away] += kept_bytes(job, keep, long=long) * count
    here = kept[False] * tokens
    items = {
        "embedding and head, packed": job.embed_bytes,
        "resident layers, packed": plan.resident * job.layer_bytes,
        "ring of layers, packed": plan.slots * job.layer_bytes,
        "one layer, unpacked": held["one layer, unpacked"],
        "head rows, unpacked": 2 * plan.head_rows * job.spec.hidden,
        "norms": held["norms"],
        "adapters, gradients, optimizer": held["adapters, gradients, optimizer"],
        "activations kept on the GPU": here,
        "tokens, positions, rotation": tokens * (4 * 2 * job.spec.head_dim + 40),
        "work space, activations in transit": max(0, activation_peak(job, plan, micro, tokens) - here),
        "matrix library": LIBRARY_BYTES + GRAPH_BYTES * job.graphs,
    }
    passing = items["work space, activations in transit"]
    items["allocator"] = int(min(SLACK * passing + KEPT_SLACK * here, MOST_SLACK * sum(items.values())))
    return replace(plan, items=items, host_bytes=kept[True] * tokens)


def _qkv(spec: ModelSpec) -> int:
    return (spec.heads + 2 * spec.kv_heads) * spec.head_dim


@dataclass(frozen=True)
class _Visit:
    """Values (2 bytes each) that a visit of one layer by one micro-batch of `n` tokens holds, in chunks of `c`.

    `m` of the tokens go on after the attention.
    """

    job: Job
    keep: Keep
    n: int
    c: int
    m: int

    @property
    def long(self) -> bool:
        return self.n > self.c

    @property
    def out(self) -> int:
        return self.job.spec.heads * self.job.spec.head_dim

    @property
    def kv(self) -> int:
        return self.job.spec.kv_heads * self.job.spec.head_dim

    def rotated(self) -> int:
        """q and k, and v where the joint projection is not kept."""
        return self.n * (
            self.out + self.kv * (2 if self.long else 1) + 2 * (self.job.spec.heads + self.job.spec.kv_heads)
        )

    def attended(self) -> int:
        return self.n * (self.out + self.job.tail("o") + 2 * self.job.spec.heads)

    def attend(self) -> int:
        """The peak up to the attention's output, all computed anew."""
        qkv = self.n * (self.out + 2 * self.kv)
        first = qkv + self.rotated()
        return max(first, first - (qkv if self.long else 0) + self.n * self.out + self.attended())

    def chunk(self, *, kept: bool) -> int:
        """A chunk of the MLP's side; `kept` products lie elsewhere."""
        d, f, job = self.job.spec.hidden, self.job.spec.mlp, self.job
        values = d + (d + job.tail("gate_up")) + (f + job.tail("down"))
        values += 0 if kept and self.keep > Keep.INPUT else 2 * d
        values += 0 if kept and self.keep >= Keep.PRODUCTS else 2 * f
        if self.m < self.n:
            values += self.out + job.tail("o")
        return min(self.c, self.m) * values

    def selected(self) -> int:
        """The input and the gradient of the positions that go on, beside those of all."""
        return 2 * self.m * self.job.spec.hidden if self.m < self.n else 0

    @cached_property
    def kept(self) -> int:
        """Bytes that wait for the backward."""
        fewer = 2 * self.job.spec.hidden * (self.keep > Keep.INPUT) + 2 * self.job.spec.mlp * (
            self.keep >= Keep.PRODUCTS
        )
        return kept_bytes(self.job, self.keep, long=self.long) * self.n - 2 * fewer * (self.n - self.m)

    def rounded(self, width: int, group: str) -> int:
        """A product's input in fp8, for its time."""
        return product_bytes(self.c, width, self.job.tail(group)) // 2 if self.job.fp8 else 0

    @cached_property
    def forward(self) -> int:
        """The peak of a forward besides its input: whatever is kept of this layer included."""
        d, f = self.job.spec.hidden, self.job.spec.mlp
        wide = self.m * (d + 2 * d * (self.keep > Keep.INPUT) + 2 * f * (self.keep >= Keep.PRODUCTS))
        wide += self.n * (self.out + 2 * self.kv) * (self.keep >= Keep.HEADS and not self.long)
        mlp = self.attended() + wide + self.chunk(kept=True) + self.rounded(f, "down")
        return max(self.attend(), mlp + self.selected())

    @cached_property
    def backward(self) -> int:
        """The peak of a backward besides its input, its gradient and what was kept."""
        job, d, f = self.job, self.job.spec.hidden, self.job.spec.mlp
        joint = self.n * (self.out + 2 * self.kv)
        held = self.rotated() + (0 if self.long or self.keep >= Keep.HEADS else joint)
        held += self.attended() if self.keep == Keep.INPUT else 0
        start = (
            self.attend() if self.keep == Keep.INPUT else max(held, self.rotated() + joint * (self.keep < Keep.HEADS))
        )
        back = max(f + job.tail("down") + d, 3 * d + job.tail("gate_up") + self.out + job.tail("o"))
        collected = self.n * self.out if self.long else 0
        mlp = held + collected + self.chunk(kept=True) + min(self.c, self.m) * (back + 2 * f * job.dora)
        mlp += self.rounded(2 * f, "gate_up")
        apart = job.spec.kv_heads if self.n > LONG else 1
        together = job.spec.heads // apart
        sums = -(-job.ordered_on // together) if job.ordered_on else 1
        flash = (4 * self.n + 2 * sums * (self.n + document_room(self.n))) * self.out // apart
        attention = held + self.n * (self.out + job.tail("o")) + joint + flash
        again = self.out + 2 * self.kv
        end = self.rotated() + (0 if self.long else joint) + joint
        end += self.rounded(again, "qkv") + self.c * (again * (2 if self.long else 1) + 2 * (d + job.tail("qkv")))
        apart_m = self.m * self.out if self.m < self.n else 0  # until its positions are among all others again
        return max(start, mlp, attention + apart_m, end) + self.selected()


@_of_job
def _visit(job: Job, keep: Keep, n: int, c: int, m: int) -> _Visit:
    return _Visit(job, keep, n, c, m)


def activation_peak(job: Job, plan: Arrangement, micro: int, tokens: int) -> int:
    """Bytes of everything that comes and goes in a step, what waits on the GPU for the backward among it."""
    d, chunk = job.spec.hidden, min(plan.chunk, micro)
    away = [keep for keep, host in plan.kinds() if host]
    here = [keep for keep, host in zip(plan.keep[-2:], plan.on_host[-2:], strict=True) if not host]
    long = chunk < micro
    waiting = sum(kept_bytes(job, k, long=long) * n for (k, host), n in plan.kinds().items() if not host) * tokens
    # Of the last layer only few positions may go on after its attention; it is gone before the one below goes back.
    fewer = rounded(int(job.labelled_most * micro), label_step(micro))
    fewer = fewer if fewer < FEW * micro else micro
    last = _visit(job, plan.keep[-1], micro, chunk, fewer)
    own = kept_bytes(job, here[-1], long=long) * tokens if here else 0
    waiting_last = waiting - own + (last.kept * tokens // micro if here else 0)
    states = d * tokens
    peaks = [2 * (states + last.forward) + waiting - own * micro // tokens]
    peaks.append(waiting_last + head_peak(job, plan, tokens))
    peaks.append(waiting_last + 2 * (states + last.backward))
    if len(here) > 1:
        below = _visit(job, here[-2], micro, chunk, micro)
        peaks.append(waiting - own + 2 * (states + below.backward))
    if away:
        visit, moved = _visit(job, max(away), micro, chunk, micro), kept_bytes(job, max(away), long=long)
        peaks.append(2 * (states + visit.forward) + 2 * moved * micro)
        peaks.append(2 * (states + visit.backward) + 2 * moved * tokens)
    return max(peaks)


def head_peak(job: Job, plan: Arrangement, tokens: int) -> int:
    """Bytes of the states, their gradient, and the logits of a piece of positions and rows with its sums in fp32."""
    positions, d = min(plan.positions, tokens), job.spec.hidden
    return 2 * 2 * tokens * d + positions * (2 * plan.head_rows + 2 * 4 * d + 2 * d)


def estimate(job: Job, plan: Arrangement, card: Card) -> Arrangement:
    """With the seconds of a step: for a layer the longest of computing, launching, weights and activations moving.

    That is taken up and down, of the layers that keep on the device and of those that keep on the host; a share of
    what is shorter comes on top.
    """
    step_s, graphed = _seconds(job, plan, card, plan.resident)
    return replace(plan, step_s=step_s, graphed=graphed)


def _seconds(job: Job, plan: Arrangement, card: Card, resident: int) -> tuple[float, bool]:
    """See `estimate`, with so many layers resident; and whether the step is replayed."""
    spec, tokens, pace = job.spec, job.rows * job.row_tokens, _pace(job, card, plan.joined, plan.chunk)
    long = plan.chunk < plan.joined * job.row_tokens
    launches = -(-tokens // (plan.joined * job.row_tokens)) * -(-plan.joined * job.row_tokens // plan.chunk)
    computing = sum(count * (pace.up + pace.down[keep]) for (keep, _), count in plan.kinds().items())
    launching = spec.layers * launches * (LAUNCH_UP_S + LAUNCH_DOWN_S)
    graphed = job.graphs and launching > GRAPH_SHARE * computing
    issued = launches * (GRAPHED if graphed else 1.0)
    weight, streamed, step_s = job.layer_bytes / card.link, 1 - resident / spec.layers, pace.rest
    for place in (False, True):
        keeps = [(keep, count) for (keep, away), count in plan.kinds().items() if away == place]
        if not (layers := sum(count for _, count in keeps)):
            continue
        moved = sum(n * kept_bytes(job, k, long=long) for k, n in keeps) * tokens / card.link / layers if place else 0.0
        up = max(pace.up, issued * LAUNCH_UP_S)
        down = max(sum(n * pace.down[k] for k, n in keeps) / layers, issued * LAUNCH_DOWN_S)
        step_s += layers * _paced(up, streamed, weight, moved, BOTH_WAYS)
        step_s += layers * _paced(down, streamed, weight, moved, 1.0)
    return step_s, graphed


def _paced(busy: float, streamed: float, weight: float, moved: float, ways: float) -> float:
    """Seconds a layer where the device is `busy` for some, and the link with its weights and what it keeps.

    Layers that are `streamed` lie among those that are not; how far these lend them their time on the link is LENT.
    """

    def linked(weight: float) -> float:
        return max(weight, moved, (weight + moved) / ways)

    apart = _beside(busy, linked(weight)) * streamed + _beside(busy, linked(0.0)) * (1 - streamed)
    return LENT * _beside(busy, linked(weight * streamed)) + (1 - LENT) * apart


def _beside(busy: float, linked: float) -> float:
    """Seconds of computing and copying side by side: the longer, and a share of the other."""
    return max(busy, linked) + HINDRANCE * min(busy, linked)


class _Pace(NamedTuple):
    """Seconds of computing: of a layer up and, by what it keeps, down; of all that is not layers."""

    up: float
    down: Mapping[Keep, float]
    rest: float


@_of_job
def _pace(job: Job, card: Card, joined: int, chunk: int) -> _Pace:
    spec, tokens = job.spec, job.rows * job.row_tokens
    weights = {part: rows * cols for part, (rows, cols) in spec.linear_shapes.items()}
    whole = sum(weights.values())
    again = {Keep.INPUT: 1.0, Keep.NARROW: 1 - (weights["o"] + weights["down"]) / whole, Keep.PRODUCTS: 0.0}
    again[Keep.HEADS] = (weights["gate"] + weights["up"]) / whole
    adapters = sum(job.tail(group) * sum(size) for group, size in group_sizes(spec).items()) / ADAPTER_SHARE
    rows = min(chunk, joined * job.row_tokens)
    flops: float = card.flops * (rows * spec.hidden / PROBED_SIZE) ** SIZE_GAIN
    a_pass = 2 * (whole / (FP8_GAIN if job.fp8 else 1) + adapters) * tokens / flops
    whole_layers = sum(spec.is_global(i) for i in range(spec.layers)) / spec.layers
    seen = job.seq / 2 * whole_layers + min(job.seq / 2, spec.window) * (1 - whole_layers)
    attention = 4 * seen * spec.heads * spec.head_dim * tokens / (ATTENTION_SHARE * card.flops)
    unpacked = 2.05 * whole / card.memory
    touched_up, touched_down = (2 * tokens / card.memory * values for values in _touched(spec))
    a_down = a_pass + ATTENTION_BACK * attention + unpacked + touched_down
    long = chunk < joined * job.row_tokens  # the joint projection is not kept, and is computed twice
    joint = a_pass * (weights["q"] + weights["k"] + weights["v"]) / whole if long else 0.0
    down = {
        keep: a_down
        + anew * a_pass
        + (attention if keep < Keep.NARROW else 0.0)
        + joint * (2 if keep >= Keep.HEADS else 1)
        for keep, anew in again.items()
    }
    head = 4 * spec.vocab * spec.hidden * tokens * job.labelled / card.flops
    update = UPDATE_BYTES * adapter_parameters(spec, job.rank, job.targets, dora=job.dora) / card.memory
    rest = HEAD * head + STEP_S + STEP_TOKEN_S * tokens + update
    return _Pace(a_pass + attention + unpacked + touched_up, down, rest)


def _touched(spec: ModelSpec) -> tuple[float, float]:
    """Values a token that a layer's elementwise kernels read or write, up and down; measured, so none of them whole."""
    d, f, qkv, out = spec.hidden, spec.mlp, _qkv(spec), spec.heads * spec.head_dim
    return 8.9 * d + 3 * f + 2.3 * (qkv + out), 33.6 * d + 15.7 * f + 6 * qkv + 3.6 * out


def itemised(plan: Arrangement, budget: int) -> list[str]:
    """Every item of an arrangement's bytes, a line each, and their sum beside the budget."""
    shown = [(name, count) for name, count in plan.items.items() if count]
    shown += [(f"together, of {budget / 2**30:.2f} GiB", plan.predicted_bytes)]
    width = max(len(name) for name, _ in shown)
    lines = [f"  {name:<{width}}  {count / 2**30:6.2f} GiB" for name, count in shown]
    ram = f"activations in RAM {plan.host_bytes / 2**30:.1f} GiB, " if plan.host_bytes else ""
    return [*lines, f"  {ram}about {plan.step_s:.2g} s a step predicted"]


def described(plan: Arrangement, layers: int) -> str:
    """One line for people."""
    kept = {f"{keep.name.lower()} {'in RAM' if away else 'on the GPU'}": n for (keep, away), n in plan.kinds().items()}
    places = ", ".join(f"{count} keep {what}" for what, count in kept.items())
    return f"{plan.resident} of {layers} layers resident; {places}"
