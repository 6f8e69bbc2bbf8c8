"""Which arithmetic a CPU trains in, and how soon that is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemwright.model import precision
from gemwright.model.precision import choose_dtype


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[torch.dtype, float]]:
    """A CPU whose products take so many ns a multiplication, by a clock that only they move."""
    costs, now = {torch.float32: 0.02, torch.bfloat16: 0.02}, [0.0]

    def mm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        now[0] += costs[x.dtype] * 1e-9 * x.shape[0] * x.shape[1] * w.shape[1]
        return x

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])
    precision._bf16_is_faster.cache_clear()
    yield costs
    assert now[0] < 0.3  # seconds that the measurement took
    precision._bf16_is_faster.cache_clear()


@pytest.mark.parametrize(("bf16", "wanted"), [(0.01, "bf16"), (0.03, "fp32"), (3.5, "fp32")], ids=str)
def test_the_faster_is_taken_and_the_slow_not_waited_for(clock: Any, bf16: float, wanted: str) -> None:
    clock[torch.bfloat16] = bf16
    assert choose_dtype("auto") == choose_dtype(wanted)
