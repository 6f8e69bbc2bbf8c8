"""A run on a GPU goes on from its checkpoint: to the bit with --deterministic, evaluation and all.

GEMWRIGHT_TINY names a small GGUF with Gemma's tokenizer (tests/conftest.py writes one: `tiny_model`).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
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
from gemwright.train.checkpoint import Checkpoints  # noqa: E402
from gemwright.train.config import TrainConfig  # noqa: E402
from gemwright.train.loop import Progress, resume, tune  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"Say {i}", "completion": f"number {i * 7 % 13} and more"} for i in range(300)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def config(data: Path, out: Path, **settings: Any) -> TrainConfig:
    given = {"seq": 256, "tokens_per_step": 1024, "max_steps": 12, "vram": "1GiB", "dropout": 0.1}
    return TrainConfig(data=data, model=TINY, out=out, **(given | settings))


def terminate_at(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.phase == "training" and progress.step == step:
            signal.raise_signal(signal.SIGTERM)

    return report


def losses(out: Path) -> tuple[list[float], list[float]]:
    run = RunFolder.open(out)
    return [row["loss"] for row in run.metrics()], [row["loss"] for row in run.evaluations()]


@pytest.mark.parametrize(
    "settings",
    [{"residency": "resident"}, {"residency": "streamed"}, {"residency": "streamed", "holdout": 20, "eval_every": 5}],
    ids=str,
)
def test_it_goes_on_to_the_same_bits(data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    tune(config(data, whole, deterministic=True, **settings))
    assert tune(config(data, run, deterministic=True, **settings), terminate_at(4)).stopped == "SIGTERM"
    assert resume(run, on_progress=terminate_at(7)).steps == 7
    assert resume(run).steps == 12
    assert losses(run) == losses(whole)
    weights = [(out / "adapter" / "adapter_model.safetensors").read_bytes() for out in (whole, run)]
    assert weights[0] == weights[1]


def test_as_it_is_by_default_it_goes_on_closely(data: Path, tmp_path: Path) -> None:
    """Without --deterministic, and with steps replayed as graphs on either side of evaluations."""
    settings = {"dropout": 0.0, "holdout": 20, "eval_every": 5, "max_steps": 20}
    tune(config(data, tmp_path / "whole", **settings))
    tune(config(data, tmp_path / "run", **settings), terminate_at(11))
    done = resume(tmp_path / "run")
    assert done.steps == 20 and 0 < done.peak_device_bytes <= 2**30
    for ours, theirs in zip(losses(tmp_path / "run"), losses(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)


def test_the_arrangement_is_kept_though_more_memory_is_free(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(config(data, tmp_path / "run", deterministic=True), terminate_at(3))
    found = Checkpoints(tmp_path / "run" / "checkpoints", 2).newest()
    assert found is not None and found.arrangement is not None
    RunFolder.open(tmp_path / "run").amend({"vram": 2**31})
    resume(tmp_path / "run", on_progress=terminate_at(5))
    again = Checkpoints(tmp_path / "run" / "checkpoints", 2).newest()
    assert again is not None and again.arrangement == found.arrangement
    assert "laid out anew" not in capsys.readouterr().err


def test_memory_that_ran_out_twice_is_a_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemwright.errors import MachineError
    from gemwright.train.setup import Setup

    tune(config(data, tmp_path / "whole", deterministic=True, residency="streamed"))
    whole, count = Setup.forward_backward, iter(range(1, 1000))

    def sometimes(setup: Setup, rows: Any, seed: int) -> Any:
        if next(count) in {3, 5}:
            raise torch.OutOfMemoryError("others took it")
        return whole(setup, rows, seed)

    with monkeypatch.context() as patched:
        patched.setattr(Setup, "forward_backward", sometimes)
        with pytest.raises(MachineError, match="ran out twice"):
            tune(config(data, tmp_path / "run", deterministic=True, residency="streamed"))
    assert resume(tmp_path / "run").steps == 12
    assert losses(tmp_path / "run")[0] == losses(tmp_path / "whole")[0]
