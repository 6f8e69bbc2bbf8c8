"""Bad input through the real command line: one line that says what and where, the exit code, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
CHAT = '{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}]}\n'


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    """The contract: `code`, nothing on stdout, one last `error:` line naming all of `said`, no traceback."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.stderr.rstrip().endswith(errors[0]), done.stderr
    assert "Traceback" not in done.stderr
    for text in said:
        assert text.lower() in errors[0].lower()


def files(folder: Path) -> dict[str, int]:
    """Every file below `folder` with its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def llama_gguf(path: Path) -> None:
    """A small well-formed GGUF of another architecture."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bad_model(kind: str, folder: Path, tiny: Path) -> Path:
    """A model file with one fault."""
    path = folder / f"{kind}.gguf"
    whole = tiny.read_bytes() if kind in ("truncated", "cut-header", "flipped", "unsupported") else b""
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "cut-header":
        path.write_bytes(whole[:100])
    elif kind == "flipped":
        at = whole.index(b"gemma3.block_count")
        path.write_bytes(whole[: at - 1] + bytes([whole[at - 1] ^ 0x80]) + whole[at:])
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is no model\n" * 50, encoding="utf-8")
    elif kind == "llama":
        llama_gguf(path)
    elif kind == "unsupported":
        at = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
        assert int.from_bytes(whole[at : at + 4], "little") == gguf.GGMLQuantizationType.Q8_0
        path.write_bytes(whole[:at] + int(gguf.GGMLQuantizationType.IQ2_XXS).to_bytes(4, "little") + whole[at + 4 :])
    elif kind == "folder":
        path.mkdir()
    return path  # "missing" is never written


MODELS = {
    "missing": "no",
    "empty": "empty",
    "text": "GGUF",
    "truncated": "",
    "cut-header": "",
    "flipped": "",
    "llama": "'llama'",
    "unsupported": "IQ2_XXS",
    "folder": "",
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_cannot_be_used(gemwright: Run, tiny_model: Path, tmp_path: Path, kind: str) -> None:
    model = bad_model(kind, tmp_path, tiny_model)
    (tmp_path / "data.jsonl").write_text(CHAT, encoding="utf-8")
    before = files(tmp_path)
    for words in (
        ("pull", model),
        ("tune", tmp_path / "data.jsonl", "--model", model, "--out", tmp_path / "run", "--json"),
        ("run", "hello", "--model", model, "--json"),
    ):
        assert_one_line(gemwright(*words), 2, model.name, MODELS[kind])
    assert files(tmp_path) == before
    assert not (tmp_path / "run").exists()


DATA: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no examples"),
    "blank": (b"\n\n", "no examples"),
    "not-json": (CHAT.encode() + b"{oops\n", "line 2"),
    "not-utf8": (CHAT.encode() + b'{"prompt": "\xff", "completion": "x"}\n', "line 2"),
    "no-model-turn": (b'{"messages": [{"role": "user", "content": "hi"}]}\n', "no model turn"),
    "wrong-roles": (
        b'{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}\n',
        "'assistant'",
    ),
    "unknown-keys": (b'{"question": "a", "answer": "b"}\n', "line 1"),
    "a-list": (b"[1, 2]\n", "line 1"),
}


