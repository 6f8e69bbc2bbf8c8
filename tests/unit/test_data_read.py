"""Reading of training data: both formats, and every fault named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemwright.data.read import read_examples
from gemwright.errors import GemwrightError, InputError

GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


def write(folder: Path, content: bytes | str) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def turns(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]})


def test_both_formats_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, f'{GOOD}\r\n\n{{"prompt": "a", "completion": "b", "source": 1}}\n  \n')
    first, second = read_examples(path)
    assert first.messages == second.messages
    assert (first.line, second.line) == (1, 3)
    assert first.messages[1] == {"role": "assistant", "content": "b"}


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    assert len(read_examples(write(tmp_path, "\ufeff" + GOOD))) == 1


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "a\u2028b\u0085", "completion": "c"}, ensure_ascii=False)
    assert read_examples(write(tmp_path, row))[0].messages[0]["content"] == "a\u2028b\u0085"


@pytest.mark.parametrize("roles", ["system user assistant", "user model user model", "user assistant user"])
def test_accepted_roles(tmp_path: Path, roles: str) -> None:
    assert len(read_examples(write(tmp_path, turns(*roles.split())))) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'a'}", "not JSON: .* at column 2"),
        ("[" * 100_000, "too deep"),
        ("9" * 5000, "too long"),
        ("[1]", "a JSON list, not an object"),
        ("null", "a JSON null"),
        ("{}", 'neither "messages" nor "prompt"'),
        ('{"prompt": "a"}', 'no "completion"'),
        ('{"prompt": 3, "completion": "b"}', '"prompt" is a JSON number'),
        ('{"prompt": "a", "completion": " "}', '"completion" is empty'),
        ('{"prompt": "a", "completion": "\\ud83d"}', r'"completion" holds half a surrogate pair \(U\+D83D\)'),
        ('{"messages": []}', "not a list with turns"),
        ('{"messages": {}}', "not a list with turns"),
        ('{"messages": ["a"]}', 'message 1 lacks "role" or "content"'),
        ('{"messages": [{"role": "user"}]}', "message 1 lacks"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "message 1 is a JSON list, not text"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "message 1 has unknown role"),
        (turns("tool"), "message 1 has unknown role 'tool'"),
        (turns("user"), "no model turn"),
        (turns("system"), "no model turn"),
        (turns("system", "user"), "no model turn"),
        (turns("assistant"), "message 1 has role 'assistant' where 'user' belongs"),
        (turns("user", "user", "assistant"), "message 2 has role 'user' where 'assistant' belongs"),
        (turns("system", "user", "model", "model"), "message 4 has role 'model' where 'user' belongs"),
        (turns("user", "system"), "message 2 has role 'system'"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(InputError, match=message) as caught:
        read_examples(path)
    assert f"{path}, line 3: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no examples"),
        (b"\n \n", "no examples"),
        (b"\xef\xbb\xbf", "no examples"),
        (GOOD.encode("utf-16"), "UTF-16"),
        (f'{GOOD}\n{{"prompt": "\xe9"}}'.encode("latin-1"), r"line 2: not UTF-8 \(byte 13 of the line is 0xE9\)"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_examples(write(tmp_path, content))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        read_examples(tmp_path)


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":, \nroleusrcontmp\\d8', max_size=80).map(str.encode))
def test_any_bytes_give_examples_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp(), content)
    try:
        assert read_examples(path)
    except GemwrightError as error:
        assert error.exit_code == 2
