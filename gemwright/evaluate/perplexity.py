"""How well a model predicts a text: perplexity and bits per byte, over any engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemwright.engines.protocol import Engine
from gemwright.errors import InputError
from gemwright.spec import BOS


@dataclass(frozen=True)
class Perplexity:
    """`tokens` scored, their mean negative log-likelihood in nats, its exponential, and bits a UTF-8 byte of text."""

    tokens: int
    nll_per_token: float
    perplexity: float
    bits_per_byte: float


def score_file(path: Path, engine: Engine, report: Callable[[int, int], None] | None = None) -> Perplexity:
    """Score the UTF-8 text at `path`; `report(tokens done, of all)` on the way. InputError for a file it cannot use."""
    return score_text(read_text(path), engine, report)


def read_text(path: Path) -> str:
    """The text of a file exactly as it lies there (its line ends too)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError("no such file", where=path, fix="Check the path.") from None
    except OSError as error:
        raise InputError(f"cannot read it: {error.strerror or error}", where=path, fix="Give a text file.") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 at byte {error.start} (0x{data[error.start]:02x})"
        raise InputError(what, where=path, fix="Convert it to UTF-8.") from None
    if not text:
        raise InputError("empty", where=path, fix="Give a text of at least one character.")
    return text


def score_text(text: str, engine: Engine, report: Callable[[int, int], None] | None = None) -> Perplexity:
    """Score BOS and `text`.

    A text longer than the context goes through windows of the full context, each begun with BOS and moved on by half.
    A token is scored once, in the first window that holds it: after the first window with at least half of one before.
    """
    ids = engine.encode(text)
    room = engine.context - 1
    half = max(1, room // 2)
    total, done = 0.0, 0
    while done < len(ids):
        first = 0 if done == 0 else done - half
        window = [BOS, *ids[first : first + room]]
        before = done
        progress = None if report is None else (lambda count, before=before: report(before + count, len(ids)))
        scores = engine.score(window, start=1 + done - first, on_progress=progress)
        total -= math.fsum(scores)
        done += len(scores)
    if report:
        report(done, len(ids))
    mean = total / done
    bits = total / math.log(2) / len(text.encode("utf-8"))
    return Perplexity(done, mean, math.exp(mean) if mean < 700 else math.inf, bits)
