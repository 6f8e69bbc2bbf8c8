"""The demo's data set: dates, amounts, numbers and names in 38 languages, and how an answer is judged."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Literal

from gemwright.data.read import Example, read_examples

Split = Literal["train", "test"]


def split_path(name: Split) -> Path:
    """The JSONL file of a split; `scripts/make_cldr.py` writes it."""
    return Path(__file__).parent / "cldr" / f"{name}.jsonl"


def load_split(name: Split) -> list[Example]:
    """All examples of a split, each one question and one answer."""
    return read_examples(split_path(name))


def exact_match(answer: str, expected: str) -> bool:
    """Whether both are the same text; composed or not, and with any white space (no-break too) as one space."""
    return _normal(answer) == _normal(expected)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
