"""A fine-tune from config to finished run folder."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from gemwright.errors import InputError, MachineError
from gemwright.model.lora import LoRA, check_targets
from gemwright.model.precision import choose_dtype
from gemwright.plan.answer import TRAINER_BYTES
from gemwright.plan.history import Seen, remember
from gemwright.report import say, size
from gemwright.runs import RunFolder
from gemwright.text.tokenizer import Tokenizer
from gemwright.train.batches import Encoded, Row, encode_file, pack, steps
from gemwright.train.config import TrainConfig
from gemwright.train.memory import peak_rss_bytes, rss_bytes
from gemwright.train.optimizer import Optimizer, learning_rate
from gemwright.train.plot import plot_loss
from gemwright.train.setup import (
    Setup,
    check_compute,
    check_placing,
    choose_device,
    set_up,
    shrink,
    use_expandable_segments,
)
from gemwright.train.step import StepLoss
from gemwright.weights.gguf_writer import write_gguf_lora
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.peft_files import write_peft_adapter
from gemwright.weights.pull import resolve_model

RECENT = 10
# A prediction further from the measured peak than this is said aloud.
PEAK_TOLERANCE = 0.05


@dataclass(frozen=True)
class Progress:
    """Where a fine-tune stands. `loss` in nats a labelled token; `tokens_per_s` counts every token, labelled or not.

    `waiting` is the share of the last step that the device waited for weights, `device_bytes` what PyTorch holds there.
    """

    phase: Literal["preparing", "training", "saving"]
    step: int
    steps: int
    loss: float
    lr: float
    tokens_per_s: float
    eta_s: float
    rss_bytes: int
    waiting: float = 0.0
    device_bytes: int = 0


@dataclass(frozen=True)
class TuneResult:
    """What a fine-tune left: `loss_first` of the first step, `loss_last` the mean of the last tenth of them.

    `adapter_gguf` is None with DoRA, which llama.cpp cannot express.
    """

    run: Path
    adapter: Path
    adapter_gguf: Path | None
    steps: int
    loss_first: float
    loss_last: float
    tokens_per_s: float
    peak_rss_bytes: int
    peak_device_bytes: int


def tune(config: TrainConfig, on_progress: Callable[[Progress], None] | None = None) -> TuneResult:
    """Fine-tune and write the run folder: config, metrics, plot, the adapter as PEFT folder and as GGUF.

    Everything that can be wrong with the input is found before the folder is made. Ctrl-C saves what is trained so far.
    Raises InputError for bad data, model or settings, DoesNotFit where the video memory is too small for the smallest
    arrangement, MachineError where the machine or the arithmetic fails.
    """
    report = on_progress or (lambda progress: None)
    report(Progress("preparing", 0, 0, math.nan, 0.0, 0.0, 0.0, rss_bytes()))
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    check_compute(config.compute, device)
    check_placing(config, device)
    dtype = choose_dtype(config.precision, device)
    file = open_model(resolve_model(config.model))
    if config.seq > file.spec.context:
        raise InputError(
            f"{config.seq} tokens exceed the model's context", where="--seq", fix=f"Use {file.spec.context} at most."
        )
    check_targets(file.spec, config.rank, config.targets)
    examples = encode_file(config.data, Tokenizer.from_model(file).encode, config.train_on, config.seq)
    use_expandable_segments()
    RunFolder.check_new(config.out)
    setup = set_up(config, file, device, dtype)
    try:
        run = RunFolder.create(config.out, _record(config, file, setup, examples))
        try:
            with ThreadPoolExecutor(1) as pool:
                return _train(config, file, setup, examples, run, report, pool.submit(file.sha256))
        finally:
            run.release()
    finally:
        setup.close()


def _record(config: TrainConfig, file: ModelFile, setup: Setup, examples: list[Encoded]) -> dict[str, object]:
    plan = setup.arrangement
    record = config.model_dump(mode="json") | {
        "alpha": config.scaled_alpha,
        "compute": "fp8" if config.compute == "fp8" else str(setup.dtype).removeprefix("torch."),
        "device": setup.device.type,
        "examples": len(examples),
        "base": {"path": str(file.path), "size": file.spec.name, "type": file.quantization},
    }
    return record if plan is None else record | {"plan": plan.summary()}


def _train(
    config: TrainConfig,
    file: ModelFile,
    setup: Setup,
    examples: list[Encoded],
    run: RunFolder,
    report: Callable[[Progress], None],
    digest: Future[str],
) -> TuneResult:
    lora = setup.lora
    optimizer = Optimizer(lora, config.weight_decay, config.clip)
    rows_an_epoch = len(pack(examples, config.seq, config.seed, 0))
    planned = math.ceil(config.epochs * math.ceil(rows_an_epoch / config.rows_per_step))
    total = config.max_steps or planned
    batches = itertools.islice(steps(examples, config.seq, config.rows_per_step, config.seed), total)
    losses: list[float] = []
    recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
    steady_tokens, steady_s, shrunk = 0, 0.0, False
    at = Progress("training", 0, total, math.nan, 0.0, 0.0, 0.0, rss_bytes())
    report(at)
    try:
        epoch, packed = next(batches)
        rows = setup.rows(packed)
        for step in range(total):
            start = time.perf_counter()
            rate = learning_rate(step, total, config.lr, config.warmup, config.schedule)
            done = _attempt(setup, rows, config.seed + step)
            if done is None:
                if shrunk:
                    break
                shrunk = True
                shrink(setup, config, file)
                rows = setup.rows(packed)
                say("video memory ran out: others took what was counted on; going on with less of it")
                done = _attempt(setup, rows, config.seed + step)
                if done is None:
                    break
            passed = epoch
            epoch, packed = next(batches, (epoch, []))
            rows = setup.rows(packed)  # while the device still works on this step
            loss = done.loss
            norm = optimizer.update(rate, loss)
            step_s = time.perf_counter() - start
            waiting = setup.waited_s() / step_s
            recent.append((done.tokens, step_s))
            if step:  # the first step also fills what is kept
                steady_tokens, steady_s = steady_tokens + done.tokens, steady_s + step_s
            losses.append(loss)
            speed = sum(t for t, _ in recent) / sum(s for _, s in recent)
            row = {"step": step + 1, "epoch": passed, "loss": loss, "lr": rate, "grad_norm": norm}
            row |= {"tokens": done.tokens, "labelled": done.labelled, "step_s": step_s, "tokens_per_s": speed}
            row |= {"rss_bytes": rss_bytes(), "device_bytes": setup.held_bytes(), "waiting": waiting}
            run.log(row | {"skipped": optimizer.skipped_in_a_row > 0})
            eta_s = (total - step - 1) * sum(s for _, s in recent) / len(recent)
            at = Progress(
                "training", step + 1, total, loss, rate, speed, eta_s, rss_bytes(), waiting, setup.held_bytes()
            )
            report(at)
            if step == 0:
                _compare(setup)
            if optimizer.skipped_in_a_row == config.patience:
                break
    except KeyboardInterrupt:
        if not losses:
            raise
    if not losses:
        raise MachineError(
            "video memory ran out in the first step", fix="Close other programs, or use a smaller --vram."
        )
    report(replace(at, phase="saving"))
    run.amend({"base": {"sha256": digest.result()}})
    save_adapter(run, lora, file, config)
    plot_loss(run.metrics(), run.plot)
    if optimizer.skipped_in_a_row == config.patience:
        raise MachineError(
            f"loss or gradient was not a number {config.patience} times in a row; the adapter before that is saved",
            where=run.path,
            fix="Lower --lr or look for broken examples.",
        )
    if done is None:
        raise MachineError(
            "video memory ran out twice; what was trained until then is saved",
            where=run.path,
            fix="Close other programs, or use a smaller --vram.",
        )
    _remember(setup, file, recent)
    last = losses[-max(1, len(losses) // 10) :]
    speed = steady_tokens / steady_s if steady_s else recent[0][0] / recent[0][1]
    return TuneResult(
        run.path,
        run.adapter,
        None if config.dora else run.adapter_gguf,
        len(losses),
        losses[0],
        sum(last) / len(last),
        speed,
        peak_rss_bytes(),
        setup.peak_bytes(),
    )


def _attempt(setup: Setup, rows: list[Row], seed: int) -> StepLoss | None:
    """A step's forward and backward, or None (and no gradient) where the device's memory ran out."""
    try:
        return setup.forward_backward(rows, seed)
    except torch.OutOfMemoryError:
        pass
    setup.lora.grad.zero_()
    return None


def _remember(setup: Setup, file: ModelFile, recent: deque[tuple[int, float]]) -> None:
    """Let the next plan on this machine know what came of this one."""
    plan = setup.arrangement
    if plan is None or len(recent) < 2:
        return
    device, size_name = torch.cuda.get_device_name(setup.device), file.spec.name
    step_s = sorted(seconds for _, seconds in recent)[len(recent) // 2]
    host = file.bytes() + plan.host_bytes + TRAINER_BYTES
    remember(
        [
            Seen("device", device, size_name, plan.predicted_bytes, setup.peak_bytes()),
            Seen("host", device, size_name, host, peak_rss_bytes()),
            Seen("seconds", device, size_name, plan.step_s, step_s),
        ]
    )


def _compare(setup: Setup) -> None:
    """Say how the peak of the first step compares with the prediction, where that was wrong."""
    plan, peak = setup.arrangement, setup.peak_bytes()
    if plan is not None and abs(peak / plan.predicted_bytes - 1) > PEAK_TOLERANCE:
        say(f"predicted peak {size(plan.predicted_bytes)} of video memory, measured {size(peak)}")


def save_adapter(run: RunFolder, lora: LoRA, file: ModelFile, config: TrainConfig) -> None:
    """Write the adapter as PEFT and llama.cpp know it (DoRA only PEFT), each whole or not at all."""
    base, name = str(file.path), f"gemma-3-{file.spec.name}"
    write_peft_adapter(
        run.adapter,
        file.spec,
        lora.rank,
        lora.alpha,
        lora.pairs(),
        base,
        lora.targets,
        rslora=lora.stabilised,
        magnitudes=lora.magnitudes(),
    )
    if not lora.dora:
        write_gguf_lora(run.adapter_gguf, file.spec, name, lora.scale * lora.rank, lora.pairs())
