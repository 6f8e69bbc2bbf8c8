"""All files of a data set as a stream of verdicts: a usable entry, or the fault that makes a row unusable."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gemwright.data.codes import DataFault, Finding
from gemwright.data.locate import Located, locate
from gemwright.data.records import DataFile
from gemwright.data.shapes import Entry, entry_of

OnProgress = Callable[[float, str], None]


def silent(fraction: float, text: str) -> None:
    """The progress that nobody watches."""


class Verdict(NamedTuple):
    """`entry` of a usable row, else the `fault`; a fault with `is_row` False ends its file and belongs to no row."""

    file: DataFile
    line: int
    unit: str
    entry: Entry | None
    fault: Finding | None = None
    is_row: bool = True


def located(names: Sequence[Path], report: Callable[[str], None]) -> Located:
    """The files of several names, in order."""
    found = [locate(name, report) for name in names]
    return Located(tuple(f for each in found for f in each.files), tuple(s for each in found for s in each.skipped))


def judged(files: Sequence[DataFile], on_progress: OnProgress = silent) -> Iterator[Verdict]:
    """A verdict for each row of each file, and one more where a file cannot be read to its end.

    `on_progress` hears every thousandth row how far (0 to 1) the bytes of all files are read.
    """
    sizes = [file.path.stat().st_size if file.path.is_file() else 0 for file in files]
    for number, verdict in enumerate(_verdicts(files)):
        if number % 1000 == 999:
            done = sum(sizes[: files.index(verdict.file)]) + verdict.file.read_bytes
            on_progress(min(0.99, done / max(1, sum(sizes))), f"{number:,} rows")
        yield verdict


def _verdicts(files: Sequence[DataFile]) -> Iterator[Verdict]:
    for file in files:
        name = str(file.path)
        try:
            for record in file.records():
                try:
                    if record.fault:
                        raise record.fault
                    entry = entry_of(record.value, name)
                except DataFault as fault:
                    found = Finding(fault.code, record.line, fault.what, name)
                    yield Verdict(file, record.line, record.unit, None, found)
                else:
                    yield Verdict(file, record.line, record.unit, entry)
        except DataFault as fault:
            yield Verdict(file, fault.line, "line", None, Finding(fault.code, fault.line, fault.what, name), False)


class Places:
    """Where each kept row lies, by its number: 12 bytes a row."""

    def __init__(self) -> None:
        self._lines, self._files = array("q"), array("l")
        self._names: list[tuple[str, str]] = []

    def add(self, verdict: Verdict) -> None:
        """The next row."""
        name = (str(verdict.file.path), verdict.unit)
        if not self._names or self._names[-1] != name:
            self._names.append(name)
        self._lines.append(verdict.line)
        self._files.append(len(self._names) - 1)

    def __getitem__(self, index: int) -> tuple[str, str, int]:
        """(file, unit, line or row) of a row by its number from 0."""
        return (*self._names[self._files[index]], self._lines[index])

    def said(self, index: int, beside: str = "") -> str:
        """The place in words, the file only where it is another than `beside`."""
        file, unit, line = self[index]
        return f"{unit} {line}" if file == beside else f"{unit} {line} of {file}"
