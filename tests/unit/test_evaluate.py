"""Perplexity: the arithmetic, the windows, and files that cannot be scored."""

import math
from pathlib import Path

import pytest

from gemwright.engines.scripted import Scripted
from gemwright.errors import InputError
from gemwright.evaluate.perplexity import score_file, score_text
from gemwright.spec import BOS


class Recording(Scripted):
    """A scripted engine that keeps what it was asked to score."""

    def __init__(self, context: int) -> None:
        super().__init__(context=context, logprob=lambda id_: -math.log(id_))
        self.asked: list[tuple[list[int], int]] = []

    def score(self, ids, start=1, on_progress=None):
        self.asked.append((ids, start))
        return super().score(ids, start, on_progress)


def test_the_numbers() -> None:
    got = score_text("щука", Scripted(logprob=lambda id_: -math.log(2)))
    assert got.tokens == 8  # bytes are the fake's tokens
    assert got.nll_per_token == pytest.approx(math.log(2))
    assert got.perplexity == pytest.approx(2)
    assert got.bits_per_byte == pytest.approx(1)


@pytest.mark.parametrize("length", [1, 8, 9, 10, 13, 14, 40, 41])
def test_every_token_is_scored_once_with_half_a_window_before_it(length: int) -> None:
    engine = Recording(context=9)
    text = "".join(chr(33 + i) for i in range(length))
    reports: list[tuple[int, int]] = []
    got = score_text(text, engine, lambda done, of: reports.append((done, of)))
    scored = [id_ for ids, start in engine.asked for id_ in ids[start:]]
    assert scored == engine.encode(text)
    assert all(ids[0] == BOS and len(ids) <= 9 for ids, _ in engine.asked)
    assert all(start >= 5 for _, start in engine.asked[1:])
    assert got.nll_per_token == pytest.approx(sum(map(math.log, scored)) / length)
    assert reports[-1] == (length, length)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    assert score_text("abc", Scripted(logprob=lambda id_: -1e6)).perplexity == math.inf


def test_files_that_cannot_be_scored(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    with pytest.raises(InputError, match="no such file"):
        score_file(file, Scripted())
    file.write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        score_file(file, Scripted())
    file.write_bytes("щу".encode() + b"\xff.")
    with pytest.raises(InputError, match=r"not UTF-8 at byte 4 \(0xff\)"):
        score_file(file, Scripted())
    with pytest.raises(InputError, match="cannot read"):
        score_file(tmp_path, Scripted())


def test_line_ends_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"a\r\nb")
    assert score_file(file, Scripted()).tokens == 4
