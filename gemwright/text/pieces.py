"""Text to ids by SentencePiece over a vocabulary given as pieces, in this process and in those it starts.

Where there is much text, `quick.py` does the same sooner. Text that has "▁" itself is divided at its user-defined
pieces: llama.cpp looks for these while spaces are still spaces, SentencePiece when they are "▁" already.
Formats: SentencePiece `src/sentencepiece_model.proto`, in protobuf's wire format.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Final

from sentencepiece import SentencePieceProcessor

from gemwright.errors import InputError

if TYPE_CHECKING:
    from gemwright.text.quick import QuickEncoder

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # as in SentencePiece and tokenizer.ggml.token_type
SPACE: Final = "▁"
_BPE: Final = 2
_WHEN_QUICK: Final = 1 << 22  # characters, which take SentencePiece about as long as QuickEncoder takes to be made


class Encoder:
    """`encoder(text)` gives the ids of `text`. Pickled it is 5 MB, after `hasten` 9 MB."""

    def __init__(self, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> None:
        """One entry per id. Raises ValueError where no vocabulary can be made of them."""
        user = [id_ for id_, kind in enumerate(types) if kind == USER_DEFINED]
        written = [*tokens]
        for id_ in user:
            written[id_] = tokens[id_].replace(" ", SPACE)
        kinds = [kind if kind in (NORMAL, USER_DEFINED, BYTE) else CONTROL for kind in types]
        entries = [*map(_entry, written, scores, kinds)]
        self._user = {tokens[id_]: (id_, entries[id_]) for id_ in user}
        self._model = _model(entries)
        self._pieces = _load(self._model)
        self._quick: QuickEncoder | None = None
        self._before_quick: float = _WHEN_QUICK

    def __getstate__(self) -> tuple[object, ...]:
        return self._user, self._model, self._quick

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._user, self._model, self._quick = state
        self._before_quick = math.inf if self._quick else _WHEN_QUICK

    @cached_property
    def _pieces(self) -> SentencePieceProcessor:
        return _load(self._model)

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides which ids a text has."""
        return hashlib.sha256(self._model).hexdigest()

    def __call__(self, text: str) -> list[int]:
        """InputError where `text` holds half a surrogate pair, which is no character."""
        try:
            if SPACE in text:
                return self._divided(text)
            if self._quick and self._quick.covers(text):
                return self._quick.encode(text)
            self._count(text)
            ids: list[int] = self._pieces.encode(text)
            return ids
        except (RuntimeError, UnicodeEncodeError):
            half = next((char for char in text if "\ud800" <= char <= "\udfff"), None)
            if half is None:
                raise
            what = f"text holds half a surrogate pair (U+{ord(half):04X})"
            raise InputError(what, fix="Remove or repair that character.") from None

    def hasten(self) -> None:
        """Be quick from now on, which calling does by itself once there was much text."""
        from gemwright.text.quick import QuickEncoder  # 16 ms that a short text need not wait for

        self._before_quick = math.inf
        with suppress(ValueError):  # then it stays as it is
            self._quick = QuickEncoder(self._model, self._pieces, {text: id_ for text, (id_, _) in self._user.items()})

    def _count(self, text: str) -> None:
        self._before_quick -= len(text)
        if self._before_quick < 0:
            self.hasten()

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
        return re.compile("|".join(map(re.escape, sorted(self._user, key=len, reverse=True))) or r"(?!)")


def _load(model: bytes) -> SentencePieceProcessor:
    try:
        return SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        raise ValueError(str(error)) from error


def _model(entries: Sequence[bytes]) -> bytes:
    """A ModelProto of these pieces and one more for the unknown, which byte pieces leave nothing to do."""
    listed = [*entries, _entry("\ue000unknown", 0.0, UNKNOWN)]
    trainer = _number(3, _BPE) + _number(4, len(listed)) + _number(35, True)  # model_type, vocab_size, byte_fallback
    trainer += _number(40, len(entries))  # unk_id
    as_it_is = _number(3, False) + _number(4, False) + _number(5, True)  # dummy prefix, space removal, escaped spaces
    return b"".join(listed) + _field(2, trainer) + _field(3, _field(1, b"identity") + as_it_is)


def _entry(piece: str, score: float, kind: int) -> bytes:
    """A SentencePiece message inside a ModelProto; its last byte is `kind`."""
    text = piece.encode("utf-8")
    return _before(len(text)) + text + _AFTER.pack(0x15, score, 0x18, kind)


@cache
def _before(length: int) -> bytes:
    """What comes before a piece of `length` bytes in its message."""
    own = _varint(1 << 3 | 2) + _varint(length)
    return _varint(1 << 3 | 2) + _varint(len(own) + length + _AFTER.size) + own


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _SHORT[value]
    return bytes((value & 0x7F | 0x80,)) + _varint(value >> 7)


_AFTER: Final = struct.Struct("<BfBB")  # score and kind
_SHORT: Final = tuple(bytes((value,)) for value in range(0x80))
