"""The stable codes of what can be wrong with a person's data, and how grave each is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from gemwright.errors import InputError

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Code:
    """What a code means: its severity, its name, and what to do about it."""

    severity: Severity
    title: str
    advice: str


CODES: Final[Mapping[str, Code]] = MappingProxyType(
    {
        "D001": Code("error", "nothing in it", "Give a file with rows, or a folder with data files."),
        "D002": Code("error", "file missing, damaged or cut short", "Check the path, or make the file anew."),
        "D003": Code("error", "no known kind of file", "Give JSONL, JSON, CSV, TSV, Parquet, Arrow or .txt."),
        "D004": Code("error", "UTF-16 or UTF-32", "Save it as UTF-8."),
        "D005": Code("note", "byte order mark", "Nothing to do: it is stepped over."),
        "D006": Code(
            "error", "not trained on yet", "It can be checked and converted; 'tune' takes conversations and text."
        ),
        "D007": Code("warning", "formats mixed", "Nothing to do where it is meant; 'data convert' makes them one."),
        "D010": Code("error", "not UTF-8", "Save the file as UTF-8."),
        "D011": Code("error", "not JSON, or not CSV", "Mend the row, or remove it."),
        "D012": Code("error", "JSON cut short", "The file is incomplete: make it anew, or remove its end."),
        "D013": Code("error", "row too long", "Split it: a row may have 32 MiB."),
        "D014": Code("error", "fields do not match the header", "Put text with delimiters or line ends in quotes."),
        "D015": Code("error", "not an object", "Write one JSON object a row."),
        "D016": Code("error", "no known format", "Rename its keys; docs/data.md lists the formats."),
        "D017": Code("error", "field missing or no text", "Write it as a string, or remove the row."),
        "D020": Code("error", "empty turn", "Write its text, or remove the row."),
        "D021": Code("error", "unknown role", "Use system, user and assistant (or model)."),
        "D022": Code("error", "roles out of order", "Alternate user and assistant, a system message only first."),
        "D023": Code("error", "no model turn", 'Add the answer, with role "assistant".'),
        "D024": Code("note", "last turn is not learned", "Nothing to do, or add the answer to it."),
        "D025": Code("error", "chosen and rejected are the same", "Remove the row."),
        "D030": Code("error", "NUL", "Remove it: many programs end a text there."),
        "D031": Code("error", "half a surrogate pair", "Repair or remove that character."),
        "D032": Code("warning", "replacement character", "Decode the source anew: a character was lost there."),
        "D033": Code("warning", "control character", "Remove it unless the model is to write it."),
        "D034": Code("note", "control token in text", "Nothing to do: it is encoded as text, never as control."),
        "D035": Code("warning", "image marker in text", "Write it otherwise: the vocabulary takes it for an image."),
        "D040": Code(
            "warning", "duplicate", "Remove it ('data convert --drop-duplicates') unless it is to weigh twice."
        ),
        "D041": Code("warning", "near duplicate", "Look at some; 'data convert --drop-duplicates' removes them."),
        "D042": Code("warning", "in the validation data too", "Remove it from one: the validation loss would flatter."),
        "D043": Code("note", "likeness looked for in a part", "Check the file in parts for the rest."),
        "D050": Code("error", "longer than --seq", "Use a longer --seq, or split the conversation."),
        "D060": Code("warning", "look-alike letters", "Write a repaired copy with --repair OUT."),
        "D070": Code("warning", "looks like a secret", "Remove it, and revoke it: a model can repeat what it learned."),
    }
)


class DataFault(InputError):
    """What makes a row, or the rest of a file from `line` on, unusable; `code` is one of CODES, of severity error."""

    def __init__(self, code: str, what: str, *, where: object, fix: str, line: int = 0) -> None:
        super().__init__(what, where=where, fix=fix)
        self.code, self.line = code, line


@dataclass(frozen=True)
class Finding:
    """One thing found: at `line` (or row, both from 1; 0 where it is the whole file) of `file`."""

    code: str
    line: int
    message: str
    file: str = ""

    @property
    def severity(self) -> Severity:
        """How grave the code is."""
        return CODES[self.code].severity
