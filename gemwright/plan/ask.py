"""What `gemwright plan` was asked, checked and answered: a model or all, a rig or all, as text and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from gemwright.errors import InputError
from gemwright.plan.answer import Answer, Purpose, Work, answer, every
from gemwright.plan.cost import Cost, Settings, claims, claims_lines, cost_of
from gemwright.plan.history import recall
from gemwright.plan.model_bytes import ModelBytes, published, weigh
from gemwright.plan.price_files import load_prices
from gemwright.plan.table import rig_line, screen, table
from gemwright.report import bytes_of
from gemwright.rigs import Rig, load_rig, rig_names, this_machine
from gemwright.spec import SPECS

# What people are told of these sizes; `--all-rigs` shows it beside what is so.
CLAIMS = (
    "As it was claimed of an 8 GB card: 1B runs and fine-tunes; 4B crawls at 2-3 tokens/s and cannot be fine-tuned;",
    "12B and 27B are a pipe dream. As it is:",
)


@dataclass(frozen=True)
class Money:
    """A job to be priced: its tokens (trained, or read and written each) and what a person says of prices, in US$."""

    tokens: float = 1e6
    kwh: float | None = None
    purchase: float = 0.0
    prices: Path | None = None


@dataclass(frozen=True)
class Asked:
    """The answer's data, its lines for a terminal, whether it fits, the words of the next command, and what was asked.

    `work` is None where it was more than one thing.
    """

    result: dict[str, Any]
    lines: list[str]
    fits: bool
    next: Sequence[str]
    work: Work | None = None


def ask(
    model: str | None,
    purpose: Purpose | None,
    *,
    rig: str | None = None,
    all_rigs: bool = False,
    context: int = 4096,
    seq: int = 2048,
    tokens_per_step: int = 8192,
    rank: int = 16,
    vram: str | None = None,
    explain: bool = False,
    money: Money | None = None,
    colour: bool = False,
) -> Asked:
    """Answer a question about models on rigs. Raises InputError for what cannot be asked."""
    for name, value in (("context", context), ("seq", seq), ("tokens-per-step", tokens_per_step), ("rank", rank)):
        if value < 1:
            raise InputError(f"{value} is not possible", where=f"--{name}", fix="Give at least 1.")
    room = _room(vram)

    def work(kind: Purpose) -> Work:
        return Work(kind, seq, max(seq, tokens_per_step), rank, context, room)

    if all_rigs:
        return _all_rigs(model, [work(purpose)] if purpose else [work("run"), work("tune")], colour)
    where = load_rig(rig) if rig else this_machine()
    seen = [] if rig else recall()
    if model is None:
        works = [work(purpose)] if purpose else [work("run"), work("tune")]
        answers = every([(name, published(name)) for name in SPECS], where, works, seen)
        lines = [rig_line(where), "", *table(answers, colour)]
        table_data = {"rig": where.name, "answers": [found.as_json() for found in answers]}
        return Asked(table_data, lines, True, ("plan", "12b", "--for", "tune", "--explain", *_named(rig)))
    weighed = _weighed(model)
    _check(weighed, context, seq, rank)
    wanted = work(purpose or "tune")
    found = answer(_short(model), weighed, where, wanted, seen)
    lines = screen(found, where, colour, explain=explain)
    result: dict[str, Any] = {"rig": where.name} | found.as_json()
    if money is not None and found.fits:
        cost = _priced(weighed, found, where, money)
        lines, result = [*lines, "", *cost.lines()], result | {"cost": cost.as_json()}
    return Asked(result, lines, found.fits, _next(model, found), wanted)


def _priced(model: ModelBytes, found: Answer, rig: Rig, money: Money) -> Cost:
    """The price of a job of so many tokens, trained or read and written."""
    training = found.purpose == "tune"
    seconds = money.tokens / found.tokens_per_s
    if not training:
        seconds += money.tokens / found.prefill_tokens_per_s
    settings = Settings(
        usd_per_kwh=money.kwh,
        purchase_usd=money.purchase,
        vram_gb=found.device_bytes / 1e9,
        training=training,
        watts_basis=rig.basis.get("watts_load", "the rig's"),
        prices_file=money.prices,
    )
    written = 0.0 if training else money.tokens
    return cost_of(seconds, rig.watts_load, money.tokens, written, model.spec.name, settings)


def _room(vram: str | None) -> int | None:
    if vram is None:
        return None
    try:
        room = bytes_of(vram)
    except ValueError as error:
        raise InputError(str(error), where="--vram", fix="Give it as 7.5GiB.") from None
    if room <= 0:
        raise InputError(f"{vram} is not possible", where="--vram", fix="Give it as 7.5GiB.")
    return room


def _weighed(model: str) -> ModelBytes:
    if model.startswith(("http://", "https://")) or Path(model).is_file() or model.endswith(".gguf"):
        return weigh(model)
    return published(model)


def _check(model: ModelBytes, context: int, seq: int, rank: int) -> None:
    longest = model.spec.context
    for name, value in (("context", context), ("seq", seq)):
        if value > longest:
            what = f"{value} tokens exceed the {longest} of Gemma 3 {model.spec.name}"
            raise InputError(what, where=f"--{name}", fix=f"Give {longest} at most.")
    widest = min(min(shape) for shape in model.spec.linear_shapes.values())
    if rank > widest:
        raise InputError(
            f"rank {rank} does not fit the matrices of Gemma 3 {model.spec.name}",
            where="--rank",
            fix=f"Use 1 to {widest}.",
        )


def _short(model: str) -> str:
    return model if len(model) <= 40 else Path(model).name


def _named(rig: str | None) -> tuple[str, ...]:
    return ("--rig", rig) if rig else ()


def _next(model: str, found: Answer) -> tuple[str, ...]:
    if found.purpose == "tune":
        return ("tune", "YOUR.jsonl", "--model", model, "--out", "runs/mine")
    return ("chat", "--model", model)


def _all_rigs(model: str | None, works: Sequence[Work], colour: bool) -> Asked:
    names = [model] if model else list(SPECS)
    models = [(_short(name), _weighed(name)) for name in names]
    prices = load_prices(None)
    lines, result = [*claims_lines(claims(prices, date.today())), "", *CLAIMS], []
    for name in rig_names():
        rig = load_rig(name)
        answers = every(models, rig, works)
        lines += ["", rig_line(rig), *table(answers, colour)]
        result.append({"rig": name, "answers": [found.as_json() for found in answers]})
    return Asked({"rigs": result}, lines, True, ("plan", "12b", "--for", "tune", "--rig", "rtx4060ti-8gb"))
