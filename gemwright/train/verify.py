"""Runs a few steps of a planned fine-tune on random tokens and says what they took, beside what was predicted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gemwright.model.precision import choose_dtype
from gemwright.plan.training import CHAT_LABELLED
from gemwright.train.batches import Encoded
from gemwright.train.config import TrainConfig
from gemwright.train.memory import peak_rss_bytes
from gemwright.train.optimizer import Optimizer
from gemwright.train.setup import choose_device, set_up, use_expandable_segments
from gemwright.weights.model_file import open_model
from gemwright.weights.pull import resolve_model

# Steps until graphs are captured and replayed.
WARM = 3


@dataclass(frozen=True)
class Measured:
    """What steps took: the most bytes held on the device and in RAM, seconds of a step after the first."""

    device_bytes: int
    host_bytes: int
    step_s: float
    tokens_per_s: float


def measure_tune(config: TrainConfig, steps: int = 3, documents: Sequence[Encoded] = ()) -> Measured:
    """Train `steps` steps (after some that are not counted) on a row of `documents`, or on random tokens.

    Nothing is written.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    file = open_model(resolve_model(config.model))
    use_expandable_segments()
    setup = set_up(config, file, device, choose_dtype(config.precision, device), CHAT_LABELLED)
    draw = torch.Generator().manual_seed(config.seed)
    drawn = [[_document(file.spec.vocab, config.seq, draw)] for _ in range(config.rows_per_step)]
    packed = [documents] if documents else drawn
    optimizer, times, tokens = Optimizer(setup.lora, 0.0, 1.0), [], 0
    warm = WARM if setup.graphs else 1
    try:
        rows = setup.rows(packed)
        for step in range(warm + steps):
            start = time.perf_counter()
            done = setup.forward_backward(rows, step)
            rows = setup.rows(packed)  # while the device works, as in a fine-tune
            optimizer.update(1e-5, done.loss)
            times.append(time.perf_counter() - start)
            tokens = done.tokens
    finally:
        setup.close()
    step_s = sorted(times[warm:])[(steps - 1) // 2]
    return Measured(setup.peak_bytes(), peak_rss_bytes(), step_s, tokens / step_s)


def _document(vocab: int, length: int, draw: torch.Generator) -> Encoded:
    ids = torch.randint(0, vocab, (length,), generator=draw).tolist()
    return Encoded(ids, (torch.rand(length, generator=draw) < CHAT_LABELLED[0]).tolist())
