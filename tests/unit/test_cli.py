"""The command line as a person meets it: real processes, their exit codes, and what each stream carries."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gemwright import __version__

VERBS = ("demo", "doctor", "pull", "tune", "run", "chat", "score")


Run = Callable[..., subprocess.CompletedProcess[str]]


def test_version(gemwright: Run) -> None:
    done = gemwright("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gemwright {__version__}\n", "")


def test_no_words_shows_help(gemwright: Run) -> None:
    done = gemwright()
    assert done.returncode == 0
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)
    assert done.stdout == gemwright("--help").stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(gemwright: Run, verb: str) -> None:
    done = gemwright(verb, "--help")
    assert done.returncode == 0
    assert f"  gemwright {verb}" in done.stdout.split("Example", 1)[1]
    assert "--json" in done.stdout


def test_help_imports_little(gemwright: Run) -> None:
    """Imports are what its 0.3 s go to; `benchmarks/run_cpu.py` measures them, not a test on a busy machine."""
    imported = gemwright("--help", PYTHONPROFILEIMPORTTIME="1").stderr.splitlines()
    names = {line.rpartition("|")[2].strip() for line in imported}
    assert "gemwright.cli" in names and len(names) < 250
    assert not names & {"torch", "numpy", "transformers", "gguf", "huggingface_hub", "matplotlib", "xllamacpp"}


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("pull",),
        ("tune", "x.jsonl"),
        ("tune", "x.jsonl", "--model", "270m", "--out", "r", "--max-steps", "many"),
        ("run", "hello", "--model", "270m", "--temperature", "-1"),
        ("run", "hello", "--model", "270m", "--loud"),
        ("score", "x.txt", "--model", "270m", "--engine", "abacus"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(gemwright: Run, words: tuple[str, ...]) -> None:
    done = gemwright(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_completion_script(gemwright: Run) -> None:
    done = gemwright("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert "gemwright" in done.stdout


def test_help_in_utf8_whatever_the_locale(gemwright: Run) -> None:
    done = gemwright("--help", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0


def test_reader_that_leaves_is_no_error() -> None:
    code = "import os, sys; os.close(0)"
    with subprocess.Popen(
        [sys.executable, "-m", "gemwright", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as shown:
        assert shown.stdout is not None and shown.stderr is not None
        subprocess.run([sys.executable, "-c", code], stdin=shown.stdout, check=True)
        shown.stdout.close()
        assert shown.stderr.read() == b""


def test_pull_of_a_local_file(gemwright: Run, tiny_model: Path) -> None:
    done = gemwright("pull", tiny_model, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert set(row) == {"path", "sha256", "bytes", "size", "quantization"}
    assert Path(row["path"]).resolve() == tiny_model.resolve()
    assert row["bytes"] == tiny_model.stat().st_size
    assert len(row["sha256"]) == 64


SWALLOWED = {
    # PyTorch goes on without NumPy where it comes while that is imported, and so did the verb.
    "in an import": "try:\n    begun()\nexcept KeyboardInterrupt:\n    pass\n",
    "in what others call back": "class Dropped:\n    def __del__(self): begun()\ndef drop(): Dropped()\n",
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to a process of its own")
@pytest.mark.parametrize("source", SWALLOWED.values(), ids=SWALLOWED)
def test_an_interrupt_is_not_lost_where_it_is_swallowed(
    tmp_path: Path, hear_ctrl_c: Callable[[], object], source: str
) -> None:
    begun = "import time\ndef begun(): print('begun', flush=True); time.sleep(1)\ndef drop(): pass\n"
    (tmp_path / "swallows.py").write_text(begun + source, encoding="utf-8")
    code = "import sys, time, gemwright.__main__ as room; sys.path.append(sys.argv[1])\n"
    code += "room._verb = lambda words: (__import__('swallows').drop(), time.sleep(60))\n"
    code += "room.main(['pull', 'swallows'])"
    words, pipe = [sys.executable, "-c", code, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, preexec_fn=hear_ctrl_c) as started:
        assert started.stdout is not None and started.stdout.readline() == b"begun\n"
        started.send_signal(signal.SIGINT)
        shown = started.communicate(timeout=30)
    assert (started.returncode, shown) == (130, (b"", b"interrupted\n"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to a process of its own")
@pytest.mark.parametrize("after_s", [0, 0.3, 1.5], ids="{}s".format)
def test_interrupting_ends_with_one_line(tiny_model: Path, hear_ctrl_c: Callable[[], object], after_s: float) -> None:
    """Whenever it comes: while modules are imported, the engine starts, or it waits for stdin."""
    code = "import sys, gemwright.__main__ as room; verb = room._engine_ahead\n"
    code += "room._engine_ahead = lambda words: print('begun', flush=True) or verb(words)\n"
    code += "room.main(['run', '-', '--model', sys.argv[1]])"
    words, pipe = [sys.executable, "-c", code, str(tiny_model)], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=hear_ctrl_c) as started:
        assert started.stdout is not None and started.stdout.readline() == b"begun\n"
        time.sleep(after_s)
        started.send_signal(signal.SIGINT)
        shown = started.communicate()
    assert (started.returncode, shown) == (130, (b"", b"interrupted\n"))
