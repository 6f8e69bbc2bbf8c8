"""Memory and speed of running a GGUF through llama.cpp: every byte itemised, seconds from rooflines.

Window layers keep their window and a batch; global ones the whole context. Source: llama.cpp's llama-kv-cache-iswa.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from gemwright.errors import DoesNotFit, InputError
from gemwright.layout import rounded
from gemwright.plan.model_bytes import ModelBytes, weights_of
from gemwright.report import size
from gemwright.spec import ModelSpec

MIB = 1 << 20
BATCH = 512
CACHE_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
# The model that guesses ahead for larger ones. From which gain or to which part of the memory on another way is named.
DRAFT, WORTH, LESS = "270m", 1.05, 0.9
# What the process holds beside the model: Python and the library here, CUDA's context there.
PROCESS_BYTES, CONTEXT_BYTES = 80 * MIB, 420 * MIB
# Up to here our engine lets window layers keep everything, so that no cached prefix is computed again.
WHOLE_CACHE_BYTES = 512 * MIB
# Of a copy's bytes a second, those of reading alone; of a processor's fp32 products, those of a prompt's.
READ_SHARE, GPU_READ_SHARE, MULTIPLY_SHARE = 1.4, 0.75, 0.87
# What multiplying a weight of a type costs llama.cpp on a CPU, in fp32 products: for one token, and for a prompt.
TOKEN_COST = {"Q4_0": 1.8, "Q4_K": 1.9, "Q5_0": 3.2, "Q5_K": 3.0, "Q6_K": 3.2, "Q8_0": 3.7, "F16": 3.0, "F32": 3.0}
PROMPT_COST = {"Q4_0": 1.0, "Q4_K": 0.85, "Q5_0": 1.3, "Q5_K": 1.2, "Q6_K": 1.2, "Q8_0": 1.05, "F16": 1.8, "F32": 1.8}
OTHER_COST = (3.2, 1.3)
# The same where vectors are 256 bits wide, as on processors whose products in bf16 are the slower ones.
NARROW_TOKEN_COST = TOKEN_COST | {"Q4_0": 2.3, "Q4_K": 2.1, "F16": 6.2}
NARROW_PROMPT_COST = PROMPT_COST | {"Q4_0": 0.8, "Q4_K": 0.75, "F16": 1.55}
# Types that llama.cpp keeps a second time in RAM, in an order that its CPU products read faster.
REPACKED = ("Q4_0", "Q4_K")
# What a token costs beside its products: sampling from 262,144, the server; and what a layer adds.
TOKEN_S, LAYER_S, PROMPT_LAYER_S, GPU_LAYER_S = 2.5e-3, 0.1e-3, 45e-6, 40e-6


@dataclass(frozen=True)
class Place:
    """A processor with its memory: bytes/s it reads weights at, products in FLOP/s, bytes it may hold.

    A CPU's vectors may be `narrow`, of 256 bits.
    """

    memory_bytes_s: float
    flops: float
    room_bytes: int
    narrow: bool = False


@dataclass(frozen=True)
class RunPlan:
    """How a model runs: layers on the GPU, context, type of the cache; its bytes on both sides and its speed."""

    context: int
    gpu_layers: int
    cache: str
    device_items: dict[str, int] = field(default_factory=dict)
    host_items: dict[str, int] = field(default_factory=dict)
    decode_tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0

    @property
    def device_bytes(self) -> int:
        """The most that will be held on the GPU."""
        return sum(self.device_items.values())

    @property
    def host_bytes(self) -> int:
        """The most that will be held in RAM."""
        return sum(self.host_items.values())


def cache_bytes(spec: ModelSpec, context: int, kind: str = "f16", layers: range | None = None, slots: int = 1) -> int:
    """Keys and values of `layers` (default: all) for `context` tokens in each of `slots`."""
    each = 2 * spec.kv_heads * spec.head_dim * CACHE_BYTES[kind]
    whole = context * slots
    if 2 * 2 * spec.layers * spec.kv_heads * spec.head_dim * whole <= WHOLE_CACHE_BYTES:
        narrow = whole
    else:
        narrow = min(whole, rounded(spec.window * slots + BATCH, 256))
    kept = [whole if spec.is_global(i) else narrow for i in (layers if layers is not None else range(spec.layers))]
    return int(each * sum(kept))


def run_plan(
    model: ModelBytes,
    context: int,
    host: Place,
    gpu: Place | None = None,
    *,
    gpu_layers: int | None = None,
    cache: str = "f16",
) -> RunPlan:
    """The plan with as many layers on the GPU as fit (or `gpu_layers`). Raises DoesNotFit, InputError.

    llama.cpp puts the last layers there first, then the head; the embedding's rows stay in RAM too.
    """
    spec = model.spec
    if not 0 < context <= spec.context:
        raise InputError(
            f"{context} tokens of context are not within 1 to {spec.context}", where="--context", fix="Give fewer."
        )
    counts: Sequence[int] = range(spec.layers + 1, -1, -1) if gpu_layers is None else [gpu_layers]
    counts = [0] if gpu is None else counts
    for count in counts:
        plan = _laid_out(model, context, count, cache)
        if gpu is not None and plan.device_bytes > gpu.room_bytes:
            continue
        if plan.host_bytes > host.room_bytes:
            break
        return _timed(model, plan, host, gpu)
    smallest = _laid_out(model, context, counts[0] if gpu_layers is not None else 0, cache)
    raise DoesNotFit(
        f"running it needs {size(smallest.host_bytes)} of RAM"
        + (f" and {size(smallest.device_bytes)} of video memory" if smallest.device_bytes else "")
        + f", {size(host.room_bytes)} are free",
        where=f"Gemma 3 {spec.name}",
        fix="Use a smaller model or context, or close other programs.",
    )


def _laid_out(model: ModelBytes, context: int, gpu_layers: int, cache: str) -> RunPlan:
    spec = model.spec
    there = min(gpu_layers, spec.layers)
    split = spec.layers - there
    device: dict[str, int] = {}
    if gpu_layers:
        device["layers, packed"] = sum(model.layers[split:])
        if gpu_layers > spec.layers:
            device["head, packed"] = model.embed
        device["keys and values"] = cache_bytes(spec, context, cache, range(split, spec.layers))
        device["work space"] = _workspace(spec, context)
        device["CUDA's context"] = CONTEXT_BYTES
    share = split / spec.layers
    host = {
        "layers, packed": sum(model.layers[:split]),
        "embedding and head, packed": model.embed,
        "repacked copy": int(share * sum(model.by_type.get(kind, 0) for kind in REPACKED)),
        "keys and values": cache_bytes(spec, context, cache, range(split)),
        "work space": _workspace(spec, context),
        "program": PROCESS_BYTES,
    }
    return RunPlan(context, gpu_layers, cache, device, {name: count for name, count in host.items() if count})


def _workspace(spec: ModelSpec, context: int) -> int:
    """Activations of a batch, the widest of the MLP's among them, and the logits of a token."""
    return 2 * 4 * min(BATCH, context) * (2 * spec.mlp + 6 * spec.hidden) + 4 * spec.vocab


