"""Formats of a row: each is known by its keys, becomes canonical messages, and its faults have stable codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemwright.data import records
from gemwright.data.codes import CODES, DataFault
from gemwright.data.read import read_examples
from gemwright.data.shapes import entry_of
from gemwright.errors import InputError

ASKED = {"role": "user", "content": "a"}
TOLD = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "format_", "messages"),
    [
        ({"messages": [ASKED, TOLD]}, "messages", [ASKED, TOLD]),
        ({"messages": [SYSTEM, ASKED, TOLD], "prompt": "x"}, "messages", [SYSTEM, ASKED, TOLD]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "sharegpt",
            [ASKED, TOLD],
        ),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "sharegpt",
            [SYSTEM, ASKED, TOLD],
        ),
        ({"conversations": [ASKED, TOLD]}, "sharegpt", [ASKED, TOLD]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, TOLD]},
            "messages",
            [ASKED, TOLD],
        ),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca", [ASKED, TOLD]),
        ({"instruction": "a", "output": "b", "system": "s"}, "alpaca", [SYSTEM, ASKED, TOLD]),
        ({"instruction": "a", "input": "c", "output": "b"}, "alpaca", [{"role": "user", "content": "a\n\nc"}, TOLD]),
        ({"prompt": "a", "completion": "b", "messages": None}, "prompt_completion", [ASKED, TOLD]),
        ({"prompt": [ASKED], "completion": [TOLD]}, "prompt_completion", [ASKED, TOLD]),
    ],
)
def test_conversations(row: dict[str, Any], format_: str, messages: list[dict[str, str]]) -> None:
    entry = entry_of(row, "here")
    assert (entry.format, list(entry.messages)) == (format_, messages)
    assert entry_of(entry.row(), "here").messages == entry.messages


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [ASKED], "chosen": [TOLD], "rejected": [{"role": "assistant", "content": "c"}]},
        {"prompt": "a", "chosen": [ASKED, TOLD], "rejected": [ASKED, {"role": "assistant", "content": "c"}]},
        {"chosen": [ASKED, TOLD], "rejected": [ASKED, {"role": "assistant", "content": "c"}]},
    ],
)
def test_preferences_in_all_their_forms_are_one(row: dict[str, Any]) -> None:
    entry = entry_of(row, "here")
    assert entry.row() == {"prompt": [ASKED], "chosen": [TOLD], "rejected": [{"role": "assistant", "content": "c"}]}
    assert entry_of(entry.row(), "here") == entry


def test_a_document() -> None:
    entry = entry_of({"text": "a\nb", "id": 3}, "here")
    assert entry.row() == {"text": "a\nb"} and entry.trained == ({"role": "document", "content": "a\nb"},)
    passage = entry_of({"text": "a", "goes_on": True}, "here")
    assert passage.row() == {"text": "a", "goes_on": True} and passage.trained[0]["role"] == "passage"
    assert passage.mapped(str.upper).row() == {"text": "A", "goes_on": True}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ([], "D015"),
        ({"question": "a", "answer": "b"}, "D016"),
        ({"conversations": []}, "D017"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TOLD]}, "D017"),
        ({"messages": [{"role": "user", "content": []}, TOLD]}, "D017"),
        ({"conversations": [{"from": "human"}]}, "D017"),
        ({"instruction": "a", "output": None}, "D017"),
        ({"chosen": "b"}, "D017"),
        ({"instruction": "a", "output": ""}, "D020"),
        ({"text": " "}, "D020"),
        ({"conversations": [{"from": "bird", "value": "a"}, {"from": "gpt", "value": "b"}]}, "D021"),
        ({"conversations": [{"from": "gpt", "value": "b"}]}, "D022"),
        ({"prompt": "a", "chosen": [ASKED, ASKED], "rejected": "c"}, "D022"),
        ({"messages": [SYSTEM]}, "D023"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "D025"),
        ({"prompt": "a\0", "completion": "b"}, "D030"),
        ({"prompt": "a\ud83d", "completion": "b"}, "D031"),
    ],
)
def test_faults_have_codes(row: Any, code: str) -> None:
    with pytest.raises(DataFault) as caught:
        entry_of(row, "here")
    assert caught.value.code == code and CODES[code].severity == "error"
    assert str(caught.value).startswith("here: ") and "\n" not in str(caught.value)


def test_what_is_not_trained_on_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}', encoding="utf-8")
    with pytest.raises(InputError, match="does not train on yet"):
        read_examples(path)


LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(["user", "model", "human"])
KEYS = st.sampled_from([*records.KEYS, "role", "content", "from", "value"])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))


def test_an_unknown_format_names_its_keys() -> None:
    with pytest.raises(DataFault, match=r"\(keys: answer, question\)"):
        entry_of({"question": "a", "answer": "b"}, "here")


@given(VALUES)
def test_any_structure_is_an_entry_or_a_fault(value: Any) -> None:
    try:
        entry = entry_of(value, "here")
    except DataFault as fault:
        assert CODES[fault.code].severity == "error" and "\n" not in str(fault)
    else:
        assert entry.texts and all(text.strip() for _, _, text in entry.texts)
        assert entry_of(json.loads(json.dumps(entry.row())), "here").row() == entry.row()


@given(st.lists(st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text), min_size=2, max_size=5))
def test_a_change_of_texts_keeps_the_rest(texts: list[str]) -> None:
    turns = [{"role": "user" if at % 2 == 0 else "model", "content": text} for at, text in enumerate(texts)]
    entry = entry_of({"messages": turns}, "here")
    assert entry.mapped(lambda text: text) == entry
    assert [text for _, _, text in entry.mapped(lambda text: text + "!").texts] == [text + "!" for text in texts]
