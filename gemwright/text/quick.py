"""SentencePiece's ids by kitoken, twice as fast or more; for much text, since its tables take two seconds to make.

kitoken merges by the same rule, with two differences. A word that is a piece is taken for that piece, though merging
may never arrive there (" yyyy": " y" comes first), and nothing is merged across a space. Which pieces that concerns is
found by having it merge each of them; text that holds one is not for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Final

from kitoken import Kitoken
from sentencepiece import SentencePieceProcessor

from gemwright.text.pieces import SPACE

_APART: Final = "\0"  # in no piece: SentencePiece refuses such a vocabulary
_MOST_LEFT_OUT: Final = 32  # each is looked for in every text
_MERGED_AT_ONCE: Final = 32


class QuickEncoder:
    """`encode(text)` of a text that it `covers` gives the ids that SentencePiece gives."""

    def __init__(self, model: bytes, pieces: SentencePieceProcessor, user: Mapping[str, int]) -> None:
        """`model` as in `pieces`; `user`: the user-defined ones' ids. ValueError where some ids would be others."""
        defined = {*user.values()}
        every = [*range(len(pieces))]
        others = (kind(every) for kind in (pieces.is_control, pieces.is_byte, pieces.is_unknown))
        ids = [id_ for id_, *other in zip(every, *others, strict=True) if id_ not in defined and not any(other)]
        texts = [piece.replace(SPACE, " ") for piece in pieces.id_to_piece(ids)]
        scores = [score for text, score in zip(texts, pieces.get_score(ids), strict=True) if len(text) > 1]
        if len({*scores}) < len(scores):
            raise ValueError("pieces with the same score")
        if not {*"".join(texts)} <= {*texts}:
            raise ValueError("pieces with characters that are none")
        self._kitoken = Kitoken.from_sentencepiece(model)
        if any(self.encode(text) != [id_] for text, id_ in user.items()):
            raise ValueError("user-defined pieces are not matched longest first")
        self._left_out = self._not_merged(ids, texts)
        if len(self._left_out) > _MOST_LEFT_OUT:
            raise ValueError(f"{len(self._left_out)} pieces would be left out")

    def __getstate__(self) -> tuple[bytes, list[str]]:
        return self._kitoken.to_bytes(), self._left_out

    def __setstate__(self, state: tuple[bytes, list[str]]) -> None:
        self._kitoken, self._left_out = Kitoken(state[0]), state[1]

    def covers(self, text: str) -> bool:
        """Whether it may encode `text`, which must not hold SPACE either."""
        return not any(map(text.__contains__, self._left_out))

    def encode(self, text: str) -> list[int]:
        """UnicodeEncodeError where `text` holds half a surrogate pair."""
        return self._kitoken.encode(text)

    def _not_merged(self, ids: list[int], texts: list[str]) -> list[str]:
        apart, missing = self.encode(_APART), []
        each = iter(zip(ids, texts, strict=True))
        while some := [*islice(each, _MERGED_AT_ONCE)]:
            if self.encode("".join(text + _APART for _, text in some)) != [i for id_, _ in some for i in (id_, *apart)]:
                missing += [text for id_, text in some if self.encode(text + _APART) != [id_, *apart]]
        return missing
