"""The GGUF reader: the same as the library's own, fast, and lazy."""

from __future__ import annotations

import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gemwright.errors import InputError
from gemwright.weights.gguf_reader import open_gguf


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.rate", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "п и ü")
    writer.add_array("a.words", ["one", "", "слово"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.flags", [True, False])
    writer.add_tensor("matrix", np.arange(96, dtype=np.float32).reshape(3, 32))
    writer.add_tensor("vector", np.arange(5, dtype=np.float16))
    packed = gguf.quants.quantize(np.random.default_rng(0).normal(size=(4, 64)), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_librarys_reader_reads(small: Path) -> None:
    ours, theirs = open_gguf(small), gguf.GGUFReader(small)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys and len(ours.metadata) == len(keys)
    for key in keys:
        value = ours.metadata[key]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs.fields[key].contents()
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.qtype == tensor.tensor_type.name
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.data.numpy().tobytes() == tensor.data.tobytes()
    assert ours.tensors["packed"].data.shape == (4, 68) and ours.tensors["vector"].data.shape == (10,)


def test_kinds_of_values(small: Path) -> None:
    metadata = open_gguf(small).metadata
    assert metadata.kind("a.words") == (gguf.GGUFValueType.STRING, True)
    assert metadata.kind("a.rate") == (gguf.GGUFValueType.FLOAT32, False)
    assert metadata.get("absent", 3) == 3


def test_the_real_file_opens_at_once(real_model: Path) -> None:
    open_gguf(real_model)
    start = time.process_time()
    opened = open_gguf(real_model)
    tokens = opened.metadata["tokenizer.ggml.tokens"]
    scores = opened.metadata["tokenizer.ggml.scores"]
    kinds = opened.metadata["tokenizer.ggml.token_type"]
    assert time.process_time() - start < 1.5  # of this process alone; 0.1 s, where the library's reader takes 10 s
    assert len(tokens) == len(scores) == len(kinds) == 262_144
    assert tokens[2] == "<bos>" and scores.dtype == np.float32


def test_tensors_outlive_the_reader(small: Path) -> None:
    matrix = open_gguf(small).tensors["matrix"].data
    assert torch.equal(matrix.view(torch.float32), torch.arange(96.0).view(3, 32))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (b"GGUF", "header ends early"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian"),
        (b"GGUF\x09\x00\x00\x00" + bytes(16), "version 9"),
        (b"GGUF\x03\x00\x00\x00" + bytes(8) + (1 << 60).to_bytes(8, "little"), "more than the file can hold"),
        (b"GGUF\x03\x00\x00\x00" + (1 << 60).to_bytes(8, "little") + bytes(8), "more than the file can hold"),
    ],
)
def test_names_what_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="is a folder"):
        open_gguf(tmp_path)
