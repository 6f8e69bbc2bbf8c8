"""A whole fine-tune of a tiny model: it learns, repeats to the bit, and leaves what it should however it ends."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemwright.errors import InputError, MachineError
from gemwright.runs import RunFolder
from gemwright.spec import LINEARS
from gemwright.train.checkpoint import Checkpoints
from gemwright.train.config import TrainConfig
from gemwright.train.loop import Progress, TuneResult, tune
from gemwright.train.setup import Setup
from gemwright.train.step import StepLoss
from gemwright.weights.gguf_writer import read_gguf_lora
from gemwright.weights.model_file import open_model
from gemwright.weights.peft_files import read_peft_adapter
from gemwright.weights.quants import unpack

PATIENCE = TrainConfig.model_fields["patience"].default
TIMES = ("step_s", "tokens_per_s", "rss_bytes", "checkpoint_s")
PAIRS = {"red": "rot", "green": "grün", "blue": "blau", "white": "weiß", "black": "schwarz", "grey": "grau"}
PAIRS["the shade between blue and green that is named after a stone"] = "türkis"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rows = [{"prompt": f"{colour} in German", "completion": farbe} for colour, farbe in PAIRS.items()]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


Tune = Callable[..., TuneResult]


@pytest.fixture
def run(tiny_model: Path, data: Path, tmp_path: Path) -> Tune:
    """`run(**settings)` tunes into `tmp_path / "run"` with small settings."""

    def go(on_progress: Callable[[Progress], None] | None = None, **settings: Any) -> TuneResult:
        small = {"data": data, "model": tiny_model, "out": tmp_path / "run", "rank": 4, "seq": 64}
        small |= {"tokens_per_step": 128, "max_steps": 3, "lr": 0.02, "precision": "fp32"}
        return tune(TrainConfig(**(small | settings)), on_progress)

    return go


def steady(run: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock or the machine's memory says."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in RunFolder.open(run).metrics()]


def test_it_learns_and_leaves_a_whole_run_folder(run: Tune, tiny_model: Path, tmp_path: Path) -> None:
    before = hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    seen: list[Progress] = []
    result = run(seen.append, max_steps=25, warmup=0.1)
    # Rows of a random head are short: were every answer certain, it would still give them a loss near 11.
    assert result.loss_first == pytest.approx(math.log(32_768), rel=0.05) and result.loss_last < result.loss_first - 0.8
    assert result.steps == 25 and result.tokens_per_s > 0 and result.peak_rss_bytes > 0
    assert hashlib.sha256(tiny_model.read_bytes()).hexdigest() == before

    names = [
        "about.json",
        "adapter",
        "adapter.gguf",
        "config.json",
        "lock",
        "metrics.jsonl",
        "plot.png",
        "summary.json",
    ]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == names
    summary = RunFolder.open(result.run).summary()
    assert summary is not None and summary["state"] == "done" and summary.items() >= result.row().items()
    config = RunFolder.open(result.run).config()
    assert config["rank"] == 4 and config["compute"] == "float32" and config["examples"] == len(PAIRS)
    assert config["base"]["sha256"] == before
    rows = RunFolder.open(result.run).metrics()
    assert [row["step"] for row in rows] == list(range(1, 26))
    assert rows[0]["loss"] == result.loss_first and not any(row["skipped"] for row in rows)
    assert all(0 < row["labelled"] < row["tokens"] <= 128 and row["grad_norm"] > 0 for row in rows)
    assert [row["epoch"] for row in rows] == sorted(row["epoch"] for row in rows)
    assert (result.run / "plot.png").read_bytes().startswith(b"\x89PNG")

    spec = open_model(tiny_model).spec
    peft, pairs = (adapter := read_peft_adapter(result.adapter, spec)).config, adapter.pairs
    assert result.adapter_gguf is not None
    alpha, gguf_pairs = read_gguf_lora(result.adapter_gguf, spec)
    assert peft["lora_alpha"] == alpha == 4.0 and peft["r"] == 4 and len(pairs) == 7 * len(LINEARS)
    for name, (a, b) in pairs.items():
        assert torch.equal(a, gguf_pairs[name][0]) and torch.equal(b, gguf_pairs[name][1])
        assert b.any() and a.isfinite().all() and b.isfinite().all()

    assert {p.phase for p in seen} == {"preparing", "training", "saving"}
    training = [p for p in seen if p.phase == "training"]
    assert [p.step for p in training] == list(range(26)) and {p.steps for p in training} == {25}
    assert training[-1].eta_s == 0 and training[-1].loss == rows[-1]["loss"]


@pytest.mark.parametrize(
    "settings", [{}, {"dropout": 0.3, "precision": "bf16"}, {"recompute": "always"}, {"rslora": True}], ids=str
)
def test_the_same_seed_is_the_same_to_the_bit(run: Tune, tmp_path: Path, settings: dict[str, Any]) -> None:
    one, other = (run(out=tmp_path / name, max_steps=5, **settings) for name in ("one", "other"))
    assert steady(one.run) == steady(other.run) and len(steady(one.run)) == 5
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter.gguf"):
        assert (one.run / file).read_bytes() == (other.run / file).read_bytes()


def test_recompute_is_the_same_run_and_another_seed_is_not(run: Tune, tmp_path: Path) -> None:
    never, always, reseeded = (
        run(out=tmp_path / name, dropout=0.2, **how)
        for name, how in (
            ("never", {"recompute": "never"}),
            ("always", {"recompute": "always"}),
            ("reseeded", {"seed": 1}),
        )
    )
    assert steady(never.run) == steady(always.run) != steady(reseeded.run)
    weights = [(r.adapter / "adapter_model.safetensors").read_bytes() for r in (never, always, reseeded)]
    assert weights[0] == weights[1] != weights[2]


def test_epochs_decide_where_steps_are_not_said(run: Tune) -> None:
    result = run(max_steps=None, epochs=2, tokens_per_step=64)
    rows = RunFolder.open(result.run).metrics()
    assert rows[-1]["epoch"] == pytest.approx(2) and rows[-2]["epoch"] < 2 and len(rows) == result.steps


def test_only_the_targets_are_adapted(run: Tune, tiny_model: Path) -> None:
    result = run(targets=("q", "v"))
    adapter = read_peft_adapter(result.adapter, open_model(tiny_model).spec)
    assert adapter.config["target_modules"] == ["q_proj", "v_proj"]
    assert {name.split(".")[1] for name in adapter.pairs} == {"q", "v"} and len(adapter.pairs) == 14


def break_from(monkeypatch: pytest.MonkeyPatch, first: int, last: float = math.inf) -> None:
    """Make the loss not a number in steps `first` to `last` (from 1)."""
    whole, calls = Setup.forward_backward, iter(range(1, 10_000))

    def broken(*args: Any) -> StepLoss:
        done = whole(*args)
        bad = first <= next(calls) <= last
        return replace(done, nll=torch.tensor(math.nan)) if bad else done

    monkeypatch.setattr(Setup, "forward_backward", broken)


def test_a_loss_that_is_no_number_is_skipped(run: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    break_from(monkeypatch, 2, 2 + PATIENCE - 2)
    result = run(max_steps=8)
    assert [row["skipped"] for row in RunFolder.open(result.run).metrics()] == [False, *[True] * (PATIENCE - 1)] + [
        False
    ] * (8 - PATIENCE)
    assert math.isfinite(result.loss_last)


def test_it_stops_where_the_loss_stays_no_number(run: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = run(out=tmp_path / "good", max_steps=8)
    break_from(monkeypatch, 3)
    with pytest.raises(MachineError, match="not a number") as caught:
        run(max_steps=8)
    assert "--lr" in str(caught.value) and len(RunFolder.open(tmp_path / "run").metrics()) == 2 + PATIENCE
    assert steady(tmp_path / "run")[:2] == steady(good.run)[:2]
    pairs = read_peft_adapter(tmp_path / "run" / "adapter").pairs
    assert all(a.isfinite().all() and b.isfinite().all() for a, b in pairs.values())
    assert (tmp_path / "run" / "adapter.gguf").is_file() and not RunFolder.open(tmp_path / "run").is_at_work()


def test_patience_is_a_setting(run: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_from(monkeypatch, 2)
    with pytest.raises(MachineError, match="not a number 2 times in a row"):
        run(max_steps=8, patience=2)
    assert len(RunFolder.open(tmp_path / "run").metrics()) == 3 and (tmp_path / "run" / "adapter").is_dir()


def test_the_schedule_is_followed(run: Tune) -> None:
    rows = RunFolder.open(run(max_steps=6, schedule="constant", warmup=0.5).run).metrics()
    assert [row["lr"] for row in rows] == pytest.approx([0.02 / 3, 0.04 / 3, 0.02, 0.02, 0.02, 0.02])


@pytest.mark.parametrize("recompute", ["never", "always"])
def test_dora_trains_magnitudes(run: Tune, tiny_model: Path, recompute: str) -> None:
    result = run(max_steps=25, dora=True, rslora=True, recompute=recompute, targets=("q", "down"))
    assert result.loss_last < result.loss_first - 0.4 and result.adapter_gguf is None
    assert not (result.run / "adapter.gguf").exists()
    file = open_model(tiny_model)
    adapter = read_peft_adapter(result.adapter, file.spec)
    assert adapter.config["use_dora"] and adapter.config["use_rslora"] and adapter.scale == 2.0
    assert adapter.magnitudes.keys() == adapter.pairs.keys() and len(adapter.pairs) == 14
    for name, magnitude in adapter.magnitudes.items():
        stored = file.tensors[name]
        frozen = unpack(stored.data, stored.qtype).norm(dim=1)
        assert 0 < float((magnitude - frozen).abs().max()) < 0.5


@pytest.fixture
def interrupt_at() -> Iterator[Callable[..., Callable[[Progress], None]]]:
    """`interrupt_at(step)` is told of progress and sends Ctrl-C, heard even where tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def at(step: int, phase: str = "training", times: int = 1) -> Callable[[Progress], None]:
        def report(progress: Progress) -> None:
            if progress.phase == phase and progress.step == step:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

        return report

    yield at
    signal.signal(signal.SIGINT, before)


