"""`gemwright data preview`: examples of a person's data, token by token as a fine-tune will see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gemwright.data.read import iter_examples
from gemwright.errors import InputError
from gemwright.text.chat import Message, TrainOn, encode_example
from gemwright.text.preview import Token, coloured, legend, plain, tokens_of
from gemwright.text.tokenizer import Tokenizer
from gemwright.weights.model_file import open_model
from gemwright.weights.pull import resolve_model


@dataclass(frozen=True)
class Preview:
    """One example, counted from 1, and where it stands."""

    example: int
    where: str
    tokens: list[Token]

    @property
    def learned(self) -> int:
        """How many tokens are targets."""
        return sum(token.is_learned for token in self.tokens)

    def row(self, seq: int | None) -> dict[str, Any]:
        """As JSON; `texts` are as the vocabulary writes them, `fits` is None without `seq`."""
        return {
            "example": self.example,
            "where": self.where,
            "tokens": len(self.tokens),
            "learned": self.learned,
            "fits": None if seq is None else len(self.tokens) <= seq,
            "ids": [token.id for token in self.tokens],
            "texts": [token.text for token in self.tokens],
            "labelled": [token.is_learned for token in self.tokens],
        }

    def shown(self, seq: int | None, colour: bool) -> str:
        """For a person."""
        head = f"example {self.example} ({self.where}): {len(self.tokens)} tokens, {self.learned} of them learned"
        return f"{head}\n{(coloured if colour else plain)(self.tokens, seq)}\n"


def preview(data: Path, model: str, train_on: TrainOn, first: int, count: int) -> list[Preview]:
    """`count` examples of `data` from the `first` on, counted from 1. InputError where there are fewer than `first`."""
    tokenizer = Tokenizer.from_model(open_model(resolve_model(model)))
    made = []
    for number, example in enumerate(islice(iter_examples(data), first - 1, first - 1 + count), start=first):
        where = f"{example.path}:{example.line}"
        try:
            encoded = encode_example([Message(**turn) for turn in example.messages], tokenizer.encode, train_on)
        except InputError as error:
            raise InputError(error.what, where=where, fix=error.fix) from error
        made.append(Preview(number, where, tokens_of(tokenizer, *encoded)))
    if not made:
        raise InputError(f"has fewer than {first} examples", where=data, fix="Give a smaller --example.")
    return made


def shown(previews: Sequence[Preview], seq: int | None, colour: bool) -> str:
    """All of them, and what the marks mean."""
    return "\n".join([*(each.shown(seq, colour) for each in previews), legend(colour)])
