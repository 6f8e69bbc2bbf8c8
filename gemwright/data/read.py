"""Reads training data of any known format and container as examples, every fault named with its line."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gemwright.data.codes import DataFault
from gemwright.data.locate import locate
from gemwright.data.records import WRITE_ROWS, DataFile
from gemwright.data.shapes import TRAINED, ChatMessage, entry_of
from gemwright.errors import InputError
from gemwright.report import say

__all__ = ["ChatMessage", "Example", "iter_examples", "read_examples", "split_examples"]

NOT_TRAINED: Final = "pairs of a chosen and a rejected answer, which 'gemwright tune' does not train on yet"


@dataclass(frozen=True)
class Example:
    """One conversation (or plain text, as `Entry.trained` has it), the line (or row) it came from, and the file."""

    messages: tuple[ChatMessage, ...]
    line: int
    path: Path | None = field(default=None, compare=False)


def read_examples(path: Path) -> list[Example]:
    """All examples of a file, a folder or a data set of the Hugging Face Hub, in order; see `iter_examples`."""
    return list(iter_examples(path))


def iter_examples(path: Path) -> Iterator[Example]:
    """Examples one by one, never a whole file in memory; blank lines are skipped, a byte order mark is accepted.

    Formats and containers: docs/data.md. InputError (with the line) where the file or a row cannot be trained on.
    """
    found = False
    for file in locate(path, say).files:
        for record in DataFile(file).records():
            where = f"{file}, {record.unit} {record.line}"
            if record.fault:
                raise record.fault
            entry = entry_of(record.value, where)
            if entry.format not in TRAINED:
                raise DataFault("D006", NOT_TRAINED, where=where, fix="Give conversations or text.")
            found = True
            yield Example(entry.trained, record.line, file)
    if not found:
        raise DataFault("D001", "no examples in it", where=path, fix=WRITE_ROWS)


def split_examples(examples: Sequence[Example], held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held out) in the file's order; the same seed always holds out the same examples."""
    if not 0 <= held_out < len(examples):
        raise InputError(f"cannot hold out {held_out} of {len(examples)} examples", fix="Hold out fewer.")
    chosen = set(random.Random(seed).sample(range(len(examples)), held_out))
    kept = [example for index, example in enumerate(examples) if index not in chosen]
    return kept, [examples[index] for index in sorted(chosen)]
