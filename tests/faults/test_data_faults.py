"""Damage to data files and to the machine while they are read: real processes, one clear line, nothing half-written."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemwright.data.judge import judged
from gemwright.data.records import DataFile

Run = Callable[..., Any]
GOOD = '{"prompt": "a", "completion": "b"}\n'


def big(path: Path, rows: int) -> Path:
    """Rows that no compression makes small."""
    noise = random.Random(0)
    lines = (json.dumps({"prompt": f"{at} {noise.random()}", "completion": "b"}) + "\n" for at in range(rows))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_a_line_of_100_mb_is_one_finding_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.write(GOOD + '{"prompt": "')
        for _ in range(100):
            file.write("x" * 1_000_000)
        file.write('", "completion": "b"}\n' + GOOD.replace("a", "c"))
    code = """
import pathlib, psutil, sys
from gemwright.check_data import check
before = psutil.Process().memory_info().rss
row = check([pathlib.Path(sys.argv[1])]).row()
print([(f["code"], f["line"]) for f in row["findings"]], row["kept"], psutil.Process().memory_info().rss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    findings, kept, grown = done.stdout.rsplit(maxsplit=2)
    assert (findings, kept) == ("[('D013', 2)]", "2") and int(grown) < 150e6


def test_what_may_not_be_read(gemwright: Run, tmp_path: Path) -> None:
    done = gemwright("data", "check", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "is a folder with no data file in it" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root and Windows may write anywhere")
def test_a_read_only_folder(gemwright: Run, tmp_path: Path) -> None:
    source, locked = big(tmp_path / "a.jsonl", 3), tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    done = gemwright("data", "convert", source, locked / "o.jsonl")
    assert done.returncode == 1 and "cannot write" in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on Windows")
@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.gz", "o.jsonl.zst", "o.parquet"])
def test_a_disk_that_is_full(tmp_path: Path, name: str) -> None:
    """A file size limit makes real writes fail in the middle, as a full disk does."""
    source = big(tmp_path / "a.jsonl", 60_000)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); from gemwright.__main__ import main;"
        "main(['data', 'convert', sys.argv[1], sys.argv[2]])"
    )
    words = [sys.executable, "-c", code, source, tmp_path / name]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without signals")
def test_killed_at_any_moment_there_is_a_whole_file_or_none(tmp_path: Path) -> None:
    source = big(tmp_path / "a.jsonl", 30_000)
    made = 0
    for seed in range(6):
        out = tmp_path / f"o{seed}.jsonl"
        words = [sys.executable, "-m", "gemwright", "data", "convert", str(source), str(out)]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(random.Random(seed).uniform(0.2, 1.2))
            process.send_signal(signal.SIGKILL)
        if out.exists():
            made += 1
            assert len(out.read_text(encoding="utf-8").splitlines()) == 30_000
    assert made < 6


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to a process of its own")
def test_interrupted(tmp_path: Path, hear_ctrl_c: Callable[[], object]) -> None:
    source = big(tmp_path / "a.jsonl", 200_000)
    words = [sys.executable, "-m", "gemwright", "data", "convert", str(source), str(tmp_path / "o.jsonl")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_ctrl_c) as process:
        while len(list(tmp_path.iterdir())) < 2:  # until it writes
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130 and said.splitlines()[-1] == "interrupted"
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = big(tmp_path / "a.jsonl", 50_000)
    rows = judged([DataFile(path)])
    first = next(rows)
    os.truncate(path, 1_500_001)
    rest = list(rows)
    assert first.entry and 1_000 < len(rest) < 50_000
    assert all(verdict.entry for verdict in rest[:-1])
