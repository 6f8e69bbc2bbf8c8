"""The engine begun before the command line is read: taken where the guess was right, gone where it was not."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gemwright.engines import open as opening
from gemwright.engines.llamacpp import LlamaCpp
from gemwright.engines.spawn import end_spare, spawn, spawn_ahead


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    opening.close_ahead()
    end_spare()


def begun(*words: object) -> LlamaCpp | None:
    opening.open_ahead(["run", "hello", *map(str, words)])
    return next(iter(opening._ahead.values()), None)


def test_what_was_begun_is_taken_where_the_same_is_asked_for(tiny_model: Path) -> None:
    guess = begun("--model", tiny_model, "--threads", 1)
    with opening.open_engine(tiny_model, threads=1) as engine:
        assert engine is guess and engine.encode("hello")
    assert not opening._ahead


def test_what_was_begun_ends_where_another_is_asked_for(tiny_model: Path) -> None:
    guess = begun("-m", tiny_model, "--threads", 1)
    assert guess is not None
    with opening.open_engine(tiny_model, threads=2) as engine:
        assert engine is not guess and engine.encode("hello")
    assert not psutil.pid_exists(guess._child.pid)


@pytest.mark.parametrize("words", [(), ("--model",), ("--model", "nowhere.gguf"), ("--model", "no-such-name")])
def test_words_that_name_no_model_begin_nothing(words: tuple[str, ...]) -> None:
    assert begun(*words) is None


def test_a_wrong_value_begins_nothing(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00")
    assert begun("--model", broken) is None
    assert begun("--model", tiny_model, "--threads", "many") is None
    assert begun("--model", tiny_model, "--adapter", tmp_path / "nowhere") is None


def test_a_spare_child_is_used_once_and_ends_with_the_rest() -> None:
    spawn_ahead("json.tool")
    with spawn("json.tool") as first, spawn("json.tool") as second:
        assert first.pid != second.pid
        first.kill()
        second.kill()
    spawn_ahead("json.tool")
    end_spare()
