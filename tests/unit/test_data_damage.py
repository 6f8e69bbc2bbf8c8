"""Damaged files of every container: rows and findings come out, never anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import CONTAINERS, arrow

from gemwright.check_data import check
from gemwright.data.judge import judged
from gemwright.data.read import read_examples
from gemwright.data.records import DataFile
from gemwright.errors import GemwrightError

ROWS = [{"prompt": f"question {at} é", "completion": "answer " * (at % 5 + 1)} for at in range(20)]
WHOLE = {name: pack(ROWS) for name, pack in CONTAINERS.items()}


@given(st.sampled_from(sorted(WHOLE)), st.data())
@settings(max_examples=200)
def test_any_damage_ends_in_rows_or_a_finding(tmp_path_factory: pytest.TempPathFactory, name: str, data: Any) -> None:
    """Bytes changed, cut off, doubled or put in: each row is kept or has a fault, and what ends a file is one too."""
    content = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at, kind = data.draw(st.integers(0, len(content))), data.draw(st.sampled_from(["flip", "cut", "put", "double"]))
        if kind == "flip" and at < len(content):
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 2000))]
        elif kind == "put":
            content[at:at] = data.draw(st.binary(max_size=8))
        else:
            content[at:at] = content[at : at + 50]
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    verdicts = list(judged([DataFile(path)]))
    faults = [verdict.fault for verdict in verdicts if verdict.fault]
    assert len(verdicts) == sum(verdict.entry is not None for verdict in verdicts) + len(faults)
    try:
        examples = read_examples(path)
    except GemwrightError as error:
        assert error.exit_code == 2 and "\n" not in str(error)
    else:
        assert not faults and len(examples) == len(verdicts)
    row = check([path]).row()
    assert row["read"] == row["kept"] + row["dropped"] == sum(verdict.is_row for verdict in verdicts)


def test_an_arrow_stream_that_claims_more_than_memory(tmp_path: Path) -> None:
    """A changed bit in a length made pyarrow ask for terabytes; the fuzzer found it."""
    path, whole = tmp_path / "a.arrow", arrow([{"prompt": "a", "completion": "b"}], pa.ipc.new_stream)
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
        for verdict in judged([DataFile(path)]):
            assert (verdict.entry is None) != (verdict.fault is None)
