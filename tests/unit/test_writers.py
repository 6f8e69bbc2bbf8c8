"""TensorBoard and trackio get a run's rows, read back with their own readers; trackio reaches nobody."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemwright.errors import InputError
from gemwright.runs import RunFolder
from gemwright.train.config import TrainConfig
from gemwright.train.writers import TensorBoard, Trackio, check_installed, local_environment

NUMBERS = ("loss", "lr", "grad_norm", "tokens_per_s", "step_s", "rss_bytes", "device_bytes", "waiting")


def row(step: int, loss: float = 1.5) -> dict[str, Any]:
    return {"step": step} | dict.fromkeys(NUMBERS, 1.0) | {"loss": loss}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "night")
    folder.path.mkdir()
    return folder


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar as TensorBoard itself would show it, in a process of its own."""
    code = (
        "import json, sys\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "seen = EventAccumulator(sys.argv[1]); seen.Reload()\n"
        "print(json.dumps({t: [(e.step, e.value) for e in seen.Scalars(t)] for t in seen.Tags()['scalars']}))"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    found: dict[str, list[tuple[int, float]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_shows_each_step_once(run: RunFolder) -> None:
    """A process that was cut off after step 3 had its last checkpoint at step 2: the third step is done again."""
    first = TensorBoard(run, 0)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 9.0)):
        first.after_step(row(step, loss))
    first.close()
    second = TensorBoard(run, 2)
    second.after_step(row(3, 1.0))
    second.after_step(row(4, math.nan))
    second.after_evaluation({"step": 4, "loss": 1.25})
    second.after_sample({"step": 4, "prompt": "Привет", "text": "Hello"})
    second.close()
    found = events(run.path / "tensorboard")
    assert [value for _, value in found["train/loss"]][:3] == [3.0, 2.0, 1.0]
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4] and found["validation/loss"] == [[4, 1.25]]
    assert {f"train/{name}" for name in NUMBERS} <= set(found)


@pytest.mark.parametrize(("name", "value"), [("tensorboard", True), ("trackio", "mine")])
def test_what_is_not_installed_is_said_with_the_command(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    config = TrainConfig(data=Path("a"), model="270m", out=Path("b"), **{name: value})
    with pytest.raises(InputError, match=rf'--{name}: {name} is not installed.*pip install "gemwright\[{name}\]"'):
        check_installed(config)
    check_installed(TrainConfig(data=Path("a"), model="270m", out=Path("b")))


def test_missing_is_said_before_anything_is_loaded(gemwright: Callable[..., Any], tmp_path: Path) -> None:
    """The model that is named here does not exist: it is not even looked for."""
    (tmp_path / "tensorboard.py").touch()
    words = ["tune", "nowhere.jsonl", "--model", "nowhere.gguf", "--out", tmp_path / "run", "--trackio", "mine"]
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed here")
    done = gemwright(*words)
    assert done.returncode == 2 and 'pip install "gemwright[trackio]"' in done.stderr


def test_the_environment_names_nobody() -> None:
    risky = {"TRACKIO_SPACE_ID": "me/space", "TRACKIO_SERVER_URL": "http://a", "TRACKIO_WEBHOOK_URL": "http://b"}
    given = {"PATH": "/bin", "HF_TOKEN": "hf_x", "TRACKIO_DIR": "/t"} | risky
    found = local_environment(given)
    assert found["PATH"] == "/bin" and found["TRACKIO_DIR"] == "/t" and found["HF_HUB_OFFLINE"] == "1"
    assert not set(found) & {"HF_TOKEN", *risky}


@pytest.mark.skipif(
    not importlib.util.find_spec("trackio"), reason="trackio is not installed (pip: gemwright[trackio])"
)
def test_trackio_keeps_it_here(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to send runs to a Space, with a token there: rows are in the local store, and no connection was tried."""
    spy = tmp_path / "spy"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(
        "import sys\n"
        "def hear(event, words):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        f"        open({str(tmp_path / 'heard.txt')!r}, 'a').write(f'{{event}} {{words[-2:]}}\\n')\n"
        "sys.addaudithook(hear)\n",
        encoding="utf-8",
    )
    store = tmp_path / "store"
    path = os.pathsep.join([str(spy), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = {
        "PYTHONPATH": path,
        "TRACKIO_DIR": str(store),
        "TRACKIO_SPACE_ID": "me/space",
        "HF_TOKEN": "hf_" + "a" * 34,
    }
    for name, value in (asked | {"TRACKIO_SERVER_URL": "http://example.org", "HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    writer = Trackio("mine", run, {"rank": 4, "plan": {}})
    writer.after_step(row(1, 3.0))
    writer.after_step(row(2, math.nan))
    writer.after_evaluation({"step": 2, "loss": 1.25})
    writer.after_sample({"step": 2, "prompt": "Привет", "text": "Hello"})
    writer.close()
    again = Trackio("mine", run, {"rank": 4})
    again.after_step(row(3, 2.0))
    again.close()
    assert not (tmp_path / "heard.txt").exists(), (tmp_path / "heard.txt").read_text(encoding="utf-8")
    subprocess.run([sys.executable, "-c", "import socket; socket.getaddrinfo('localhost', 80)"], check=True)
    assert (tmp_path / "heard.txt").exists()  # so that it would have been heard
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage; "
        "print(json.dumps(SQLiteStorage.get_logs('mine', 'night')))"
    )
    environment = local_environment(os.environ)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    logs = json.loads(done.stdout.splitlines()[-1])
    losses = {log["step"]: log["train/loss"] for log in logs if "train/loss" in log}
    assert losses == {1: 3.0, 3: 2.0} and [log["validation/loss"] for log in logs if "validation/loss" in log] == [1.25]
    assert list(store.glob("*mine*"))


def test_a_writer_that_dies_stops_nothing(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A child that cannot even start: rows are dropped, and it is said once."""
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    writer = Trackio("mine", run, {})
    child = writer._child
    assert child is not None
    child.wait(30)
    for step in range(1, 5):
        writer.after_step(row(step))
    writer.close()
    assert capsys.readouterr().err.count("trackio ended") == 1
