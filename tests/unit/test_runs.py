"""Files that are never half-written, and run folders that never lose what is in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemwright.errors import InputError, MachineError
from gemwright.runs import Lines, RunFolder, atomic_path, write_json


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
    first = RunFolder.create(tmp_path / "run", {})
    with pytest.raises(InputError, match="in use"):
        RunFolder.create(tmp_path / "run", {})
    with pytest.raises(InputError, match=rf"another run is at work here \(process {os.getpid()}\)"):
        RunFolder.open(tmp_path / "run").claim()
    assert first.is_at_work() and RunFolder.open(tmp_path / "run").is_at_work()
    first.release()
    assert not first.is_at_work()
    again = RunFolder.open(tmp_path / "run")
    again.claim()
    again.release()


def test_a_claim_dies_with_its_process(tmp_path: Path) -> None:
    """Killed, with no chance to tidy up: the next one needs no hand."""
    code = "import sys; from pathlib import Path; from gemwright.runs import RunFolder"
    code += "; run = RunFolder.create(Path(sys.argv[1]), {}); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        run = RunFolder.open(tmp_path / "run")
        assert run.is_at_work()
        with pytest.raises(InputError, match="another run is at work here"):
            run.claim()
        holder.kill()
    assert not run.is_at_work()
    run.claim()
    run.release()


def test_of_many_that_start_at_once_one_runs(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from gemwright.runs import RunFolder; sys.stdin.readline()"
    code += "; run = RunFolder.create(Path(sys.argv[1]), {}); time.sleep(1)"
    words, pipe = [sys.executable, "-c", code, tmp_path / "run"], subprocess.PIPE
    started = [subprocess.Popen(words, stdin=pipe, stderr=pipe, text=True) for _ in range(4)]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 1, 1, 1]
    assert all("InputError" in text for text in said if text) and RunFolder.open(tmp_path / "run").config() == {}


def test_a_start_that_was_cut_off_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / ".config.json.123.part").write_text("{", encoding="utf-8")
    RunFolder.create(tmp_path, {"rank": 1}).release()
    assert RunFolder.open(tmp_path).config() == {"rank": 1}


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="permissions that bind this user")
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    run.release()
    (tmp_path / "run" / "lock").chmod(0o444)
    (tmp_path / "run").chmod(0o555)
    with pytest.raises(MachineError, match="cannot be written"):
        RunFolder.open(tmp_path / "run").claim()


def test_rows_that_the_disk_refuses_wait_for_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Lines(tmp_path / "gone" / "metrics.jsonl")
    for step in (1, 2):
        log.add({"step": step})
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "metrics.jsonl: cannot write" in said
    with pytest.raises(MachineError, match="cannot write"):
        log.flush()
    log.path.parent.mkdir()
    log.add({"step": 3})
    log.flush()
    assert [row["step"] for row in log.rows()] == [1, 2, 3] and not capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX thing")
def test_a_row_that_fits_in_part_leaves_no_part(tmp_path: Path) -> None:
    """A real limit that cuts a write short, as a full disk does; then there is room again."""
    code = f"""
import resource, signal
from pathlib import Path
from gemwright.runs import Lines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = Lines(Path({str(tmp_path / "x.jsonl")!r}))
log.add({{"step": 1}})
resource.setrlimit(resource.RLIMIT_FSIZE, (30, resource.RLIM_INFINITY))
log.add({{"step": 2, "text": "longer than what is left"}})
print(log.path.read_text().count("step"))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.add({{"step": 3}})
print([row["step"] for row in log.rows()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n[1, 2, 3]\n" and done.stderr.count("\n") == 1


def test_going_back_drops_what_came_after(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    for step in (1, 2, 3):
        run.log({"step": step})
    run.evaluations_log.add({"step": 2})
    (run.path / "samples.jsonl").write_text('{"step": 1}\n{"step": 3}\n', encoding="utf-8")
    run.end({"state": "stopped"})
    left = (run.path / ".adapter.7.part", run.checkpoints / ".step-00000003.7.part")
    for part in left:
        part.mkdir(parents=True)
    (run.path / ".adapter.gguf.7.part").touch()
    run.go_back_to(1)
    assert run.metrics() == [{"step": 1}] and run.evaluations() == [] and run.summary() is None
    assert Lines(run.path / "samples.jsonl").rows() == [{"step": 1}]
    assert not list(run.path.rglob("*.part"))


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_damaged_logs_are_read_as_far_as_they_are_rows(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Lines(Path(folder) / "x.jsonl")
        log.path.write_bytes(b"\n".join([*lines, b'{"step": 7}', b'{"st']))
        assert {"step": 7} in log.rows() and all(isinstance(row, dict) for row in log.rows())


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        RunFolder.open(tmp_path)
