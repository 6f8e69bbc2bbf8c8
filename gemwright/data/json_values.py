"""A JSON array (or values one after another), parsed value by value over a growing window, never whole in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gemwright.data.codes import DataFault
from gemwright.data.records import ESCAPED_BYTE, LONGEST_BYTES, Record
from gemwright.errors import needed

_BLOCK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_NEAR_END = 16  # characters: an error so near the window's end may be its end's fault
_FIX = "Mend it, or write one JSON object on each line (JSONL)."


class _Window:
    """The part of the text that is being parsed; `at` is where, `lines` how many lines were left behind."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path, self._stream = path, stream
        # Bytes that are no UTF-8 come through as half surrogates, so that the fault can be laid on their row.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.text, self.at, self.ended, self._lines = "", 0, False, 1

    def grow(self) -> None:
        """Drop what was parsed and read as much again as is left."""
        self._lines += self.text.count("\n", 0, self.at)
        block = self._stream.read(max(_BLOCK_BYTES, len(self.text) - self.at))
        self.ended = not block
        self.text, self.at = self.text[self.at :] + self._decode(block, final=self.ended), 0

    def sign(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = needed(_SPACE.match(self.text, self.at)).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.grow()

    def fault(self, code: str, what: str, position: int) -> DataFault:
        """A fault at `position` of the window, named by the file's line."""
        line = self._lines + self.text.count("\n", 0, position)
        return DataFault(code, what, where=f"{self._path}, line {line}", fix=_FIX, line=line)


def json_values(path: Path, stream: BinaryIO) -> Iterator[Record]:
    """Rows of a JSON array or of values in sequence. DataFault where the text stops being JSON: no row follows that."""
    window = _Window(path, stream)
    is_array = window.sign() == "["
    window.at += is_array
    number = 0
    while (sign := window.sign()) not in ("", "]") or (number == 0 and sign == ""):
        if sign == "" and not is_array:
            return
        number += 1
        yield _value(window, number, path)
        sign = window.sign()
        if is_array and sign not in (",", "]"):
            code, what = ("D011", f"not JSON: ',' or ']' expected after row {number}")
            if sign == "":
                code, what = "D012", f"JSON cut short: the list does not end after row {number}"
            raise window.fault(code, what, window.at)
        if sign == ",":
            window.at += 1
            if window.sign() == "]":
                raise window.fault("D011", f"not JSON: a comma after the last row ({number})", window.at)
    _end(window, is_array)


def _end(window: _Window, is_array: bool) -> None:
    if is_array and window.sign() != "]":
        raise window.fault("D012", "JSON cut short: the list does not end", window.at)
    window.at += is_array
    if window.sign():
        raise window.fault("D011", "not JSON: something follows its end", window.at)


def _value(window: _Window, number: int, path: Path) -> Record:
    scan = json.JSONDecoder().raw_decode
    while True:
        try:
            value, end = scan(window.text, window.at)
            if end < len(window.text) or window.ended:
                break
        except json.JSONDecodeError as error:
            open_string = error.msg.startswith("Unterminated")
            if window.ended or (error.pos <= len(window.text) - _NEAR_END and not open_string):
                what = f"not JSON: {error.msg.removesuffix(' at')} in row {number}"
                if open_string or error.pos >= len(window.text.rstrip()):
                    raise window.fault("D012", f"{what}, where the file ends", error.pos) from None
                raise window.fault("D011", what, error.pos) from None
        except (RecursionError, ValueError):
            raise window.fault("D011", f"JSON too deep or a number too long in row {number}", window.at) from None
        if len(window.text) - window.at > LONGEST_BYTES:
            what = f"row {number} has more than {LONGEST_BYTES >> 20} MiB"
            raise window.fault("D013", what, window.at)
        window.grow()
    text, window.at = window.text[window.at : end], end
    if not text.isascii() and ESCAPED_BYTE.search(text):
        fault = DataFault("D010", "not UTF-8", where=f"{path}, row {number}", fix="Save the file as UTF-8.")
        return Record(number, "row", None, fault)
    return Record(number, "row", value)
