"""Damaged model files: whatever the bytes, opening ends in a model or in one line, never in a crash or a hang."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemwright.errors import InputError
from gemwright.spec import SPECS
from gemwright.weights.gguf_reader import GGUFFile, open_gguf
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.random_model import write_random_gguf

TINY = replace(
    SPECS["270m"], name="tiny", layers=1, hidden=32, mlp=32, heads=1, kv_heads=1, head_dim=32, vocab=32, window=16
)
FUZZ = settings(deadline=2000, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("faults") / "whole.gguf"
    write_random_gguf(path, TINY, "Q8_0")
    return path.read_bytes()


def open_all(path: Path) -> None:
    """Open as GGUF with every value decoded, and as a model; only InputError may come out."""
    try:
        opened = open_gguf(path)
        assert isinstance(opened, GGUFFile)
        for key in opened.metadata:
            opened.metadata[key]
        for tensor in opened.tensors.values():
            tensor.data.sum()
        assert isinstance(open_model(path), ModelFile)
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)


def header_end(whole: bytes) -> int:
    return whole.index(b"blk.0.ffn_norm.weight") + 200


@FUZZ
@given(data=st.data())
def test_flipped_bytes(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(whole)
    places = st.integers(0, header_end(whole))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)):
        damaged[place] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    open_all(path)


@FUZZ
@given(data=st.data())
def test_whole_numbers_replaced(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Eight bytes at a time: counts, lengths, dimensions and offsets become huge ones."""
    place = data.draw(st.integers(0, header_end(whole)))
    value = data.draw(st.sampled_from([1 << 60, (1 << 64) - 1, 1 << 63, 1 << 32, (1 << 31) - 1, 0, 1]))
    damaged = whole[:place] + value.to_bytes(8, "little") + whole[place + 8 :]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    open_all(path)


@FUZZ
@given(keep=st.floats(0, 1), tail=st.binary(max_size=64))
def test_truncated(whole: bytes, tmp_path: Path, keep: float, tail: bytes) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(whole[: int(len(whole) * keep)] + tail)
    open_all(path)


@FUZZ
@given(noise=st.binary(max_size=400))
def test_noise(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + noise)
    open_all(path)


ODD: dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]] = {
    "numbers": ([1, 2], GGUFValueType.ARRAY, GGUFValueType.INT32),
    "words": (["a\n", "b"], GGUFValueType.ARRAY, GGUFValueType.STRING),
    "text": ("two\nlines " * 50, GGUFValueType.STRING, None),
    "nothing": ("", GGUFValueType.STRING, None),
    "true": (True, GGUFValueType.BOOL, None),
    "nan": (float("nan"), GGUFValueType.FLOAT32, None),
    "infinity": (float("inf"), GGUFValueType.FLOAT64, None),
    "negative": (-1, GGUFValueType.INT64, None),
    "huge": ((1 << 64) - 1, GGUFValueType.UINT64, None),
    "zero": (0, GGUFValueType.UINT8, None),
}


@pytest.mark.parametrize("odd", ODD)
def test_values_of_another_kind(whole: bytes, tmp_path: Path, odd: str) -> None:
    """Each metadata value replaced by one of a kind that nobody would put there."""
    source = tmp_path / "whole.gguf"
    source.write_bytes(whole)
    model = open_gguf(source)
    assert len(model.metadata) > 15
    for replaced in model.metadata:
        path = tmp_path / "odd.gguf"
        writer = gguf.GGUFWriter(path, "gemma3")
        writer.kv_data[0].clear()
        for key in model.metadata:
            value, kind, items = (
                ODD[odd] if key == replaced else (model.metadata[key], model.metadata.kind(key)[0], None)
            )
            writer.add_key_value(key, value, kind, sub_type=items)
        for tensor in model.tensors.values():
            kept = gguf.GGMLQuantizationType[tensor.qtype]
            shape = (*tensor.shape[:-1], tensor.data.shape[-1])
            writer.add_tensor(tensor.name, tensor.data.numpy(), raw_shape=shape, raw_dtype=kept)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        open_all(path)


@pytest.mark.parametrize("kind", [GGUFValueType.FLOAT32, GGUFValueType.BOOL, GGUFValueType.STRING])
def test_empty_arrays(tmp_path: Path, kind: GGUFValueType) -> None:
    path = tmp_path / "empty.gguf"
    value = b"".join(number.to_bytes(4, "little") for number in (GGUFValueType.ARRAY, kind)) + bytes(8)
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + value)
    assert len(open_gguf(path).metadata["k"]) == 0


def test_any_truncation_is_noticed(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for size in range(0, len(whole) - 64, max(1, len(whole) // 200)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            open_model(path)


def test_the_real_file_cut_short(real_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    with real_model.open("rb") as source:
        path.write_bytes(source.read(8_000_000))
    with pytest.raises(InputError, match=r"tensor token_embd\.weight ends at byte .* but the file has 8,000,000"):
        open_model(path)
