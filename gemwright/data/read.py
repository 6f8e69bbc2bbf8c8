"""Reads training data of any known format and container as examples, every fault named with its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gemwright.data.codes import DataFault
from gemwright.data.locate import locate
from gemwright.data.records import WRITE_ROWS, DataFile
from gemwright.data.shapes import TRAINED, ChatMessage, entry_of
from gemwright.report import say

__all__ = ["ChatMessage", "Example", "examples_in", "iter_examples", "read_examples"]

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
    yield from examples_in(locate(path, say).files, path)


def examples_in(files: Sequence[Path], name: Path) -> Iterator[Example]:
    """As `iter_examples`, of the `files` that the data `name` means."""
    found = False
    for file in files:
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
        raise DataFault("D001", "no examples in it", where=name, fix=WRITE_ROWS)
