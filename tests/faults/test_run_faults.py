"""Runs that are killed, starved, damaged and crowded: nothing older is lost, one clear line, and they go on exactly."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_child import CONTEXT, Done, Fault, run, start, wait

from gemwright.run_records import read_run
from gemwright.runs import RunFolder
from gemwright.train.checkpoint import Checkpoints

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and small file systems of Unix")
TIMES = ("step_s", "tokens_per_s", "rss_bytes", "checkpoint_s", "seconds", "waiting")
STEPS, EVERY = 10, 2
Count = Callable[[str, bool], None]


class Bench:
    """A folder to work in, the words of a small run, and the same run as it is when nothing happens to it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.log, self.model = folder, folder / "said.txt", model
        self.data = folder / "data.jsonl"
        rows = [{"prompt": f"{n} times seven", "completion": f"{7 * n} точно"} for n in range(1, 25)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.content = self.data.read_bytes()
        self.whole, self.whole_s = folder / "whole", 0.0

    def words(self, out: Path, *more: object) -> list[str]:
        """The command that tunes into `out`."""
        words: list[object] = ["tune", self.data, "--model", self.model, "--out", out, "--max-steps", STEPS]
        words += ["--rank", 4, "--seq", 64, "--tokens-per-step", 128, "--lr", 0.02, "--precision", "fp32"]
        words += ["--dropout", 0.2, "--holdout", 4, "--eval-every", 5, "--save-every", EVERY, "--threads", 1]
        return [str(word) for word in (*words, *more)]

    def tune(self, out: Path, fault: Fault | None = None, *more: object) -> Done:
        """Tune into `out` in a process of its own."""
        return run(self.words(out, *more), self.log, fault)

    def resume(self, out: Path, fault: Fault | None = None) -> Done:
        """Go on in `out` in a process of its own."""
        return run(["runs", "resume", str(out)], self.log, fault)

    def assert_ends_the_same(self, out: Path) -> None:
        """Go on in `out` by the command alone, to the bits of the run that nothing happened to."""
        done = self.resume(out)
        assert done.code == 0, done.said
        self.assert_same(out)

    def assert_same(self, out: Path) -> None:
        """The run in `out` has every number of the whole one, each step once."""
        one, other = RunFolder.open(self.whole), RunFolder.open(out)
        assert steady(one.metrics()) == steady(other.metrics()) and len(other.metrics()) == STEPS
        assert steady(one.evaluations()) == steady(other.evaluations()) and len(other.evaluations()) == 2
        for file in ("adapter/adapter_model.safetensors", "adapter.gguf", "samples.jsonl"):
            assert (self.whole / file).read_bytes() == (out / file).read_bytes(), file
        assert read_run(out).record.state == "done" and not list(out.rglob("*.part"))


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("faults"), tiny_model)
    for out in (bench.whole, bench.folder / "again"):  # the second time nothing is left to be imported
        begun_s = time.monotonic()
        done = bench.tune(out)
        bench.whole_s = time.monotonic() - begun_s
        assert done.code == 0, done.said
    bench.assert_same(bench.folder / "again")
    return bench


@pytest.fixture
def bench(made: Bench) -> Iterator[Bench]:
    """The bench with its data as they were, whatever a test did to them."""
    yield made
    made.data.write_bytes(made.content)


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Count:
    """`count(fault, survived)` adds a try to the table that is printed at the end."""
    return lambda fault, survived: request.node.user_properties.append(("fault", (fault, survived)))


def one_line(done: Done, code: int, *said: str) -> None:
    assert done.code == code, done.said
    assert len(done.errors) == 1 and "Traceback" not in done.said, done.said
    for text in said:
        assert text.lower() in done.errors[0].lower(), done.errors[0]