def _timed(model: ModelBytes, plan: RunPlan, host: Place, gpu: Place | None) -> RunPlan:
    spec = model.spec
    there = min(plan.gpu_layers, spec.layers)
    split = spec.layers - there
    weights = sum(r * c for r, c in spec.linear_shapes.values())
    head_there = plan.gpu_layers > spec.layers
    linear, head, prompt = _costs(model, host)
    share = split / spec.layers
    reading = sum(model.layers[:split]) + (0 if head_there else model.embed)
    flops = 2 * (share * linear + (0 if head_there else head))
    products_s = max(reading / (READ_SHARE * host.memory_bytes_s), flops / host.flops)
    token_s = TOKEN_S + split * LAYER_S + products_s
    prompt_s = split * (2 * weights * prompt / (MULTIPLY_SHARE * host.flops) + PROMPT_LAYER_S)
    if gpu is not None and there:
        reading = sum(model.layers[split:]) + (model.embed if head_there else 0)
        token_s += reading / (GPU_READ_SHARE * gpu.memory_bytes_s) + there * GPU_LAYER_S
        prompt_s += 2 * weights * there / (0.5 * gpu.flops)
    prompt_s += 2 * spec.vocab * spec.hidden / (MULTIPLY_SHARE * host.flops) / BATCH
    return replace(plan, decode_tokens_per_s=1 / token_s, prefill_tokens_per_s=1 / prompt_s)


