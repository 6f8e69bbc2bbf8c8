"""The demo around its training: what it counts, what it shows, and what it may replace."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gemwright import demo
from gemwright.data.cldr import load_split
from gemwright.errors import InputError
from gemwright.runs import RunFolder
from gemwright.train.batches import shared
from gemwright.train.loop import TuneResult


def earlier_demo(folder: Path) -> Path:
    folder.mkdir()
    config = {"data": str(Path("anywhere", "data", "cldr", "train.jsonl"))}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "summary.json").touch()
    return folder


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    run = earlier_demo(tmp_path / "demo")
    demo._clear(run)
    assert not run.exists()


def test_a_demo_that_broke_off_is_replaced_but_not_one_at_work(tmp_path: Path) -> None:
    run = earlier_demo(tmp_path / "demo")
    at_work = RunFolder(run)
    at_work.claim()
    with pytest.raises(InputError, match="at work"):
        demo._clear(run)
    at_work.release()
    demo._clear(run)
    assert not run.exists()


@pytest.mark.parametrize("config", [None, "{}", "not json", '{"data": "mine/train.jsonl"}', "[1]"])
def test_nothing_else_is_replaced(tmp_path: Path, config: str | None) -> None:
    (tmp_path / "thesis.txt").touch()
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match="not a demo"):
        demo._clear(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_new_or_empty_folder_is_fine(tmp_path: Path) -> None:
    demo._clear(tmp_path / "new")
    demo._clear(tmp_path)
    assert tmp_path.is_dir()


@pytest.mark.parametrize(
    ("step_s", "steps", "seq"), [(0.01, 150, 1024), (2.5, 150, 1024), (5.0, 148, 512), (60.0, 70, 512)]
)
def test_a_slow_machine_has_fewer_tokens(step_s: float, steps: int, seq: int) -> None:
    assert demo._affordable(step_s) == (steps, seq)
    assert steps == demo.FEWEST or steps * step_s * seq / demo.SEQ <= (demo.MOST_S if seq == demo.SEQ else demo.TRAIN_S)


def test_the_measured_row_is_of_the_data_and_fits(real_model: Path) -> None:
    row = demo._row(real_model, 512)
    assert 450 < sum(len(document.ids) for document in row) <= 512
    assert all(any(document.labelled) for document in row) and any(shared(row))


def result(folder: Path) -> TuneResult:
    numbers = {"steps": 3, "loss_first": 3.0, "loss_last": 0.5, "tokens_per_s": 900.0}
    peaks = {"peak_rss_bytes": 10**9, "peak_device_bytes": 0}
    return TuneResult(run=folder, adapter=folder / "adapter", adapter_gguf=folder / "adapter.gguf", **numbers, **peaks)


def test_summary_counts_exact_answers(tmp_path: Path) -> None:
    test = load_split("test")
    right = [example.messages[-1]["content"] for example in test]
    half = [text if index % 2 else "no" for index, text in enumerate(right)]
    summary = demo._summary(result(tmp_path), test, ["no"] * len(test), half)
    assert (summary["exact_match_before"], summary["exact_match_after"]) == (0.0, 0.5)
    assert summary["test_examples"] == len(test)


def test_examples_are_of_several_languages_and_shown_without_errors(tmp_path: Path) -> None:
    test = load_split("test")
    right = [example.messages[-1]["content"] for example in test]
    examples = demo._examples(test, ["I am\nnot sure " * 30] * len(test), right)
    assert len(examples) == len(demo.SHOWN) and all(example.correct for example in examples)
    summary = demo._summary(result(tmp_path), test, [""] * len(test), right) | {"seconds": 400.0}
    shown = demo.show(summary, examples)
    assert "0% before, 100% after" in shown and "6 min 40 s" in shown
    assert examples[0].right.split()[0] in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 110
