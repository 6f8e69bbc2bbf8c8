"""One data file as a stream of parsed rows: compression and container told by content, faults kept with their rows."""

from __future__ import annotations

import gzip
import io
import json
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, NamedTuple, cast

from gemwright.data.codes import DataFault

Container = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "arrow-stream", "text"]

LONGEST_BYTES: Final = 32 << 20
SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt")
COMPRESSED: Final = (".gz", ".zst")
WRITE_ROWS: Final = 'Write {"messages": [...]} or {"prompt": "...", "completion": "..."} on each line.'
# The keys of a row that some format knows (shapes.py).
KEYS: Final = (
    *("messages", "conversations", "system", "prompt", "completion", "chosen", "rejected"),
    *("instruction", "input", "output", "text", "goes_on"),
)
_KINDS: Final = "Give JSONL, JSON, CSV, TSV, Parquet, Arrow or .txt, plain or as .gz or .zst."
# What `surrogateescape` makes of bytes that are no UTF-8.
ESCAPED_BYTE: Final = re.compile("[\udc80-\udcff]")
# A list of objects, or an object over several lines: JSON in a file that is named JSONL.
_SPREAD: Final = re.compile(rb"\[\s*\{|\{[ \t\r]*\n\s*[\"}]")
_HEAD_BYTES = 64 << 10
_BLOCK_BYTES = 1 << 20
_FOREIGN: Final = (
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet"),
    (b"BZh", "compressed with bzip2"),
    (b"\xfd7zXZ", "compressed with xz"),
    (b"GGUF", "a model file"),
    (b"%PDF", "a PDF"),
    (b"FEA1", "Feather version 1"),
    (b"SQLite format 3", "an SQLite database"),
)


class Record(NamedTuple):
    """A row: `line` counts lines (or rows, as `unit` says) from 1; `fault` where it could not be parsed."""

    line: int
    unit: Literal["line", "row"]
    value: Any
    fault: DataFault | None = None


def bare_suffix(path: Path) -> str:
    """The suffix below a compression's, in lower case: .jsonl of chats.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


class DataFile:
    """One file to read; `container`, `compression` and `has_bom` are known once the first record was asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.container: Container | None = None
        self.compression: Literal["gzip", "zstd"] | None = None
        self.has_bom = False
        self._raw: BinaryIO | None = None

    @property
    def read_bytes(self) -> int:
        """How far the file on disk has been read."""
        return self._raw.tell() if self._raw is not None and not self._raw.closed else 0

    def records(self) -> Iterator[Record]:
        """Rows in the file's order, blank lines skipped. DataFault (D001 to D004) where no further row can be read."""
        try:
            with ExitStack() as stack:
                self._raw = stack.enter_context(self.path.open("rb"))
                yield from self._parsed(self._unpacked(stack), stack)
        except FileNotFoundError:
            raise DataFault("D002", "no such file", where=self.path, fix="Check the path of the data.") from None
        except (EOFError, zlib.error) as error:
            raise self.damaged(str(error)) from None
        except OSError as error:
            if self.compression and self._raw is not None:
                raise self.damaged(error.strerror or str(error)) from None
            reason = "is a folder" if self.path.is_dir() else f"cannot be read: {error.strerror or error}"
            raise DataFault("D002", reason, where=self.path, fix="Check the path and its permissions.") from error

    def damaged(self, why: str) -> DataFault:
        """The fault of a file that cannot be read to its end."""
        kind = " ".join(filter(None, (self.compression, self.container))) or "file"
        reason = " ".join(why.split()).rstrip(".")[:200]
        return DataFault("D002", f"{kind} damaged or cut short ({reason})", where=self.path, fix="Make the file anew.")

    def _unpacked(self, stack: ExitStack) -> io.BufferedIOBase:
        raw = cast("io.BufferedReader", self._raw)
        magic = raw.read(4)
        raw.seek(0)
        if magic.startswith(b"\x1f\x8b"):
            self.compression = "gzip"
            return stack.enter_context(gzip.GzipFile(fileobj=raw, mode="rb"))
        if magic == b"\x28\xb5\x2f\xfd":
            import pyarrow as pa

            self.compression = "zstd"
            unpacked = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
            return stack.enter_context(io.BufferedReader(unpacked, _BLOCK_BYTES))
        return raw

    def _parsed(self, stream: io.BufferedIOBase, stack: ExitStack) -> Iterator[Record]:
        head = stream.read(_HEAD_BYTES)
        if head.startswith(b"\xef\xbb\xbf"):
            self.has_bom, head = True, head[3:]
        self.container = container_of(self.path, head)
        if self.container in ("parquet", "arrow", "arrow-stream"):
            from gemwright.data.tables import arrow_records

            yield from arrow_records(self, self._seekable(head, stream, stack))
            return
        rest = io.BufferedReader(cast("io.RawIOBase", _Joined(head, stream)), _BLOCK_BYTES)
        joined = cast("BinaryIO", stack.enter_context(rest))
        if self.container == "jsonl":
            yield from _json_lines(self.path, joined)
        elif self.container == "json":
            from gemwright.data.json_values import json_values

            yield from json_values(self.path, joined)
        elif self.container == "text":
            yield from _passages(self.path, joined)
        else:
            from gemwright.data.tables import csv_records

            yield from csv_records(self.path, joined, "\t" if self.container == "tsv" else None)

    def _seekable(self, head: bytes, stream: io.BufferedIOBase, stack: ExitStack) -> BinaryIO:
        """The file itself, or where it is compressed a temporary copy on disk that is not."""
        if self.compression is None:
            stream.seek(0)
            return cast("BinaryIO", stream)
        copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        copy.write(head)
        while block := stream.read(_BLOCK_BYTES):
            copy.write(block)
        copy.seek(0)
        return cast("BinaryIO", copy)


