"""`gemwright plan` as it is asked: tables, one screen, rigs, prices, bad input, what earlier runs taught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemwright.errors import DoesNotFit, InputError
from gemwright.plan.answer import Work, answer
from gemwright.plan.ask import Money, ask
from gemwright.plan.history import Seen, correction, recall, remember
from gemwright.plan.model_bytes import published
from gemwright.plan.table import screen, table, verdict
from gemwright.rigs import load_rig, rig_names
from gemwright.spec import SPECS

SEED = "rtx4060ti-8gb"
Run = Callable[..., CompletedProcess[str]]


@pytest.mark.parametrize("rig", rig_names())
def test_every_rig_has_an_answer_for_every_size(rig: str) -> None:
    asked = ask(None, None, rig=rig)
    answers = asked.result["answers"]
    assert [a["model"] for a in answers[::2]] == list(SPECS) and len(answers) == 2 * len(SPECS)
    for found in answers:
        assert found["fits"] == (found["tokens_per_s"] > 0) and (found["what"] or found["fits"])
    assert all(len(line) <= 120 for line in asked.lines)


def test_the_seed_rig_tunes_every_size() -> None:
    """The promise: 27B fine-tunes in 8 GB."""
    for found in ask(None, "tune", rig=SEED).result["answers"]:
        assert found["fits"] and found["peak_device_bytes"] < 8e9


def test_the_contract(gemwright: Run) -> None:
    done = gemwright("plan", "27b", "--for", "tune", "--rig", SEED, "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["fits"] is True
    for key in ("peak_device_bytes", "peak_host_bytes", "tokens_per_s"):
        assert said[key] > 0
    assert sum(i["bytes"] for i in said["items"] if i["where"] == "device") == said["peak_device_bytes"]
    assert sum(i["bytes"] for i in said["items"] if i["where"] == "host") == said["peak_host_bytes"]
    assert said["arrangement"]["chunk_tokens"] > 0 and said["basis"]["gpu.link_bytes_s"]


def test_what_does_not_fit_is_an_answer_and_exit_3(gemwright: Run) -> None:
    done = gemwright("plan", "27b", "--for", "tune", "--rig", SEED, "--vram", "3GiB")
    assert done.returncode == 3 and "does not fit" in done.stdout and "Give --vram" in done.stdout
    said = json.loads(gemwright("plan", "27b", "--rig", SEED, "--vram", "3GiB", "--json").stdout)
    assert said["fits"] is False and said["tokens_per_s"] == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("plan", "7b"), "unknown model '7b'"),
        (("plan", "4b", "--rig", "rtx4060"), "Nearest: rtx4060ti-8gb"),
        (("plan", "4b", "--seq", "0"), "--seq: 0 is not possible"),
        (("plan", "4b", "--rank", "5000"), "--rank: rank 5000 does not fit"),
        (("plan", "1b", "--for", "run", "--context", "40000"), "--context: 40000 tokens exceed the 32768"),
        (("plan", "4b", "--vram", "8 apples"), "--vram"),
        (("plan", "missing.gguf"), "no such file"),
        (("plan", "4b", "--cost", "--kwh", "-1", "--rig", SEED), "-1"),
    ],
)
def test_bad_input_is_one_line(gemwright: Run, words: tuple[str, ...], line: str) -> None:
    done = gemwright(*words)
    assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_a_local_file_is_weighed(gemwright: Run, real_model: Path) -> None:
    said = json.loads(gemwright("plan", real_model, "--for", "run", "--json").stdout)
    assert said["basis"]["model"] == "the file's header" and said["peak_host_bytes"] > real_model.stat().st_size


def test_prices_stand_beside_the_plan() -> None:
    asked = ask("27b", "run", rig="rtx3090-24gb", money=Money(5e6))
    assert any("hosted" in line for line in asked.lines) and asked.result["cost"]["here"]["price_usd"] > 0
    tuned = ask("27b", "tune", rig=SEED, money=Money(5e6))
    assert any("not for training" in line for line in tuned.lines)


def test_all_rigs_stand_beside_what_was_claimed() -> None:
    asked = ask("27b", None, all_rigs=True)
    text = "\n".join(asked.lines)
    assert "pipe dream" in text and "$200" in text and len(asked.result["rigs"]) == len(rig_names())


def test_colour_only_where_asked() -> None:
    rig = load_rig(SEED)
    found = answer("4b", published("4b"), rig, Work())
    assert verdict(found) == "yes"
    assert "\x1b[" in "".join(screen(found, rig, True, explain=False))
    assert "\x1b[" not in "".join([*screen(found, rig, False, explain=True), *table([found], False)])


def test_runs_correct_the_next_plan(tmp_path: Path) -> None:
    rig = load_rig(SEED)
    assert rig.gpu is not None
    plain = answer("4b", published("4b"), rig, Work())
    seen = [Seen("seconds", rig.gpu.name, "4b", 1.0, 1.25)] * 3
    slower = answer("4b", published("4b"), rig, Work(), seen)
    assert slower.tokens_per_s == pytest.approx(plain.tokens_per_s / 1.25) and "3 runs" in slower.basis["speed"]
    assert answer("4b", published("4b"), rig, Work(), seen[:2]).tokens_per_s == plain.tokens_per_s
    file = tmp_path / "deep" / "plans.jsonl"
    remember(seen, file)
    with file.open("a", encoding="utf-8") as handle:
        handle.write('{"kind": "seconds", "device": "x"}\nnot json\n{"kind":"seconds","device":"x","size":"4b",')
    assert recall(file) == seen and recall(tmp_path / "none") == []


@given(st.lists(st.floats(0.3, 3.0), min_size=3, max_size=40))
def test_a_correction_lies_within_what_was_seen(ratios: list[float]) -> None:
    rows = [Seen("device", "card", "4b", 1.0, ratio) for ratio in ratios]
    factor, count = correction(rows, "device", "card")
    assert min(ratios) <= factor <= max(ratios) and count == min(20, len(ratios))
    assert correction(rows, "device", "another") == (1.0, 0)


def test_too_little_ram_does_not_fit() -> None:
    found = answer("27b", published("27b"), load_rig("cpu-only"), Work("tune", seq=2048, tokens_per_step=1 << 20))
    assert not found.fits and "RAM" in found.what


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="--rank"):
        ask("4b", None, rig=SEED, rank=0)
    with pytest.raises((InputError, DoesNotFit)):
        ask("4b", None, rig=SEED, vram="0GiB")
