"""Coverage-guided fuzzing of what reads a person's files: `python scripts/fuzz.py TARGET SECONDS`, TARGET data or gguf.

Needs atheris (`pip install atheris==3.0.0`; Linux and macOS). Whatever is no GemwrightError is a crash: its bytes are
kept as `crash-...` in the folder that is current, and belong into a test. Ends with the executions and what was found.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

TRACED = ["gemwright.data", "gemwright.weights.gguf_reader", "gemwright.plan", "json", "csv"]
with atheris.instrument_imports(include=TRACED):
    from gemwright.data.judge import judged
    from gemwright.data.read import iter_examples
    from gemwright.data.records import DataFile
    from gemwright.errors import GemwrightError
    from gemwright.plan.model_bytes import weigh
    from gemwright.weights.gguf_reader import open_gguf

NAMES = ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.arrow", "a", "a.jsonl.gz", "a.zst")
FOLDER = Path(tempfile.mkdtemp(prefix="gemwright-fuzz-"))


def read_data(content: bytes) -> None:
    """One file of random name and bytes: every row ends as kept or as a fault, and reading ends the same way."""
    path = FOLDER / NAMES[content[0] % len(NAMES) if content else 0]
    path.write_bytes(content[1:])
    verdicts = list(judged([DataFile(path)]))
    faults = [verdict for verdict in verdicts if verdict.fault]
    assert all((verdict.entry is None) != (verdict.fault is None) for verdict in verdicts)
    try:
        examples = sum(1 for _ in iter_examples(path))
    except GemwrightError:
        return
    assert examples == len(verdicts) and not faults


def read_gguf(content: bytes) -> None:
    """One GGUF: opened with all its metadata, and weighed from its header alone."""
    path = FOLDER / "a.gguf"
    path.write_bytes(content)
    with suppress(GemwrightError):
        opened = open_gguf(path)
        for key in opened.metadata:
            opened.metadata[key]
    with suppress(GemwrightError):
        weigh(path)


def data_seeds() -> list[bytes]:
    """A valid file of every container, each after the byte that chooses its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chat = {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}]}
    rows = [chat, {"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "", "output": "c"}]
    rows += [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"text": "t"}]
    rows += [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    table = pa.Table.from_pylist([chat, chat])
    parquet, arrow, stream = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    with pa.ipc.new_file(arrow, table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(stream, table.schema) as file:
        file.write_table(table)
    zstd = pa.compress(lines, "zstd", asbytes=True)
    csv = b'prompt,completion\na,"b\nc"\n"d""e",f\n'
    array = json.dumps(rows, indent=1).encode()
    contents = (lines, array, csv, csv.replace(b",", b"\t"), lines, parquet.getvalue(), arrow.getvalue())
    contents += (stream.getvalue(), gzip.compress(lines), zstd)
    return [bytes([index]) + content for index, content in enumerate(contents)]


def gguf_seeds() -> list[bytes]:
    """A small model in our own writer's hand."""
    from dataclasses import replace

    from gemwright.spec import SPECS
    from gemwright.weights.random_model import write_random_gguf

    shape = {"layers": 1, "hidden": 32, "mlp": 32, "heads": 1, "kv_heads": 1, "head_dim": 32, "vocab": 32}
    path = FOLDER / "seed.gguf"
    write_random_gguf(path, replace(SPECS["270m"], name="tiny", **shape), "Q4_0")
    return [path.read_bytes(), path.read_bytes()[:600]]


def main() -> None:
    """Fuzz for the time given."""
    target, seconds = sys.argv[1], int(sys.argv[2])
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    for index, content in enumerate(data_seeds() if target == "data" else gguf_seeds()):
        (seeds / f"seed-{index}").write_bytes(content)
    options = [f"-max_total_time={seconds}", "-max_len=8192", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], read_data if target == "data" else read_gguf)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
