"""Puts a fine-tune on its device: residency, activations and layout of work, on a CPU or under a budget on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from gemwright.errors import DoesNotFit, InputError, needed
from gemwright.kernels.dispatch import has_triton
from gemwright.layout import Keep, activation_bytes
from gemwright.machine import available_ram_bytes
from gemwright.model.activations import Activations, Offloaded, OnDevice
from gemwright.model.decoder import Gemma
from gemwright.model.lora import LoRA
from gemwright.model.residency import UnpackedResidency
from gemwright.model.sources import LayerBytes
from gemwright.model.streamed import StreamedResidency, spread
from gemwright.plan.answer import card_of, room_for_activations
from gemwright.plan.training import MIB, Arrangement, Card, Job, arrange, budget_for, described, itemised
from gemwright.report import say
from gemwright.rigs import this_machine
from gemwright.train.batches import Encoded, Row, make_row
from gemwright.train.config import TrainConfig
from gemwright.train.graphs import Graphs
from gemwright.train.memory import keep_freed_memory, spare_bytes
from gemwright.train.step import StepLoss, Work, forward_backward
from gemwright.weights.model_file import ModelFile

# What is left to the desktop and to CUDA itself where nobody says how much may be used.
MARGIN_BYTES = 512 * MIB
FP8_SINCE = (8, 9)
ALL = (1.0, 1.0)


@dataclass
class Setup:
    """A model ready to train; `joined` packed rows make one micro-batch."""

    model: Gemma
    work: Work
    store: Activations
    device: torch.device
    dtype: torch.dtype
    joined: int = 1
    arrangement: Arrangement | None = None
    graphs: Graphs | None = None
    row_tokens: int | None = None

    def rows(self, packed: Sequence[Sequence[Encoded]]) -> list[Row]:
        """The micro-batches of a step from its packed rows of documents."""
        groups = [packed[i : i + self.joined] for i in range(0, len(packed), self.joined)]
        spec, made = self.model.spec, []
        for group in groups:
            full = self.row_tokens * len(group) if self.row_tokens else None
            made.append(make_row(spec, [d for row in group for d in row], self.device, self.dtype, full))
        return made

    def forward_backward(self, rows: Sequence[Row], seed: int) -> StepLoss:
        """See `train.step.forward_backward`; where its kernels take longer to launch than to run, as a graph."""
        if self.graphs is not None:
            return self.graphs.forward_backward(rows, seed)
        return forward_backward(self.model, rows, self.work, self.store, seed=seed)

    @property
    def lora(self) -> LoRA:
        """What is trained."""
        if self.model.lora is None:
            raise RuntimeError("a model without adapters does not train")
        return self.model.lora

    def held_bytes(self) -> int:
        """What PyTorch holds on the device now."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def waited_s(self) -> float:
        """Seconds that the device waited for weights and activations since last asked."""
        residency = self.model.residency
        return residency.waits.seconds() if isinstance(residency, StreamedResidency) else 0.0

    def peak_bytes(self) -> int:
        """The most that PyTorch held on the device."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0

    def close(self) -> None:
        """Give device and host memory back."""
        self.graphs = None
        for part in (self.model.residency, self.store):
            if isinstance(part, (StreamedResidency, Offloaded)):
                part.close()
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


def choose_device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; InputError where there is none of that kind."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("PyTorch finds no CUDA device", where="--device", fix="Use --device cpu, or check the driver.")
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device) < (8, 0):
        if wanted == "cuda":
            name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
            what = f"{name} (compute capability {major}.{minor}) has no bf16 arithmetic, and Gemma 3 overflows fp16"
            raise InputError(what, where="--device", fix="Use --device cpu.")
        return torch.device("cpu")
    return device


def check_placing(config: TrainConfig, device: torch.device) -> None:
    """InputError where a setting for video memory would do nothing."""
    for name, default in (("vram", None), ("residency", "auto"), ("source", "auto")):
        if device.type == "cpu" and getattr(config, name) != default:
            raise InputError(f"--{name} is for a GPU, and the CPU is used", where=f"--{name}", fix="Leave it out.")


def check_compute(compute: str, device: torch.device) -> None:
    """InputError where the device cannot compute as asked."""
    if compute != "fp8":
        return
    if device.type == "cpu":
        why = "a CPU has no fp8 products"
    elif (capability := torch.cuda.get_device_capability(device)) < FP8_SINCE:
        why = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]}) has no fp8"
    elif not has_triton(device):
        why = "fp8 needs Triton, which cannot be used here"
    else:
        return
    raise InputError(why, where="--compute", fix="Use --compute bf16.")


def job_of(config: TrainConfig, file: ModelFile, labelled: tuple[float, float] = ALL) -> Job:
    """What the configuration asks the GPU to hold; `labelled` as `Job` has it: of all tokens, of a row at most."""
    largest = max(LayerBytes(file, i).size for i in range(file.spec.layers))
    return Job(
        file.spec,
        largest,
        file.tensors["embed"].data.numel(),
        config.rank,
        config.targets,
        config.seq,
        config.rows_per_step,
        *labelled,
        ordered_on=torch.cuda.get_device_properties(0).multi_processor_count if config.deterministic else 0,
        dora=config.dora,
        fp8=config.compute == "fp8",
        graphs=config.graphs and config.packing and not (config.dropout or config.dora or config.deterministic),
    )


def budget_bytes(vram: int | None, device: torch.device) -> int:
    """Bytes that PyTorch may hold: those asked for, or what is free less a margin for the desktop."""
    free, total = torch.cuda.mem_get_info(device)
    if vram is None:
        return free + torch.cuda.memory_reserved(device) - MARGIN_BYTES
    if vram > total:
        what = (
            f"{vram / 2**30:.2f} GiB are more than the {total / 2**30:.2f} GiB of {torch.cuda.get_device_name(device)}"
        )
        raise InputError(what, where="--vram", fix="Leave it out to use what is free.")
    return vram


def set_up(
    config: TrainConfig,
    file: ModelFile,
    device: torch.device,
    dtype: torch.dtype,
    labelled: tuple[float, float] = ALL,
    earlier: Arrangement | None = None,
) -> Setup:
    """Load a model and new adapters for training on `device`; on a GPU exactly as `arrange` lays it out.

    `labelled` is the share of the tokens that are targets, and the most that any row has. A run that goes on has the
    arrangement that it had `earlier`, where that still fits: another rounds otherwise.
    """
    if device.type == "cpu":
        return _on_cpu(config, file, new_lora(config, file, device, dtype), dtype)
    if earlier is not None and earlier.predicted_bytes <= (budget := budget_bytes(config.vram, device)):
        plan = earlier
        _hold_to(budget, device)
    else:
        plan = plan_for(config, file, device, labelled=labelled)
        if earlier is not None and plan != earlier:
            say("less video memory is free than at the start: laid out anew, results may differ in their last bits")
    if config.compute == "fp8":
        say("fp8 is an experiment: compare its loss with that of --compute bf16 before relying on it")
    say(f"{torch.cuda.get_device_name(device)}: {described(plan, file.spec.layers)}")
    for line in itemised(plan, budget_bytes(config.vram, device)):
        say(line)
    return on_gpu(plan, config, file, new_lora(config, file, device, dtype), device, dtype)


def new_lora(config: TrainConfig, file: ModelFile, device: torch.device, dtype: torch.dtype) -> LoRA:
    """Adapters as configured, which change nothing yet."""
    return LoRA(
        file.spec,
        config.rank,
        config.scaled_alpha,
        config.targets,
        dtype=dtype,
        dropout=config.dropout,
        seed=config.seed,
        stabilised=config.rslora,
        dora=config.dora,
        device=device,
    )


def _on_cpu(config: TrainConfig, file: ModelFile, lora: LoRA, dtype: torch.dtype) -> Setup:
    keep_freed_memory()
    spare = spare_bytes()
    activations = activation_bytes(file.spec, config.seq * config.rows_per_step, dtype.itemsize)
    recompute = config.recompute == "always" or (config.recompute == "auto" and activations > spare // 2)
    model = Gemma(UnpackedResidency(file, dtype, spare - (0 if recompute else activations)), lora)
    return Setup(model, Work(Keep.INPUT if recompute else Keep.ALL), OnDevice(), torch.device("cpu"), dtype)


def plan_for(
    config: TrainConfig,
    file: ModelFile,
    device: torch.device,
    budget: int | None = None,
    link_share: float = 1.0,
    labelled: tuple[float, float] = ALL,
) -> Arrangement:
    """The arrangement for this card, with nothing loaded yet; as if its link had that share of its speed.

    Raises DoesNotFit.
    """
    budget = budget_bytes(config.vram, device) if budget is None else budget
    card = card_here(device)
    card = card._replace(link=card.link * link_share)
    host_free = room_for_activations(available_ram_bytes(), file.bytes())
    keeps = {"always": (Keep.INPUT,), "never": (Keep.PRODUCTS,), "auto": tuple(Keep)[:-1]}[config.recompute]
    plan = arrange(job_of(config, file, labelled), budget, card, host_free, residency=config.residency, keeps=keeps)
    _hold_to(budget, device)
    return plan


def arrangement_of(fields: Mapping[str, Any]) -> Arrangement:
    """An arrangement from its fields as JSON keeps them."""
    keep, on_host = tuple(Keep(k) for k in fields["keep"]), tuple(fields["on_host"])
    return Arrangement(**(dict(fields) | {"keep": keep, "on_host": on_host}))


def _hold_to(budget: int, device: torch.device) -> None:
    """Let PyTorch take `budget` bytes of the device and no more, and count its peak from now on."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)


