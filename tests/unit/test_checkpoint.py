"""Checkpoints are whole or absent: whatever is damaged, cut off or refused by the disk, the one before it is found."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemwright.errors import MachineError
from gemwright.layout import Keep
from gemwright.model.lora import LoRA
from gemwright.plan.training import Arrangement
from gemwright.spec import SPECS
from gemwright.train import checkpoint as room
from gemwright.train.checkpoint import Checkpoint, Checkpoints, State, on_cpu
from gemwright.train.optimizer import Optimizer
from gemwright.train.setup import arrangement_of

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def made(step: int, best: int = 0) -> Checkpoint:
    adapter = {"master": torch.arange(50.0) + step}
    moments = {"step": torch.tensor(float(step)), "exp_avg": torch.ones(50), "exp_avg_sq": torch.full((50,), 0.5)}
    state = State(step, step / 7, [1 / (i + 3) for i in range(step)], best_step=best, best_loss=0.1 if best else None)
    return Checkpoint(state, adapter, moments, {"rank": 4, "targets": ["q"]})


def write(checkpoints: Checkpoints, step: int, best: int = 0) -> None:
    checkpoints.finish(lambda: made(step, best))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    assert checkpoints.newest() is None and checkpoints.steps() == []
    write(checkpoints, 7)
    folder = tmp_path / "checkpoints" / "step-00000007"
    assert sorted(os.listdir(folder)) == sorted(FILES) and os.listdir(folder.parent) == [folder.name]
    found, wanted = checkpoints.newest(), made(7)
    assert found is not None and found.state == wanted.state and found.origin == wanted.origin
    for ours, theirs in ((found.adapter, wanted.adapter), (found.optimizer, wanted.optimizer)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_no_pickle_and_every_byte_under_the_manifest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    write(checkpoints, 3)
    manifest = json.loads((checkpoints.path(3) / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert set(manifest) == set(FILES[:-1])
    for name, entry in manifest.items():
        assert entry["bytes"] == (checkpoints.path(3) / name).stat().st_size and len(entry["sha256"]) == 64


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FILES), st.data())
def test_any_damage_is_seen(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """A bit flipped or an end cut off anywhere: read as it was (a manifest has spare blanks) or passed over."""
    checkpoints = Checkpoints(tmp_path / "c", 2)
    write(checkpoints, 1)
    write(checkpoints, 2)
    file = checkpoints.path(2) / name
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        file.write_bytes(whole[:at])
    else:
        bit = data.draw(st.integers(0, 7))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
    found = checkpoints.newest()
    assert found is not None and found.state.step in ((1, 2) if name == "manifest.json" else (1,))
    assert torch.equal(found.adapter["master"], made(found.state.step).adapter["master"])
    assert found.state == made(found.state.step).state


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_seen_and_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    write(checkpoints, 1)
    write(checkpoints, 2)
    (checkpoints.path(2) / name).unlink()
    found = checkpoints.newest()
    assert found is not None and found.state.step == 1
    assert name in capsys.readouterr().err


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (1, 2, 3, 4, 5):
        write(checkpoints, step, best=2 if step >= 2 else 0)
    assert checkpoints.steps() == [2, 4, 5]
    write(checkpoints, 6, best=6)
    assert checkpoints.steps() == [5, 6]


def test_damaged_ones_past_the_step_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """Damaged 8 and 9 are of a history that ended: after going on from 4, they go, and 4 stays."""
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (4, 8, 9):
        (checkpoints.path(step)).mkdir(parents=True)
    write(checkpoints, 4)
    write(checkpoints, 5)
    assert checkpoints.steps() == [4, 5]


def test_the_snapshot_is_of_its_moment(tmp_path: Path) -> None:
    """What is trained while a write is under way does not reach it."""
    lora = LoRA(SPECS["270m"], 1, 1.0, ("k",), dtype=torch.float32)
    optimizer, checkpoints = Optimizer(lora, 0.0, 1.0), Checkpoints(tmp_path, 2)
    lora.grad.fill_(1.0)
    optimizer.update(1e-2, 1.0)
    before = lora.master.clone()
    snapshot = Checkpoint(State(1), on_cpu({"master": lora.master}), on_cpu(optimizer.tensors()), {})
    lora.grad.fill_(-1.0)
    optimizer.update(1e-2, 1.0)
    checkpoints.begin(lambda: snapshot)
    assert checkpoints.settle()
    found = checkpoints.newest()
    assert found is not None and torch.equal(found.adapter["master"], before)
    assert int(found.optimizer["step"]) == 1


def test_the_optimizer_goes_on_to_the_bit() -> None:
    def after(optimizer: Optimizer, lora: LoRA, seeds: range) -> None:
        for seed in seeds:
            lora.grad.copy_(torch.randn(lora.grad.shape, generator=torch.Generator().manual_seed(seed)))
            optimizer.update(1e-2, float("nan") if seed == 2 else 1.0)

    one, other = (LoRA(SPECS["270m"], 1, 1.0, ("k",), dtype=torch.bfloat16) for _ in range(2))
    first = Optimizer(one, 0.1, 1.0)
    after(first, one, range(3))
    assert first.skipped_in_a_row == 1 and first.is_intact
    second = Optimizer(other, 0.1, 1.0)
    other.master.copy_(one.master)
    other.refresh()
    second.load(on_cpu(first.tensors()))
    assert second.skipped_in_a_row == 1
    after(first, one, range(3, 6))
    after(second, other, range(3, 6))
    assert torch.equal(one.master, other.master) and first.is_intact and second.is_intact


def test_the_layout_of_a_gpus_memory_is_kept_whole(tmp_path: Path) -> None:
    plan = Arrangement(3, 2, (Keep.INPUT, Keep.PRODUCTS), (True, False), 2, 512, 64, 4096, {"slots": 7}, 5, 0.25, True)
    checkpoint = replace(made(1), arrangement=asdict(plan))
    Checkpoints(tmp_path, 1).finish(lambda: checkpoint)
    found = Checkpoints(tmp_path, 1).newest()
    assert found is not None and found.arrangement is not None and arrangement_of(found.arrangement) == plan


def test_a_refusing_disk_is_said_once_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    write(checkpoints, 1)
    with monkeypatch.context() as full:

        def refuse(file: Path, tensors: object) -> None:
            file.write_bytes(b"some of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr(room, "write_safetensors", refuse)
        checkpoints.begin(lambda: made(2))
        assert not checkpoints.settle() and checkpoints.settle()
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "No space left" in said and "step-00000002" in said
        with pytest.raises(MachineError, match="No space left"):
            checkpoints.finish(lambda: made(3))
    assert os.listdir(tmp_path) == ["step-00000001"] and checkpoints.newest() is not None
    write(checkpoints, 4)
    assert checkpoints.steps() == [4]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX thing")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A process that may write no file of more than 4 KiB: the older checkpoint stays, one line says why."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from gemwright.train.checkpoint import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
made = lambda n, step: lambda: Checkpoint(State(step), {{"master": torch.ones(n)}}, {{"step": torch.ones(())}}, {{}})
checkpoints = Checkpoints(Path({str(tmp_path)!r}), 2)
checkpoints.finish(made(10, 1))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
checkpoints.begin(made(10_000, 2))
print(checkpoints.settle(), checkpoints.newest().state.step)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"] and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and os.listdir(tmp_path) == ["step-00000001"]