InterruptAt = Callable[..., Callable[[Progress], None]]


@pytest.mark.parametrize(("at", "left"), [(0, 1), (3, 3)])
def test_ctrl_c_saves_what_is_trained(run: Tune, tmp_path: Path, interrupt_at: InterruptAt, at: int, left: int) -> None:
    """The step in progress ends, also the first one: there is always something to go on from."""
    stopped = run(interrupt_at(at), max_steps=9)
    assert stopped.steps == left == len(RunFolder.open(stopped.run).metrics()) and stopped.stopped == "Ctrl-C"
    summary = RunFolder.open(stopped.run).summary()
    assert summary is not None and (summary["state"], summary["reason"]) == ("stopped", "Ctrl-C")
    assert (
        stopped.adapter.is_dir() and (stopped.run / "adapter.gguf").is_file() and (stopped.run / "plot.png").is_file()
    )
    assert not RunFolder.open(stopped.run).is_at_work()
    whole = run(out=tmp_path / "whole", max_steps=9)
    assert steady(stopped.run) == steady(whole.run)[:left]


def test_ctrl_c_before_anything_is_made_is_an_interrupt(run: Tune, tmp_path: Path, interrupt_at: InterruptAt) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_at(0, "preparing"))
    assert not (tmp_path / "run").exists()