def on_gpu(
    plan: Arrangement, config: TrainConfig, file: ModelFile, lora: LoRA, device: torch.device, dtype: torch.dtype
) -> Setup:
    """Load a model as `plan` says."""
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    residency = StreamedResidency(
        file,
        device,
        dtype=dtype,
        tails=lora.tails(),
        resident=spread(plan.resident, file.spec.layers),
        slots=plan.slots,
        source=config.source,
        head_rows=plan.head_rows,
        fp8=config.compute == "fp8",
    )
    work = Work(plan.keep, plan.chunk, plan.positions, plan.head_rows)
    store, model = Offloaded(plan.on_host, device, residency.waits), Gemma(residency, lora)
    made = Setup(model, work, store, device, dtype, plan.joined, plan)
    if plan.graphed and residency.source_kind != "pageable":
        made.graphs, made.row_tokens = Graphs(model, residency, work, store), job_of(config, file).row_tokens
    return made


@cache
def card_here(device: torch.device) -> Card:
    """The card as `gemwright doctor` measured it, so that plan and run count alike; else by a quick probe."""
    rig, name = this_machine(), torch.cuda.get_device_name(device)
    wanted = ("gpu.bf16_flops", "gpu.link_bytes_s", "gpu.memory_bytes_s")
    known = all(rig.basis.get(figure, "").startswith("measured") for figure in wanted)
    return card_of(rig) if known and rig.gpu is not None and rig.gpu.name == name else probe(device)


