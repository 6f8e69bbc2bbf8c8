"""`gemwright data convert`: any known format and container to canonical rows; nothing is left out unless asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemwright.data.codes import Finding
from gemwright.data.duplicates import Fingerprints
from gemwright.data.judge import OnProgress, judged, located, silent
from gemwright.data.records import DataFile
from gemwright.data.tally import Tally
from gemwright.data.write import Cancelled, check_out, writer
from gemwright.text.scripts import repaired


@dataclass
class Converted:
    """What was read and written; `is_written` is False where rows were unusable and none were to be dropped."""

    out: Path
    tally: Tally = field(default_factory=Tally)
    repaired: int = 0
    is_written: bool = False

    def row(self) -> dict[str, Any]:
        """As one JSON object."""
        tally = self.tally
        return {
            "out": str(self.out) if self.is_written else None,
            "formats": dict(tally.formats),
            "read": tally.read,
            "kept": tally.kept,
            "dropped": tally.dropped,
            "dropped_by_code": dict(sorted(tally.dropped_by.items())),
            "repaired": self.repaired,
            "findings": tally.findings(),
        }


def convert(
    names: Sequence[Path],
    out: Path,
    *,
    drop_bad: bool = False,
    drop_duplicates: bool = False,
    repair: bool = False,
    report: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = silent,
) -> Converted:
    """Write the rows of `names` to `out`; unusable ones are dropped with `drop_bad`, else nothing is written.

    A file that cannot be read to its end is never converted: how much of it is lost is not known. `drop_duplicates`
    leaves out later rows that repeat an earlier one, exactly or nearly; `repair` writes look-alikes as they were meant.
    """
    check_out(out)
    done = Converted(out)
    files = located(names, report).files
    repeats = _repeats(files) if drop_duplicates else {}
    usable, is_broken = -1, False
    with writer(out) as write:
        for verdict in judged([DataFile(path) for path in files], on_progress):
            entry = verdict.entry
            if entry is None:
                if verdict.fault:
                    done.tally.note(verdict.fault)
                    is_broken |= not verdict.is_row
                    if verdict.is_row:
                        done.tally.drop(verdict.fault.code)
                continue
            usable += 1
            if code := repeats.get(usable):
                done.tally.drop(code)
                continue
            if repair:
                mended = entry.mapped(repaired)
                done.repaired += mended != entry
                entry = mended
            done.tally.keep(entry.format)
            write(entry.row())
        if not done.tally.read and not done.tally.has_errors:
            done.tally.note(Finding("D001", 0, "no rows in it", ", ".join(map(str, names))))
        if is_broken or not done.tally.kept or (done.tally.has_errors and not drop_bad):
            raise Cancelled
        done.is_written = True
    return done


def _repeats(files: Sequence[Path]) -> dict[int, str]:
    """Number of each usable row that repeats an earlier one -> the code it is dropped under."""
    seen = Fingerprints()
    for verdict in judged([DataFile(path) for path in files]):
        if verdict.entry:
            seen.add(verdict.entry)
    exact, near = seen.pairs()
    return {pair.at: "D041" for pair in near} | {pair.at: "D040" for pair in exact}
