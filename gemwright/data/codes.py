"""The stable codes of what can be wrong with a person's data, and how grave each is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from gemwright.errors import InputError

Severity = Literal["error", "warning", "note"]

CODES: Final[Mapping[str, tuple[Severity, str]]] = MappingProxyType(
    {
        "D001": ("error", "nothing in it"),
        "D002": ("error", "file damaged or cut short"),
        "D003": ("error", "no known kind of file"),
        "D004": ("error", "not UTF-8: UTF-16 or UTF-32"),
        "D005": ("note", "byte order mark"),
        "D006": ("error", "known, but not trained on yet"),
        "D007": ("warning", "formats mixed"),
        "D010": ("error", "not UTF-8"),
        "D011": ("error", "not JSON"),
        "D012": ("error", "JSON cut short"),
        "D013": ("error", "too long a row"),
        "D014": ("error", "row has another number of fields than its header"),
        "D015": ("error", "not an object"),
        "D016": ("error", "no known format"),
        "D017": ("error", "field missing or no text"),
        "D020": ("error", "empty turn"),
        "D021": ("error", "unknown role"),
        "D022": ("error", "roles out of order"),
        "D023": ("error", "no model turn"),
        "D024": ("note", "last turn is not learned"),
        "D025": ("error", "chosen and rejected are the same"),
        "D030": ("error", "NUL"),
        "D031": ("error", "half a surrogate pair"),
        "D032": ("warning", "replacement character"),
        "D033": ("warning", "control character"),
        "D034": ("note", "control token written as text"),
        "D035": ("warning", "image marker in text"),
        "D040": ("warning", "duplicate"),
        "D041": ("warning", "near duplicate"),
        "D042": ("warning", "also in the validation data"),
        "D043": ("note", "near duplicates looked for in a part only"),
        "D050": ("error", "longer than --seq"),
        "D060": ("warning", "look-alike letters of another script"),
        "D070": ("warning", "looks like a secret"),
    }
)


class DataFault(InputError):
    """What makes a row, or all of a file, unusable; `code` is a key of CODES whose severity is error."""

    def __init__(self, code: str, what: str, *, where: object, fix: str) -> None:
        super().__init__(what, where=where, fix=fix)
        self.code = code


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
        return CODES[self.code][0]
