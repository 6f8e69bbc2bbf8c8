"""Findings as a person reads them: by code, the gravest first, each with its count, advice and first examples."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Final

from gemwright.data.codes import CODES, Finding
from gemwright.data.tally import Tally

_RED, _YELLOW, _CYAN, _DIM, _BOLD, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[36m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
_SHADE: Final = {"error": _RED, "warning": _YELLOW, "note": _CYAN}
_WIDTH: Final = 100


def bold(text: str, colour: bool) -> str:
    """`text` in bold where there is colour."""
    return f"{_BOLD}{text}{_PLAIN}" if colour else text


def finding_lines(tally: Tally, show: int, colour: bool, files: int) -> list[str]:
    """All codes with up to `show` examples each; files are named where there are several."""
    lines: list[str] = []
    for code, count, found in tally.by_code():
        severity, title, advice = CODES[code].severity, CODES[code].title, CODES[code].advice
        shade, dim, plain = (_SHADE[severity], _DIM, _PLAIN) if colour else ("", "", "")
        lines.append(f"{shade}{severity:<8}{plain}{code}  {bold(title, colour)} ({count:,}). {dim}{advice}{plain}")
        for finding in found[:show]:
            wrapped = textwrap.wrap(_example(finding, files), _WIDTH)
            lines += [f"{' ' * 14}{line}" if at == 0 else f"{' ' * 16}{line}" for at, line in enumerate(wrapped)]
        if count > show > 0:
            lines.append(f"{' ' * 14}and {count - show:,} more")
    return lines


def _example(finding: Finding, files: int) -> str:
    place = f"line {finding.line}: " if finding.line else ""
    file = f"{finding.file}, " if files > 1 and finding.file else ""
    return f"{file if place else file.replace(', ', ': ')}{place}{finding.message}"


def counted(tally: Tally) -> str:
    """Read, kept and dropped in one line, the dropped by their codes."""
    by_code = ", ".join(f"{code} {count:,}" for code, count in sorted(tally.dropped_by.items()))
    dropped = f"{tally.dropped:,} dropped ({by_code})" if by_code else "none dropped"
    return f"{tally.read:,} read, {tally.kept:,} kept, {dropped}"


def named(names: Sequence[str | None]) -> str:
    """Different names in their order, as one phrase."""
    return ", ".join(dict.fromkeys(name for name in names if name)) or "unknown"