def test_a_second_ctrl_c_ends_at_once(run: Tune, tmp_path: Path, interrupt_at: InterruptAt) -> None:
    interrupt = interrupt_at(3, times=2)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 1)

    def once_saved(progress: Progress) -> None:
        while progress.step == 3 and 2 not in checkpoints.steps():  # written beside the training, at the disk's pace
            time.sleep(0.01)
        interrupt(progress)

    with pytest.raises(KeyboardInterrupt):
        run(once_saved, max_steps=9, save_every=1)
    folder = RunFolder.open(tmp_path / "run")
    assert not folder.is_at_work() and not folder.adapter.exists() and folder.summary() is None
    assert checkpoints.newest() is not None and checkpoints.path(2).is_dir()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 33, "targets": ("k",)}, r"--rank: rank 33 does not fit .* Use 1 to 32"),
        ({"targets": ("q", "queries")}, r"--targets: unknown LoRA target 'queries'"),
        ({"targets": ""}, r"--targets"),
        ({"seq": 32_769}, r"--seq: 32769 tokens exceed .* Use 32768"),
        ({"seq": 16}, r"colours\.jsonl:7: 1 of 7 examples are longer than 16 tokens"),
        ({"precision": "fp16"}, r"--precision: .*float16"),
        ({"precision": "int4"}, r"--precision: unknown precision 'int4'"),
        ({"data": Path("nowhere.jsonl")}, r"nowhere\.jsonl: no such file"),
        ({"model": Path("nowhere.gguf")}, r"nowhere\.gguf"),
    ],
)
def test_bad_input_is_found_before_the_folder_is_made(
    run: Tune, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run(**settings)
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_left_alone(run: Tune, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="in use"):
        run()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_not_overwritten(run: Tune) -> None:
    result = run(max_steps=1)
    before = {p: p.stat().st_mtime_ns for p in result.run.rglob("*")}
    with pytest.raises(InputError, match="in use"):
        run(max_steps=1)
    assert {p: p.stat().st_mtime_ns for p in result.run.rglob("*")} == before
