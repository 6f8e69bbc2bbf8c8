"""What is worth a person's look in a row that can be used: characters, control tokens, secrets, an unlearned end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from gemwright.data.codes import Finding
from gemwright.data.secrets import has_hint, hidden, secrets_in
from gemwright.data.shapes import MODEL_ROLES, Entry

# Gemma 3's control tokens; a test compares them with the vocabulary of the real model.
CONTROL_TOKEN: Final = re.compile(r"<(?:pad|eos|bos|unk|mask|(?:start|end)_of_turn|unused\d{1,4})>")
# Those the vocabulary holds as ordinary pieces: in a text they become the marker itself.
_IMAGE_MARKER: Final = re.compile(r"<(?:start|end)_of_image>")
_CONTROLS: Final = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1d\x1f\x7f\x80-\x84\x86-\x9f]")
_SHOWN = 24


def screen(entry: Entry, line: int, file: str) -> Iterator[Finding]:
    """Warnings and notes of one row (D024, D032 to D035, D070)."""

    def found(code: str, message: str) -> Finding:
        return Finding(code, line, message, file)

    if entry.messages and entry.format != "preference" and entry.messages[-1]["role"] not in MODEL_ROLES:
        yield found("D024", f"message {len(entry.messages)} is the user's and the last: nothing is learned from it")
    if not _is_odd(entry.whole):
        return
    for name, role, text in entry.texts:
        if "\ufffd" in text:
            what = "U+FFFD, the trace of a lost character"
            yield found("D032", f"{name} holds {what}: {around(text, text.index(chr(0xFFFD)))}")
        if control := _CONTROLS.search(text):
            what = f"U+{ord(control.group()):04X} at character {control.start() + 1}"
            yield found("D033", f"{name} holds the control character {what}: {around(text, control.start())}")
        yield from (found(code, f"{name} ({role}) {what}") for code, what in _markers(text))
        for kind, shown in secrets_in(text):
            yield found("D070", f"{name} holds what looks like {kind}: {shown}")


def _is_odd(text: str) -> bool:
    """Whether a closer look is worth its time."""
    return "<" in text or "\ufffd" in text or bool(_CONTROLS.search(text)) or has_hint(text)


def _markers(text: str) -> Iterator[tuple[str, str]]:
    if tokens := CONTROL_TOKEN.findall(text):
        names = ", ".join(dict.fromkeys(tokens[:5]))
        yield "D034", f"holds {names}: encoded as text, never as control"
    if images := _IMAGE_MARKER.findall(text):
        yield "D035", f"holds {images[0]}, which the vocabulary takes for the marker of an image"


def around(text: str, at: int) -> str:
    """A short part of `text` around `at`, on one line, without secrets."""
    text = hidden(text)
    start, end = max(0, at - _SHOWN), at + _SHOWN
    part = "".join(letter if letter.isprintable() else "\N{MIDDLE DOT}" for letter in text[start:end])
    return f'"{"..." * (start > 0)}{part}{"..." * (end < len(text))}"'
