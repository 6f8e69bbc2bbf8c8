"""A run that was interrupted goes on to the same bits, from whatever is whole, and from nothing that was changed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from gemwright.errors import InputError, MachineError
from gemwright.runs import RunFolder
from gemwright.train import optimizer, plot
from gemwright.train.checkpoint import Checkpoints
from gemwright.train.config import TrainConfig
from gemwright.train.loop import Progress, resume, tune
from gemwright.train.optimizer import Optimizer
from gemwright.train.results import TuneResult
from gemwright.train.setup import Setup
from gemwright.train.validate import Validation

TIMES = ("step_s", "tokens_per_s", "rss_bytes", "checkpoint_s", "seconds")
ADAPTER = ("adapter/adapter_model.safetensors", "adapter.gguf")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "numbers.jsonl"
    rows = [{"prompt": f"{n} times seven", "completion": f"{7 * n} точно"} for n in range(1, 25)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


Config = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is half of what so small a run takes."""
    monkeypatch.setattr(plot, "draw_run", lambda *_: None)


@pytest.fixture(scope="module")
def small(tiny_model: Path, data: Path) -> dict[str, Any]:
    """Settings with all that could go out of step: dropout, several rows a step, some steps an epoch."""
    small = {"data": data, "model": tiny_model, "rank": 4, "seq": 64, "dropout": 0.2, "tokens_per_step": 128}
    return small | {"max_steps": 9, "lr": 0.02, "precision": "fp32", "weight_decay": 0.01}


@pytest.fixture
def config(small: dict[str, Any], tmp_path: Path) -> Config:
    """`config(name, **settings)`: the small settings with others, into a folder of that name."""
    return lambda name="run", **settings: TrainConfig(**(small | {"out": tmp_path / name} | settings))


