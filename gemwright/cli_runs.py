"""The command line's `runs`: go on with a fine-tune that was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemwright.report import Progressing, command, duration, say, size

if TYPE_CHECKING:
    from gemwright.train.results import Progress, TuneResult

app = typer.Typer(
    rich_markup_mode=None,
    help="""Fine-tunes that are there, finished or not.

    \b
    Examples:
      gemwright runs resume runs/first
    """,
)

Run = Annotated[Path, typer.Argument(help="A run folder of 'gemwright tune'.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.callback()
def options() -> None:
    """Keeps `resume` a verb of its own."""


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
    shown.update(now.phase, now.step / max(now.steps, 1), text if now.step else "")


def give_result(result: TuneResult, model: str, as_json: bool) -> None:
    """A fine-tune's result on stdout, then what to do next; exits as the signal that stopped it has it."""
    from gemwright.train.stop import EXIT_CODES

    text = (
        f"{result.run}: {result.steps} steps, loss {result.loss_first:.3f} -> {result.loss_last:.3f}, "
        f"{result.tokens_per_s:.0f} tokens/s, peak {size(result.peak_rss_bytes)} of RAM"
    )
    print(json.dumps(result.row(), ensure_ascii=False) if as_json else text, flush=True)
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
