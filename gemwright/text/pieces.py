"""Text to ids by SentencePiece over a vocabulary given as pieces, in this process and in those it starts.

Two things are done before SentencePiece. Text is divided into words that no piece reaches out of, and the ids of short
words are remembered, which is up to three times as fast. And text that has "▁" itself is divided at its user-defined
pieces: llama.cpp looks for these while spaces are still spaces, SentencePiece when they are "▁" already.
Formats: SentencePiece `src/sentencepiece_model.proto`, in protobuf's wire format.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Final

from sentencepiece import SentencePieceProcessor

from gemwright.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # as in SentencePiece and tokenizer.ggml.token_type
SPACE: Final = "▁"
_MATCHED: Final = (NORMAL, USER_DEFINED)
_BPE: Final = 2
# Letters, one digit, or other signs, and the spaces before them. Where the line is drawn changes the speed alone.
_LETTERS: Final = r"a-zA-Z\xc0-\u1fff\u200c\u200d\u2c00-\u2dff\u3005-\u3007\u3041-\ufdff\ufe70-\ufefe\uff21-\uffdc"
_WORD: Final = re.compile(f" *[{_LETTERS}]+| *[0-9]|(?: *[^ 0-9{_LETTERS}])+| +")
_LONGEST_REMEMBERED: Final = 24  # characters; longer words are rare and would only fill the memory
_REMEMBERED: Final = 1 << 15  # words, some 10 MB
_WHOLE_AT_FIRST: Final = 64  # texts that are encoded whole at first; what few need shall not be waited for
_WHOLE_FOR: Final = 7  # and after one whose words were new for the most part


class Encoder:
    """`encoder(text)` gives the ids of `text`. Pickled it is 5 MB, and an unpickled one loads in less than 0.1 s."""

    def __init__(self, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> None:
        """One entry per id. Raises ValueError where no vocabulary can be made of them."""
        user = [id_ for id_, kind in enumerate(types) if kind == USER_DEFINED]
        written = [*tokens]
        for id_ in user:
            written[id_] = tokens[id_].replace(" ", SPACE)
        kinds = [kind if kind in (NORMAL, USER_DEFINED, BYTE) else CONTROL for kind in types]
        entries = [*map(_entry, written, scores, kinds)]
        self._user = {tokens[id_]: (id_, entries[id_]) for id_ in user}
        self._matched = [text for text, kind in zip(written, kinds, strict=True) if kind in _MATCHED]
        self._model = _model(entries)
        self._begin()

    def __getstate__(self) -> tuple[object, ...]:
        return self._user, self._across, self._model

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._user, self._across, self._model = state
        self._matched = []
        self._begin()

    def _begin(self) -> None:
        self._whole: Callable[[str], list[int]] = _load(self._model).encode
        self._words = _Words(self._whole)
        self._wait = _WHOLE_AT_FIRST

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides which ids a text has."""
        return hashlib.sha256(self._model).hexdigest()

    def __call__(self, text: str) -> list[int]:
        """InputError where `text` holds half a surrogate pair, which is no character."""
        try:
            if SPACE in text:
                return self._divided(text)
            if self._wait or self._across.search(text):
                self._wait = max(0, self._wait - 1)
                return self._whole(text)
            return self._by_words(text)
        except RuntimeError:
            half = next((char for char in text if "\ud800" <= char <= "\udfff"), None)
            if half is None:
                raise
            what = f"text holds half a surrogate pair (U+{ord(half):04X})"
            raise InputError(what, fix="Remove or repair that character.") from None

    def _by_words(self, text: str) -> list[int]:
        words, before = _WORD.findall(text), self._words.new
        ids = list(chain.from_iterable(map(self._words.__getitem__, words)))
        if 2 * (self._words.new - before) > len(text):
            self._wait = _WHOLE_FOR
        return ids

    @cached_property
    def _across(self) -> re.Pattern[str]:
        """The pieces that are not within one word."""
        texts = (text.replace(SPACE, " ") for text in self._matched)
        return _any_of(text for text in texts if len(_WORD.findall(text)) > 1)

    def _divided(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._user_pattern.finditer(text):
            ids += self._parts(text[start : match.start()])
            ids.append(self._user[match.group()][0])
            start = match.end()
        return ids + self._parts(text[start:])

    @cached_property
    def _parts(self) -> Callable[[str], list[int]]:
        model = self._model
        for _, entry in self._user.values():
            model = model.replace(entry, entry[:-1] + bytes((CONTROL,)), 1)
        parts: Callable[[str], list[int]] = _load(model).encode
        return parts

    @cached_property
    def _user_pattern(self) -> re.Pattern[str]:
        return _any_of(self._user)


class _Words(dict[str, tuple[int, ...]]):
    """The ids of words; `new` counts the characters that had to be encoded."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode, self.new = encode, 0

    def __missing__(self, word: str) -> tuple[int, ...]:
        self.new += len(word)
        ids = tuple(self._encode(word))
        if len(word) <= _LONGEST_REMEMBERED:
            if len(self) >= _REMEMBERED:
                self.clear()
            self[word] = ids
        return ids


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Leftmost, longest of `texts`, by their first characters for speed; matches nothing where there are none."""
    by_first: dict[str, list[str]] = {}
    for text in sorted(texts, key=len, reverse=True):
        by_first.setdefault(text[0], []).append(re.escape(text[1:]))
    return re.compile(
        "|".join(f"{re.escape(first)}(?:{'|'.join(rest)})" for first, rest in by_first.items()) or r"(?!)"
    )


def _load(model: bytes) -> SentencePieceProcessor:
    try:
        return SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        raise ValueError(str(error)) from error


def _model(entries: Sequence[bytes]) -> bytes:
    """A ModelProto of these pieces and one more for the unknown, which byte pieces leave nothing to do."""
    listed = [*entries, _entry("\ue000unknown", 0.0, UNKNOWN)]
    trainer = _number(3, _BPE) + _number(4, len(listed)) + _number(35, True)  # model_type, vocab_size, byte_fallback
    as_it_is = _number(3, False) + _number(4, False) + _number(5, True)  # dummy prefix, space removal, escaped spaces
    return b"".join(listed) + _field(2, trainer) + _field(3, _field(1, b"identity") + as_it_is)


def _entry(piece: str, score: float, kind: int) -> bytes:
    """A SentencePiece message inside a ModelProto; its last byte is `kind`."""
    content = _field(1, piece.encode("utf-8")) + struct.pack("<BfBB", 0x15, score, 0x18, kind)
    return _field(1, content)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _SHORT[value]
    return bytes((value & 0x7F | 0x80,)) + _varint(value >> 7)


_SHORT: Final = tuple(bytes((value,)) for value in range(0x80))
