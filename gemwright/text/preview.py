"""A training example for a person to look at: each token, what is learned of it, and where a row would end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gemwright.text.tokenizer import Tokenizer

# Ink and paper are both set, so that it reads alike on dark and light screens; two shades tell neighbours apart.
_READ: Final = ("\x1b[38;5;252;48;5;236m", "\x1b[38;5;252;48;5;240m")
_LEARNED: Final = ("\x1b[1;38;5;231;48;5;25m", "\x1b[1;38;5;231;48;5;31m")
_PLAIN: Final = "\x1b[0m"


@dataclass(frozen=True)
class Token:
    """`text` is as the vocabulary writes it; `is_text` is False for control tokens and single bytes."""

    id: int
    text: str
    is_text: bool
    is_learned: bool


def tokens_of(tokenizer: Tokenizer, ids: Sequence[int], labelled: Sequence[bool]) -> list[Token]:
    """An encoded example token by token."""
    return [
        Token(id_, tokenizer.piece(id_), tokenizer.is_text(id_), learned)
        for id_, learned in zip(ids, labelled, strict=True)
    ]


def coloured(tokens: Sequence[Token], seq: int | None = None) -> str:
    """For a terminal: learned tokens bold on blue, others on grey, control tokens as ⟨bos⟩, line breaks after ↵."""
    shown: list[str] = []
    shade = 0
    for index, token in enumerate(tokens):
        if index == seq:
            shown.append(f"{_newline(shown)}{_end_of_row(seq)}\n")
        shade = 1 - shade
        text, breaks = _visible(token), "\n" if token.is_text and "\n" in token.text else ""
        shown.append(f"{(_LEARNED if token.is_learned else _READ)[shade]}{text}{_PLAIN}{breaks}")
    return "".join(shown).rstrip("\n")


def plain(tokens: Sequence[Token], seq: int | None = None) -> str:
    """A line a token: its place, its id, * where it is learned, its text as a JSON string or a control token's name."""
    lines = []
    for index, token in enumerate(tokens):
        if index == seq:
            lines.append(_end_of_row(seq))
        text = _quoted(token.text) if token.is_text else _visible(token)
        lines.append(f"{index:6} {token.id:7} {'*' if token.is_learned else ' '} {text}")
    return "\n".join(lines)


def legend(colour: bool) -> str:
    """What the marks mean."""
    if not colour:
        return "* learned"
    return f"{_LEARNED[0]} learned {_PLAIN} {_READ[0]} only read {_PLAIN}"


def _end_of_row(seq: int | None) -> str:
    return f"--- a row of {seq} tokens ends here: 'gemwright tune' refuses this example ---"


def _newline(shown: Sequence[str]) -> str:
    return "" if not shown or shown[-1].endswith("\n") else "\n"


def _visible(token: Token) -> str:
    if not token.is_text:
        return f"⟨{token.text.removeprefix('<').removesuffix('>')}⟩"
    return "".join(map(_sign, token.text))


def _quoted(text: str) -> str:
    """A JSON string in which what cannot be seen is escaped."""
    return "".join(
        char if char.isprintable() else json.dumps(char)[1:-1] for char in json.dumps(text, ensure_ascii=False)
    )


def _sign(char: str) -> str:
    if char in "\n\t":
        return "↵" if char == "\n" else "⇥   "
    return char if char.isprintable() else f"⟨U+{ord(char):04X}⟩"