class _Joined(io.RawIOBase):
    """What was read ahead, then the rest."""

    def __init__(self, head: bytes, rest: io.BufferedIOBase) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(block)] = block
        return len(block)


def container_of(path: Path, head: bytes) -> Container:
    """Which container a file is, from its first bytes and, where they leave a choice, its name."""
    for magic, container in ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow-stream")):
        if head.startswith(magic):
            return cast("Container", container)
    for magic, name in _FOREIGN:
        if head.startswith(magic):
            raise DataFault("D003", f"is {name}, not a data file", where=path, fix=_KINDS)
    _refuse_wide(path, head)
    suffix = bare_suffix(path)
    if suffix in (".csv", ".tsv"):
        return "csv" if suffix == ".csv" else "tsv"
    if suffix in (".parquet", ".arrow", ".feather") and head:
        raise DataFault("D003", f"is named {suffix}, but is not that", where=path, fix=_KINDS)
    return _json_or_text(path, suffix, head)


def _json_or_text(path: Path, suffix: str, head: bytes) -> Container:
    start = head.lstrip()
    line, newline, _ = start.partition(b"\n")
    if suffix in (".jsonl", ".ndjson"):
        return "json" if _SPREAD.match(start) else "jsonl"
    if suffix != ".txt" and start.startswith((b"[", b"{")):
        return "jsonl" if start.startswith(b"{") and (not newline or _is_json(line)) else "json"
    if suffix == ".txt":
        return "jsonl" if line.startswith(b"{") and _is_json(line) else "text"
    if suffix not in ("", ".json") or not start:
        return "jsonl"
    raise DataFault("D003", "neither JSON nor a known kind of file", where=path, fix=_KINDS)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_wide(path: Path, head: bytes) -> None:
    """UTF-16 and UTF-32, told by their mark or by a zero in every other byte, and what is no text at all."""
    wide = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    even, odd = head[:4096:2].count(0), head[1:4096:2].count(0)
    half = max(1, len(head[:4096]) // 2)
    if wide or (max(even, odd) > 0.4 * half and min(even, odd) < 0.1 * half):
        raise DataFault("D004", "is UTF-16, not UTF-8", where=path, fix="Save it as UTF-8.")
    if (even + odd) > 0.05 * len(head[:4096]) and not head.lstrip().startswith((b"{", b"[")):
        raise DataFault("D003", "is no text and no known kind of file", where=path, fix=_KINDS)


def _text_lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, str, str | DataFault]]:
    """(number, place to name in errors, text or what is wrong with it) of each line."""
    number = 0
    while raw := stream.readline(LONGEST_BYTES):
        number += 1
        where = f"{path}, line {number}"
        try:
            if len(raw) == LONGEST_BYTES and not raw.endswith(b"\n"):
                raise _too_long(where, len(raw) + skip_line(stream))
            yield number, where, _text(raw, where)
        except DataFault as fault:
            yield number, where, fault


def _json_lines(path: Path, stream: BinaryIO) -> Iterator[Record]:
    for number, where, text in _text_lines(path, stream):
        try:
            if isinstance(text, DataFault):
                raise text
            if not text.isspace():
                yield Record(number, "line", parse_json(text, where, is_last=not text.endswith("\n")))
        except DataFault as fault:
            yield Record(number, "line", None, fault)


def skip_line(stream: BinaryIO) -> int:
    """Step over the rest of a line without keeping it; its bytes."""
    skipped = 0
    while rest := stream.readline(_BLOCK_BYTES):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def _too_long(where: str, size: int) -> DataFault:
    what = f"the line has {size / 1e6:,.0f} MB, more than the {LONGEST_BYTES >> 20} MiB that a row may have"
    return DataFault("D013", what, where=where, fix="Split it, or write one JSON object on each line.")


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} of the line is 0x{raw[error.start]:02X}"
        raise DataFault("D010", f"not UTF-8 ({byte})", where=where, fix="Save the file as UTF-8.") from None


def parse_json(text: str, where: str, *, is_last: bool = False) -> Any:
    """`text` as JSON. DataFault where it is not; with `is_last` what ends too early is called cut short."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if "\0" in text:
            what, fix = f"NUL byte at column {text.index(chr(0)) + 1}", "Remove it; the file may be damaged there."
            raise DataFault("D030", what, where=where, fix=fix) from None
        what = f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        if is_last and (error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")):
            fix = "The file is incomplete: make it anew, or remove this line."
            raise DataFault("D012", f"{what}, where the file ends", where=where, fix=fix) from None
        raise DataFault("D011", what, where=where, fix="Write one JSON object on each line.") from None
    except (RecursionError, ValueError):
        raise DataFault("D011", "JSON too deep or a number too long", where=where, fix=WRITE_ROWS) from None


_PASSAGE_CHARACTERS = 2000


def _passages(path: Path, stream: BinaryIO) -> Iterator[Record]:
    """Plain text, cut at the first empty line after every 2,000 characters; `line` is where a passage begins."""
    ready: Record | None = None
    parts: list[str] = []
    first, size = 1, 0
    for number, _, text in _text_lines(path, stream):
        if isinstance(text, DataFault):
            yield Record(number, "line", None, text)
            continue
        if not parts:
            first, size = number, 0
        if parts or not text.isspace():
            parts.append(text)
            size += len(text)
        if size > LONGEST_BYTES or (size >= _PASSAGE_CHARACTERS and text.isspace()):
            if ready:
                yield ready
            ready, parts = Record(first, "line", {"text": "".join(parts).strip(), "goes_on": True}), []
    if ready:
        yield ready if parts else ready._replace(value={"text": ready.value["text"]})
    if parts:
        yield Record(first, "line", {"text": "".join(parts).strip()})
