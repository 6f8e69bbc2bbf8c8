"""The command line's `runs`: look at fine-tunes, compare them, go on with one, remove one."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemwright.cli_options import AsJson, give
from gemwright.report import Progressing, command, duration, say, size

if TYPE_CHECKING:
    from gemwright.train.results import Progress, TuneResult

app = typer.Typer(
    rich_markup_mode=None,
    help="""Fine-tunes that are there, finished or not.

    \b
    Examples:
      gemwright runs list
      gemwright runs show runs/first
      gemwright runs compare runs/first runs/second --out compare.png
      gemwright runs resume runs/first
    """,
)

Run = Annotated[Path, typer.Argument(help="A run folder of 'gemwright tune'.")]


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """All runs of a folder, the newest first.

    \b
    Examples:
      gemwright runs list
      gemwright runs list ~/runs --json
    """
    from gemwright.run_records import find_runs, read_run
    from gemwright.run_text import table

    records = [read_run(path).record for path in find_runs(folder)]
    records.sort(key=lambda one: one.begun or "", reverse=True)
    if records or as_json:
        give({"runs": [one.row() for one in records]}, as_json, "\n".join(table(records)))
    if records:
        say(f"next: {command('gemwright', 'runs', 'show', records[0].path)}")
    else:
        say(f"{folder}: no runs yet")
        say(f"next: {command('gemwright', 'tune', 'YOUR.jsonl', '--model', '270m', '--out', folder / 'first')}")


@app.command()
def show(run: Run, as_json: AsJson = False) -> None:
    """All about one run: how it stands, its settings, data and machine, what it writes, what to do next.

    \b
    Examples:
      gemwright runs show runs/first
      gemwright runs show runs/first --json
    """
    from gemwright.run_records import plain, read_run
    from gemwright.run_text import next_command, story

    files = read_run(run)
    parts: dict[str, object] = {"config": files.config, "about": files.about}
    parts |= {"evaluations": files.evaluations, "samples": files.samples}
    give(files.record.row() | plain(parts), as_json, "\n".join(story(files)))
    say(f"next: {next_command(files.record, files.config.get('model'))}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run folders.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw their losses together into this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Runs side by side: the settings that differ, then what came of each.

    \b
    Examples:
      gemwright runs compare runs/first runs/second
      gemwright runs compare runs/first runs/second runs/third --out compare.png --json
    """
    from gemwright.run_records import plain, read_run
    from gemwright.run_text import differences, side_by_side

    if len(runs) < 2:
        raise typer.BadParameter("give two runs or more")
    files = [read_run(path) for path in runs]
    if out is not None:
        from gemwright.train.plot import draw_losses

        draw_losses({str(one.record.path): (one.metrics, one.evaluations) for one in files}, out)
    answer = {"differences": plain(differences(files)), "runs": [one.record.row() for one in files]}
    give(answer | {"plot": str(out) if out else None}, as_json, "\n".join(side_by_side(files)))
    plots = () if out else ("--out", "compare.png")
    follow = ("show", runs[0]) if out else ("compare", *runs, *plots)
    say(f"next: {command('gemwright', 'runs', *follow)}")


@app.command()
def delete(
    run: Run,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    keep_adapter: Annotated[
        bool, typer.Option("--keep-adapter", help="Leave the adapter, and the record of where it came from.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a run, or all of it but its adapter. Says what goes, and asks.

    \b
    Examples:
      gemwright runs delete runs/first
      gemwright runs delete runs/first --keep-adapter --yes
    """
    from gemwright.run_records import delete as remove
    from gemwright.run_records import disk_bytes, parts_to_delete

    parts = parts_to_delete(run, keep_adapter)
    freed = sum(disk_bytes(part) for part in parts)
    what = ", ".join(str(part) for part in parts) or "nothing"
    say(f"to be removed for good: {what} ({size(freed)}, {freed} bytes)")
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("nobody is there to ask: give --yes to remove it")
        if not typer.confirm("Remove it?", err=True):
            say("nothing was removed")
            return
    remove(run, keep_adapter)
    answer = {"run": str(run), "removed": [str(part) for part in parts], "bytes": freed}
    give(answer, as_json, f"{run}: removed {size(freed)}")
    say(f"next: {command('gemwright', 'runs', 'list', run.parent)}")


@app.command()
def resume(
    run: Run,
    until: Annotated[str | None, typer.Option("--until", help="Stop at this time of day, e.g. 07:00.")] = None,
    max_hours: Annotated[float | None, typer.Option("--max-hours", help="Stop after so many hours.")] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a fine-tune from its newest checkpoint, to the same result as if it had not been interrupted.

    \b
    Examples:
      gemwright runs resume runs/first
      gemwright runs resume runs/night --until 07:00 --json
    """
    from gemwright.train.loop import resume as go_on

    with Progressing() as progress:
        result = go_on(run, until, max_hours, lambda p: show_progress(progress, p))
    model = json.loads((run / "config.json").read_text(encoding="utf-8"))["model"]
    give_result(result, model, as_json)


def show_progress(shown: Progressing, now: Progress) -> None:
    """Put where a fine-tune stands on the bar."""
    text = (
        f"step {now.step}/{now.steps}  loss {now.loss:.3f}  {now.tokens_per_s:.0f} tokens/s  "
        f"{duration(now.eta_s)} left  {size(now.rss_bytes)} of RAM"
    )
    if now.device_bytes:
        text = f"{text}  {size(now.device_bytes)} of VRAM  {now.waiting:.0%} waiting"
    is_told = now.step and not math.isnan(now.loss)  # a run that goes on has made no step of its own at first
    shown.update(now.phase, now.step / max(now.steps, 1), text if is_told else "")


def give_result(result: TuneResult, model: str, as_json: bool) -> None:
    """A fine-tune's result on stdout, then what to do next; exits as the signal that stopped it has it."""
    from gemwright.train.stop import EXIT_CODES

    text = (
        f"{result.run}: {result.steps} steps, loss {result.loss_first:.3f} -> {result.loss_last:.3f}, "
        f"{result.tokens_per_s:.0f} tokens/s, peak {size(result.peak_rss_bytes)} of RAM"
    )
    give(result.row(), as_json, text)
    if result.stopped:
        say(f"stopped ({result.stopped}) after step {result.steps}; the adapter so far is in {result.adapter}")
        say(f"go on with: {command('gemwright', 'runs', 'resume', result.run)}")
        if result.stopped in EXIT_CODES:
            raise SystemExit(EXIT_CODES[result.stopped])
        return
    pytorch = () if result.adapter_gguf else ("--engine", "pytorch")
    if pytorch:
        say("no adapter.gguf was written: llama.cpp cannot express DoRA; --engine pytorch runs it")
    say(f"next: {command('gemwright', 'chat', '--model', model, '--adapter', result.run, *pytorch)}")
