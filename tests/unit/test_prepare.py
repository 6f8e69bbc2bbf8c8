"""Preparing data: one store for any number of workers, found again, made again when damaged, errors with a line."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from dying_worker import DiesInItsResult
from test_text_tokenizer import TOKENIZER

from gemwright.data.read import Example
from gemwright.errors import InputError, MachineError
from gemwright.spec import BOS
from gemwright.text.chat import Message, TrainOn, encode_example
from gemwright.train.batches import steps
from gemwright.train.prepare import Prepared, clear, prepare, stored_sets, stores
from gemwright.train.tokenise import tokenised


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMWRIGHT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def data(path: Path, *answers: str) -> Path:
    rows = [{"prompt": "hello ab", "completion": answer} for answer in answers]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def prepared(path: Path, seq: int = 1000, train_on: TrainOn = "model", said: list[str] | None = None) -> Prepared:
    return prepare(path, TOKENIZER.encode, train_on, seq=seq, report=[].append if said is None else said.append)


def test_a_store_holds_what_the_template_makes(tmp_path: Path) -> None:
    first, second = prepared(data(tmp_path / "a.jsonl", "yes", "no")).examples
    assert first.ids[0] == BOS and len(first.ids) == len(first.labelled)
    for example, answer in ((first, "yes"), (second, "no")):
        messages = [Message("user", "hello ab"), Message("model", answer)]
        assert (example.ids, example.labelled) == encode_example(messages, TOKENIZER.encode)


def test_the_second_time_it_is_there(tmp_path: Path) -> None:
    path = data(tmp_path / "a.jsonl", "yes", "no")
    once, again = prepared(path), prepared(path)
    assert once.workers == 1 and again.workers == 0 and again.examples.folder == once.examples.folder
    assert [*again.examples] == [*once.examples]
    copy = tmp_path / "elsewhere" / "a.jsonl"
    copy.parent.mkdir()
    assert prepared(path.rename(copy)).workers == 0


def test_other_data_or_other_targets_are_another_store(tmp_path: Path) -> None:
    path = data(tmp_path / "a.jsonl", "yes", "no")
    folders = {prepared(path).examples.folder, prepared(path, train_on="all").examples.folder}
    data(path, "yes", "nn")
    folders |= {prepared(path).examples.folder}
    assert len(folders) == 3 == len([*stored_sets()])
    assert clear() > 0 and not [*stored_sets()] and not stores().exists()


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.bin", "meta.json"])
def test_a_damaged_store_is_made_again_aloud(tmp_path: Path, name: str) -> None:
    path = data(tmp_path / "a.jsonl", "yes", "no")
    once = [*(first := prepared(path)).examples]
    file = first.examples.folder / name
    file.write_bytes(file.read_bytes()[:-3])
    said: list[str] = []
    again = prepared(path, said=said)
    assert again.workers == 1 and [*again.examples] == once and "damaged" in said[0]


def test_an_example_too_long_is_named_by_its_line(tmp_path: Path) -> None:
    path = data(tmp_path / "a.jsonl", "yes", "y" * 200, "no", "y" * 300)
    longest = prepared(path).examples.about["longest"]
    with pytest.raises(InputError, match=rf"a\.jsonl:4: 2 of 4 examples are longer than 100.*--seq {longest}"):
        prepared(path, seq=100)
    assert len(prepared(path, seq=longest).examples) == 4


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl.*no such file"):
        prepared(tmp_path / "none.jsonl")


def test_data_that_changes_meanwhile_is_refused(tmp_path: Path, home: Path) -> None:
    path = data(tmp_path / "a.jsonl", "yes")
    with pytest.raises(InputError, match="changed while it was read"):
        prepare(path, TOKENIZER.encode, "model", seq=99, on_progress=lambda done, share: os.utime(path, (1, 1)))
    assert not [*stored_sets()] and not [*(home / "prepared").glob(".*")]


def many(count: int) -> list[Example]:
    words = ("hello", "aab", "a a", "漢п", "<td>", "\n\n", "x")
    turns = ("user", "assistant") * 2
    return [
        Example(
            tuple({"role": role, "content": " ".join(words[(i * k) % 7] for k in range(2, 200))} for role in turns), i
        )
        for i in range(count)
    ]


def joined(workers: int, examples: list[Example]) -> tuple[list[int], bytes]:
    batches = [*tokenised(examples, TOKENIZER.encode, "all", workers)]
    assert [e for batch in batches for e in batch.examples] == examples
    return [n for batch in batches for n in batch.lengths], b"".join(batch.tokens for batch in batches)


def test_any_number_of_workers_gives_the_same_bytes() -> None:
    examples = many(700)
    here = joined(1, examples)
    assert joined(2, examples) == here == joined(3, examples)


def then_fail(examples: list[Example]) -> Iterator[Example]:
    yield from examples
    raise InputError("not JSON", where="data:99")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_in_the_order_of_the_file_is_raised(workers: int) -> None:
    with pytest.raises(InputError, match="data:99: not JSON"):
        [*tokenised(then_fail(many(300)), TOKENIZER.encode, "all", workers)]
    bad = Example(({"role": "user", "content": "a"}, {"role": "user", "content": "b"}), 5, Path("d.jsonl"))
    with pytest.raises(InputError, match=r"d\.jsonl:5: turn 2 has role 'user'"):
        [*tokenised(then_fail([*many(3), bad]), TOKENIZER.encode, "all", workers)]


@pytest.mark.skipif(os.name == "nt", reason="pipes of Windows are written in one piece")
def test_a_worker_that_dies_within_its_result_is_one_clear_error() -> None:
    encode = DiesInItsResult.__new__(DiesInItsResult)
    encode.__setstate__(TOKENIZER.encode.__getstate__())
    with pytest.raises(MachineError, match="tokenising has been killed"):
        [*tokenised(many(300), encode, "all", 2)]


def test_steps_from_a_store_are_those_of_its_examples(tmp_path: Path) -> None:
    path = data(tmp_path / "a.jsonl", *("ab" * n for n in range(1, 60)))
    stored = prepared(path).examples
    for packing in (True, False):
        lazy = itertools.islice(steps(stored, 200, 3, 1, 7, packing), 40)
        assert [*lazy] == [*itertools.islice(steps([*stored], 200, 3, 1, 7, packing), 40)]
