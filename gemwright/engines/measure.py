"""Runs a model through llama.cpp for a moment and says what that took, beside what was predicted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from gemwright.engines.open import open_engine
from gemwright.engines.protocol import Sampling
from gemwright.engines.session import run_prompt

PROMPT = "A long and patient sentence about nothing in particular goes on and on. "


@dataclass(frozen=True)
class MeasuredRun:
    """The most RAM that the engine's process held, tokens a second written and read."""

    host_bytes: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float


def measure_run(model: Path, context: int, *, tokens: int = 48, threads: int | None = None) -> MeasuredRun:
    """Answer one prompt of several hundred tokens with `tokens` more, after a short one that is not counted."""
    with open_engine(model, context=context, threads=threads) as engine:
        sampling = Sampling(max_tokens=tokens, temperature=0.0)
        run_prompt(engine, "Hello", raw=True, sampling=Sampling(max_tokens=2, temperature=0.0))
        prompt = PROMPT * max(1, min(40, context // 32))
        done = run_prompt(engine, prompt, raw=True, sampling=sampling)
        held = [child.memory_info().rss for child in psutil.Process().children(recursive=True)]
    prefill = done.prompt_tokens / done.first_token_s if done.first_token_s else 0.0
    return MeasuredRun(max(held, default=0), done.tokens_per_s, prefill)
