"""`gemwright data prepare`: a person's data as tokens on disk, how full its rows will be, and what is kept there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemwright.report import Progressing, duration, size
from gemwright.text.chat import TrainOn
from gemwright.text.tokenizer import Tokenizer
from gemwright.train.batches import pack
from gemwright.train.prepare import clear, prepare, stored_sets, stores
from gemwright.weights.model_file import open_model
from gemwright.weights.pull import resolve_model


def prepare_file(
    data: Path,
    model: str,
    *,
    seq: int,
    train_on: TrainOn,
    workers: int | None,
    report: Callable[[str], None],
    progress: Progressing,
) -> dict[str, Any]:
    """Prepare `data` as `tune` would, and lay it out once; as JSON. Raises what `prepare` raises."""
    encode = Tokenizer.from_model(open_model(resolve_model(model))).encode
    prepared = prepare(
        data, encode, train_on, seq=seq, workers=workers, report=report, on_progress=bar(progress.update)
    )
    examples = prepared.examples
    rows = len(pack(examples, seq, 0, 0))
    return {
        "data": str(data),
        "store": str(examples.folder),
        "bytes": examples.bytes,
        "examples": len(examples),
        "tokens": examples.tokens,
        "learned": examples.labelled,
        "longest": examples.about["longest"],
        "seq": seq,
        "packing": {"rows": rows, "efficiency": examples.tokens / (rows * seq)},
        "was_there": not prepared.workers,
        "workers": prepared.workers,
        "prepare_s": prepared.seconds,
    }


def shown(row: dict[str, Any]) -> str:
    """The same for a person."""
    made = (
        "was there already"
        if row["was_there"]
        else f"made in {duration(row['prepare_s'])} with {row['workers']} process{'es' if row['workers'] > 1 else ''}"
    )
    return (
        f"{row['data']}: {row['examples']:,} examples, {row['tokens']:,} tokens, {row['learned']:,} of them learned, "
        f"longest {row['longest']:,}\n"
        f"rows of {row['seq']:,} tokens: {row['packing']['rows']:,}, {row['packing']['efficiency']:.1%} full\n"
        f"{row['store']} ({size(row['bytes'])}) {made}"
    )


def bar(update: Callable[[str, float, str], None]) -> Callable[[int, float], None]:
    """What shows how far preparing is."""
    return lambda examples, share: update("preparing", share, f"{examples:,} examples tokenised")


def listed() -> list[dict[str, Any]]:
    """What is kept: each store's folder, the data's name, what is learned of it, and the counts."""
    return [
        {
            "store": str(folder),
            "data": meta["about"]["name"],
            "train_on": meta["about"]["settings"]["train_on"],
            "examples": meta["examples"],
            "tokens": meta["tokens"],
            "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        }
        for folder, meta in stored_sets()
    ]


def shown_list(rows: list[dict[str, Any]]) -> str:
    """The same for a person."""
    lines = [
        f"{row['store']}: {row['data']}, train-on {row['train_on']}, {row['examples']:,} examples, {size(row['bytes'])}"
        for row in rows
    ]
    return "\n".join([*lines, f"{len(rows)} in {stores()}, {size(sum(row['bytes'] for row in rows))}"])


def cleared() -> dict[str, Any]:
    """Remove all of it."""
    return {"folder": str(stores()), "freed_bytes": clear()}
