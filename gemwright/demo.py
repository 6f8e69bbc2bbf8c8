"""The demo: fine-tune the real Gemma 3 270M on dates, money and names in many languages; measure before and after."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemwright.errors import InputError
from gemwright.report import Progressing, duration
from gemwright.runs import RunFolder

if TYPE_CHECKING:
    from gemwright.data.read import Example
    from gemwright.data.store import Encoded
    from gemwright.train.loop import Progress, TuneResult

MODEL = "270m"
STEPS, RANK, SEQ, LEARNING_RATE = 150, 16, 1024, 2e-3
# Seconds that training may take, for ten minutes in all; those that it aims at on a slower machine, with half as many
# tokens a step, which teaches more in that time; and the fewest steps that help, however long they take.
MOST_S, TRAIN_S, FEWEST = 380.0, 370.0, 70
# Questions that are answered at a time, and tokens that each may take with its answer.
SIDE_BY_SIDE, ROOM = 32, 256
# Tokens by which an answer may be longer than the right one before it is cut off: it is wrong by then.
LONGER_ANSWER = 4
SHOWN = ("Russian", "Russian", "Ukrainian", "German", "Polish", "Greek", "Turkish", "Japanese", "Hindi", "Spanish")
# Where each phase ends on the one bar: its share of the time measured on two cores.
BEGUN, BEFORE_DONE, TRAINED = 0.02, 0.10, 0.92


@dataclass(frozen=True)
class Shown:
    """One held-out question, the answer of the base model, of the tuned one, and the right one."""

    question: str
    before: str
    after: str
    right: str
    correct: bool


def run_demo(out: Path, progress: Progressing, threads: int | None = None) -> tuple[dict[str, Any], list[Shown]]:
    """Fetch, measure, tune, measure again; the summary (also kept as `summary.json` in `out`) and examples to show.

    An earlier demo in `out` is replaced. Raises InputError where `out` holds anything else.
    """
    from gemwright.data.cldr import load_split, split_path
    from gemwright.train.config import TrainConfig
    from gemwright.train.loop import tune
    from gemwright.train.setup import choose_device
    from gemwright.train.verify import measure_tune
    from gemwright.weights.pull import pull

    start = time.perf_counter()
    _clear(out)
    progress.update("weights", 0.0, "fetching and verifying Gemma 3 270M")
    model = pull(MODEL, report=progress.say).path
    test = load_split("test")
    before = _answers(model, None, test, progress, ("before", BEGUN, BEFORE_DONE), threads)
    fixed: dict[str, Any] = {"data": split_path("train"), "model": model, "out": out, "rank": RANK}
    fixed |= {"lr": LEARNING_RATE, "threads": threads}
    steps, seq = STEPS, SEQ
    if choose_device("auto").type == "cpu":
        progress.update("training", BEFORE_DONE, "measuring how fast this machine trains")
        half = TrainConfig(seq=SEQ // 2, tokens_per_step=SEQ // 2, **fixed)
        steps, seq = _affordable(2 * measure_tune(half, 2, _row(model, SEQ // 2)).step_s)
    if seq < SEQ:
        progress.say(
            f"{steps} steps of {seq} tokens, not {STEPS} of {SEQ}, so that it takes minutes on this machine too"
        )
    config = TrainConfig(max_steps=steps, seq=seq, tokens_per_step=seq, **fixed)
    trained = tune(config, lambda now: _training(now, progress))
    after = _answers(model, out, test, progress, ("after", TRAINED, 1.0), threads)
    summary = _summary(trained, test, before, after) | {
        "seconds": round(time.perf_counter() - start, 1),
        "run": str(out),
    }
    run = RunFolder.open(out)
    run.end((run.summary() or {}) | summary)
    progress.update("done", 1.0)
    return summary, _examples(test, before, after)


def _row(model: Path, tokens: int) -> list[Encoded]:
    """The first examples to learn from, as many as fit into so many tokens: what they share is computed once."""
    from gemwright.data.cldr import load_split
    from gemwright.data.store import Encoded
    from gemwright.text.chat import Message, encode_example
    from gemwright.text.tokenizer import Tokenizer
    from gemwright.weights.model_file import open_model

    encode = Tokenizer.from_model(open_model(model)).encode
    row = list[Encoded]()
    for example in load_split("train"):
        messages = [Message(turn["role"], turn["content"]) for turn in example.messages]
        row.append(Encoded(*encode_example(messages, encode)))
        if sum(len(document.ids) for document in row) > tokens:
            break
    return row[:-1]


def _affordable(step_s: float) -> tuple[int, int]:
    """(steps, tokens a step) for a machine on which SEQ tokens take `step_s` seconds."""
    if STEPS * step_s < MOST_S:
        return STEPS, SEQ
    return max(FEWEST, int(2 * TRAIN_S / step_s)), SEQ // 2


def _clear(out: Path) -> None:
    """Remove an earlier demo at `out`, finished or broken off; never anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    config = out / "config.json"
    try:
        data = str(json.loads(config.read_text(encoding="utf-8"))["data"])
    except (OSError, ValueError, KeyError, TypeError):
        data = ""
    if Path(data).parts[-2:] != ("cldr", "train.jsonl"):
        raise InputError("holds something that is not a demo", where=out, fix="Choose another --out.")
    if RunFolder(out).is_at_work():
        raise InputError("another demo is at work here", where=out, fix="Wait for its end, or choose another --out.")
    shutil.rmtree(out)


