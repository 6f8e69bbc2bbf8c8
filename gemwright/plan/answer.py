"""Answers `gemwright plan`: one model or all sizes, to run or to tune, on this machine or a named rig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gemwright.errors import DoesNotFit, GemwrightError, needed
from gemwright.layout import activation_bytes
from gemwright.plan.history import FEWEST, Seen, correction
from gemwright.plan.model_bytes import ModelBytes, published
from gemwright.plan.running import CONTEXT_BYTES, DRAFT, Place, RunPlan, alternatives, run_plan
from gemwright.plan.training import CHAT_LABELLED, Arrangement, Card, Job, arrange, described
from gemwright.report import size
from gemwright.rig_file import Rig
from gemwright.spec import LINEARS

Purpose = Literal["run", "tune", "serve"]
GIB = 1 << 30
# What a training process holds beside the model's file and its activations: PyTorch, CUDA's library, Python.
TRAINER_BYTES = int(1.35 * GIB)
# A long run of products is slower than a short one, as the card's power limit has it; so is real work than a copy.
SUSTAINED = {"bf16_flops": 0.88, "memory_bytes_s": 0.96, "link_bytes_s": 1.0}
# Of the free RAM, what a plan may count on; of a CPU's products, the share that training on it reaches.
RAM_SHARE, CPU_SHARE = 0.9, 0.7
# From this width on a CPU's products in bf16 are as fast as they get. In fp32 they are so much faster than the probe's
# square ones, times this power of the width beside the 270M's, up to so much.
FULL_WIDTH, FP32_GAIN = 850, (1.1, 0.35, 1.25)
# Of unified memory, what macOS lets the GPU hold.
UNIFIED_SHARE = 0.7
# How far predictions were from measurements; said with each.
BANDS = {"tune, GPU": 0.15, "tune, CPU": 0.3, "run, CPU": 0.25, "run, GPU": 0.4}


@dataclass(frozen=True)
class Work:
    """What is asked: tokens of a training step, or of a context."""

    purpose: Purpose = "tune"
    seq: int = 2048
    tokens_per_step: int = 8192
    rank: int = 16
    context: int = 4096
    vram_bytes: int | None = None
    residency: str = "auto"

    @property
    def rows(self) -> int:
        """Packed rows of a step."""
        return max(1, self.tokens_per_step // self.seq)


@dataclass(frozen=True)
class Answer:
    """Whether it fits, in how many bytes, how fast, and on what these numbers rest; `what` says it in words."""

    model: str
    purpose: Purpose
    fits: bool
    what: str
    device_bytes: int = 0
    host_bytes: int = 0
    tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    band: float = 0.0
    items: Sequence[tuple[str, str, int]] = field(default_factory=tuple)
    arrangement: dict[str, Any] = field(default_factory=dict)
    basis: dict[str, str] = field(default_factory=dict)
    hint: str = ""

    def as_json(self) -> dict[str, Any]:
        """The contract of `--json`."""
        return {
            "model": self.model,
            "for": self.purpose,
            "fits": self.fits,
            "peak_device_bytes": self.device_bytes,
            "peak_host_bytes": self.host_bytes,
            "tokens_per_s": self.tokens_per_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "error_band": self.band,
            "items": [{"where": where, "name": name, "bytes": count} for where, name, count in self.items],
            "arrangement": self.arrangement,
            "basis": self.basis,
            "what": self.what,
            "hint": self.hint,
        }


def answer(
    name: str, model: ModelBytes, rig: Rig, work: Work, seen: Sequence[Seen] = (), *, hint: bool = True
) -> Answer:
    """What `work` with a model would be on a rig; a plan that does not fit is an answer too.

    `seen` are this machine's runs, by which the speed is corrected; `hint` asks what more memory would change.
    """
    try:
        if work.purpose == "tune":
            return _tune(name, model, rig, work, list(seen), hint=hint)
        return _run(name, model, rig, work, hint=hint)
    except DoesNotFit as error:
        basis = {"model": model.basis} | dict(rig.basis)
        return Answer(name, work.purpose, False, error.what, basis=basis, hint=error.fix or "")


def budget_of(rig: Rig, work: Work) -> int:
    """Video memory that PyTorch may hold on a rig: all but CUDA's context and what the desktop takes."""
    if rig.gpu is None:
        return 0
    if work.vram_bytes is not None:
        return work.vram_bytes
    return rig.gpu.vram_bytes - CONTEXT_BYTES - rig.desktop_bytes


