"""`gemwright data check`: reads a data set once, judges every row, and says what would be trained on and what not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemwright.data.codes import CODES, Finding
from gemwright.data.duplicates import MOST_SIGNATURES, Fingerprints, Pair
from gemwright.data.judge import OnProgress, Places, Verdict, judged, located, silent
from gemwright.data.read import NOT_TRAINED
from gemwright.data.records import DataFile
from gemwright.data.screen import screen
from gemwright.data.secrets import hidden
from gemwright.data.shapes import TRAINED, Entry, Format
from gemwright.data.shown import bold, counted, finding_lines, named
from gemwright.data.tally import Tally
from gemwright.errors import InputError
from gemwright.spec import START_OF_TURN
from gemwright.text.chat import Message, encode_example
from gemwright.text.scripts import lookalikes
from gemwright.text.tokenizer import Tokenizer

MOST_AT_ONCE = 10_000  # rows compared without a word about it
_SHOWN_TOKENS = 12
_SHOWN_WORDS = 3


@dataclass
class Lengths:
    """Tokens of all rows with a model's own tokenizer; with `seq`, rows longer than that and what would be cut."""

    tokenizer: Tokenizer
    model: str
    seq: int | None = None
    total: int = 0
    labelled: int = 0
    longest: int = 0
    longest_line: int = 0
    over_long: int = 0
    cut: int = 0

    def add(self, entry: Entry, line: int) -> str | None:
        """Count a row; what to say where it is too long."""
        ids, labelled = self._encoded(entry)
        if len(ids) > self.longest:
            self.longest, self.longest_line = len(ids), line
        if self.seq is not None and len(ids) > self.seq:
            self.over_long += 1
            self.cut += len(ids) - self.seq
            return self._cut(ids, self.seq, entry)
        self.total += len(ids)
        self.labelled += labelled
        return None

    def row(self) -> dict[str, Any]:
        """As one JSON object; `total` and `labelled` are of the rows that are not too long."""
        names = ("model", "total", "labelled", "longest", "longest_line", "seq", "over_long", "cut")
        return {name: getattr(self, name) for name in names}

    def _encoded(self, entry: Entry) -> tuple[list[int], int]:
        if entry.format in TRAINED:
            ids, learned = encode_example([Message(**turn) for turn in entry.trained], self.tokenizer.encode)
            return ids, sum(learned)
        ids = [id_ for _, _, text in entry.texts for id_ in self.tokenizer.encode(text)]
        return ids, 0

    def _cut(self, ids: list[int], seq: int, entry: Entry) -> str:
        what = f"{len(ids):,} tokens, {len(ids) - seq:,} more than {seq:,}"
        rest = " ".join(hidden(self.tokenizer.decode(ids[seq : seq + _SHOWN_TOKENS])).split())
        turn = ids[:seq].count(START_OF_TURN) + (bool(entry.messages) and entry.messages[0]["role"] == "system")
        place = f" in message {turn}" if entry.messages and entry.format in TRAINED else ""
        return f'{what}: the cut would be{place} before "{rest}..."'


def lengths_of(model: str, seq: int | None) -> Lengths:
    """Lengths by the tokenizer of a `--model`."""
    from gemwright.weights.model_file import open_model
    from gemwright.weights.pull import resolve_model

    return Lengths(Tokenizer.from_model(open_model(resolve_model(model))), model, seq)


