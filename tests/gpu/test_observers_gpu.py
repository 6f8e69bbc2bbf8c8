"""Samples on a GPU: the same whether layers stay or stream, and training beside them is what it is without.

GEMWRIGHT_TINY names a small GGUF with Gemma's tokenizer (tests/conftest.py writes one: `tiny_model`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
TINY = os.environ.get("GEMWRIGHT_TINY")
if not TINY:
    pytest.skip("GEMWRIGHT_TINY names no model", allow_module_level=True)

from gemwright.runs import RunFolder  # noqa: E402
from gemwright.train.config import TrainConfig  # noqa: E402
from gemwright.train.loop import tune  # noqa: E402

pytestmark = pytest.mark.gpu
VRAM = 2**30


@pytest.mark.parametrize("how", [{"deterministic": True}, {"deterministic": True, "dropout": 0.1}, {}], ids=str)
def test_samples_stay_within_memory_and_change_nothing(tmp_path: Path, how: dict[str, Any]) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Say {i}", "completion": f"number {i * 7 % 13} and more"} for i in range(300)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    losses, samples = [], []
    for name, settings in (
        ("resident", {"residency": "resident", "holdout": 20, "eval_every": 3}),
        ("streamed", {"residency": "streamed", "holdout": 20, "eval_every": 3}),
        ("seldom", {"residency": "streamed", "holdout": 20, "eval_every": 12}),
    ):
        given: dict[str, Any] = {"seq": 256, "tokens_per_step": 1024, "max_steps": 12, "vram": VRAM}
        result = tune(TrainConfig(data=data, model=TINY, out=tmp_path / name, **(given | settings | how)))
        assert result.peak_device_bytes <= VRAM
        losses.append([row["loss"] for row in RunFolder.open(result.run).metrics()])
        lines = (result.run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        samples.append([json.loads(line) for line in lines])
        assert (result.run / "plot.png").is_file()
    assert len(samples[0]) == 12 and len(samples[2]) == 3
    if how:
        assert losses[0] == losses[1] == losses[2] and samples[0] == samples[1] and samples[1][-3:] == samples[2]
