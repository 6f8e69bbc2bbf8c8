"""The store of tokens: what is written comes back, and whatever is damaged is noticed on opening."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.data.store import DamagedStore, Encoded, Stored, StoreWriter, packed, read_meta

Tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=30)
FILES = ("tokens.bin", "lengths.bin", "meta.json")


def example(pairs: list[tuple[int, bool]]) -> Encoded:
    return Encoded([id_ for id_, _ in pairs], [flag for _, flag in pairs])


def write(folder: Path, examples: list[Encoded], batch: int = 3) -> Stored:
    shutil.rmtree(folder, ignore_errors=True)
    writer = StoreWriter(folder)
    for at in range(0, len(examples), batch):
        some = examples[at : at + batch]
        writer.add([len(e.ids) for e in some], b"".join(packed(e.ids, e.labelled) for e in some))
    writer.finish({"name": "данные"})
    return Stored(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@settings(max_examples=60)
@given(st.lists(Tokens.map(example), max_size=12), st.integers(1, 5))
def test_what_is_written_comes_back(place: Path, examples: list[Encoded], batch: int) -> None:
    stored = write(place / "a", examples, batch)
    assert [*stored] == examples and stored[:] == examples and stored.about == {"name": "данные"}
    assert stored.lengths.tolist() == [len(e.ids) for e in examples]
    assert stored.targets.tolist() == [sum(e.labelled) for e in examples]
    assert (stored.tokens, stored.labelled) == (sum(stored.lengths), sum(sum(e.labelled) for e in examples))
    assert stored[-1:] == examples[-1:]
    with pytest.raises(IndexError):
        stored[len(examples)]


def test_targets_of_many_examples_are_counted(place: Path) -> None:
    examples = [Encoded([7] * (i % 4), [j == i % 3 for j in range(i % 4)]) for i in range(2500)]
    assert write(place / "g", examples, 100).targets.tolist() == [sum(e.labelled) for e in examples]


def test_examples_are_read_when_asked_for(place: Path) -> None:
    stored = write(place / "b", [Encoded([7] * 1000, [True] * 1000)] * 50)
    assert isinstance(stored._words, np.memmap) and stored[49].ids == [7] * 1000


@settings(max_examples=150)
@given(st.data())
def test_every_flipped_bit_and_every_cut_is_noticed(place: Path, data: st.DataObject) -> None:
    stored = write(place / "c", [Encoded([1, 2, 3], [False, True, True]), Encoded([4], [True])])
    file = stored.folder / data.draw(st.sampled_from(FILES))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
        if file.name == "meta.json" and content.endswith(b"}"):
            return  # only the newline at the end is gone
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        again = Stored(stored.folder)
    except DamagedStore:
        return
    # A flipped bit in white space or in a digit's spelling may leave the same JSON.
    assert file.name == "meta.json" and [*again] == [*stored] and again.about == stored.about


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(place: Path, name: str) -> None:
    stored = write(place / "d", [Encoded([1], [True])])
    (stored.folder / name).unlink()
    with pytest.raises(DamagedStore, match="cannot be read"):
        Stored(stored.folder)


def test_another_format_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemwright.data.store.FORMAT", 2)
    stored = write(place / "e", [Encoded([1], [True])])
    monkeypatch.undo()
    with pytest.raises(DamagedStore, match="format 2, not 1"):
        read_meta(stored.folder)


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_any_meta_file_is_read_or_refused(place: Path, content: bytes) -> None:
    folder = place / "f"
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").write_bytes(content)
    with pytest.raises(DamagedStore):
        read_meta(folder)
