"""The command line's `data` verbs, each a thin shell over the room that does the work."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gemwright.report import Progressing, command, say

data_app = typer.Typer(
    rich_markup_mode=None,
    help="""Check, convert and prepare training data.

    \b
    Examples:
      gemwright data check chats.jsonl
      gemwright data convert alpaca.parquet chats.jsonl
    """,
)

Names = Annotated[list[Path], typer.Argument(help="Files, folders, or a Hugging Face data set (owner/name).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@data_app.command()
def check(
    data: Names,
    validation: Annotated[Path | None, typer.Option("--validation", help="Find rows that stand there too.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Count tokens with this model's tokenizer (as 'tune').")
    ] = None,
    seq: Annotated[
        int | None, typer.Option("--seq", min=16, help="With --model: name rows longer than so many tokens.")
    ] = None,
    repair: Annotated[
        Path | None, typer.Option("--repair", help="Write a copy with look-alike letters repaired.")
    ] = None,
    show: Annotated[int, typer.Option("--show", min=0, max=100, help="Examples to show of each code.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with training data, row by row, before anything is trained on it; exit 2 where it cannot be.

    \b
    Examples:
      gemwright data check chats.jsonl
      gemwright data check chats.jsonl --validation held-out.jsonl --model 270m --seq 1024
      gemwright data check chats.jsonl --repair chats-repaired.jsonl
      gemwright data check folder/ --json
    """
    from gemwright.check_data import check as check_rows
    from gemwright.check_data import lengths_of, shown
    from gemwright.convert_data import convert as convert_rows
    from gemwright.data.write import check_out

    if seq is not None and model is None:
        raise typer.BadParameter("--seq counts tokens: it goes with --model")
    if repair is not None:
        check_out(repair)
    lengths = lengths_of(model, seq) if model is not None else None
    with Progressing() as progress:
        found = check_rows(
            data, validation=validation, lengths=lengths, report=say, on_progress=_bar(progress, "checking")
        )
    row = found.row() | {"repaired": None}
    if repair is not None and found.tally.kept and not found.tally.has_errors:
        row["repaired"] = convert_rows(data, repair, repair=True).row() | {"findings": []}
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(json.dumps(row, ensure_ascii=False) if as_json else shown(found, show=show, colour=colour), flush=True)
    if row["repaired"]:
        say(f"{row['repaired']['repaired']} rows repaired; the copy is {repair}")
    elif repair is not None:
        say(f"{repair} was not written")
    say(f"next: {command('gemwright', *found.next(data, repair))}")
    if not found.is_trainable:
        raise typer.Exit(2)


@data_app.command()
def convert(
    data: Names,
    out: Annotated[Path, typer.Argument(help="New file: .jsonl, .jsonl.gz, .jsonl.zst or .parquet.")],
    drop_bad: Annotated[bool, typer.Option("--drop-bad", help="Leave out rows that cannot be used.")] = False,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Leave out rows that repeat an earlier one, exactly or nearly.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Repair look-alike letters of another script.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write any known format and container as chat messages; where a row cannot be used, nothing is written.

    \b
    Examples:
      gemwright data convert alpaca.json chats.jsonl
      gemwright data convert folder/ chats.jsonl.zst --drop-bad --drop-duplicates
    """
    from gemwright.convert_data import convert as convert_rows
    from gemwright.data.shown import counted, finding_lines

    with Progressing() as progress:
        done = convert_rows(
            data,
            out,
            drop_bad=drop_bad,
            drop_duplicates=drop_duplicates,
            repair=repair,
            report=say,
            on_progress=_bar(progress, "converting"),
        )
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    text = f"{out if done.is_written else 'nothing written'}: {counted(done.tally)}"
    findings = finding_lines(done.tally, 3, colour, len(data))
    print(json.dumps(done.row(), ensure_ascii=False) if as_json else "\n".join([*findings, text]), flush=True)
    if not done.is_written:
        say("next: mend the rows, or add --drop-bad to leave them out")
        raise typer.Exit(2)
    say(f"next: {command('gemwright', 'data', 'check', out)}")


def _bar(progress: Progressing, phase: str) -> Callable[[float, str], None]:
    return lambda fraction, text: progress.update(phase, fraction, text)
