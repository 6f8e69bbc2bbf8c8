"""Where a run was made: noted without secrets, in a repository or none, once more for each process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gemwright.runs import RunFolder
from gemwright.train.about import add_session, git_state, session, without_secrets


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hf-token", "abc", "--rank", "4"], ["--hf-token", "***", "--rank", "4"]),
        (["--api-key=abc"], ["--api-key=***"]),
        (["--tokens-per-step", "128", "--keep", "2"], ["--tokens-per-step", "128", "--keep", "2"]),
        (["hf_abcdefghijklmnop"], ["***"]),
        (["https://me:secret@host/data.jsonl"], ["https://***@host/data.jsonl"]),
    ],
)
def test_secrets_are_not_kept(words: list[str], shown: list[str]) -> None:
    assert without_secrets(words) == shown


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    if subprocess.run(["git", "init", "-q", tmp_path], check=False).returncode:
        pytest.skip("git is not installed")
    assert git_state(tmp_path) is None  # nothing committed yet
    (tmp_path / "file").write_text("a", encoding="utf-8")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, "add", "file"], check=True)
    subprocess.run(["git", "-C", tmp_path, *who, "commit", "-qm", "a"], check=True)
    state = git_state(tmp_path) or {}
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "file").write_text("b", encoding="utf-8")
    assert (git_state(tmp_path) or {})["dirty"] is True


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path.cwd()) is None


def test_each_process_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "tune", "a b.jsonl", "--rank", "4"])
    run = RunFolder.create(tmp_path / "run", {})
    add_session(run, 0, 20)
    add_session(run, 7, 20)
    about = json.loads((run.path / "about.json").read_text(encoding="utf-8"))
    first, second = about["sessions"]
    assert about["steps_planned"] == 20 and (first["from_step"], second["from_step"]) == (0, 7)
    assert first["versions"]["torch"] and first["machine"]["threads"] and "a b.jsonl" in first["command"]
    (run.path / "about.json").write_text("{", encoding="utf-8")
    add_session(run, 9, 20)
    assert len(json.loads((run.path / "about.json").read_text(encoding="utf-8"))["sessions"]) == 1
    run.release()


def test_it_is_json() -> None:
    json.dumps(session(0), allow_nan=False)
