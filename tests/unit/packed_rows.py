"""The same rows in every container and compression that is read."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, str]]


def jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: Rows, delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["prompt", "completion"], delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: Rows) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=2)
    return out.getvalue()


def arrow(rows: Rows, new: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    out = io.BytesIO()
    made = pa.Table.from_pylist(rows)
    with new(out, made.schema) as file:
        file.write_table(made, max_chunksize=2)
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    packed: bytes = pa.compress(content, "zstd", asbytes=True)
    return packed


CONTAINERS: dict[str, Callable[[Rows], bytes]] = {
    "a.jsonl": jsonl,
    "b.json": lambda rows: json.dumps(rows).encode(),
    "c.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "d.json": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "e.jsonl": lambda rows: json.dumps(rows).encode(),
    "f.csv": lambda rows: table(rows, ","),
    "g.csv": lambda rows: table(rows, ";"),
    "h.tsv": lambda rows: table(rows, "\t"),
    "i.parquet": parquet,
    "j.arrow": arrow,
    "k.arrow": lambda rows: arrow(rows, pa.ipc.new_stream),
    "l.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "m.jsonl.zst": lambda rows: zstd(jsonl(rows)),
    "n.csv.gz": lambda rows: gzip.compress(table(rows, ",")),
    "o.parquet.gz": lambda rows: gzip.compress(parquet(rows)),
    "p.jsonl.zst": lambda rows: zstd(jsonl(rows[:1])) + zstd(jsonl(rows[1:])),
    "q.jsonl.gz": lambda rows: gzip.compress(jsonl(rows[:1])) + gzip.compress(jsonl(rows[1:])),
    "r": jsonl,
    "s.txt": jsonl,
}
