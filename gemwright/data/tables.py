"""Rows of tables: CSV and TSV by their header, Parquet and Arrow batch by batch through pyarrow."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gemwright.data.codes import DataFault
from gemwright.data.records import ESCAPED_BYTE, KEYS, LONGEST_BYTES, Record, parse_json

if TYPE_CHECKING:
    from gemwright.data.records import DataFile

_BATCH_ROWS = 512
_BLOCK_BYTES = 1 << 20
_LISTS = ("messages", "conversations", "chosen", "rejected")


def csv_records(path: Path, stream: BinaryIO, delimiter: str | None) -> Iterator[Record]:
    """Rows as objects keyed by the header; `line` is where a row begins. The delimiter is told from the header."""
    # Bytes that are no UTF-8 come through as half surrogates, so that the fault can be laid on their row.
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    csv.field_size_limit(LONGEST_BYTES)
    first = text.readline(LONGEST_BYTES)
    if not first:
        return
    delimiter = delimiter or max(",;\t", key=first.count)
    reader = csv.reader(_with_first(first, text), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        where = f"{path}, line {line}"
        try:
            fields = next(reader)
            if header is None:
                header = [name.strip() for name in fields]
            elif fields:
                yield Record(line, "line", _object(header, fields, where))
        except StopIteration:
            return
        except DataFault as fault:
            yield Record(line, "line", None, fault)
        except csv.Error as error:
            what = f"not {'TSV' if delimiter == chr(9) else 'CSV'}: {error}"
            code = "D013" if "limit" in str(error) else "D011"
            fix = "Mend the quotes: a field with quotes or line ends stands in quotes."
            if header is None:
                raise DataFault(code, what, where=where, fix=fix) from None
            yield Record(line, "line", None, DataFault(code, what, where=where, fix=fix))


def _with_first(first: str, rest: io.TextIOWrapper) -> Iterator[str]:
    yield first
    while line := rest.readline(LONGEST_BYTES):
        yield line


def _object(header: list[str], fields: list[str], where: str) -> dict[str, Any]:
    if len(fields) != len(header):
        what = f"{len(fields)} fields, but the header names {len(header)}"
        raise DataFault("D014", what, where=where, fix="Put a text that holds the delimiter or a line end in quotes.")
    if any(ESCAPED_BYTE.search(field) for field in fields):
        raise DataFault("D010", "not UTF-8", where=where, fix="Save the file as UTF-8.")
    row: dict[str, Any] = dict(zip(header, fields, strict=True))
    for name in _LISTS:
        if row.get(name, "").lstrip().startswith("[{") or (name in _LISTS[:2] and row.get(name)):
            row[name] = parse_json(row[name], f'{where}, "{name}"')
    return row


def arrow_records(file: DataFile, stream: BinaryIO) -> Iterator[Record]:
    """Rows of a Parquet file, an Arrow file or an Arrow stream; of their columns those that a format knows."""
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(stream, file.container):
            for value in _objects(batch):
                number += 1
                yield Record(number, "row", value)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise file.damaged(f"{error} after row {number}") from None
    except MemoryError:
        raise file.damaged(f"a size that no memory holds after row {number}") from None
    except KeyError as error:  # pyarrow looks a time zone up that there is not
        raise file.damaged(f"no such time zone: {error}") from None


def _objects(batch: Any) -> Iterator[dict[str, Any]]:
    known = [name for name in batch.schema.names if name in KEYS]
    if known:
        yield from batch.select(known).to_pylist()
    else:
        yield from (dict.fromkeys(batch.schema.names) for _ in range(batch.num_rows))


def _batches(stream: BinaryIO, container: str | None) -> Iterator[Any]:
    """Validated batches of few rows, for each becomes Python objects at once.

    Without validation a damaged offset would be followed out of its buffer.
    """
    import pyarrow as pa

    if container == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BLOCK_BYTES) as parquet:
            known = [name for name in parquet.schema_arrow.names if name in KEYS] or None
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=known, use_threads=False):
                batch.validate(full=True)
                yield batch
        return
    with (pa.ipc.open_file if container == "arrow" else pa.ipc.open_stream)(stream) as arrow:
        count = arrow.num_record_batches if container == "arrow" else None
        for batch in arrow if count is None else map(arrow.get_batch, range(count)):
            batch.validate(full=True)
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS)
