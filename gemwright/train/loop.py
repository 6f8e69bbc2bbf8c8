"""A fine-tune from config to finished run folder."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gemwright.errors import InputError, MachineError
from gemwright.model.decoder import Gemma
from gemwright.model.layer import Keep
from gemwright.model.lora import LoRA
from gemwright.model.precision import choose_dtype
from gemwright.model.residency import UnpackedResidency
from gemwright.runs import RunFolder
from gemwright.text.tokenizer import Tokenizer
from gemwright.train.batches import Encoded, encode_file, pack, steps
from gemwright.train.config import TrainConfig
from gemwright.train.memory import activation_bytes, keep_freed_memory, peak_rss_bytes, rss_bytes, spare_bytes
from gemwright.train.optimizer import Optimizer, learning_rate
from gemwright.train.plot import plot_loss
from gemwright.train.step import Work, forward_backward
from gemwright.weights.gguf_writer import write_gguf_lora
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.peft_files import write_peft_adapter
from gemwright.weights.pull import resolve_model

RECENT = 10


@dataclass(frozen=True)
class Progress:
    """Where a fine-tune stands. `loss` in nats a labelled token; `tokens_per_s` counts every token, labelled or not."""

    phase: Literal["preparing", "training", "saving"]
    step: int
    steps: int
    loss: float
    lr: float
    tokens_per_s: float
    eta_s: float
    rss_bytes: int


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
    Raises InputError for bad data, model or settings, MachineError where the machine or the arithmetic fails.
    """
    report = on_progress or (lambda progress: None)
    report(Progress("preparing", 0, 0, math.nan, 0.0, 0.0, 0.0, rss_bytes()))
    if config.threads:
        torch.set_num_threads(config.threads)
    dtype = choose_dtype(config.precision)
    file = open_model(resolve_model(config.model))
    if config.seq > file.spec.context:
        raise InputError(
            f"{config.seq} tokens exceed the model's context", where="--seq", fix=f"Use {file.spec.context} at most."
        )
    lora = LoRA(
        file.spec,
        config.rank,
        config.scaled_alpha,
        config.targets,
        dtype=dtype,
        dropout=config.dropout,
        seed=config.seed,
        stabilised=config.rslora,
        dora=config.dora,
    )
    examples = encode_file(config.data, Tokenizer.from_model(file).encode, config.train_on, config.seq)
    run = RunFolder.create(config.out, _record(config, file, dtype, examples))
    try:
        return _train(config, file, lora, dtype, examples, run, report)
    finally:
        run.release()


def _record(config: TrainConfig, file: ModelFile, dtype: torch.dtype, examples: list[Encoded]) -> dict[str, object]:
    return config.model_dump(mode="json") | {
        "alpha": config.scaled_alpha,
        "compute": str(dtype).removeprefix("torch."),
        "examples": len(examples),
        "base": {"path": str(file.path), "sha256": file.sha256(), "size": file.spec.name, "type": file.quantization},
    }


def _train(
    config: TrainConfig,
    file: ModelFile,
    lora: LoRA,
    dtype: torch.dtype,
    examples: list[Encoded],
    run: RunFolder,
    report: Callable[[Progress], None],
) -> TuneResult:
    keep_freed_memory()
    spare = spare_bytes()
    activations = activation_bytes(file.spec, config.seq * config.rows_per_step, dtype.itemsize)
    recompute = config.recompute == "always" or (config.recompute == "auto" and activations > spare // 2)
    model = Gemma(UnpackedResidency(file, dtype, spare - (0 if recompute else activations)), lora)
    work = Work(Keep.INPUT if recompute else Keep.ALL)
    optimizer = Optimizer(lora, config.weight_decay, config.clip)
    rows_an_epoch = len(pack(examples, config.seq, config.seed, 0))
    planned = math.ceil(config.epochs * math.ceil(rows_an_epoch / config.rows_per_step))
    total = config.max_steps or planned
    batches = steps(file.spec, examples, config.seq, config.rows_per_step, config.seed, dtype=dtype)
    losses: list[float] = []
    recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
    steady_tokens, steady_s = 0, 0.0
    report(Progress("training", 0, total, math.nan, 0.0, 0.0, 0.0, rss_bytes()))
    try:
        for step, (epoch, rows) in enumerate(itertools.islice(batches, total)):
            start = time.perf_counter()
            rate = learning_rate(step, total, config.lr, config.warmup, config.schedule)
            done = forward_backward(model, rows, work, seed=config.seed + step)
            loss = done.loss
            norm = optimizer.update(rate, loss)
            step_s = time.perf_counter() - start
            recent.append((done.tokens, step_s))
            if step:  # the first step also unpacks what is kept unpacked
                steady_tokens, steady_s = steady_tokens + done.tokens, steady_s + step_s
            losses.append(loss)
            speed = sum(t for t, _ in recent) / sum(s for _, s in recent)
            row = {"step": step + 1, "epoch": epoch, "loss": loss, "lr": rate, "grad_norm": norm}
            row |= {"tokens": done.tokens, "labelled": done.labelled, "step_s": step_s, "tokens_per_s": speed}
            run.log(row | {"rss_bytes": rss_bytes(), "skipped": optimizer.skipped_in_a_row > 0})
            eta_s = (total - step - 1) * sum(s for _, s in recent) / len(recent)
            report(Progress("training", step + 1, total, loss, rate, speed, eta_s, rss_bytes()))
            if optimizer.skipped_in_a_row == config.patience:
                break
    except KeyboardInterrupt:
        if not losses:
            raise
    report(Progress("saving", len(losses), total, losses[-1], 0.0, 0.0, 0.0, rss_bytes()))
    save_adapter(run, lora, file, config)
    plot_loss(run.metrics(), run.plot)
    if optimizer.skipped_in_a_row == config.patience:
        raise MachineError(
            f"loss or gradient was not a number {config.patience} times in a row; the adapter before that is saved",
            where=run.path,
            fix="Lower --lr or look for broken examples.",
        )
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
        0,
    )


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