@dataclass
class Checked:
    """What a check has found; `rows` says where each kept row lies, for duplicates found at the end."""

    files: list[DataFile]
    skipped: list[tuple[Path, str]]
    tally: Tally = field(default_factory=Tally)
    lengths: Lengths | None = None
    overlap: int | None = None
    first: dict[Format, Finding] = field(default_factory=dict)
    records: Counter[str] = field(default_factory=Counter)

    @property
    def is_trainable(self) -> bool:
        """Whether `gemwright tune` takes it as it is."""
        return self.tally.kept > 0 and not self.tally.has_errors

    def next(self, names: Sequence[Path], repaired: Path | None) -> tuple[object, ...]:
        """The verb and its words that go on from here."""
        from gemwright.train.config import TrainConfig

        errors = {code for code in self.tally.counts if CODES[code].severity == "error"}
        if self.tally.kept and errors <= {"D050"}:
            longest, model = (self.lengths.longest, self.lengths.model) if self.lengths else (0, "270m")
            seq = ("--seq", longest) if longest > TrainConfig.model_fields["seq"].default else ()
            return ("tune", repaired or names[0], "--model", model, "--out", "runs/mine", *seq)
        if self.tally.kept and errors <= set(self.tally.dropped_by):
            return ("data", "convert", *names, "kept.jsonl", "--drop-bad")
        return ("data", "check", *names)

    @property
    def format(self) -> str | None:
        """The one format of the usable rows, `mixed`, or None where there is none."""
        names = list(self.tally.formats)
        return None if not names else names[0] if len(names) == 1 else "mixed"

    def row(self) -> dict[str, Any]:
        """As one JSON object."""
        tally = self.tally
        return {
            "format": self.format,
            "formats": dict(tally.formats),
            "container": _one([file.container for file in self.files]),
            "compression": _one([file.compression for file in self.files]),
            "read": tally.read,
            "kept": tally.kept,
            "dropped": tally.dropped,
            "dropped_by_code": dict(sorted(tally.dropped_by.items())),
            "trainable": self.is_trainable,
            "findings": tally.findings(),
            "counts": dict(sorted(tally.counts.items())),
            "tokens": self.lengths.row() if self.lengths else {},
            "validation_overlap": self.overlap,
            "files": [_file_row(file, self.records[str(file.path)]) for file in self.files],
            "skipped": [{"path": str(path), "why": why} for path, why in self.skipped],
        }


def shown(checked: Checked, *, show: int, colour: bool) -> str:
    """One screen for a person: what was read, what was found, and whether it can be trained on."""
    tally, files = checked.tally, checked.files
    kinds = named([" ".join(filter(None, (file.container, file.compression))) for file in files])
    formats = named(list(tally.formats))
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    lines = [bold(named([str(file.path) for file in files[:3]]), colour) + more]
    lines += [f"format     {formats} ({kinds})", f"rows       {counted(tally)}"]
    if lengths := checked.lengths:
        line = f"{lengths.total:,}, {lengths.labelled:,} of them learned; the longest row has {lengths.longest:,}"
        lines.append(f"tokens     {line} (line {lengths.longest_line})")
        if lengths.over_long:
            lines.append(f"           {lengths.over_long:,} rows over {lengths.seq:,}, by {lengths.cut:,} tokens")
    if checked.overlap is not None:
        lines.append(f"validation {checked.overlap:,} of the rows stand there too")
    lines += [f"skipped    {path} ({why})" for path, why in checked.skipped]
    if tally.counts:
        lines += ["", *finding_lines(tally, show, colour, len(files))]
    verdict = "can be trained on" if checked.is_trainable else "cannot be trained on as it is"
    return "\n".join([*lines, "", bold(f"The data {verdict}.", colour)])


def _one(names: list[Any]) -> str | None:
    different = {name for name in names if name is not None}
    return None if not different else different.pop() if len(different) == 1 else "mixed"


def _file_row(file: DataFile, rows: int) -> dict[str, Any]:
    return {"path": str(file.path), "container": file.container, "compression": file.compression, "read": rows}


def check(
    names: Sequence[Path],
    *,
    validation: Path | None = None,
    lengths: Lengths | None = None,
    report: Callable[[str], None] = lambda line: None,
    on_progress: OnProgress = silent,
) -> Checked:
    """Judge all rows of `names`; with `validation` find those that stand there too, with `lengths` count tokens.

    Never holds a file in memory: some 300 bytes stay of each row. InputError where `validation` has no usable row.
    """
    found = located(names, report)
    checked = Checked([DataFile(path) for path in found.files], list(found.skipped), lengths=lengths)
    seen, places = Fingerprints(), Places()
    for verdict in judged(checked.files, on_progress):
        if entry := _taken(verdict, checked):
            seen.add(entry)
            places.add(verdict)
    if len(seen) > MOST_AT_ONCE:
        on_progress(1.0, "comparing rows")
    _repeats(seen, places, checked.tally)
    if validation is not None:
        _overlap(seen, places, validation, checked, report)
    _whole(checked, names)
    return checked