@pytest.mark.parametrize("kind", DATA)
def test_data_that_cannot_be_used(gemwright: Run, tiny_model: Path, tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(DATA[kind][0])
    done = gemwright("tune", data, "--model", tiny_model, "--out", tmp_path / "run")
    assert_one_line(done, 2, "data.jsonl", DATA[kind][1])
    assert sorted(files(tmp_path)) == ["data.jsonl"]
    assert not (tmp_path / "run").exists()


def test_data_that_is_missing(gemwright: Run, tiny_model: Path, tmp_path: Path) -> None:
    done = gemwright("tune", tmp_path / "none.jsonl", "--model", tiny_model, "--out", tmp_path / "run")
    assert_one_line(done, 2, "none.jsonl")
    assert not (tmp_path / "run").exists()


def test_output_folder_in_use(gemwright: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(CHAT, encoding="utf-8")
    before = files(tmp_path)
    assert_one_line(gemwright("tune", tmp_path / "data.jsonl", "--model", tiny_model, "--out", tmp_path), 2, "in use")
    assert files(tmp_path) == before


def test_demo_never_replaces_what_is_not_a_demo(gemwright: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert_one_line(gemwright("demo", "--out", tmp_path), 2, str(tmp_path))
    assert files(tmp_path) == {"thesis.txt": 4}


NONSENSE = [("--rank", "9999999"), ("--rank", "33"), ("--lr", "-1"), ("--targets", "q,nose"), ("--epochs", "0")]
NONSENSE += [("--precision", "fp16"), ("--schedule", "steps"), ("--warmup", "2"), ("--clip", "0"), ("--patience", "0")]
NONSENSE += [("--weight-decay", "-1"), ("--vram", "lots"), ("--device", "tpu"), ("--residency", "nowhere")]
NONSENSE += [] if torch.cuda.is_available() else [("--vram", "4GiB"), ("--device", "cuda"), ("--source", "pinned")]


@pytest.mark.parametrize("option", NONSENSE, ids=" ".join)
def test_settings_that_make_no_sense(gemwright: Run, tiny_model: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    (tmp_path / "data.jsonl").write_text(CHAT, encoding="utf-8")
    done = gemwright("tune", tmp_path / "data.jsonl", "--model", tiny_model, "--out", tmp_path / "run", *option)
    assert_one_line(done, 2, option[0].strip("-"))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="session")
def tuned(gemwright: Run, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the tiny model, made by the command line."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "data.jsonl").write_text(CHAT * 4, encoding="utf-8")
    words = (
        "tune",
        folder / "data.jsonl",
        "--model",
        tiny_model,
        "--out",
        folder / "run",
        "--max-steps",
        2,
        "--seq",
        64,
    )
    done = gemwright(*words, "--json")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("engine", ["llamacpp", "pytorch"])
def test_an_adapter_for_another_model(gemwright: Run, real_model: Path, tuned: Path, engine: str) -> None:
    done = gemwright("run", "hello", "--model", real_model, "--adapter", tuned, "--engine", engine, "--json")
    assert_one_line(done, 2, "adapter")


def test_an_adapter_that_is_not_there(gemwright: Run, tiny_model: Path, tmp_path: Path) -> None:
    done = gemwright("run", "hello", "--model", tiny_model, "--adapter", tmp_path / "none", "--json")
    assert_one_line(done, 2, "none")


def test_text_to_score_that_cannot_be_used(gemwright: Run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.txt").touch()
    for name in ("latin.txt", "empty.txt", "none.txt"):
        assert_one_line(gemwright("score", tmp_path / name, "--model", tiny_model), 2, name)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with 64 KiB of room: a real tmpfs, which only root on Linux can mount."""
    folder = tmp_path / "full"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root on Linux")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this machine does not let its root mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_no_space_for_the_adapter(gemwright: Run, tiny_model: Path, tmp_path: Path, full_disk: Path) -> None:
    (tmp_path / "data.jsonl").write_text(CHAT, encoding="utf-8")
    done = gemwright(
        "tune", tmp_path / "data.jsonl", "--model", tiny_model, "--out", full_disk / "run", "--max-steps", 1
    )
    assert_one_line(done, 1, "No space left", str(full_disk))
    assert not [path for path in files(full_disk) if "adapter" in path or path.endswith(".part")]


def test_no_space_for_the_model(gemwright: Run, full_disk: Path) -> None:
    done = gemwright("pull", "270m", GEMWRIGHT_HOME=str(full_disk / "home"))
    assert_one_line(done, 1, "No space left")
    assert not [path for path in files(full_disk) if path.endswith((".gguf", ".part"))]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit on Windows")
def test_files_that_may_not_grow(tiny_model: Path, tmp_path: Path) -> None:
    """The same fault for those who are not root: the system refuses every byte past 20,000 in a file."""
    (tmp_path / "data.jsonl").write_text(CHAT, encoding="utf-8")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from gemwright.__main__ import main; main(sys.argv[1:])"
    )
    words = ["tune", "data.jsonl", "--model", str(tiny_model), "--out", "run", "--max-steps", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert_one_line(done, 1, "cannot write")
    assert not [path for path in files(tmp_path) if path.endswith((".part", "adapter.gguf"))]