def _answers(
    model: Path,
    adapter: Path | None,
    test: Sequence[Example],
    progress: Progressing,
    share: tuple[str, float, float],
    threads: int | None,
) -> list[str]:
    """The model's greedy answer to each question, several side by side through llama.cpp."""
    from gemwright.engines.llamacpp import LlamaCpp
    from gemwright.engines.open import open_engine
    from gemwright.engines.protocol import Sampling
    from gemwright.text.chat import Message, render_prompt

    phase, begin, end = share
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        progress.update(phase, begin + (end - begin) * done / len(test), f"{done}/{len(test)} held-out questions")

    progress.update(phase, begin, "loading llama.cpp")
    with open_engine(model, adapter=adapter, context=ROOM, parallel=SIDE_BY_SIDE, threads=threads) as engine:
        if not isinstance(engine, LlamaCpp):
            raise TypeError(f"the demo measures through llama.cpp, not {engine.name}")
        prompts = [render_prompt([Message("user", _question(example))], engine.encode) for example in test]
        lengths = [len(engine.encode(_right(example))) + LONGER_ANSWER for example in test]
        samplings = [Sampling(max_tokens=length, temperature=0.0) for length in lengths]
        answers = engine.generate_many(prompts, samplings, count)
        return [given.text + "…" * (given.stop_reason == "length") for given in answers]


def _training(now: Progress, progress: Progressing) -> None:
    text = f"step {now.step}/{now.steps}  loss {now.loss:.3f}  {now.tokens_per_s:.0f} tokens/s"
    text = f"{text}  {duration(now.eta_s)} left" if now.phase == "training" and now.step else now.phase
    progress.update("training", BEFORE_DONE + (TRAINED - BEFORE_DONE) * now.step / max(now.steps, 1), text)


def _summary(
    trained: TuneResult, test: Sequence[Example], before: Sequence[str], after: Sequence[str]
) -> dict[str, Any]:
    from gemwright.data.cldr import exact_match, load_split

    def share(answers: Sequence[str]) -> float:
        right = sum(exact_match(given, _right(example)) for given, example in zip(answers, test, strict=True))
        return round(right / len(test), 4)

    return {
        "train_examples": len(load_split("train")),
        "test_examples": len(test),
        "exact_match_before": share(before),
        "exact_match_after": share(after),
        "loss_first": trained.loss_first,
        "loss_last": trained.loss_last,
        "tokens_per_s": trained.tokens_per_s,
    }


def _question(example: Example) -> str:
    return example.messages[0]["content"]


def _right(example: Example) -> str:
    return example.messages[-1]["content"]


def _examples(test: Sequence[Example], before: Sequence[str], after: Sequence[str]) -> list[Shown]:
    """The first held-out questions of each language in SHOWN, whatever became of them."""
    from gemwright.data.cldr import exact_match

    rows = list(zip(test, before, after, strict=True))
    chosen = []
    for language in SHOWN:
        row = next(row for row in rows if f" in {language} " in _question(row[0]))
        rows.remove(row)
        question, right = _question(row[0]), _right(row[0])
        chosen.append(Shown(question, row[1], row[2], right, exact_match(row[2], right)))
    return chosen


def show(summary: dict[str, Any], examples: Sequence[Shown]) -> str:
    """The result as a person reads it: a table of answers before and after, and the score."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    for title in ("Asked (never seen in training)", "Before", "After", ""):
        table.add_column(title, no_wrap=True)
    for row in examples:
        mark = "right" if row.correct else f"wrong: {row.right}"
        table.add_row(*(Text(cell) for cell in (row.question, _short(row.before, 16), _short(row.after, 24), mark)))
    console = Console(file=io.StringIO(), width=130, highlight=False)
    console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    return (
        "\n".join(line.rstrip() for line in shown.rstrip().splitlines())
        + f"\n\nexact answers on {summary['test_examples']} held-out questions: "
        f"{summary['exact_match_before']:.0%} before, {summary['exact_match_after']:.0%} after; "
        f"loss {summary['loss_first']:.2f} -> {summary['loss_last']:.2f}, {summary['tokens_per_s']:.0f} tokens/s, "
        f"{duration(summary['seconds'])} in all"
    )


def _short(text: str, width: int) -> str:
    """The first line of an answer, cut to `width` characters."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "(nothing)")
    return line if len(line) <= width else line[: width - 1] + "…"