def probe(device: torch.device) -> Card:
    """Measure, in some hundredths of a second, the card's matrix products and its link."""
    side, block = 4096, 64 * MIB
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    host = torch.empty(block, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(block, dtype=torch.uint8, device=device)
    product_s = median_s(lambda: torch.mm(x, x))
    copy_s = median_s(lambda: there.copy_(host, non_blocking=True))
    y = torch.empty_like(x).repeat(4, 1)
    z = torch.empty_like(y)
    move_s = median_s(lambda: z.copy_(y))
    # A long run of products is slower than a short one, as the card's power limit has it, and so are less square ones.
    return Card(0.82 * 2 * side**3 / product_s, block / copy_s, 0.9 * 2 * y.numel() * y.element_size() / move_s)


def median_s(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds that the device takes for `work`, the median of some after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return float(sorted(times)[len(times) // 2])


def shrink(setup: Setup, config: TrainConfig, file: ModelFile) -> None:
    """Lay the same step out smaller, after memory that was counted on was taken by others.

    Raises DoesNotFit where too little is left.
    """
    device, plan = setup.device, needed(setup.arrangement)
    setup.close()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    left, had = free + torch.cuda.memory_reserved(device), budget_for(plan)
    try:
        plan = plan_for(config, file, device, min(int(had * 0.85), left))
    except DoesNotFit:  # little is smaller
        plan = plan_for(config, file, device, min(had, left))
    new = on_gpu(plan, config, file, setup.lora, device, setup.dtype)
    setup.model, setup.work, setup.store = new.model, new.work, new.store
    setup.joined, setup.arrangement, setup.graphs, setup.row_tokens = new.joined, plan, new.graphs, new.row_tokens


def use_expandable_segments() -> None:
    """Have PyTorch's allocator grow its blocks instead of leaving gaps between them; before the first allocation."""
    if sys.platform == "linux" and torch.cuda.is_available():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
