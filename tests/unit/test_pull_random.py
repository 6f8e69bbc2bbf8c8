"""`pull --random`: true shapes and types without anyone's weights, marked as what they are, and never in the way."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from gemwright.errors import InputError, MachineError
from gemwright.spec import LINEARS, RANDOM_KEY, SPECS
from gemwright.weights.model_file import open_model
from gemwright.weights.pull import Pulled, pull_random
from gemwright.weights.quants import unpack
from gemwright.weights.random_model import RANDOM_TYPES, random_tensors, weight_bytes

Run = Callable[..., subprocess.CompletedProcess[str]]
SHAPE = {"layers": 9, "hidden": 256, "mlp": 512, "heads": 2, "kv_heads": 1, "head_dim": 128, "query_scalar": 128}
TINY = replace(SPECS["270m"], name="1b", vocab=512, **SHAPE)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder of its own without a 270M in it, where 1b is a small shape."""
    monkeypatch.setenv("GEMWRIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(SPECS, "1b", TINY)
    return tmp_path / "home"


@pytest.mark.parametrize("qtype", RANDOM_TYPES)
def test_every_type_opens_as_what_it_is(home: Path, qtype: str) -> None:
    said: list[str] = []
    seen: list[tuple[str, float]] = []
    got = pull_random("gemma-3-1B", qtype.lower(), report=said.append, on_progress=lambda *at: seen.append(at))
    path = home / "models" / f"gemma-3-1b-random-{qtype.lower()}.gguf"
    data = path.read_bytes()
    assert got == Pulled(path, hashlib.sha256(data).hexdigest(), len(data), "1b", got.quantization)
    assert got.quantization == {"F32": "ALL_F32"}.get(qtype, qtype).removeprefix("ALL_")
    assert said == [
        f"random weights in the shapes of Gemma 3 1b, {qtype}, without a tokenizer ('gemwright pull 270m' first gives "
        "one): to measure with, not to talk with"
    ]
    assert {phase for phase, _ in seen} == {"writing", "hashing"}
    written = [share for phase, share in seen if phase == "writing"]
    assert written == sorted(written) and written[0] == 0 and 0.9 < written[-1] < 1
    model = open_model(path)
    assert model.metadata[RANDOM_KEY] is True and model.spec == replace(TINY, vocab=512)
    assert {name: (t.shape, t.qtype) for name, t in model.tensors.items()} == random_tensors(TINY, qtype)
    assert 0 < len(data) - weight_bytes(TINY, qtype) < 1 << 15
    for part in LINEARS:
        values = unpack(model.tensors[f"3.{part}"].data, model.tensors[f"3.{part}"].qtype)
        assert 0.015 < float(values.std()) < 0.025 and abs(float(values.mean())) < 2e-3


def test_seeds_differ_and_repeat(home: Path, tmp_path: Path) -> None:
    one, again, other = (
        pull_random("1b", "Q4_K_M", out, seed)
        for out, seed in ((tmp_path / "new" / "a.gguf", 0), (tmp_path / "b.gguf", 0), (None, 5))
    )
    assert one.sha256 == again.sha256 != other.sha256
    assert other.path == home / "models" / "gemma-3-1b-random-q4_k_m-seed5.gguf"


def test_a_file_is_never_overwritten(home: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.gguf: exists already"):
        pull_random("1b", out=tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text(encoding="utf-8") == "mine"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_without_room_is_found_before_writing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage(10**12, 10**12 - 10**10, 10**10)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(MachineError, match=r"takes 15\.2 GB, but .* has 10\.0 GB free") as caught:
        pull_random("27b")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    assert asked == [home.parent] and not home.exists()


@pytest.mark.parametrize(
    ("name", "qtype", "said"),
    [
        ("3b", "Q4_0", "3b: no size of Gemma 3"),
        ("./a.gguf", "Q4_0", "no size"),
        ("4b-it", "Q4_0", "270m, 1b, 4b"),
        ("1b", "Q2_K", "--type: cannot"),
    ],
)
def test_what_cannot_be_made_up(home: Path, name: str, qtype: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        pull_random(name, qtype)
    assert not home.exists()


def test_sizes_in_true_shapes() -> None:
    """Four and a half bits a value and the embedding once: what Google's own Q4_0 files hold besides images."""
    assert {size: round(weight_bytes(spec, "Q4_0") / 1e9, 2) for size, spec in SPECS.items()} == {
        "270m": 0.15,
        "1b": 0.56,
        "4b": 2.18,
        "12b": 6.62,
        "27b": 15.2,
    }
    kinds = random_tensors(SPECS["27b"], "Q4_K_M")
    finer = [layer for layer in range(62) if kinds[f"{layer}.down"][1] == "Q6_K"]
    assert finer == [layer for layer in range(62) if kinds[f"{layer}.v"][1] == "Q6_K"]
    assert finer == [*range(7), *range(9, 54, 3), *range(54, 62)]
    assert kinds["embed"][1] == "Q6_K" and {kinds[f"{i}.{part}"][1] for i in range(62) for part in "qko"} == {"Q4_K"}


def test_the_mix_is_the_real_files_tensor_by_tensor(real_model: Path) -> None:
    real = {name: (tensor.shape, tensor.qtype) for name, tensor in open_model(real_model).tensors.items()}
    assert random_tensors(SPECS["270m"], "Q4_K_M") == real


def test_a_random_270m_can_be_tuned_and_run(gemwright: Run, real_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    done = gemwright("pull", "270m", "--random", "--type", "Q4_K_M", "--out", path, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row == {
        "path": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "size": "270m",
        "quantization": "Q4_K_M",
    }
    assert "with the 270M's tokenizer" in done.stderr and "next: gemwright tune" in done.stderr
    (tmp_path / "data.jsonl").write_text('{"prompt": "2 + 2?", "completion": "four"}\n' * 4, encoding="utf-8")
    words = ("--model", path, "--out", tmp_path / "run", "--max-steps", 1, "--seq", 64, "--tokens-per-step", 64)
    tuned = gemwright("tune", tmp_path / "data.jsonl", *words, "--json")
    assert tuned.returncode == 0, tuned.stderr
    ask = ("run", "2 + 2?", "--model", path, "--adapter", tmp_path / "run", "--max-tokens", 3, "--json")
    answered = gemwright(*ask)
    assert answered.returncode == 0, answered.stderr


def test_a_model_without_a_tokenizer_says_so_when_it_is_tuned(gemwright: Run, home: Path, tmp_path: Path) -> None:
    got = pull_random("1b")
    (tmp_path / "data.jsonl").write_text('{"prompt": "2 + 2?", "completion": "four"}\n', encoding="utf-8")
    done = gemwright("tune", tmp_path / "data.jsonl", "--model", got.path, "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "") and "tokenizer" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", [("--type", "Q4_0"), ("--out", "x.gguf"), ("--seed", "0")], ids=" ".join)
def test_what_goes_with_random_alone(gemwright: Run, words: tuple[str, str]) -> None:
    done = gemwright("pull", "270m", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "go with --random" in done.stderr
