"""Canonical rows to a file whose name says how: JSONL, plain or as .gz or .zst, or Parquet; whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from gemwright.data.records import bare_suffix
from gemwright.errors import InputError
from gemwright.runs import atomic_path

Write = Callable[[dict[str, Any]], None]
_GROUP_ROWS = 2048
_NAMES: Final = "Name it .jsonl, .jsonl.gz, .jsonl.zst or .parquet."


class Cancelled(Exception):
    """Raised inside `writer` to leave no file behind."""


def check_out(path: Path) -> None:
    """InputError where the name says no format that can be written, or something is there."""
    kind, outer = bare_suffix(path), path.suffix.lower()
    if kind not in (".jsonl", ".ndjson", ".parquet") or (kind == ".parquet" and outer != ".parquet"):
        raise InputError("no name of a format that is written", where=path, fix=_NAMES)
    if path.exists():
        raise InputError("is there already", where=path, fix="Choose another name, or remove it first.")


@contextmanager
def writer(path: Path) -> Iterator[Write]:
    """A function that writes one row. Nothing is at `path` until all is; `Cancelled` raised inside leaves it so.

    Raises what `check_out` does, and MachineError where the disk refuses.
    """
    check_out(path)
    try:
        with atomic_path(path) as temporary, ExitStack() as stack:
            yield (
                _parquet(temporary, path, stack)
                if path.suffix.lower() == ".parquet"
                else _lines(temporary, path, stack)
            )
    except Cancelled:
        pass


def _lines(temporary: Path, path: Path, stack: ExitStack) -> Write:
    raw: Any = stack.enter_context(temporary.open("wb"))
    if path.suffix.lower() == ".gz":  # no time and no name in it: the same rows give the same bytes
        raw = stack.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0))
    elif path.suffix.lower() == ".zst":
        import pyarrow as pa

        raw = stack.enter_context(pa.CompressedOutputStream(pa.PythonFile(raw, mode="w"), "zstd"))
    stream = stack.enter_context(io.BufferedWriter(_Unclosing(raw), 1 << 20))

    def write(row: dict[str, Any]) -> None:
        stream.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")

    return write


class _Unclosing(io.RawIOBase):
    """Passes bytes on; what it writes to is closed by its own owner."""

    def __init__(self, to: Any) -> None:
        self._to = to

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._to.write(bytes(data))
        return len(data)


def _parquet(temporary: Path, path: Path, stack: ExitStack) -> Write:
    """Rows in groups of 2,048; their columns are those of the first row's kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    columns = {
        "messages": [("messages", turns)],
        "text": [("text", pa.string()), ("goes_on", pa.bool_())],
        "prompt": [("prompt", turns), ("chosen", turns), ("rejected", turns)],
    }
    waiting: list[dict[str, Any]] = []
    out: list[Any] = []

    def flush() -> None:
        if waiting and not out:
            schema = pa.schema(columns[next(iter(waiting[0]))])
            out.append(pq.ParquetWriter(temporary, schema, compression="zstd"))
        if waiting:
            out[0].write_batch(pa.RecordBatch.from_pylist(waiting, schema=out[0].schema))
            waiting.clear()

    def write(row: dict[str, Any]) -> None:
        first = out[0].schema.names[0] if out else next(iter(waiting[0] if waiting else row))
        if next(iter(row)) != first:
            what = f"a table cannot hold rows of {first} and of {next(iter(row))}"
            raise InputError(what, where=path, fix="Write .jsonl.")
        waiting.append(row)
        if len(waiting) >= _GROUP_ROWS:
            flush()

    def close(kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            flush()
        for file in out:
            file.close()

    stack.push(close)
    return write
