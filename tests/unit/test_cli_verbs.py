"""Every verb's JSON contract, through real processes over a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
CHAT = '{"prompt": "2 + 2?", "completion": "четыре 四"}\n'
ANSWER = {"text", "prompt_tokens", "completion_tokens", "tokens_per_s", "first_token_s", "engine"}


def answer(done: subprocess.CompletedProcess[str], *keys: str) -> dict[str, object]:
    """The one JSON object on stdout, with exactly `keys`; the person is told of a next command on stderr."""
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    row: dict[str, object] = json.loads(line)
    assert set(row) == set(keys)
    assert "next: gemwright " in done.stderr
    return row


@pytest.fixture(scope="module")
def run_folder(gemwright: Run, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune of three steps by the command line."""
    folder = tmp_path_factory.mktemp("verbs")
    (folder / "data.jsonl").write_text(CHAT * 8, encoding="utf-8")
    options = ("--max-steps", 3, "--seq", 64, "--tokens-per-step", 64, "--rank", 4, "--targets", "q,v", "--json")
    done = gemwright("tune", folder / "data.jsonl", "--model", tiny_model, "--out", folder / "run", *options)
    files = ("run", "adapter", "adapter_gguf")
    numbers = ("steps", "loss_first", "loss_last", "tokens_per_s", "peak_rss_bytes", "peak_device_bytes")
    row = answer(done, *files, *numbers)
    assert row["steps"] == 3
    assert all(Path(str(row[file])).exists() for file in files)
    return folder / "run"


def test_tune_does_without_pytorchs_compiler(gemwright: Run, tiny_model: Path, tmp_path: Path) -> None:
    """Importing it takes as long again as PyTorch."""
    (tmp_path / "data.jsonl").write_text(CHAT * 8, encoding="utf-8")
    words = ("tune", tmp_path / "data.jsonl", "--model", tiny_model, "--out", tmp_path / "run", "--max-steps", 1)
    done = gemwright(*words, "--holdout", 2, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "torch.optim.adamw" in done.stderr
    assert "torch._dynamo" not in done.stderr and "sympy" not in done.stderr


def test_tune_with_every_adapter_and_schedule_setting(gemwright: Run, tiny_model: Path, tmp_path: Path) -> None:
    """DoRA has no GGUF, says so, and runs in our engine alone."""
    (tmp_path / "data.jsonl").write_text(CHAT * 8, encoding="utf-8")
    said = {"schedule": "linear", "warmup": 0.5, "weight-decay": 0.01, "clip": 0.5, "patience": 3}
    options = [word for name, value in said.items() for word in (f"--{name}", value)]
    words = ("--max-steps", 2, "--seq", 64, "--tokens-per-step", 64, "--rank", 4, "--rslora", "--dora", "--json")
    done = gemwright(
        "tune", tmp_path / "data.jsonl", "--model", tiny_model, "--out", tmp_path / "run", *words, *options
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["adapter_gguf"] is None and Path(row["adapter"]).is_dir()
    assert "llama.cpp cannot express DoRA" in done.stderr
    assert done.stderr.splitlines()[-1].endswith(f"--adapter {tmp_path / 'run'} --engine pytorch")
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert {name: config[name.replace("-", "_")] for name in said} == said and config["rslora"] and config["dora"]
    ask = ("run", "2 + 2?", "--model", tiny_model, "--max-tokens", 3, "--adapter", tmp_path / "run", "--json")
    assert answer(gemwright(*ask, "--engine", "pytorch"), *ANSWER)["engine"] == "pytorch"
    refused = gemwright(*ask)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.count("\n") == 1 and "Use --engine pytorch" in refused.stderr


@pytest.mark.parametrize("engine", ["llamacpp", "pytorch"])
def test_run(gemwright: Run, tiny_model: Path, run_folder: Path, engine: str) -> None:
    words = ("run", "2 + 2?", "--model", tiny_model, "--max-tokens", 5, "--temperature", 0, "--engine", engine)
    row = answer(gemwright(*words, "--adapter", run_folder, "--json"), *ANSWER)
    assert row["engine"] == engine
    assert isinstance(row["completion_tokens"], int) and row["completion_tokens"] <= 5
    shown = gemwright(*words, "--adapter", run_folder)
    assert shown.stdout.rstrip("\n") == str(row["text"]).rstrip("\n")


def test_run_reads_stdin_and_repeats_with_a_seed(gemwright: Run, tiny_model: Path) -> None:
    words = ("run", "-", "--model", tiny_model, "--max-tokens", 6, "--seed", 7, "--raw", "--json")
    first, second = (answer(gemwright(*words, given="пятница 🙂"), *ANSWER) for _ in range(2))
    assert first["text"] == second["text"]


def test_run_refuses_stdin_that_is_not_utf8(gemwright: Run, tiny_model: Path) -> None:
    done = gemwright("run", "-", "--model", tiny_model, given=b"caf\xe9")
    assert (done.returncode, done.stdout) == (2, "")
    assert "UTF-8" in done.stderr and done.stderr.count("\n") == 1


def test_chat_answers_every_line_of_a_pipe(gemwright: Run, tiny_model: Path) -> None:
    words = ("chat", "--model", tiny_model, "--max-tokens", 4, "--system", "Be brief.", "--json")
    done = gemwright(*words, given="one\ntwo\n")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 and all(set(row) == ANSWER for row in rows)
    assert rows[1]["prompt_tokens"] > rows[0]["prompt_tokens"]


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a POSIX thing")
def test_chat_on_a_terminal(tiny_model: Path) -> None:
    """A person's session: a prompt, an answer, /help, Ctrl-D."""
    import pty

    person, terminal = pty.openpty()
    words = [sys.executable, "-m", "gemwright", "chat", "--model", str(tiny_model), "--max-tokens", "3"]
    with subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE) as started:
        os.close(terminal)
        assert b"you> " in seen(person, b"you> ")
        os.write(person, b"hello\n")
        seen(person, b"you> ")
        os.write(person, b"/help\n")
        seen(person, b"you> ")
        os.write(person, b"\x04")
        said = started.communicate()[1].decode()
    os.close(person)
    assert started.returncode == 0
    assert "/save FILE" in said and said.rstrip().splitlines()[-1].startswith("next: gemwright score")


def seen(person: int, wanted: bytes) -> bytes:
    """What the terminal shows until `wanted` appears."""
    shown = b""
    while wanted not in shown:
        shown += os.read(person, 1024)
    return shown


def test_score_agrees_between_engines(gemwright: Run, tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "page.txt"
    text.write_text("Пятница, 8 марта 2031 г.\n" * 3, encoding="utf-8")
    keys = ("tokens", "nll_per_token", "perplexity", "bits_per_byte")
    rows = [
        answer(gemwright("score", text, "--model", tiny_model, "--engine", engine, "--json"), *keys)
        for engine in ("llamacpp", "pytorch")
    ]
    assert rows[0]["tokens"] == rows[1]["tokens"]
    assert rows[0]["nll_per_token"] == pytest.approx(rows[1]["nll_per_token"], rel=0.02)
