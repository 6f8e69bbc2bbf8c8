"""Damaged model files: whatever the bytes, opening ends in a model or in one line, never in a crash or a hang."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
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
