"""`data convert`: canonical rows in every written container, whole or not at all, and nothing left out unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.convert_data import convert
from gemwright.data.read import read_examples
from gemwright.errors import InputError

OUTS = ("o.jsonl", "o.jsonl.gz", "o.jsonl.zst", "o.parquet", "o.ndjson")
TEXTS = st.text(min_size=1, max_size=20).filter(lambda text: text.strip() and "\0" not in text)


def written(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
@settings(max_examples=20)
def test_what_is_written_reads_the_same(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.getbasetemp()
    source = written(folder / "in.jsonl", *({"instruction": a, "input": "", "output": b} for a, b in pairs))
    before = [example.messages for example in read_examples(source)]
    for name in OUTS:
        (folder / name).unlink(missing_ok=True)
        done = convert([source], folder / name)
        assert done.is_written and done.tally.kept == len(pairs)
        assert [example.messages for example in read_examples(folder / name)] == before


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", {"prompt": "a", "completion": "b"})
    for name in OUTS[:3]:
        convert([source], tmp_path / name)
        convert([source], tmp_path / f"again-{name}")
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again-{name}").read_bytes()


GOOD = [{"prompt": f"number {at}", "completion": "b"} for at in range(4)]


def test_bad_rows_are_refused_or_dropped_by_choice(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", GOOD[0], "{", GOOD[1], {"prompt": "", "completion": "b"}, GOOD[0])
    done = convert([source], tmp_path / "o.jsonl")
    assert not done.is_written and done.row()["out"] is None and (done.tally.read, done.tally.dropped) == (5, 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl"]

    done = convert([source], tmp_path / "o.jsonl", drop_bad=True, drop_duplicates=True)
    row = done.row()
    assert (row["read"], row["kept"], row["dropped"]) == (5, 2, 3)
    assert row["dropped_by_code"] == {"D011": 1, "D020": 1, "D040": 1}
    read = [example.messages[0]["content"] for example in read_examples(tmp_path / "o.jsonl")]
    assert read == ["number 0", "number 1"]


@given(st.lists(st.sampled_from([json.dumps(GOOD[0]), json.dumps(GOOD[1]), "{", '{"text": "t"}', ""]), max_size=8))
@settings(max_examples=30)
def test_kept_and_dropped_add_up(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp()
    source, out = written(folder / "add.jsonl", *lines), folder / "added.jsonl"
    out.unlink(missing_ok=True)
    row = convert([source], out, drop_bad=True, drop_duplicates=True).row()
    assert row["read"] == row["kept"] + row["dropped"] == sum(bool(line) for line in lines)
    assert row["dropped"] == sum(row["dropped_by_code"].values())
    assert out.exists() == (row["kept"] > 0)
    if out.exists():
        assert len(out.read_text(encoding="utf-8").splitlines()) == row["kept"]


def test_a_file_cut_short_is_never_converted(tmp_path: Path) -> None:
    source = tmp_path / "in.json"
    source.write_text(json.dumps(GOOD)[:-20], encoding="utf-8")
    done = convert([source], tmp_path / "o.jsonl", drop_bad=True)
    assert not done.is_written and not (tmp_path / "o.jsonl").exists()


def test_repair(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", GOOD[0], {"prompt": "\u0432o\u0434a", "completion": "vodka"})
    done = convert([source], tmp_path / "o.jsonl", repair=True)
    assert done.repaired == 1
    read = read_examples(tmp_path / "o.jsonl")
    assert [turn["content"] for turn in read[1].messages] == ["\u0432\u043e\u0434\u0430", "vodka"]


def test_documents_and_preferences_are_converted_for_later(tmp_path: Path) -> None:
    rows = [{"text": "a document"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    source = written(tmp_path / "in.jsonl", *rows)
    assert convert([source], tmp_path / "o.jsonl").row()["formats"] == {"text": 1, "preference": 1}
    out = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert out[0] == rows[0] and out[1]["chosen"] == [{"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match="a table cannot hold rows of text and of prompt"):
        convert([source], tmp_path / "o.parquet")
    assert not (tmp_path / "o.parquet").exists()


def test_passages_stay_passages(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text(("word " * 500 + "\n\n") * 3, encoding="utf-8")
    before = [example.messages for example in read_examples(source)]
    assert [turn["role"] for (turn,) in before] == ["passage", "passage", "document"]
    for name in OUTS:
        convert([source], tmp_path / name)
        assert [example.messages for example in read_examples(tmp_path / name)] == before


def test_nothing_older_is_lost(tmp_path: Path) -> None:
    source, there = written(tmp_path / "in.jsonl", GOOD[0]), written(tmp_path / "there.jsonl", GOOD[1])
    with pytest.raises(InputError, match="is there already"):
        convert([source], there)
    with pytest.raises(InputError, match="no name of a format"):
        convert([source], tmp_path / "o.csv")
    assert json.loads(there.read_text(encoding="utf-8")) == GOOD[1]


def test_the_verb(gemwright: Callable[..., Any], tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", GOOD[0], "{")
    done = gemwright("data", "convert", source, tmp_path / "o.jsonl")
    assert done.returncode == 2 and "D011" in done.stdout and "--drop-bad" in done.stderr
    done = gemwright("data", "convert", source, tmp_path / "o.jsonl", "--drop-bad", "--json")
    assert done.returncode == 0 and "next: gemwright data check" in done.stderr
    assert json.loads(done.stdout)["dropped_by_code"] == {"D011": 1}