def _taken(verdict: Verdict, checked: Checked) -> Entry | None:
    """Count one verdict with all that is found in its row; the row if it is kept."""
    tally, file, line = checked.tally, str(verdict.file.path), verdict.line
    checked.records[file] += verdict.is_row
    if verdict.entry is None:
        if verdict.fault:
            tally.note(verdict.fault)
            if verdict.is_row:
                tally.drop(verdict.fault.code)
        return None
    entry = verdict.entry
    if checked.lengths and (too_long := checked.lengths.add(entry, line)):
        tally.note(Finding("D050", line, too_long, file))
        tally.drop("D050")
        return None
    for finding in (*screen(entry, line, file), *_lookalikes(entry, line, file)):
        tally.note(finding)
    if entry.format not in checked.first:
        checked.first[entry.format] = Finding("D007", line, entry.format, file)
    tally.keep(entry.format)
    return entry


def _lookalikes(entry: Entry, line: int, file: str) -> Iterator[Finding]:
    if next(lookalikes(entry.whole), None) is None:
        return
    for name, _, text in entry.texts:
        words = list(lookalikes(text))
        if words:
            shown = "; ".join(f'"{w.word}" with {w.odd}, meant as "{w.repaired}"' for w in words[:_SHOWN_WORDS])
            more = f" and {len(words) - _SHOWN_WORDS} more" if len(words) > _SHOWN_WORDS else ""
            yield Finding("D060", line, f"{name}: {shown}{more}", file)


def _repeats(seen: Fingerprints, places: Places, tally: Tally) -> None:
    exact, near = seen.pairs()
    for code, how, pairs in (("D040", "repeats", exact), ("D041", "nearly repeats", near)):
        for pair in pairs:
            file, _, line = places[pair.at]
            tally.note(Finding(code, line, f"{how} {places.said(pair.of, file)}{_share(pair)}", file))
    if seen.is_partial:
        what = f"near duplicates were looked for among the first {MOST_SIGNATURES:,} rows only"
        tally.note(Finding("D043", 0, what))


def _share(pair: Pair) -> str:
    return f" ({pair.share:.0%} of it alike)" if pair.share < 1 else ""


def _overlap(
    seen: Fingerprints, places: Places, validation: Path, checked: Checked, report: Callable[[str], None]
) -> None:
    theirs, their_places = Fingerprints(), Places()
    files = [DataFile(path) for path in located([validation], report).files]
    faults = 0
    for verdict in judged(files):
        if verdict.entry:
            theirs.add(verdict.entry)
            their_places.add(verdict)
        faults += verdict.fault is not None
    if faults:
        report(f"{validation}: {faults:,} faults in the validation data; check it by itself too")
    if not len(theirs):
        raise InputError("no usable row in the validation data", where=validation, fix="Check it by itself first.")
    pairs = seen.pairs_with(theirs)
    checked.overlap = len(pairs)
    for pair in pairs:
        file, _, line = places[pair.at]
        checked.tally.note(Finding("D042", line, f"is {their_places.said(pair.of)}{_share(pair)}", file))


def _whole(checked: Checked, names: Sequence[Path]) -> None:
    """What can be said of the whole only: nothing in it, marks, formats mixed or not trained on."""
    tally = checked.tally
    for file in checked.files:
        if file.has_bom:
            tally.note(Finding("D005", 1, "begins with a byte order mark, which is stepped over", str(file.path)))
    if not tally.read and not tally.has_errors:
        tally.note(Finding("D001", 0, "no rows in it", ", ".join(map(str, names))))
    if count := tally.formats["preference"]:
        first = checked.first["preference"]
        tally.note(Finding("D006", first.line, f"{count:,} of {tally.kept:,} rows are {NOT_TRAINED}", first.file))
    for name, first in list(checked.first.items())[1:]:
        count = tally.formats[name]
        what = f"{first.message} where the rows before are {next(iter(checked.first))}; {count:,} in all"
        tally.note(Finding("D007", first.line, what, first.file))
