"""`tune` on a GPU from file to run folder: the same losses wherever weights are, memory that runs out, budgets.

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

from gemwright.errors import DoesNotFit, InputError, MachineError  # noqa: E402
from gemwright.train import loop  # noqa: E402
from gemwright.train.config import TrainConfig  # noqa: E402
from gemwright.train.setup import Setup  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"Say {i}", "completion": f"number {i * 7 % 13} and more"} for i in range(300)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def config(data: Path, out: Path, **settings: Any) -> TrainConfig:
    given = {"seq": 256, "tokens_per_step": 1024, "max_steps": 6, "vram": "1GiB", "deterministic": True}
    return TrainConfig(data=data, model=TINY, out=out, **(given | settings))


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_the_same_run_wherever_the_weights_are(data: Path, tmp_path: Path) -> None:
    runs = {
        "resident": {"residency": "resident"},
        "streamed": {"residency": "streamed"},
        "recomputed": {"residency": "streamed", "recompute": "always", "source": "pageable"},
    }
    for name, settings in runs.items():
        result = loop.tune(config(data, tmp_path / name, **settings))
        assert result.steps == 6 and 0 < result.peak_device_bytes <= 2**30
        assert (result.adapter / "adapter_model.safetensors").is_file() and result.adapter_gguf is not None
    first = losses(tmp_path / "resident")
    assert first[-1] < first[0]
    assert losses(tmp_path / "streamed") == first and losses(tmp_path / "recomputed") == first


def test_a_cpu_learns_the_same(data: Path, tmp_path: Path) -> None:
    loop.tune(config(data, tmp_path / "gpu"))
    loop.tune(config(data, tmp_path / "cpu", device="cpu", precision="bf16", vram=None))
    for gpu, cpu in zip(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), strict=True):
        assert gpu == pytest.approx(cpu, rel=5e-3)


def failing(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    whole, count = Setup.forward_backward, iter(range(1, 1000))

    def sometimes(setup: Setup, rows: Any, seed: int) -> Any:
        if next(count) in calls:
            setup.lora.grad.add_(1.0)  # a half-done step has left something behind
            raise torch.OutOfMemoryError("others took it")
        return whole(setup, rows, seed)

    monkeypatch.setattr(Setup, "forward_backward", sometimes)


def test_a_step_that_ran_out_of_memory_is_done_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.tune(config(data, tmp_path / "calm", residency="streamed"))
    failing(monkeypatch, {3})
    loop.tune(config(data, tmp_path / "short", residency="streamed"))
    # Nothing that is much smaller exists for so small a model, so it is laid out as before: the same bits.
    assert losses(tmp_path / "short") == losses(tmp_path / "calm")
    assert "video memory ran out" in capsys.readouterr().err


def test_the_second_time_what_was_trained_is_saved(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, {3, 5})
    with pytest.raises(MachineError, match="ran out twice"):
        loop.tune(config(data, tmp_path / "run"))
    assert len(losses(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_where_too_little_is_left_what_was_trained_is_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {3})

    def nothing_left(*args: Any, **settings: Any) -> Any:
        raise DoesNotFit("others took nearly all of it")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "shrink", nothing_left)
        with pytest.raises(MachineError, match=r"too little of it is left.*runs resume"):
            loop.tune(config(data, tmp_path / "run"))
    assert len(losses(tmp_path / "run")) == 2
    assert loop.resume(tmp_path / "run").steps == 6


def test_a_smaller_arrangement_learns_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.tune(config(data, tmp_path / "calm", seq=1024, tokens_per_step=8192, max_steps=4))
    failing(monkeypatch, {3})
    loop.tune(config(data, tmp_path / "short", seq=1024, tokens_per_step=8192, max_steps=4))
    short, calm = losses(tmp_path / "short"), losses(tmp_path / "calm")
    assert short[:2] == calm[:2] and short == pytest.approx(calm, rel=1e-3)  # other micro-batches round otherwise


def test_a_budget_too_small_names_the_one_that_fits(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"Give --vram [\d.]+GiB") as caught:
        loop.tune(config(data, tmp_path / "run", vram="60MiB"))
    assert not (tmp_path / "run").exists() and caught.value.exit_code == 3
    wanted = str(caught.value).split("Give --vram ")[1].split(",")[0]
    result = loop.tune(config(data, tmp_path / "run", vram=wanted, max_steps=2))
    assert result.peak_device_bytes <= float(wanted.removesuffix("GiB")) * 2**30


def test_more_than_the_card_has_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than the"):
        loop.tune(config(data, tmp_path / "run", vram="5000GiB"))
