"""The command line's `data` verbs, each a thin shell over the room that does the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from gemwright.cli_options import AsJson, ModelName, give, has_colour
from gemwright.report import Progressing, command, say, size

data_app = typer.Typer(
    rich_markup_mode=None,
    help="""Check, convert and prepare training data.

    \b
    Examples:
      gemwright data check chats.jsonl
      gemwright data convert alpaca.parquet chats.jsonl
      gemwright data preview chats.jsonl --model 270m
      gemwright data prepare chats.jsonl --model 270m --seq 2048
    """,
)

Names = Annotated[list[Path], typer.Argument(help="Files, folders, or a Hugging Face data set (owner/name).")]
OneName = Annotated[Path, typer.Argument(help="File, folder, or a Hugging Face data set (owner/name).")]
Learned = Annotated[Literal["model", "last", "all"], typer.Option("--train-on", help="Turns to learn.")]


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
    give(row, as_json, shown(found, show=show, colour=has_colour()))
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
    text = f"{out if done.is_written else 'nothing written'}: {counted(done.tally)}"
    give(done.row(), as_json, "\n".join([*finding_lines(done.tally, 3, has_colour(), len(data)), text]))
    if not done.is_written:
        say("next: mend the rows, or add --drop-bad to leave them out")
        raise typer.Exit(2)
    say(f"next: {command('gemwright', 'data', 'check', out)}")


@data_app.command()
def preview(
    data: OneName,
    model: ModelName,
    example: Annotated[int, typer.Option("--example", min=1, help="The first example to show, counted from 1.")] = 1,
    count: Annotated[int, typer.Option("--count", min=1, help="How many to show.")] = 1,
    train_on: Learned = "model",
    seq: Annotated[int | None, typer.Option("--seq", min=16, help="Show where a row of so many tokens ends.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the exact tokens of examples, and on which of them a loss is taken.

    In colour on a terminal; elsewhere, or with NO_COLOR, a line a token.

    \b
    Examples:
      gemwright data preview chats.jsonl --model 270m
      gemwright data preview chats.jsonl --model 270m --example 100 --count 3 --train-on last
      gemwright data preview chats.jsonl --model 270m --seq 512 --json
    """
    from gemwright.preview_data import preview as previewed
    from gemwright.preview_data import shown

    found = previewed(data, model, train_on, example, count)
    result = {"data": str(data), "train_on": train_on, "seq": seq, "examples": [each.row(seq) for each in found]}
    give(result, as_json, shown(found, seq, has_colour()))
    say(f"next: {command('gemwright', 'data', 'prepare', data, '--model', model)}")


@data_app.command()
def prepare(
    data: Annotated[Path | None, typer.Argument(help="File, folder, or a Hugging Face data set (owner/name).")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="270m, a GGUF file or a safetensors folder.")
    ] = None,
    seq: Annotated[int, typer.Option("--seq", min=16, help="Tokens a packed row.")] = 1024,
    train_on: Learned = "model",
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Most processes to tokenise in (all threads, within 1 GB of RAM)."),
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List what is kept.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all that is kept.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn data into tokens on disk, as 'gemwright tune' does by itself; what is there already is taken as it is.

    \b
    Examples:
      gemwright data prepare chats.jsonl --model 270m
      gemwright data prepare chats.jsonl --model 270m --seq 2048 --train-on all --workers 4 --json
      gemwright data prepare --list
      gemwright data prepare --clear
    """
    if clear or show_list:
        if data is not None or (clear and show_list):
            raise typer.BadParameter("--list and --clear stand alone")
        _kept(clear, as_json)
        return
    if data is None or model is None:
        raise typer.BadParameter("give data and --model")
    from gemwright.prepare_data import prepare_file, shown

    with Progressing() as progress:
        row = prepare_file(
            data, model, seq=seq, train_on=train_on, workers=workers, report=progress.say, progress=progress
        )
    give(row, as_json, shown(row))
    row_length = () if seq == 1024 else ("--seq", seq)
    learned = () if train_on == "model" else ("--train-on", train_on)
    say(f"next: {command('gemwright', 'tune', data, '--model', model, *row_length, *learned, '--out', 'runs/mine')}")


def _kept(clear: bool, as_json: bool) -> None:
    from gemwright.prepare_data import cleared, listed, shown_list

    if clear:
        row = cleared()
        give(row, as_json, f"{row['folder']}: {size(row['freed_bytes'])} freed")
    else:
        rows = listed()
        give({"stores": rows}, as_json, shown_list(rows))
    say(f"next: {command('gemwright', 'data', 'prepare', 'YOUR.jsonl', '--model', '270m')}")


def _bar(progress: Progressing, phase: str) -> Callable[[float, str], None]:
    return lambda fraction, text: progress.update(phase, fraction, text)