def card_of(rig: Rig) -> Card:
    """What the rig's GPU sustains: of what a probe measured in a moment a part, of a catalogue's figures all."""
    gpu = needed(rig.gpu)
    shares = {w: s if rig.basis.get(f"gpu.{w}", "").startswith("measured") else 1.0 for w, s in SUSTAINED.items()}
    flops, memory, link = (getattr(gpu, what) * share for what, share in shares.items())
    return Card(flops, link, memory)


def room_for_activations(available: int, file_bytes: int) -> int:
    """Bytes of `available` RAM that are left beside a mapped model file and the trainer itself; may be negative."""
    return int(available * RAM_SHARE) - file_bytes - TRAINER_BYTES


def _tune(name: str, model: ModelBytes, rig: Rig, work: Work, seen: list[Seen], *, hint: bool) -> Answer:
    basis = {"model": model.basis} | dict(rig.basis)
    if rig.gpu is None or rig.unified or (rig.gpu.capability or (8, 0)) < (8, 0):
        return _tune_on_cpu(name, model, rig, work, basis)
    card = card_of(rig)
    job = Job(model.spec, model.largest_layer, model.embed, work.rank, LINEARS, work.seq, work.rows, *CHAT_LABELLED)
    free = room_for_activations(rig.ram_available_bytes, model.total)
    if free < 0:
        raise DoesNotFit(
            f"the file of {size(model.total)} and the program need more than the {size(rig.ram_available_bytes)} of "
            "RAM that are free",
            fix="Free some RAM.",
        )
    budget = budget_of(rig, work)
    plan = arrange(job, budget, card, free, residency=work.residency)
    tokens = job.rows * job.row_tokens
    host = model.total + plan.host_bytes + TRAINER_BYTES
    items = [("device", item, count) for item, count in plan.items.items() if count]
    items += [("host", "model file, mapped", model.total), ("host", "activations", plan.host_bytes)]
    items.append(("host", "program", TRAINER_BYTES))
    words = f"{described(plan, model.spec.layers)}; {size(plan.predicted_bytes)} of video memory, {size(host)} of RAM"
    seconds, learned = correction(seen, "seconds", rig.gpu.name)
    if learned >= FEWEST:
        basis["speed"] = f"predicted, times {1 / seconds:.2f} as {learned} runs on this machine had it"
    return Answer(
        name,
        "tune",
        True,
        words,
        plan.predicted_bytes,
        host,
        tokens / (plan.step_s * seconds),
        0.0,
        BANDS["tune, GPU"],
        items,
        plan.summary(),
        basis,
        _more(job, budget, card, free, plan) if hint else "",
    )


def _more(job: Job, budget: int, card: Card, free: int, plan: Arrangement) -> str:
    """What 2 GiB more of video memory would change."""
    more = arrange(job, budget + 2 * GIB, card, free)
    gain = plan.step_s / more.step_s - 1
    if gain < 0.01:
        return "2 GiB more of video memory would change nothing"
    return f"2 GiB more of video memory would make it {gain:.0%} faster"


