"""Files that are never half-written, and run folders that never lose what is in them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gemwright.errors import InputError, MachineError
from gemwright.runs import RunFolder, atomic_path, write_json


def test_atomic_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.bin"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_bytes() == b"half"
    assert os.listdir(target.parent) == ["file.bin"]


def test_atomic_file_keeps_the_old_one_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("new", encoding="utf-8")
        raise ZeroDivisionError
    assert target.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_atomic_folder_replaces_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "stale").touch()
    with atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "fresh").write_text("x", encoding="utf-8")
    assert os.listdir(target) == ["fresh"]
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_refusing_disk_is_a_machine_error_that_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot write") as caught, atomic_path(tmp_path / "file" / "below") as path:
        path.touch()
    assert str(tmp_path / "file" / "below") in str(caught.value)


def test_json_keeps_every_script(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"text": "пятница 金曜日 🙂"})
    assert "пятница 金曜日 🙂" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_a_run_is_created_logged_and_opened_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"rank": 16})
    run.log({"step": 1, "loss": 2.5})
    run.log({"step": 2, "loss": 2.0})
    run.release()
    again = RunFolder.open(tmp_path / "run")
    assert again.config() == {"rank": 16}
    assert [row["loss"] for row in again.metrics()] == [2.5, 2.0]
    assert again.adapter.parent == again.adapter_gguf.parent == again.plot.parent == tmp_path / "run"


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    assert run.metrics() == []
    run.log({"step": 1})
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as handle:
        handle.write(json.dumps({"step": 2})[:-3])
    assert run.metrics() == [{"step": 1}]


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="in use"):
        RunFolder.create(tmp_path, {})
    assert os.listdir(tmp_path) == ["thesis.txt"]
    with pytest.raises(InputError, match="in use"):
        RunFolder.create(tmp_path / "thesis.txt", {})


def test_two_runs_cannot_claim_one_folder(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", {})
    with pytest.raises(InputError, match=r"in use|just started"):
        RunFolder.create(tmp_path / "run", {})


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        RunFolder.open(tmp_path)
