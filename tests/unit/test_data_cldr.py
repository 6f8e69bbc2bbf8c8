"""The demo's data set: as the generator writes it, nothing of the test in training, and how answers are compared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import babel
import pytest

from gemwright.data.cldr import exact_match, load_split, split_path

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_cldr.py"


def rows(name: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in split_path(name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.skipif(babel.__version__ != "2.18.0", reason=f"Babel is {babel.__version__}: another release of CLDR")
def test_the_generator_gives_the_same_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, tmp_path], check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in split_path("train").parent.iterdir()}


def test_counts() -> None:
    train, test = load_split("train"), load_split("test")
    assert (len(train), len(test)) == (5056, 152)
    assert all([turn["role"] for turn in e.messages] == ["user", "assistant"] for e in train + test)


def test_nothing_of_the_test_is_in_training() -> None:
    assert not {e.messages[0]["content"] for e in load_split("train")} & {
        e.messages[0]["content"] for e in load_split("test")
    }


def test_training_shows_each_language_every_month_and_weekday() -> None:
    months, weekdays = defaultdict(set), defaultdict(set)
    for row in rows("train"):
        words = row["messages"][0]["content"].split()
        if row["task"] == "date":
            months[row["language"]].add(words[3].split("-")[1])
        elif row["task"] == "weekday":
            weekdays[row["language"]].add(words[3])
    assert len(months) == len(weekdays) == 38
    assert {len(seen) for seen in months.values()} == {12}
    assert {len(seen) for seen in weekdays.values()} == {7}


def test_every_language_and_task_is_tested() -> None:
    test = rows("test")
    assert {row["language"] for row in test} == {row["language"] for row in rows("train")}
    assert {row["task"] for row in test} == {row["task"] for row in rows("train")}


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("14 марта 2021 г.\n", "14 марта 2021\u202fг.", True),
        ("1 234,50 €", "1\u00a0234,50\u00a0€", True),
        ("Ma\u0308rz", "März", True),
        ("14 марта 2021", "14 марта 2021\u202fг.", False),
        ("1234,50 €", "1\u00a0234,50\u00a0€", False),
        ("14 Марта 2021 г.", "14 марта 2021\u202fг.", False),
        ("", "x", False),
    ],
)
def test_exact_match(answer: str, expected: str, same: bool) -> None:
    assert exact_match(answer, expected) is same