@pytest.fixture(scope="module")
def whole(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    """The run of the small settings that nothing interrupts."""
    return tune(TrainConfig(out=tmp_path_factory.mktemp("whole") / "run", **small))


@pytest.fixture(scope="module")
def stopped_once(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tune(TrainConfig(out=tmp_path_factory.mktemp("stopped") / "run", **small), terminate_at([3]))
    return result.run


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A run of the small settings that was stopped after step 3."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


def terminate_at(steps: Iterable[int], phase: str = "training") -> Callable[[Progress], None]:
    """A report that has the process sent SIGTERM once when it comes to each of `steps`."""
    left = set(steps)

    def report(progress: Progress) -> None:
        if progress.phase == phase and progress.step in left:
            left.remove(progress.step)
            signal.raise_signal(signal.SIGTERM)

    return report


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    """Two runs whose every number is the same, but for those of clock and memory."""
    a, b = RunFolder.open(one), RunFolder.open(other)
    assert steady(a.metrics()) == steady(b.metrics()) and len(a.metrics()) > 0
    assert steady(a.evaluations()) == steady(b.evaluations())
    for file in ADAPTER:
        assert (one / file).read_bytes() == (other / file).read_bytes()


EVALUATED: dict[str, Any] = {"holdout": 4, "eval_every": 3, "precision": "auto"}
SETTINGS = [
    (EVALUATED, (2, 3, "end", "after")),
    ({"tokens_per_step": 64, "max_steps": None, "epochs": 1.5, "schedule": "linear", "precision": "bf16"}, (2, "end")),
    ({"dora": True, "targets": ("q", "down"), "tokens_per_step": 192}, (1, "after")),
]


@pytest.mark.parametrize(("settings", "stops"), SETTINGS, ids=str)
def test_it_goes_on_to_the_same_bits(config: Config, settings: dict[str, Any], stops: tuple[int | str, ...]) -> None:
    """Stopped within an epoch once and twice, at an epoch's end, and at the step after it."""
    files = ADAPTER[:1] if settings.get("dora") else ADAPTER
    whole = tune(config("whole", **settings))
    end = next(row["step"] for row in RunFolder.open(whole.run).metrics() if row["epoch"] == 1.0)
    run = config(**settings).out
    for at in stops:
        step = {"end": end, "after": end + 1}.get(str(at), at)
        report = terminate_at([int(step)])
        stopped = resume(run, on_progress=report) if run.exists() else tune(config(**settings), report)
        assert stopped.steps == step and stopped.stopped == "SIGTERM"
    done = resume(run)
    assert done.stopped is None and done.steps == whole.steps
    assert (done.loss_first, done.loss_last) == (whole.loss_first, whole.loss_last)
    a, b = RunFolder.open(whole.run), RunFolder.open(done.run)
    assert steady(a.metrics()) == steady(b.metrics()) and steady(a.evaluations()) == steady(b.evaluations())
    assert all((whole.run / file).read_bytes() == (done.run / file).read_bytes() for file in files)


def test_a_step_is_recorded_once(config: Config, whole: TuneResult) -> None:
    """Steps after the checkpoint, done by a process that was killed, are done again and not recorded twice."""
    tune(config(save_every=4, keep=9), terminate_at([7]))
    run = RunFolder.open(config().out)
    shutil.rmtree(Checkpoints(run.checkpoints, 1).path(7))
    (run.path / "adapter.gguf").unlink()
    with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 8, "lo')
    resume(run.path)
    assert [row["step"] for row in run.metrics()] == list(range(1, 10))
    assert_same(whole.run, run.path)


def test_damaged_checkpoints_are_passed_over_aloud(
    config: Config, whole: TuneResult, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = tune(config(save_every=2, keep=3), terminate_at([6]))
    checkpoints = Checkpoints(stopped.run / "checkpoints", 3)
    assert checkpoints.steps() == [2, 4, 6]
    flipped = checkpoints.path(6) / "optimizer.safetensors"
    flipped.write_bytes(bytes(b ^ (i == 5000) for i, b in enumerate(flipped.read_bytes())))
    cut = checkpoints.path(4) / "adapter.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    left = checkpoints.folder / ".step-00000008.99999.part"
    left.mkdir()
    resume(stopped.run)
    said = capsys.readouterr().err
    assert str(flipped) in said and str(cut) in said and said.count("not whole") == 2
    assert_same(whole.run, stopped.run)
    assert not left.exists() and checkpoints.newest() is not None and checkpoints.steps() == [4, 6, 8]


def test_each_checkpoint_asked_for_is_written_however_slow_the_disk(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Checkpoints._write
    monkeypatch.setattr(Checkpoints, "_write", lambda self, made: (time.sleep(0.3), real(self, made)))
    done = tune(config(save_every=1, keep=9, max_steps=3))
    assert Checkpoints(done.run / "checkpoints", 9).steps() == [1, 2, 3]


def test_without_a_checkpoint_it_begins_anew(
    stopped: Path, whole: TuneResult, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(stopped / "checkpoints")
    resume(stopped)
    assert "no complete checkpoint" in capsys.readouterr().err
    assert_same(whole.run, stopped)


def test_a_finished_run_says_so_and_stays(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tune(config(max_steps=2))
    before = {file: file.stat().st_mtime_ns for file in whole.run.rglob("*") if file.name != "lock"}
    again = resume(whole.run)
    assert again == whole and "finished (2 steps)" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in whole.run.rglob("*") if file.name != "lock"} == before


def test_a_run_that_was_moved_goes_on(
    stopped: Path, whole: TuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = stopped.rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume(Path("moved")).run == Path("moved")
    assert_same(whole.run, moved)


@pytest.mark.parametrize(
    ("name", "value"), [("rank", 8), ("targets", ["q"]), ("seed", 1), ("lr", 0.5), ("max_steps", 99)]
)
def test_another_setting_is_refused_by_name(stopped: Path, name: str, value: object) -> None:
    RunFolder.open(stopped).amend({name: value})
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: ") as caught:
        resume(stopped)
    assert repr(value) in str(caught.value) and Checkpoints(stopped / "checkpoints", 1).steps() == [3]


def test_other_data_are_refused(config: Config, data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    shutil.copy(data, own)
    stopped = tune(config(data=own), terminate_at([2]))
    own.write_text(own.read_text(encoding="utf-8").replace("точно", "ровно", 1), encoding="utf-8")
    with pytest.raises(InputError, match=r"own\.jsonl: the data changed") as caught:
        resume(stopped.run)
    assert caught.value.exit_code == 2
    shutil.copy(data, own)
    assert resume(stopped.run).steps == 9


def test_another_template_is_refused(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemwright.train import prepare, tokenise

    whole = tokenise.encode_example
    monkeypatch.setattr(prepare, "TEMPLATE", "another")
    monkeypatch.setattr(tokenise, "encode_example", lambda *a: tuple(part[:-1] for part in whole(*a)))
    with pytest.raises(InputError, match="the chat template or the tokenizer gives other tokens"):
        resume(stopped)


def test_another_base_model_is_refused(config: Config, tiny_model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.gguf"
    shutil.copy(tiny_model, own)
    stopped = tune(config(model=own), terminate_at([2]))
    with own.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(InputError, match=r"own\.gguf: not the base model"):
        resume(stopped.run)


def test_one_process_at_a_time(stopped: Path) -> None:
    other = RunFolder.open(stopped)
    other.claim()
    with pytest.raises(InputError, match=r"another run is at work here \(process \d+\)"):
        resume(stopped)
    other.release()
    assert resume(stopped).stopped is None


def test_a_time_limit_is_a_stop_that_goes_on(config: Config, whole: TuneResult) -> None:
    """The limit is of one process: the next has none unless it is given one."""
    stopped = tune(config(max_hours=1e-6))
    assert (stopped.steps, stopped.stopped) == (1, "--max-hours 1e-06")
    assert resume(stopped.run, max_hours=1e-6).steps == 1  # no time for another
    done = resume(stopped.run)
    assert done.stopped is None and (RunFolder.open(done.run).summary() or {})["state"] == "done"
    assert_same(whole.run, done.run)


def test_the_best_is_put_back(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It gets worse after step 4 and ends early, in a second process: the adapter is that of step 4."""
    from gemwright.train import loop

    losses = iter([3.0, 2.0, 2.5, float("nan"), 2.0, 1.0])
    settings = {"holdout": 4, "eval_every": 2, "keep": 1, "stop_after": 3, "save_every": 1, "max_steps": 12}
    at_best = tune(config("until", **settings), terminate_at([4]))
    monkeypatch.setattr(loop, "validate", lambda *_: Validation(next(losses), 7, 0.1))
    stopped = tune(config(**settings), terminate_at([7]))
    assert Checkpoints(stopped.run / "checkpoints", 1).steps() == [4, 7]
    done = resume(stopped.run)
    assert done.steps == 10 and done.stopped is None
    run = RunFolder.open(done.run)
    assert [row["best"] for row in run.evaluations()] == [True, True, False, False, False]
    assert "the adapter is that of step 4" in capsys.readouterr().err
    for file in ADAPTER:
        assert (done.run / file).read_bytes() == (at_best.run / file).read_bytes()
    summary = run.summary() or {}
    assert (summary["state"], summary["best_step"], summary["best_loss"]) == ("done", 4, 2.0)


def test_stopped_within_an_evaluation_it_evaluates_again(config: Config) -> None:
    settings = {"holdout": 4, "eval_every": 3}
    whole = tune(config("whole", **settings))
    stopped = tune(config(**settings), terminate_at([6], "evaluating"))
    assert [row["step"] for row in RunFolder.open(stopped.run).evaluations()] == [3] and stopped.steps == 6
    resume(stopped.run)
    assert_same(whole.run, stopped.run)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("forward_backward", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate")),
        ("update", MemoryError()),
    ],
)
def test_memory_that_ran_out_loses_nothing(
    config: Config, whole: TuneResult, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    calls = iter(range(1, 99))
    place = Setup if where == "forward_backward" else Optimizer
    real = getattr(place, where)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 6:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(place, where, failing)
        with pytest.raises(MachineError, match="memory ran out; what was trained until then is saved") as caught:
            tune(config())
    assert "gemwright runs resume" in str(caught.value)
    run = RunFolder.open(config().out)
    assert Checkpoints(run.checkpoints, 1).steps() == [5] and (run.summary() or {})["state"] == "failed"
    resume(run.path)
    assert_same(whole.run, run.path)


def test_an_update_that_was_broken_off_is_not_saved(
    config: Config, whole: TuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = iter(range(1, 99)), optimizer.adamw

    def failing(*state: Any, **settings: Any) -> None:
        real(*state, **settings)
        if next(calls) == 6:
            raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(optimizer, "adamw", failing)
        with pytest.raises(MachineError, match="memory ran out; what is saved is step 4"):
            tune(config(save_every=2))
    run = RunFolder.open(config().out)
    assert max(Checkpoints(run.checkpoints, 1).steps()) == 4 and not run.adapter.exists()
    resume(run.path)
    assert_same(whole.run, run.path)


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def whole_process(
    gemwright: Run, tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[str]]:
    """What an uninterrupted `tune` printed, and its words up to the value of --out."""
    options = ("--seq", 64, "--tokens-per-step", 64, "--rank", 4, "--max-steps", 12, "--save-every", 3, "--holdout", 2)
    words = [str(word) for word in ("tune", data, "--model", tiny_model, *options, "--json", "--out")]
    done = gemwright(*words, tmp_path_factory.mktemp("whole") / "run")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), words


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signals to a process of its own")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_signalled_goes_on(
    gemwright: Run,
    whole_process: tuple[dict[str, Any], list[str]],
    tmp_path: Path,
    hear_ctrl_c: Callable[[], object],
    number: signal.Signals,
    code: int,
) -> None:
    """By the command line alone: exit codes, what it says, and the same result however it ended the first time."""
    whole, words = whole_process
    run, pipe = tmp_path / "run", subprocess.PIPE
    command = [sys.executable, "-m", "gemwright", *words, str(run)]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_ctrl_c) as started:
        while len(RunFolder(run).metrics()) < 4:
            assert started.poll() is None, started.communicate()
            time.sleep(0.01)
        with pytest.raises(InputError, match=rf"another run is at work here \(process {started.pid}\)"):
            resume(run)
        started.send_signal(number)
        out, said = started.communicate()
    assert started.returncode == code
    assert json.loads(out).keys() == whole.keys() and (run / "adapter" / "adapter_config.json").is_file()
    assert said.splitlines()[-1] == f"go on with: gemwright runs resume {run}"
    done = gemwright("runs", "resume", run, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert {key: row[key] for key in ("steps", "loss_first", "loss_last")} == {
        key: whole[key] for key in ("steps", "loss_first", "loss_last")
    }
    assert_same(Path(whole["run"]), run)


@pytest.mark.slow
def test_the_real_model_goes_on_to_the_same_bits(real_model: Path, data: Path, tmp_path: Path) -> None:
    settings = {"data": data, "model": real_model, "seq": 128, "tokens_per_step": 256, "max_steps": 6, "dropout": 0.1}
    whole = tune(TrainConfig(out=tmp_path / "whole", **settings))
    stopped = tune(TrainConfig(out=tmp_path / "run", **settings), terminate_at([2]))
    resume(stopped.run, on_progress=terminate_at([3]))
    assert resume(stopped.run).loss_last == whole.loss_last < whole.loss_first
    assert_same(whole.run, stopped.run)