def newest(out: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    found = Checkpoints(out / "checkpoints", 1).newest() if (out / "checkpoints").is_dir() else None
    return found.state.step if found else 0


def kill_at_random_moments(bench: Bench, out: Path, kills: int, seed: int, count: Count) -> dict[str, int]:
    """SIGKILL runs, new and resumed, at moments spread over their whole life; the last of each chain is let finish."""
    rng, hits = random.Random(seed), {"inside a save": 0, "before the first step": 0, "between": 0}
    last, done_kills = 0, 0
    while done_kills < kills:
        fresh = not (out / "config.json").is_file()
        words = bench.words(out) if fresh else ["runs", "resume", str(out)]
        process = start(words, bench.log, Fault("pause", "fsync", 0, {"seconds": rng.choice((0.0, 0.01, 0.03))}))
        process.join(rng.uniform(0.0, bench.whole_s))
        if process.exitcode is not None:
            assert process.exitcode == 0, bench.log.read_text(encoding="utf-8")
            bench.assert_same(out)
            shutil.rmtree(out)
            last = 0
            continue
        process.kill()
        process.join()
        wait_for(lambda: not RunFolder(out).is_at_work())  # a `git` that it was just starting shared its lock
        done_kills += 1
        inside = bool(list((out / "checkpoints").glob(".*.part")))
        early = not (out / "metrics.jsonl").is_file()
        hits["inside a save" if inside else "before the first step" if early else "between"] += 1
        now = newest(out)
        state = read_run(out).record.state if (out / "config.json").is_file() else "not begun"
        survived = now >= last and state in ("not begun", "killed", "done")
        count("SIGKILL at a random moment", survived)
        assert survived, (last, now, state)
        last = now
    if (out / "config.json").is_file():
        bench.assert_ends_the_same(out)
    return hits


def test_killed_at_random_moments(bench: Bench, tmp_path: Path, count: Count) -> None:
    kill_at_random_moments(bench, tmp_path / "run", 8, 7, count)


@pytest.mark.slow
def test_killed_at_fifty_random_moments(bench: Bench, tmp_path: Path, count: Count) -> None:
    hits = kill_at_random_moments(bench, tmp_path / "run", 50, 11, count)
    print(f"moments: {hits}")
    assert hits["inside a save"] >= 2  # a tenth of them on average; `test_killed_inside_a_save` does it on purpose


@pytest.mark.parametrize(("where", "at"), [("fsync", 8), ("replace", 4), ("rename", 1)])
def test_killed_inside_a_save(bench: Bench, tmp_path: Path, count: Count, where: str, at: int) -> None:
    """Before a file is synced, before the folder gets its name, and as an older one is put away."""
    out = tmp_path / "run"
    place = Fault("kill", where, at)
    done = bench.tune(out, place)
    assert done.code == -9, done.said
    count("SIGKILL inside a save", True)
    bench.assert_ends_the_same(out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(megabytes)` is a file system of that size; its real ENOSPC is the fault."""
    mounted = []

    def mount(megabytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "gemwright", folder], capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip("this machine does not let its root mount a tmpfs")
        mounted.append(folder)
        return folder

    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_the_disk_is_full_during_a_save(
    bench: Bench, tmp_path: Path, count: Count, small_disk: Callable[[int], Path]
) -> None:
    """Room for one checkpoint and not for two: the first stays whole, and the run goes on when there is room."""
    one = sum(file.stat().st_size for file in (bench.whole / "checkpoints").glob("*/*")) // 3
    disk = small_disk(max(1, round(1.6 * one / 2**20 + 0.5)))
    out = disk / "run"
    process = start(bench.words(out, "--keep", 4), bench.log)
    done = wait(process, bench.log)
    assert done.code in (0, 1) and "Traceback" not in done.said
    assert "No space left" in done.said and len(done.errors) <= 1
    assert newest(out) >= EVERY
    count("disk full during a save", True)
    moved = tmp_path / "moved"
    shutil.copytree(out, moved)
    (moved / "summary.json").unlink(missing_ok=True)
    bench.assert_ends_the_same(moved)


def stopped_at(bench: Bench, out: Path, step: int) -> None:
    """A run that was killed in step `step` + 1."""
    done = bench.tune(out, Fault("kill", "forward_backward", step + 1))
    assert done.code == -9, done.said


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(
    bench: Bench, tmp_path: Path, count: Count, killed: Path, file: str, damage: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    steps = Checkpoints(out / "checkpoints", 9).steps()
    target = out / "checkpoints" / f"step-{steps[-1]:08d}" / file
    whole = target.read_bytes()
    at = random.Random(f"{file}{damage}").randrange(len(whole))
    if damage == "gone":
        target.unlink()
    else:
        target.write_bytes(whole[:at] if damage == "cut" else whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    assert newest(out) == steps[-2]
    count(f"checkpoint file {damage}", True)


def test_all_checkpoints_damaged(bench: Bench, tmp_path: Path, count: Count, killed: Path) -> None:
    """It says so and begins anew, to the same end."""
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    for file in (out / "checkpoints").glob("*/state.json"):
        file.write_bytes(file.read_bytes()[:-2])
    bench.assert_ends_the_same(out)
    said = bench.log.read_text(encoding="utf-8")
    assert "no complete checkpoint" in said and said.count("not whole") == 2
    count("all checkpoints damaged", True)


@pytest.fixture(scope="module")
def killed(made: Bench) -> Path:
    """A run that was killed after step 6, with the checkpoints of steps 4 and 6 at least begun."""
    out = made.folder / "killed"
    stopped_at(made, out, 7)
    assert len(Checkpoints(out / "checkpoints", 9).steps()) == 2
    return out


def test_one_damaged_goes_on_from_the_older(bench: Bench, tmp_path: Path, count: Count, killed: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    last = sorted((out / "checkpoints").glob("step-*"))[-1] / "optimizer.safetensors"
    last.write_bytes(last.read_bytes()[:100])
    bench.assert_ends_the_same(out)
    assert str(last) in bench.log.read_text(encoding="utf-8")
    count("checkpoint damaged, then resumed", True)


@pytest.mark.parametrize("seconds", [-86_400.0 * 3650, pytest.param(86_400.0 * 3650, marks=pytest.mark.slow)])
def test_the_clock_is_moved(bench: Bench, tmp_path: Path, count: Count, seconds: float) -> None:
    out = tmp_path / "run"
    done = bench.tune(out, Fault("clock", words={"seconds": seconds}), "--max-hours", 1)
    assert done.code == 0, done.said
    bench.assert_same(out)
    rows = RunFolder.open(out).metrics()
    assert (
        all(0 < row["step_s"] < 60 for row in rows)
        and 0 < json.loads((out / "summary.json").read_text())["seconds"] < 120
    )
    count("clock moved", True)


def test_a_run_folder_that_cannot_be_written(
    bench: Bench, tmp_path: Path, count: Count, killed: Path, small_disk: Callable[[int], Path]
) -> None:
    """On a medium mounted read-only a run is looked at as ever, and going on is refused in one line."""
    disk = small_disk(64)
    shutil.copytree(killed, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    one_line(bench.resume(disk / "run"), 1, "read-only", str(disk / "run"))
    one_line(bench.tune(disk / "new"), 1, "read-only", str(disk / "new"))
    assert read_run(disk / "run").record.state == "killed" and newest(disk / "run") >= 4
    done = run(["runs", "delete", str(disk / "run"), "--yes"], bench.log)
    assert done.code == 1 and len(done.errors) == 1 and (disk / "run" / "config.json").is_file()
    count("read-only run folder", True)


def test_two_runs_in_one_folder(bench: Bench, tmp_path: Path, count: Count, killed: Path) -> None:
    """While one works the second is refused, whether it would begin or go on; the first ends as ever."""
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    first = start(
        ["runs", "resume", str(out)], tmp_path / "first.txt", Fault("slow", "forward_backward", 1, {"times": 3})
    )
    wait_for(lambda: RunFolder(out).is_at_work())
    assert read_run(out).record.state == "running"
    one_line(bench.resume(out), 2, "at work")
    one_line(bench.tune(out), 2, "in use")
    one_line(run(["runs", "delete", str(out), "--yes"], bench.log), 2, "at work")
    assert wait(first, tmp_path / "first.txt").code == 0
    bench.assert_same(out)
    count("two runs in one folder", True)


def test_two_that_start_at_once(bench: Bench, tmp_path: Path, count: Count) -> None:
    """Of several that start together in one new folder exactly one gets it."""
    out = tmp_path / "run"
    logs = [tmp_path / f"said{i}.txt" for i in range(3)]
    done = [wait(process, log) for process, log in [(start(bench.words(out), log), log) for log in logs]]
    assert sorted(one.code for one in done) == [0, 2, 2]
    for one in done:
        if one.code:  # before the folder is there the lock refuses, after that the folder
            one_line(one, 2, "another run is at work here" if "at work" in one.said else "folder is in use")
    bench.assert_same(out)
    count("several runs started at once", True)


def wait_for(there: Callable[[], bool], limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not there():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_the_data_change_under_a_run(bench: Bench, tmp_path: Path, count: Count) -> None:
    """What is being trained was read before: the run ends as ever. Going on is then refused by the file's name."""
    out, stopped = tmp_path / "run", tmp_path / "stopped"
    stopped_at(bench, stopped, 5)
    other = bench.content.replace(b"seven", b"eight", 3)
    done = bench.tune(out, Fault("input", "forward_backward", 4, {"path": str(bench.data), "content": other}))
    assert done.code == 0, done.said
    bench.assert_same(out)
    count("data changed under a run", True)
    one_line(bench.resume(stopped), 2, "data.jsonl", "changed")
    bench.data.unlink()
    one_line(bench.resume(stopped), 2, "data.jsonl")
    bench.data.write_bytes(bench.content)
    bench.assert_ends_the_same(stopped)
    count("data changed or gone before a resume", True)


@pytest.mark.parametrize(
    ("where", "at", "kind"),
    [("forward_backward", 6, "memory"), ("backward", 7 * 5 * 2 + 3, "torch"), ("update", 6, "memory")],
)
def test_memory_runs_out(bench: Bench, tmp_path: Path, count: Count, where: str, at: int, kind: str) -> None:
    out = tmp_path / "run"
    one_line(bench.tune(out, Fault(kind, where, at)), 1, "memory ran out", "gemwright runs resume")
    assert newest(out) >= 4 and read_run(out).record.state == "failed"
    bench.assert_ends_the_same(out)
    count(f"memory runs out in {'the optimizer' if where == 'update' else where.split('_')[0]}", True)


def test_steps_that_take_five_times_as_long(bench: Bench, tmp_path: Path, count: Count) -> None:
    out = tmp_path / "run"
    done = bench.tune(out, Fault("slow", "forward_backward", 12, {"times": 6}), "--max-steps", 22)
    assert done.code == 0, done.said
    warned = [line for line in done.said.splitlines() if "times as long as before" in line]
    assert len(warned) == 1 and ("Likely cause" in warned[0] or "no cause" in warned[0]), done.said
    count("five-fold step time", True)


def test_the_server_of_processes_is_a_real_one() -> None:
    assert CONTEXT.get_start_method() == "forkserver"
