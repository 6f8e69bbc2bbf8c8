"""Containers and compressions: the same rows give the same examples, and what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import CONTAINERS, Rows, arrow, parquet

from gemwright.data import records
from gemwright.data.codes import DataFault
from gemwright.data.locate import locate
from gemwright.data.read import read_examples
from gemwright.data.records import DataFile, Record

TEXTS = st.text(min_size=1, max_size=12).filter(lambda text: text.strip() and "\0" not in text)


@given(st.lists(st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}), min_size=1, max_size=5))
@settings(max_examples=25)
def test_the_same_rows_in_every_container(tmp_path_factory: pytest.TempPathFactory, rows: Rows) -> None:
    folder = tmp_path_factory.getbasetemp()
    expected = [[row["prompt"], row["completion"]] for row in rows]
    for name, pack in CONTAINERS.items():
        (folder / name).write_bytes(pack(rows))
        read = read_examples(folder / name)
        assert [[turn["content"] for turn in example.messages] for example in read] == expected


def test_containers_are_told_by_content(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    told = {}
    for name, pack in CONTAINERS.items():
        (tmp_path / name).write_bytes(pack(rows))
        file = DataFile(tmp_path / name)
        assert len(list(file.records())) == 2
        told[name] = (file.container, file.compression)
    assert [told[name] for name in ("a.jsonl", "d.json", "e.jsonl", "r")] == [
        ("jsonl", None),
        ("json", None),
        ("json", None),
        ("jsonl", None),
    ]
    assert told["k.arrow"] == ("arrow-stream", None) and told["o.parquet.gz"] == ("parquet", "gzip")
    assert told["m.jsonl.zst"] == ("jsonl", "zstd")


def read(path: Path, content: bytes) -> list[Record]:
    path.write_bytes(content)
    return list(DataFile(path).records())


def codes(found: list[Record]) -> list[str | None]:
    return [record.fault.code if record.fault else None for record in found]


def test_lists_of_messages_in_tables(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.csv").write_text(
        f'messages\n"{json.dumps(turns).replace(chr(34), chr(34) * 2)}"\n', encoding="utf-8"
    )
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "score": 3}]), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        (example,) = read_examples(tmp_path / name)
        assert list(example.messages) == turns


def test_lines_of_a_csv_are_those_of_the_file(tmp_path: Path) -> None:
    found = read(tmp_path / "a.csv", b'prompt,completion\n"a\nb",c\nd\ne,\xff\nf,g\n')
    assert [record.line for record in found] == [2, 4, 5, 6]
    assert codes(found) == [None, "D014", "D010", None]


def test_a_quote_that_never_ends(tmp_path: Path) -> None:
    assert codes(read(tmp_path / "a.csv", b'prompt,completion\na,b\nc,"d\ne,f\n')) == [None, "D011"]


def test_a_line_too_long_is_stepped_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_BYTES", 100)
    found = read(tmp_path / "a.jsonl", b'{"text": "a"}\n' + b"x" * 3_000_000 + b'\n{"text": "b"}\n')
    assert codes(found) == [None, "D013", None] and found[2].line == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}\n{"text": "b', [None, "D012"]),
        (b'{"text": "a"}\n{"text": "b\n{"text": "c"}', [None, "D011", None]),
        (b'{"text": "a"}\n\0\0\0\0\n', [None, "D030"]),
        (b'{"text": "a"}\n{"text": "\xc3"}\n', [None, "D010"]),
    ],
)
def test_faults_of_lines(tmp_path: Path, content: bytes, expected: list[str | None]) -> None:
    assert codes(read(tmp_path / "a.jsonl", content)) == expected


@pytest.mark.parametrize(
    ("content", "before", "code"),
    [
        (b'[{"text": "a"}, {"text": "b', 1, "D012"),
        (b'[{"text": "a"},\n{"text": "b"}', 2, "D012"),
        (b'[{"text": "a"},\n{"text" "b"}]', 1, "D011"),
        (b'[{"text": "a"} {"text": "b"}]', 1, "D011"),
        (b'[{"text": "a"},]', 1, "D011"),
        (b'[{"text": "a"}] 3', 1, "D011"),
        (b"[" * 100_000, 0, "D011"),
        (b"[", 0, "D012"),
    ],
)
def test_faults_of_a_json_array_end_it(tmp_path: Path, content: bytes, before: int, code: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    rows = DataFile(path).records()
    for number in range(1, before + 1):
        assert next(rows)[:2] == (number, "row")
    with pytest.raises(DataFault) as caught:
        next(rows)
    assert caught.value.code == code and f"{path}, line " in str(caught.value)


def test_rows_of_an_array_that_are_not_utf8(tmp_path: Path) -> None:
    assert codes(read(tmp_path / "a.json", b'[{"text": "a"}, {"text": "\xff"}, {"text": "b"}]')) == [None, "D010", None]


def test_an_array_larger_than_the_window(tmp_path: Path) -> None:
    rows = [{"text": chr(0x430 + at % 32) * (at * 997 % 40_000 + 1)} for at in range(200)]
    found = read(tmp_path / "a.json", json.dumps(rows, indent=1, ensure_ascii=False).encode())
    assert [record.value for record in found] == rows


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "b.arrow", "a.parquet.gz"])
def test_a_file_cut_short_is_named(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": str(at) * 50, "completion": "b"} for at in range(3000)]
    pack = {"a.jsonl.gz": CONTAINERS["l.jsonl.gz"], "a.jsonl.zst": CONTAINERS["m.jsonl.zst"], "a.parquet": parquet}
    more = {"a.arrow": arrow, "b.arrow": CONTAINERS["k.arrow"], "a.parquet.gz": CONTAINERS["o.parquet.gz"]}
    whole = (pack | more)[name](rows)
    for size in (len(whole) // 2, len(whole) - 3):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(DataFault, match="damaged or cut short") as caught:
            list(DataFile(tmp_path / name).records())
        assert caught.value.code == "D002" and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "D004"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-be"), "D004"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-32"), "D004"),
        ("a.jsonl", b"PK\x03\x04rest", "D003"),
        ("a.json", b"%PDF-1.4", "D003"),
        ("a.parquet", b"something else", "D003"),
        ("a", b"words", "D003"),
        ("a.jsonl", b"\x89PNG\r\n" + bytes(500), "D003"),
        ("a.json", b'{"a": 1', "D012"),
    ],
)
def test_what_is_no_data_file(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    (tmp_path / name).write_bytes(content)
    found: str | None = None
    try:
        (found,) = codes(list(DataFile(tmp_path / name).records()))
    except DataFault as fault:
        found = fault.code
    assert found == code


def test_text_becomes_documents_that_begin_where_they_say(tmp_path: Path) -> None:
    paragraph = "word " * 500 + "\n"
    found = read(tmp_path / "a.txt", ("\n" + (paragraph + "\n") * 4 + "end").encode())
    assert [(record.line, record.unit) for record in found] == [(at, "line") for at in (2, 4, 6, 8, 10)]
    assert [record.value.get("goes_on", False) for record in found] == [True, True, True, True, False]
    assert found[4].value == {"text": "end"} and found[0].value["text"] == paragraph.strip()
    (alone,) = read(tmp_path / "b.txt", (paragraph + "\n\n").encode())
    assert alone.value == {"text": paragraph.strip()}


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.jsonl", "a/.hidden.jsonl", "README.md", "LICENSE-x.txt", "dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name, "completion": "x"}), encoding="utf-8")
    found = locate(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in found.files] == ["a/c.jsonl", "b.jsonl"]
    assert {file.name for file, _ in found.skipped} == {"README.md", "LICENSE-x.txt", "dataset_info.json"}
    read = read_examples(tmp_path)
    assert [example.messages[0]["content"] for example in read] == ["a/c.jsonl", "b.jsonl"]
    assert [example.path for example in read] == list(found.files)


def test_held_out_splits_beside_a_training_split_are_left_out(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet", "validation.jsonl"):
        (tmp_path / name).touch()
    found = locate(tmp_path)
    assert [file.name for file in found.files] == ["train-00000-of-00001.parquet"]
    assert {why for _, why in found.skipped} == {"beside a training split"}


@pytest.mark.parametrize("name", ["none.jsonl", "no/such/place", "chats/none.jsonl"])
def test_a_missing_file_asks_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataFault, match="no such file"):
        locate(Path(name))