def _costs(model: ModelBytes, host: Place) -> tuple[float, float, float]:
    """In fp32 products: what one token's linear layers and head are worth, and a weight of a prompt's layers."""
    a_token, a_prompt = (NARROW_TOKEN_COST, NARROW_PROMPT_COST) if host.narrow else (TOKEN_COST, PROMPT_COST)
    types = dict(model.by_type)
    types[model.embed_type] -= model.embed
    weights = {kind: weights_of(count, kind) for kind, count in types.items() if count > 0}
    linear = sum(count * a_token.get(kind, OTHER_COST[0]) for kind, count in weights.items())
    prompt = sum(count * a_prompt.get(kind, OTHER_COST[1]) for kind, count in weights.items())
    head = model.spec.vocab * model.spec.hidden * a_token.get(model.embed_type, OTHER_COST[0])
    return linear, head, prompt / sum(weights.values())


@dataclass(frozen=True)
class Alternative:
    """Another way to run the model, and what would come of it."""

    what: str
    tokens_per_s: float
    device_bytes: int
    host_bytes: int

    def words(self, plan: RunPlan) -> str:
        """In words, beside `plan`."""
        less = plan.device_bytes + plan.host_bytes - self.device_bytes - self.host_bytes
        memory = f", {size(abs(less))} {'less' if less > 0 else 'more'}" if abs(less) >= 50 * MIB else ""
        return f"{self.what}: {self.tokens_per_s:.3g} tokens/s{memory}"


def alternatives(
    model: ModelBytes, plan: RunPlan, host: Place, gpu: Place | None, draft: ModelBytes
) -> list[Alternative]:
    """What is faster than `plan` or takes less: a smaller cache, a draft, more video memory; the fastest first."""
    found = []

    def add(what: str, other: RunPlan, speed: float) -> None:
        if speed > WORTH * plan.decode_tokens_per_s or other.device_bytes + other.host_bytes < LESS * (
            plan.device_bytes + plan.host_bytes
        ):
            found.append(Alternative(what, speed, other.device_bytes, other.host_bytes))

    small = run_plan(model, plan.context, host, gpu, cache="q8_0")
    add("keys and values in q8_0", small, small.decode_tokens_per_s)
    if draft.spec.layers < model.spec.layers:
        rest = replace(host, room_bytes=host.room_bytes - plan.host_bytes)
        beside = replace(gpu, room_bytes=gpu.room_bytes - plan.device_bytes + CONTEXT_BYTES) if gpu else None
        with suppress(DoesNotFit):
            second = run_plan(draft, min(plan.context, draft.spec.context), rest, beside)
            both = replace(
                plan,
                device_items=plan.device_items | {"draft model": max(0, second.device_bytes - CONTEXT_BYTES)},
                host_items=plan.host_items | {"draft model": second.host_bytes - PROCESS_BYTES},
            )
            add(f"with {draft.spec.name} as a draft that is right 6 times in 10", both, with_draft(plan, second))
    if gpu is not None:
        more = run_plan(model, plan.context, host, replace(gpu, room_bytes=gpu.room_bytes + (2 << 30)))
        add("2 GiB more of video memory", more, more.decode_tokens_per_s)
    return sorted(found, key=lambda other: -other.tokens_per_s)


def with_draft(plan: RunPlan, draft: RunPlan, accepted: float = 0.6, ahead: int = 4) -> float:
    """Tokens/s with a draft that guesses `ahead` tokens, each right with probability `accepted`.

    Source: Leviathan et al. 2023 (arXiv 2211.17192), equation 1. Checking a few tokens reads the weights once.
    """
    expected = (1 - accepted ** (ahead + 1)) / (1 - accepted)
    seconds = ahead / draft.decode_tokens_per_s + 1 / plan.decode_tokens_per_s
    return expected / seconds
