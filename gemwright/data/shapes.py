"""The formats of a row: which one it is, whether its turns can be used, and the one canonical form of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, TypedDict

from gemwright.data.codes import DataFault
from gemwright.data.records import WRITE_ROWS

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference"]

TRAINED: Final = ("messages", "sharegpt", "alpaca", "prompt_completion", "text")
MODEL_ROLES: Final = ("assistant", "model")
_ALTERNATE: Final = "Alternate user and assistant, a system message only at the start."
_ROLES: Final = ("system", "user", *MODEL_ROLES)
_SHAREGPT_ROLES: Final = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


class ChatMessage(TypedDict):
    """One turn as it stands in the file."""

    role: str
    content: str


@dataclass(frozen=True)
class Entry:
    """One usable row: a conversation, a document (`text`), or a prompt (`messages`) with two ends to choose from."""

    format: Format
    messages: tuple[ChatMessage, ...] = ()
    text: str | None = None
    chosen: tuple[ChatMessage, ...] = ()
    rejected: tuple[ChatMessage, ...] = ()
    goes_on: bool = False  # a passage: the text's document has more

    @property
    def trained(self) -> tuple[ChatMessage, ...]:
        """What a fine-tune reads: the conversation, or plain text as one message of role document or passage."""
        if self.text is None:
            return self.messages
        return ({"role": "passage" if self.goes_on else "document", "content": self.text},)

    @cached_property
    def texts(self) -> list[tuple[str, str, str]]:
        """(what a person would call it, its role, its text) of each text in the row."""
        if self.text is not None:
            return [("the text", "document", self.text)]
        parts = [("message ", self.messages), ("chosen, message ", self.chosen), ("rejected, message ", self.rejected)]
        return [
            (f"{name}{number}", turn["role"], turn["content"])
            for name, turns in parts
            for number, turn in enumerate(turns, start=1)
        ]

    @cached_property
    def whole(self) -> str:
        """All texts as one, with a sign between that stands in none."""
        if self.text is not None:
            return self.text
        return "\x1e".join([turn["content"] for turn in (*self.messages, *self.chosen, *self.rejected)])

    def mapped(self, change: Callable[[str], str]) -> Entry:
        """The same row with every text changed."""

        def turns(messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
            return tuple({"role": turn["role"], "content": change(turn["content"])} for turn in messages)

        text = None if self.text is None else change(self.text)
        ends = turns(self.chosen), turns(self.rejected)
        return Entry(self.format, turns(self.messages), text, *ends, self.goes_on)

    def row(self) -> dict[str, Any]:
        """The canonical row: `messages`; `text`; or `prompt`, `chosen` and `rejected` as lists of messages."""
        if self.text is not None:
            return {"text": self.text} | ({"goes_on": True} if self.goes_on else {})
        if self.format == "preference":
            return {"prompt": list(self.messages), "chosen": list(self.chosen), "rejected": list(self.rejected)}
        return {"messages": list(self.messages)}


def entry_of(row: Any, where: str) -> Entry:
    """The entry that a parsed row is. DataFault (D015 to D031) where it is none that can be used."""
    if not isinstance(row, dict):
        raise DataFault("D015", f"a JSON {_kind(row)}, not an object", where=where, fix=WRITE_ROWS)
    format_ = _format(row, where)
    if format_ == "messages":
        return Entry("messages", _conversation(row["messages"], '"messages"', where))
    if format_ == "sharegpt":
        return Entry("sharegpt", _conversation(row["conversations"], '"conversations"', where, row.get("system")))
    if format_ == "alpaca":
        return Entry("alpaca", _alpaca(row, where))
    if format_ == "text":
        return Entry("text", text=_content(row["text"], '"text"', where), goes_on=row.get("goes_on") is True)
    return _preference(row, where) if format_ == "preference" else _pair(row, where)


def _format(row: Mapping[str, Any], where: str) -> Format:
    """By the keys that hold something: tables fill up columns that a row lacks with nulls."""
    keys = {key for key, value in row.items() if value is not None}
    if "messages" in row and ("messages" in keys or not keys):
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if keys & {"chosen", "rejected"}:
        return "preference"
    if "instruction" in keys and "output" in row:
        return "alpaca"
    if keys & {"prompt", "completion"}:
        return "prompt_completion"
    if "text" in keys:
        return "text"
    what = 'neither "messages" nor "prompt" and "completion" nor another known format'
    keys_here = ", ".join(sorted(map(str, row)))[:80]
    raise DataFault("D016", what + (f" (keys: {keys_here})" if row else ""), where=where, fix=WRITE_ROWS)


def _needed(row: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in names:
        if name not in row:
            raise DataFault("D017", f'no "{name}"', where=where, fix=WRITE_ROWS)


def _pair(row: Mapping[str, Any], where: str) -> Entry:
    """`prompt` and `completion`, each a text or a list of messages."""
    _needed(row, ("prompt", "completion"), where)
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        joined = row["prompt"] + row["completion"]
        return Entry("prompt_completion", _conversation(joined, '"prompt" and "completion"', where))
    pair = (("user", "prompt"), ("assistant", "completion"))
    turns: tuple[ChatMessage, ...] = tuple(
        {"role": role, "content": _content(row[key], f'"{key}"', where)} for role, key in pair
    )
    return Entry("prompt_completion", turns)


def _alpaca(row: Mapping[str, Any], where: str) -> tuple[ChatMessage, ...]:
    """`input` follows `instruction` after an empty line, as the original template has it; `system` may be there."""
    question = _content(row["instruction"], '"instruction"', where)
    given = row.get("input")
    if given not in (None, ""):
        question += "\n\n" + _content(given, '"input"', where, may_be_empty=True).strip()
    turns = [ChatMessage(role="user", content=question.strip())]
    turns.append({"role": "assistant", "content": _content(row["output"], '"output"', where)})
    return _with_system(row.get("system"), tuple(turns), where)


def _with_system(system: Any, turns: tuple[ChatMessage, ...], where: str) -> tuple[ChatMessage, ...]:
    if system in (None, ""):
        return turns
    return ({"role": "system", "content": _content(system, '"system"', where)}, *turns)


def _preference(row: Mapping[str, Any], where: str) -> Entry:
    """A prompt and two answers; lists of messages may repeat the prompt or, without one, begin with it."""
    _needed(row, ("chosen", "rejected"), where)
    chosen, rejected = (_turns_of(row[name], f'"{name}"', "assistant", where) for name in ("chosen", "rejected"))
    prompt = _turns_of(row["prompt"], '"prompt"', "user", where) if row.get("prompt") is not None else None
    if prompt is None:
        shared = [a for a, b in zip(chosen[:-1], rejected[:-1], strict=False) if a == b]
        prompt = chosen[: len(shared)] if chosen[: len(shared)] == rejected[: len(shared)] else ()
    chosen, rejected = (end[len(prompt) :] if end[: len(prompt)] == prompt else end for end in (chosen, rejected))
    if chosen == rejected:
        fix = "Remove the row: it says nothing about which is better."
        raise DataFault("D025", "chosen and rejected are the same", where=where, fix=fix)
    for name, end in (("chosen", chosen), ("rejected", rejected)):
        _in_order((*prompt, *end), f'"{name}" after the prompt: message', where)
    return Entry("preference", prompt, chosen=chosen, rejected=rejected)


def _turns_of(value: Any, name: str, role: str, where: str) -> tuple[ChatMessage, ...]:
    if isinstance(value, list):
        return tuple(_turn(turn, f"{name}, message {index}", where) for index, turn in enumerate(value, start=1))
    return ({"role": role, "content": _content(value, name, where)},)


def _conversation(messages: Any, name: str, where: str, system: Any = None) -> tuple[ChatMessage, ...]:
    if not isinstance(messages, list) or not messages:
        raise DataFault("D017", f"{name} is not a list with turns in it", where=where, fix=WRITE_ROWS)
    turns = tuple(_turn(message, f"message {index}", where) for index, message in enumerate(messages, start=1))
    if turns[0]["role"] != "system":
        turns = _with_system(system, turns, where)
    _in_order(turns, "message", where)
    return turns


def _in_order(turns: tuple[ChatMessage, ...], name: str, where: str) -> None:
    """System first or not at all, then user and model by turns, at least one of each."""
    start = bool(turns) and turns[0]["role"] == "system"
    for index, turn in enumerate(turns[start:]):
        wanted = ("user",) if index % 2 == 0 else MODEL_ROLES
        if turn["role"] not in wanted:
            what = f"{name} {index + 1 + start} has role {turn['role']!r} where {wanted[0]!r} belongs"
            raise DataFault("D022", what, where=where, fix=_ALTERNATE)
    if len(turns) - start < 2:
        raise DataFault("D023", "no model turn", where=where, fix='Add the answer, with role "assistant".')


def _turn(message: Any, name: str, where: str) -> ChatMessage:
    """`role` and `content`, or ShareGPT's `from` and `value`."""
    by = ("from", "value") if isinstance(message, Mapping) and "from" in message else ("role", "content")
    if not isinstance(message, Mapping) or by[0] not in message or by[1] not in message:
        raise DataFault("D017", f'{name} lacks "{by[0]}" or "{by[1]}"', where=where, fix=WRITE_ROWS)
    role = message[by[0]]
    if by[0] == "from" and isinstance(role, str):
        role = _SHAREGPT_ROLES.get(role, role)
    if role not in _ROLES:
        fix = "Use system, user or assistant." if by[0] == "role" else "Use system, human or gpt."
        raise DataFault("D021", f"{name} has unknown role {str(role)[:40]!r}", where=where, fix=fix)
    return {"role": role, "content": _content(_joined(message[by[1]]), name, where)}


def _joined(content: Any) -> Any:
    """One text where it is a list of text parts, as templates for images write it; anything else as it is."""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return content
    texts = [part.get("text") if part.get("type") == "text" else None for part in content]
    return "".join(map(str, texts)) if texts and all(isinstance(text, str) for text in texts) else content


def _content(value: Any, name: str, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        what = f"{name} is a JSON {_kind(value)}, not text"
        raise DataFault("D017", what, where=where, fix="Write it as a string.")
    if not may_be_empty and not value.strip():
        raise DataFault("D020", f"{name} is empty", where=where, fix="Write its text, or remove the line.")
    if "\0" in value:
        what = f"{name} holds a NUL at character {value.index(chr(0)) + 1}"
        raise DataFault("D030", what, where=where, fix="Remove it: many programs end a text there.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        what = f"{name} holds half a surrogate pair ({half})"
        raise DataFault("D031", what, where=where, fix="Repair or remove that character.") from None
    return value


def _kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