def _tune_on_cpu(name: str, model: ModelBytes, rig: Rig, work: Work, basis: dict[str, str]) -> Answer:
    spec = model.spec
    values = sum(r * c for r, c in spec.linear_shapes.values())
    trained = work.rank * spec.layers * sum(sum(shape) for shape in spec.linear_shapes.values())
    in_bf16 = rig.cpu.bf16_flops > rig.cpu.fp32_flops
    itemsize = 2 if in_bf16 else 4
    unpacked = itemsize * (values * spec.layers + spec.vocab * spec.hidden)
    tokens = work.rows * work.seq
    scratch = itemsize * (values + 4096 * spec.hidden + 4 * tokens * (spec.mlp + 4 * spec.hidden))
    room = int(rig.ram_available_bytes * RAM_SHARE)
    everything = activation_bytes(spec, tokens, itemsize)
    inputs = itemsize * tokens * spec.hidden * spec.layers
    again = everything > room // 4  # as the trainer decides: more than half of what it may use
    items = [
        ("host", "model file, mapped", model.total),
        ("host", "adapters, gradients, optimizer", 18 * trained),
        ("host", "activations kept", inputs if again else everything),
        ("host", "work space", scratch),
        ("host", "program", int(0.45 * GIB)),
    ]
    least = sum(count for _, _, count in items)
    if least > room:
        raise DoesNotFit(
            f"training it on a CPU needs {size(least)} of RAM, {size(rig.ram_available_bytes)} are free",
            fix="Use a smaller model, --seq or --tokens-per-step.",
        )
    kept = min(unpacked, max(0, (room - least) // 2))
    items.append(("host", "layers kept unpacked", kept))
    flops = 2 * 2 * values * spec.layers + 4 * spec.vocab * spec.hidden * CHAT_LABELLED[0]
    recompute = 1.5 if again else 1.0
    gain, power, most = FP32_GAIN
    wide = min(1.0, spec.hidden / FULL_WIDTH) if in_bf16 else gain * min(most, (spec.hidden / 640) ** power)
    share = CPU_SHARE * wide
    speed = share * max(rig.cpu.bf16_flops, rig.cpu.fp32_flops) / (flops * recompute)
    words = f"on the CPU; {size(least + kept)} of RAM"
    return Answer(
        name, "tune", True, words, 0, least + kept, speed, 0.0, BANDS["tune, CPU"], items, {"device": "cpu"}, basis
    )


def _run(name: str, model: ModelBytes, rig: Rig, work: Work, *, hint: bool) -> Answer:
    narrow = rig.cpu.bf16_flops < rig.cpu.fp32_flops
    host = Place(rig.ram_bytes_s, rig.cpu.fp32_flops, int(rig.ram_available_bytes * RAM_SHARE), narrow)
    gpu = None
    if rig.gpu is not None and rig.unified:  # one memory, at the GPU's speed
        host = Place(rig.gpu.memory_bytes_s, rig.gpu.bf16_flops, int(rig.ram_bytes * UNIFIED_SHARE))
    elif rig.gpu is not None:
        room = rig.gpu.vram_bytes - rig.desktop_bytes if work.vram_bytes is None else work.vram_bytes
        gpu = Place(rig.gpu.memory_bytes_s, rig.gpu.bf16_flops, room)
    plan = run_plan(model, work.context, host, gpu)
    items = [("device", item, count) for item, count in plan.device_items.items()]
    items += [("host", item, count) for item, count in plan.host_items.items()]
    basis = {"model": model.basis} | dict(rig.basis)
    others = alternatives(model, plan, host, gpu, published(DRAFT)) if hint else []
    return Answer(
        name,
        work.purpose,
        True,
        _run_words(plan, model),
        plan.device_bytes,
        plan.host_bytes,
        plan.decode_tokens_per_s,
        plan.prefill_tokens_per_s,
        BANDS["run, GPU" if plan.gpu_layers else "run, CPU"],
        items,
        {
            "gpu_layers": plan.gpu_layers,
            "context": plan.context,
            "cache": plan.cache,
            "alternatives": [asdict(other) for other in others],
        },
        basis,
        "\n".join(other.words(plan) for other in others) or ("no other arrangement would be faster" if hint else ""),
    )


def _run_words(plan: RunPlan, model: ModelBytes) -> str:
    layers = model.spec.layers
    if plan.gpu_layers > layers:
        where = "wholly on the GPU"
    elif plan.gpu_layers:
        where = f"{plan.gpu_layers} of {layers} layers on the GPU"
    else:
        where = "on the CPU"
    video = f"{size(plan.device_bytes)} of video memory, " if plan.device_bytes else ""
    return f"{where}; {video}{size(plan.host_bytes)} of RAM"


def every(
    models: Sequence[tuple[str, ModelBytes]], rig: Rig, works: Sequence[Work], seen: Sequence[Seen] = ()
) -> list[Answer]:
    """All models for all purposes on a rig; what goes wrong with one is its answer."""
    answers = []
    for name, model in models:
        for work in works:
            try:
                answers.append(answer(name, model, rig, work, seen, hint=False))
            except GemwrightError as error:
                answers.append(Answer(name, work.purpose, False, error.what, hint=error.fix or ""))
    return answers
