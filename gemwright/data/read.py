"""Reads training data: chat `messages` JSONL or prompt/completion JSONL, every fault named with its line."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

from gemwright.errors import InputError

_FORMATS: Final = 'Write {"messages": [...]} or {"prompt": "...", "completion": "..."} on each line.'
_ALTERNATE: Final = "Alternate user and assistant, a system message only at the start."
_MODEL_ROLES: Final = ("assistant", "model")


class ChatMessage(TypedDict):
    """One turn as it stands in the file."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One conversation and the line of the file it came from."""

    messages: tuple[ChatMessage, ...]
    line: int


def read_examples(path: Path) -> list[Example]:
    """All examples of a JSONL file; blank lines are skipped and a byte order mark is accepted.

    Each line is `{"messages": [{"role", "content"}, ...]}` or `{"prompt", "completion"}`; other keys are left alone.
    InputError (with the line) where the file or a line cannot be used.
    """
    return list(iter_examples(path))


def iter_examples(path: Path) -> Iterator[Example]:
    """`read_examples` one by one, never the whole file in memory; the same errors, each when its line is reached."""
    number = 0
    for number, (line, where, row) in enumerate(_rows(path), start=1):
        yield Example(_messages(row, where), line)
    if not number:
        raise InputError("no examples in it", where=path, fix=_FORMATS)


def split_examples(examples: Sequence[Example], held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held out) in the file's order; the same seed always holds out the same examples."""
    if not 0 <= held_out < len(examples):
        raise InputError(f"cannot hold out {held_out} of {len(examples)} examples", fix="Hold out fewer.")
    chosen = set(random.Random(seed).sample(range(len(examples)), held_out))
    kept = [example for index, example in enumerate(examples) if index not in chosen]
    return kept, [examples[index] for index in sorted(chosen)]


def _rows(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(line number, place to name in errors, parsed JSON) of each line that is not blank."""
    for number, raw in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        text = _text(raw, where)
        if text.strip():
            yield number, where, _json(text, where)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            first = file.readline()
            if first.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise InputError("is UTF-16, not UTF-8", where=path, fix="Save it as UTF-8.")
            yield first.removeprefix(b"\xef\xbb\xbf")
            yield from file
    except FileNotFoundError:
        raise InputError("no such file", where=path, fix="Check the path of the data.") from None
    except OSError as error:
        reason = "is a folder" if path.is_dir() else f"cannot be read: {error.strerror or error}"
        raise InputError(reason, where=path, fix="Give a JSONL file.") from error


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} of the line is 0x{raw[error.start]:02X}"
        raise InputError(f"not UTF-8 ({byte})", where=where, fix="Save the file as UTF-8.") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg} at column {error.colno}"
        raise InputError(what, where=where, fix="Write one JSON object on each line.") from None
    except (RecursionError, ValueError):
        raise InputError("JSON too deep or a number too long", where=where, fix=_FORMATS) from None


def _messages(row: Any, where: str) -> tuple[ChatMessage, ...]:
    if not isinstance(row, dict):
        raise InputError(f"a JSON {_kind(row)}, not an object", where=where, fix=_FORMATS)
    if "messages" in row:
        return _conversation(row["messages"], where)
    missing = [key for key in ("prompt", "completion") if key not in row]
    if len(missing) == 2:
        raise InputError('neither "messages" nor "prompt" and "completion"', where=where, fix=_FORMATS)
    if missing:
        raise InputError(f'no "{missing[0]}"', where=where, fix=_FORMATS)
    pair = (("user", "prompt"), ("assistant", "completion"))
    return tuple({"role": role, "content": _content(row[key], f'"{key}"', where)} for role, key in pair)


def _conversation(messages: Any, where: str) -> tuple[ChatMessage, ...]:
    if not isinstance(messages, list) or not messages:
        raise InputError('"messages" is not a list with turns in it', where=where, fix=_FORMATS)
    turns = tuple(_turn(message, f"message {index}", where) for index, message in enumerate(messages, start=1))
    after_system = turns[1:] if turns[0]["role"] == "system" else turns
    for index, turn in enumerate(after_system):
        wanted = ("user",) if index % 2 == 0 else _MODEL_ROLES
        if turn["role"] not in wanted:
            place = index + 1 + len(turns) - len(after_system)
            what = f"message {place} has role {turn['role']!r} where {wanted[0]!r} belongs"
            raise InputError(what, where=where, fix=_ALTERNATE)
    if len(after_system) < 2:
        raise InputError("no model turn", where=where, fix='Add the answer, with role "assistant".')
    return turns


def _turn(message: Any, name: str, where: str) -> ChatMessage:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise InputError(f'{name} lacks "role" or "content"', where=where, fix=_FORMATS)
    role = message["role"]
    if role not in ("system", "user", *_MODEL_ROLES):
        raise InputError(f"{name} has unknown role {role!r}", where=where, fix="Use system, user or assistant.")
    return {"role": role, "content": _content(message["content"], name, where)}


def _content(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is a JSON {_kind(value)}, not text", where=where, fix="Write it as a string.")
    if not value.strip():
        raise InputError(f"{name} is empty", where=where, fix="Write its text, or remove the line.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        what = f"{name} holds half a surrogate pair ({half})"
        raise InputError(what, where=where, fix="Repair or remove that character.") from None
    return value


def _kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), "null")
