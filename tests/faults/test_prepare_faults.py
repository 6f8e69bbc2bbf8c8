"""Preparing data while things go wrong: a worker killed, Ctrl-C, the program killed, a disk that takes no more."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and limits as POSIX has them")
LARGE_BYTES = 49_000_000  # enough for three workers and some seconds of work


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rng = tmp_path_factory.mktemp("data") / "large.jsonl", random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < LARGE_BYTES:
            answer = rng.randbytes(1000).hex(" ", 4)
            file.write(json.dumps({"prompt": "go on", "completion": answer}) + "\n")
    return path


@pytest.fixture
def start(data: Path, tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def begin(**options: Callable[[], None]) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "gemwright", "data", "prepare", data, "--model", tiny_model, "--seq", "8192"]
        environment = os.environ | {"GEMWRIGHT_HOME": str(tmp_path)}
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(
                [*map(str, words), "--workers", "3", "--json"],
                env=environment,
                stdout=pipe,
                stderr=pipe,
                text=True,
                start_new_session=True,
                **options,  # type: ignore[call-overload]
            )
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def workers_of(process: subprocess.Popen[str], count: int = 3, busy_s: float = 0.6) -> list[psutil.Process]:
    """Its worker processes, once there are so many and each has had so much of a processor."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with suppress(psutil.Error):  # the process that makes their tokenizer ends before they start
            children = psutil.Process(process.pid).children()
            workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            if len(workers) == count and all(worker.cpu_times().user >= busy_s for worker in workers):
                return workers
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def left(folder: Path) -> list[str]:
    """All that is there but locks."""
    return sorted(path.name for path in (folder / "prepared").iterdir() if path.suffix != ".lock")


def test_a_killed_worker_is_one_clear_error(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = start()
    workers_of(process)[1].kill()
    out, said = process.communicate(timeout=120)
    assert process.returncode == 1 and not out and "Traceback" not in said
    assert [line for line in said.splitlines() if "killed, perhaps for want of memory" in line] == said.splitlines()[
        -1:
    ]
    assert not left(tmp_path)


@pytest.mark.parametrize(
    ("count", "busy_s"), [(3, 0.6), (2, 0), (1, 0)], ids=["at work", "while they start", "as the first starts"]
)
def test_ctrl_c_ends_all_processes_and_leaves_nothing(
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    hear_ctrl_c: Callable[[], object],
    count: int,
    busy_s: float,
) -> None:
    process = start(preexec_fn=hear_ctrl_c)
    workers = workers_of(process, count, busy_s)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and said.splitlines()[-1] == "interrupted" and "Traceback" not in said
    assert not left(tmp_path)
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_a_killed_program_takes_its_workers_along_and_the_next_goes_well(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start()
    workers = workers_of(process)
    process.kill()
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert [name for name in left(tmp_path) if name.endswith(".part")]
    process.communicate()
    again = start()
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and left(tmp_path) == [Path(json.loads(out)["store"]).name]


def limit_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))


def test_a_disk_that_takes_no_more_is_one_clear_error(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(preexec_fn=limit_files)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 1 and not out and "Traceback" not in said
    assert "cannot write" in said.splitlines()[-1] and not left(tmp_path)
