"""The command line: one Typer command a verb, each a thin shell over the room that does the work."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gemwright import __version__, cli_data, cli_runs
from gemwright.cli_options import AsJson, ModelName, give, has_colour
from gemwright.report import Progressing, command, say, size

if TYPE_CHECKING:
    from gemwright.engines.protocol import Generation

app = typer.Typer(
    name="gemwright",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Fine-tune, check and run Google's Gemma 3 on the machine you own.

    \b
    Examples:
      gemwright demo
      gemwright plan
      gemwright doctor
      gemwright data check chats.jsonl
      gemwright pull 270m
      gemwright tune chats.jsonl --model 270m --out runs/first
      gemwright run "The capital of France is" --model 270m --raw
      gemwright chat --model 270m --adapter runs/first
      gemwright score page.txt --model 270m
    """,
)
app.add_typer(cli_data.data_app, name="data")
app.add_typer(cli_runs.app, name="runs")

Adapter = Annotated[Path | None, typer.Option("--adapter", "-a", help="A run folder of 'gemwright tune'.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Stop after so many tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token each time.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")]
EngineName = Annotated[Literal["llamacpp", "pytorch"], typer.Option("--engine", help="What runs the model.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; all cores unless said.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gemwright {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """What every verb shares."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Run folder; an earlier demo there is replaced.")] = Path(
        "runs/demo"
    ),
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune the real Gemma 3 270M on this machine and show it before and after (seven to nine minutes, two cores).

    \b
    Example:
      gemwright demo
    """
    from gemwright.demo import run_demo, show

    with Progressing() as progress:
        result, examples = run_demo(out, progress, threads=threads)
    give(result, as_json, show(result, examples))
    say("\nNext, try:")
    for line in (
        command("gemwright", "chat", "--model", "270m", "--adapter", out),
        command(
            "gemwright", "run", "Write the date 2031-03-08 in Russian (русский).", "--model", "270m", "--adapter", out
        ),
        command("gemwright", "tune", "YOUR.jsonl", "--model", "270m", "--out", "runs/mine"),
    ):
        say(f"  {line}")


@app.command()
def doctor(
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Measure what has not been measured yet.")] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again.")] = False,
    save: Annotated[Path | None, typer.Option("--save", help="Write this machine's profile as a rig file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at this machine: what it is, how fast it is, and what to mind.

    \b
    Examples:
      gemwright doctor
      gemwright doctor --no-probe
      gemwright doctor --fresh --save desk.toml
    """
    from gemwright.doctor import diagnose, shown
    from gemwright.doctor import save as save_rig

    if fresh and not probe:
        raise typer.BadParameter("--fresh measures, --no-probe does not")
    found = diagnose(probe=probe, fresh=fresh, report=lambda what: say(f"measuring: {what}"))
    if save:
        save_rig(found, save)
    give(found.row() | {"saved": str(save) if save else None}, as_json, shown(found))
    say(f"next: {command('gemwright', 'plan', *(('--rig', save) if save else ()))}")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="270m, 270m-it, 1b, 4b, 12b, 27b (-pt: base model), or a path.")],
    random: Annotated[bool, typer.Option("--random", help="Write random weights in that size's shapes.")] = False,
    kind: Annotated[str | None, typer.Option("--type", help="Number format of --random (Q4_0), also Q4_K_M.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="New file of --random.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of --random (0).")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a model, or take one that is here, and check that it is whole.

    With --random, make one of random weights instead, to measure with.

    \b
    Examples:
      gemwright pull 270m
      gemwright pull ./gemma-3-4b-it-q4_0.gguf --json
      gemwright pull 27b --random --type Q4_K_M
    """
    from gemwright.weights.pull import pull as fetch
    from gemwright.weights.pull import pull_random

    if not random and (kind, out, seed) != (None, None, None):
        raise typer.BadParameter("--type, --out and --seed go with --random")
    if random:
        with Progressing() as progress:
            got = pull_random(name, kind or "Q4_0", out, seed or 0, report=progress.say, on_progress=progress.update)
    else:
        got = fetch(name, report=say)
    result = {k: getattr(got, k) for k in ("path", "sha256", "bytes", "size", "quantization")}
    result["path"] = str(result["path"])
    give(result, as_json, f"{got.path}\nGemma 3 {got.size}, {got.quantization}, {size(got.bytes)}, sha256 {got.sha256}")
    verb = ("tune", "YOUR.jsonl", "--out", "runs/mine") if random else ("chat",)
    say(f"next: {command('gemwright', *verb, '--model', got.path if random else name)}")


@app.command()
def tune(
    data: Annotated[Path, typer.Argument(help="Chats or text: a file, a folder or owner/name; docs/data.md.")],
    model: ModelName,
    out: Annotated[Path, typer.Option("--out", "-o", help="New run folder.")],
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="Stop after so many steps.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data (1).")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="LoRA rank (16).")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="LoRA alpha (the rank).")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank), not alpha / rank.")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Learn each row's magnitude too (not for llama.cpp).")] = False,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate (0.001).")] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="cosine (default), linear or constant.")] = None,
    warmup: Annotated[float | None, typer.Option("--warmup", help="Share of the steps that --lr rises (0.05).")] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="AdamW's decay of adapters (0).")] = None,
    clip: Annotated[float | None, typer.Option("--clip", help="Longest gradient that is not shortened (1).")] = None,
    patience: Annotated[
        int | None,
        typer.Option("--patience", min=1, help="Stop after so many updates in a row with no finite loss (5)."),
    ] = None,
    seq: Annotated[int | None, typer.Option("--seq", min=16, help="Tokens a packed row (1024).")] = None,
    tokens_per_step: Annotated[int | None, typer.Option("--tokens-per-step", min=16, help="Tokens a step.")] = None,
    dropout: Annotated[float | None, typer.Option("--dropout", help="LoRA dropout (0).")] = None,
    targets: Annotated[str | None, typer.Option("--targets", help="Linears to adapt, e.g. q,k,v,o (all).")] = None,
    train_on: Annotated[str | None, typer.Option("--train-on", help="Turns to learn: model, last or all.")] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Many examples a row, or one (like lengths together).")
    ] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="auto, bf16 or fp32.")] = None,
    compute: Annotated[
        str | None, typer.Option("--compute", help="Products of the frozen weights: bf16 (as --precision) or fp8.")
    ] = None,
    recompute: Annotated[
        str | None, typer.Option("--recompute", help="Activations anew in the backward: auto, always, never.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")] = None,
    vram: Annotated[
        str | None,
        typer.Option("--vram", help="Video memory never to exceed, e.g. 7.5GiB (what is free, less 0.5 GiB)."),
    ] = None,
    residency: Annotated[
        str | None, typer.Option("--residency", help="Packed layers on the GPU: auto, resident or streamed.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="Where layers stream from: auto, mapped, pinned or pageable.")
    ] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="The same bits in every run, more slowly.")
    ] = None,
    validation: Annotated[Path | None, typer.Option("--validation", help="Data to measure the loss on.")] = None,
    holdout: Annotated[
        int | None, typer.Option("--holdout", min=1, help="Keep so many examples back, to measure the loss on.")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", min=1, help="Measure it every so many steps (each epoch's end).")
    ] = None,
    stop_after: Annotated[
        int | None, typer.Option("--stop-after", min=1, help="End after so many measurements without a gain.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", min=1, help="Steps from checkpoint to checkpoint (every 10 minutes).")
    ] = None,
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Checkpoints to keep besides the best (2).")] = None,
    sample_prompts: Annotated[
        Path | None, typer.Option("--sample-prompts", help="Prompts to continue at each measurement, one a line.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write event files for TensorBoard.")] = False,
    trackio: Annotated[
        str | None, typer.Option("--trackio", help="Also log to this project of trackio, on this machine.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="Stop at this time of day, e.g. 07:00.")] = None,
    max_hours: Annotated[float | None, typer.Option("--max-hours", help="Stop after so many hours.")] = None,
    seed: Seed = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model with LoRA on your data. Ctrl-C stops it with all saved; 'gemwright runs resume' goes on.

    \b
    Examples:
      gemwright tune chats.jsonl --model 270m --out runs/first
      gemwright tune chats.jsonl --model 270m --out runs/night --epochs 5 --holdout 50 --stop-after 2 --until 07:00
      gemwright tune chats.jsonl --model 270m --out runs/short --max-steps 50 --rank 8 --json
      gemwright tune chats.jsonl --model 27b --out runs/large --seq 2048 --tokens-per-step 8192 --vram 7.5GiB
    """
    given = {key: value for key, value in locals().items() if value is not None and key != "as_json"}
    from gemwright.train.config import TrainConfig

    config = TrainConfig(**given)  # before torch is imported, which takes seconds
    from gemwright.train.loop import tune as train

    with Progressing() as progress:
        result = train(config, lambda p: cli_runs.show_progress(progress, p))
    cli_runs.give_result(result, model, as_json)


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; - reads it from stdin.")],
    model: ModelName,
    adapter: Adapter = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without chat turns.")] = False,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 1.0,
    seed: Seed = None,
    engine: EngineName = "llamacpp",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt.

    \b
    Examples:
      gemwright run "Write the date 2031-03-08 in Russian (русский)." --model 270m --adapter runs/demo
      gemwright run "Once upon a time" --model 270m --raw --max-tokens 40 --seed 1 --json
    """
    from gemwright.engines.open import open_engine
    from gemwright.engines.protocol import Sampling
    from gemwright.engines.session import run_prompt
    from gemwright.weights.pull import resolve_model

    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with open_engine(resolve_model(model), engine=engine, adapter=adapter, threads=threads) as opened:
        done = run_prompt(opened, text, raw=raw, sampling=sampling, on_text=None if as_json else _stream)
    if done.stop_reason == "cancelled":
        raise KeyboardInterrupt
    give(_answer(done, opened.name), as_json, "")
    say(f"next: {command('gemwright', 'chat', '--model', model, *_with(adapter))}")


@app.command()
def chat(
    model: ModelName,
    adapter: Adapter = None,
    system: Annotated[
        str | None, typer.Option("--system", help="Instructions that come before the first turn.")
    ] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 1.0,
    seed: Seed = None,
    engine: EngineName = "llamacpp",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Talk with a model; from a pipe each line is a turn. /help lists the commands.

    \b
    Examples:
      gemwright chat --model 270m --adapter runs/demo
      gemwright chat --model 270m --json < questions.txt
    """
    from gemwright.engines.open import open_engine
    from gemwright.engines.protocol import Sampling
    from gemwright.engines.session import Chat
    from gemwright.talk import talk
    from gemwright.weights.pull import resolve_model

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with open_engine(resolve_model(model), engine=engine, adapter=adapter, threads=threads) as opened:
        talk(
            Chat(opened, sampling, system=system, note=say),
            lambda done: give(_answer(done, opened.name), as_json, ""),
            None if as_json else _stream,
        )
    say(f"next: {command('gemwright', 'score', 'TEXTFILE', '--model', model, *_with(adapter))}")


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="270m, 1b, 4b, 12b, 27b (-pt: base model), a GGUF or its URL; all unless said."),
    ] = None,
    purpose: Annotated[
        Literal["run", "tune", "serve"] | None, typer.Option("--for", help="run, tune or serve.")
    ] = None,
    rig: Annotated[
        str | None, typer.Option("--rig", help="A rig of the catalogue or a .toml; this machine if left out.")
    ] = None,
    all_rigs: Annotated[
        bool, typer.Option("--all-rigs", help="All rigs of the catalogue, beside the old claims.")
    ] = False,
    context: Annotated[int, typer.Option("--context", help="Tokens of context to run with.")] = 4096,
    seq: Annotated[int, typer.Option("--seq", help="Tokens a packed row to tune with.")] = 2048,
    tokens_per_step: Annotated[int, typer.Option("--tokens-per-step", help="Tokens a step to tune with.")] = 8192,
    rank: Annotated[int, typer.Option("--rank", help="LoRA rank.")] = 16,
    vram: Annotated[str | None, typer.Option("--vram", help="Video memory to stay within, e.g. 7.5GiB.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Every item, and what each number rests on.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run it for a moment and print predicted beside measured.")
    ] = False,
    cost: Annotated[bool, typer.Option("--cost", help="What the job costs here, rented and by hosted API.")] = False,
    tokens: Annotated[float, typer.Option("--tokens", help="Tokens of the job, trained or in and out each.")] = 1e6,
    kwh: Annotated[float | None, typer.Option("--kwh", help="US$ a kWh of electricity.")] = None,
    purchase: Annotated[float, typer.Option("--purchase", help="US$ the machine would cost (0: it is there).")] = 0.0,
    prices: Annotated[Path | None, typer.Option("--prices", help="A TOML of your own prices.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what fits, how fast it will be and what it takes, before anything is downloaded or loaded.

    \b
    Examples:
      gemwright plan
      gemwright plan 12b --for tune --rig rtx4060ti-8gb --explain
      gemwright plan ./gemma-3-4b-it-q4_0.gguf --for run --context 32768 --json
      gemwright plan 4b --for run --cost --tokens 20e6
    """
    from gemwright.plan.ask import Money, ask

    asked = ask(
        model,
        purpose,
        rig=rig,
        all_rigs=all_rigs,
        context=context,
        seq=seq,
        tokens_per_step=tokens_per_step,
        rank=rank,
        vram=vram,
        explain=explain,
        money=Money(tokens, kwh, purchase, prices) if cost else None,
        colour=has_colour(),
    )
    if verify and asked.fits:
        from gemwright.verify import verify as measure

        asked = measure(asked, model, rig)
    give(asked.result, as_json, "\n".join(asked.lines))
    if not asked.fits:
        raise typer.Exit(3)
    say(f"next: {command('gemwright', *asked.next)}")


@app.command()
def score(
    textfile: Annotated[Path, typer.Argument(help="A UTF-8 text.")],
    model: ModelName,
    adapter: Adapter = None,
    engine: EngineName = "llamacpp",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Say how well a model predicts a text: perplexity and bits per byte.

    \b
    Examples:
      gemwright score page.txt --model 270m
      gemwright score page.txt --model 270m --adapter runs/demo --engine pytorch --json
    """
    from gemwright.engines.open import open_engine
    from gemwright.evaluate.perplexity import score_file
    from gemwright.weights.pull import resolve_model

    with (
        open_engine(resolve_model(model), engine=engine, adapter=adapter, parallel=4, threads=threads) as opened,
        Progressing() as progress,
    ):
        got = score_file(
            textfile, opened, lambda done, of: progress.update("scoring", done / of, f"{done}/{of} tokens")
        )
    text = f"perplexity {got.perplexity:.3f}, {got.bits_per_byte:.4f} bits per byte"
    give(asdict(got), as_json, f"{textfile}: {got.tokens} tokens, {text}, {got.nll_per_token:.4f} nats per token")
    say(f"next: {command('gemwright', 'tune', 'YOUR.jsonl', '--model', model, '--out', 'runs/mine')}")


def _stream(text: str) -> None:
    print(text, end="", flush=True)


def _answer(done: Generation, engine: str) -> dict[str, Any]:
    fields = ("text", "prompt_tokens", "completion_tokens", "tokens_per_s", "first_token_s")
    return {field: getattr(done, field) for field in fields} | {"engine": engine}


def _with(adapter: Path | None) -> list[object]:
    return ["--adapter", adapter] if adapter else []
