"""Rows and findings counted while they stream by: every row is kept or dropped, and each dropped one has a code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from gemwright.data.codes import CODES, Finding
from gemwright.data.shapes import Format

MOST_KEPT: Final = 100
_GRAVE: Final = {"error": 0, "warning": 1, "note": 2}


class Tally:
    """`read` = `kept` + `dropped` at every moment; findings are counted, and the first hundred of each code kept."""

    def __init__(self) -> None:
        self.kept = 0
        self.dropped_by: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.formats: Counter[Format] = Counter()
        self._found: dict[str, list[Finding]] = {}

    @property
    def dropped(self) -> int:
        """Rows that cannot be used."""
        return self.dropped_by.total()

    @property
    def read(self) -> int:
        """Rows that were there."""
        return self.kept + self.dropped

    @property
    def has_errors(self) -> bool:
        """Whether anything found has the severity error."""
        return any(CODES[code].severity == "error" for code in self.counts)

    def keep(self, format_: Format) -> None:
        """Count a usable row."""
        self.kept += 1
        self.formats[format_] += 1

    def drop(self, code: str) -> None:
        """Count a row that is left out, under the one code that decided it."""
        self.dropped_by[code] += 1

    def note(self, finding: Finding) -> None:
        """Count a finding, and keep it if it is among the first of its code."""
        self.counts[finding.code] += 1
        found = self._found.setdefault(finding.code, [])
        if len(found) < MOST_KEPT:
            found.append(finding)

    def by_code(self) -> Iterator[tuple[str, int, list[Finding]]]:
        """(code, how many, the first of them), the gravest first."""
        for code in sorted(self.counts, key=lambda code: (_GRAVE[CODES[code].severity], code)):
            yield code, self.counts[code], self._found[code]

    def findings(self) -> list[dict[str, Any]]:
        """The kept findings as JSON objects."""
        return [
            {"code": code, "line": f.line, "message": f.message, "severity": f.severity, "file": f.file}
            for code, _, found in self.by_code()
            for f in found
        ]
