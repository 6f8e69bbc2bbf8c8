"""Runs as the verbs show them: whole, cut off, damaged, at work; compared, and removed with nothing beside them."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from gemwright.errors import InputError
from gemwright.run_records import delete, disk_bytes, find_runs, parts_to_delete, read_run
from gemwright.run_text import differences, next_command, side_by_side, story, table
from gemwright.runs import RunFolder

Run = Callable[..., CompletedProcess[str]]


def make(path: Path, state: str | None = "done", **config: Any) -> Path:
    """A run folder of 20 steps as `tune` leaves it."""
    run = RunFolder.create(
        path,
        {"model": "270m", "data": "/d/a.jsonl", "rank": 16, "lr": 0.001, "max_steps": 20, "examples": 7}
        | {"base": {"size": "270m", "type": "Q4_K_M", "sha256": "ab" * 32}, "data_sha256": "cd" * 32}
        | config,
    )
    for step in range(1, 21):
        row = {"step": step, "loss": 4.0 - 0.1 * step, "lr": 1e-3, "tokens": 100, "step_s": 0.5}
        run.log(row | {"tokens_per_s": 200.0, "rss_bytes": 10**9, "device_bytes": 0})
    run.evaluations_log.add({"step": 10, "loss": 2.0, "best": True})
    run.evaluations_log.add({"step": 20, "loss": 2.5, "best": False})
    session = {"begun": "2026-11-24T22:00:00+01:00", "command": "gemwright tune a.jsonl", "git": {"commit": "f" * 40}}
    (path / "about.json").write_text(json.dumps({"steps_planned": 20, "sessions": [session]}), encoding="utf-8")
    (path / "samples.jsonl").write_text('{"step": 20, "prompt": "Привет", "text": "Hello"}\n', encoding="utf-8")
    for folder in ("adapter", "checkpoints/step-00000010"):
        (path / folder).mkdir(parents=True)
    (path / "checkpoints/step-00000010/manifest.json").touch()
    (path / "adapter.gguf").write_bytes(b"GGUF")
    if state:
        run.end({"state": state, "reason": "20 steps", "steps": 20, "tokens_per_s": 210.0, "seconds": 12.0})
    run.release()
    return path


def test_a_whole_run(tmp_path: Path) -> None:
    one = read_run(make(tmp_path / "run")).record
    assert (one.state, one.steps, one.steps_planned, one.model) == ("done", 20, 20, "270m Q4_K_M")
    assert one.loss_first == 3.9 and one.loss_last == pytest.approx(2.05)
    assert (one.evaluation_loss, one.best_loss, one.best_step) == (2.5, 2.0, 10)
    assert one.tokens_per_s == 210 and one.peak_rss_bytes == 10**9 and one.checkpoints == (10,) and not one.damaged
    assert next_command(one, "270m").startswith("gemwright chat --model 270m --adapter ")


def test_a_run_that_was_killed(tmp_path: Path) -> None:
    one = read_run(make(tmp_path / "run", state=None)).record
    assert one.state == "killed" and one.tokens_per_s == pytest.approx(200) and one.seconds == 10
    assert next_command(one, "270m") == f"gemwright runs resume {tmp_path / 'run'}"


def test_a_run_at_work(tmp_path: Path) -> None:
    run = RunFolder(make(tmp_path / "run", state=None))
    run.claim()
    assert read_run(run.path).record.state == "running"
    with pytest.raises(InputError, match="at work"):
        delete(run.path, False)
    run.release()
    assert read_run(run.path).record.state == "killed"


@pytest.mark.parametrize("file", ["config.json", "about.json", "summary.json", "metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("damage", ["gone", "cut", "noise", "list", "folder"])
def test_damage_does_not_stop_the_reading(tmp_path: Path, file: str, damage: str) -> None:
    path = make(tmp_path / "run") / file
    whole = path.read_bytes()
    if damage in ("gone", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    else:
        noise = random.Random(file).randbytes(300)
        path.write_bytes({"cut": whole[: len(whole) // 2], "noise": noise, "list": b'[1, "a"]\n'}[damage])
    if file == "config.json" and damage in ("gone", "folder"):
        with pytest.raises(InputError, match="not a run folder"):
            read_run(path.parent)
        return
    files = read_run(path.parent)
    assert story(files) and table([files.record]) and side_by_side([files, files]) and json.dumps(files.record.row())
    if damage in ("cut", "noise", "list") and file.endswith(".json"):
        assert files.record.damaged == (file,) and file in "\n".join(story(files))


def test_a_loss_that_is_no_number_is_null_in_json(tmp_path: Path) -> None:
    path = make(tmp_path / "run")
    with (path / "evaluations.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 21, "loss": NaN}\n')
    record = read_run(path).record
    assert record.row()["evaluation_loss"] is None and record.best_loss == 2.0
    json.dumps(record.row(), allow_nan=False)


def test_runs_are_found_and_others_are_not(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "group" / "b")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gemma3"}', encoding="utf-8")
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "group" / "b"] and find_runs(tmp_path / "a") == [
        tmp_path / "a"
    ]
    with pytest.raises(InputError, match="no such folder"):
        find_runs(tmp_path / "nowhere")


def test_only_what_differs_is_compared(tmp_path: Path) -> None:
    a, b = (read_run(make(tmp_path / name, lr=lr)) for name, lr in (("a", 0.001), ("b", 0.01)))
    assert differences([a, b]) == {"lr": [0.001, 0.01]}
    text = "\n".join(side_by_side([a, b]))
    assert "0.01" in text and "rank" not in text and "2.500, best 2.000 after step 10" in text


def test_deleting_leaves_what_is_linked_to(tmp_path: Path) -> None:
    run, treasure = make(tmp_path / "run"), tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "thesis.txt").write_text("x" * 5000, encoding="utf-8")
    (run / "link").symlink_to(treasure, target_is_directory=True)
    (run / "checkpoints" / "link.txt").symlink_to(treasure / "thesis.txt")
    assert disk_bytes(run) < 5000
    (tmp_path / "alias").symlink_to(run, target_is_directory=True)
    with pytest.raises(InputError, match="is a link"):
        delete(tmp_path / "alias", False)
    delete(run, False)
    assert not run.exists() and (treasure / "thesis.txt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alias", "treasure"]


def test_the_adapter_can_stay(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert run / "checkpoints" in parts_to_delete(run, True)
    delete(run, True)
    left = sorted(path.name for path in run.iterdir() if path.name != "lock")
    assert left == ["about.json", "adapter", "adapter.gguf", "config.json", "summary.json"]
    assert read_run(run).record.state == "done"
    shutil.rmtree(run / "adapter")
    with pytest.raises(InputError, match="no adapter"):
        delete(run, True)


def test_what_is_no_run_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="nothing is removed"):
        delete(tmp_path / "photos", False)
    assert (tmp_path / "photos" / "config.json").is_file()


def test_the_verbs(gemwright: Run, tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", state=None, lr=0.5)
    listed = gemwright("runs", "list", tmp_path, "--json")
    runs = json.loads(listed.stdout)["runs"]
    assert {run["path"]: run["state"] for run in runs} == {str(a): "done", str(b): "killed"}
    shown = gemwright("runs", "show", a)
    assert "Привет" in shown.stdout and "gemwright tune a.jsonl" in shown.stdout and "next: " in shown.stderr
    assert json.loads(gemwright("runs", "show", b, "--json").stdout)["config"]["lr"] == 0.5
    done = gemwright("runs", "compare", a, b, "--out", tmp_path / "both.png", "--json")
    assert json.loads(done.stdout)["differences"] == {"lr": [0.001, 0.5]}
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert gemwright("runs", "compare", a).returncode == 2
    refused = gemwright("runs", "delete", a)
    assert refused.returncode == 2 and "--yes" in refused.stderr and a.is_dir() and "bytes" in refused.stderr
    removed = gemwright("runs", "delete", a, "--yes", "--json")
    assert removed.returncode == 0 and json.loads(removed.stdout)["bytes"] > 1000 and not a.exists()
    assert gemwright("runs", "show", a).returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("typed", "stays"), [(b"n\n", True), (b"y\n", False)])
def test_on_a_terminal_it_asks(tmp_path: Path, typed: bytes, stays: bool) -> None:
    import pty
    import subprocess

    run = make(tmp_path / "run")
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "gemwright", "runs", "delete", str(run)]
    with subprocess.Popen(words, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        os.write(ours, typed)
        _, said = child.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert b"Remove it?" in said and run.exists() is stays
