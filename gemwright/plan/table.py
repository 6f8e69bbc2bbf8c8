"""Answers as text for a terminal: one screen for a model, one table for all sizes, in colour and in words."""

from __future__ import annotations

from collections.abc import Sequence

from gemwright.plan.answer import Answer
from gemwright.rig_file import Rig

# Below these a person waits: tokens a second written, and trained.
SLOW_RUN, SLOW_TUNE = 5.0, 100.0
CELL = 42
GREEN, YELLOW, RED, PLAIN = "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[0m"


def verdict(answer: Answer) -> str:
    """In a word: no, slow, or yes."""
    if not answer.fits:
        return "no"
    return "slow" if answer.tokens_per_s < (SLOW_TUNE if answer.purpose == "tune" else SLOW_RUN) else "yes"


def coloured(text: str, word: str, colour: bool) -> str:
    """`text` in the colour of a verdict."""
    shade = {"yes": GREEN, "slow": YELLOW, "no": RED}[word]
    return f"{shade}{text}{PLAIN}" if colour else text


def speed(answer: Answer) -> str:
    """Tokens a second with the band that measurements kept to."""
    rate = answer.tokens_per_s
    return f"{rate:,.0f} tokens/s" if rate >= 20 else f"{rate:.1f} tokens/s"


def rig_line(rig: Rig) -> str:
    """The rig in a line."""
    if rig.gpu is None:
        card = f"no GPU, {rig.cpu.name}"
    elif rig.unified:
        card = f"{rig.gpu.name}, memory shared with the processor"
    else:
        link = f"{rig.gpu.link_bytes_s / 1e9:.1f} GB/s to it"
        card = f"{rig.gpu.name}, {rig.gpu.vram_bytes / 2**30:.1f} GiB, {link}"
    ram = f"{rig.ram_available_bytes / 2**30:.0f} of {rig.ram_bytes / 2**30:.0f} GiB of RAM free"
    return f"{rig.name}: {card}; {ram}"


def table(answers: Sequence[Answer], colour: bool) -> list[str]:
    """A row a model, run and tune side by side."""
    models = list(dict.fromkeys(answer.model for answer in answers))
    purposes = list(dict.fromkeys(answer.purpose for answer in answers))
    heads = "".join(f"{f'to {purpose} (video memory + RAM)':<{CELL}}" for purpose in purposes)
    lines = [f"        {heads}".rstrip()]
    for model in models:
        cells = []
        for purpose in purposes:
            found = next(a for a in answers if a.model == model and a.purpose == purpose)
            word = verdict(found)
            text = f"{word:<5}{speed(found):<17}{_memory(found)}" if found.fits else f"{word:<5}{found.what}"
            short = text if len(text) < CELL else f"{text[: CELL - 3]}…"
            cells.append(coloured(f"{short:<{CELL}}", word, colour))
        lines.append(f"  {model:<6}" + "".join(cells).rstrip())
    return lines


def _memory(answer: Answer) -> str:
    video = f"{answer.device_bytes / 1e9:.1f} + " if answer.device_bytes else ""
    return f"{video}{answer.host_bytes / 1e9:.1f} GB"


def screen(answer: Answer, rig: Rig, colour: bool, *, explain: bool) -> list[str]:
    """One answer in full."""
    word = verdict(answer)
    lines = [rig_line(rig), ""]
    if not answer.fits:
        lines.append(coloured(f"{answer.model} to {answer.purpose}: does not fit", word, colour))
        return [*lines, f"  {answer.what}", *(f"  {line}" for line in answer.hint.splitlines())]
    head = f"{answer.model} to {answer.purpose}: {'fits' if word == 'yes' else 'fits, slowly'}"
    lines.append(coloured(head, word, colour))
    lines.append(f"  {answer.what}")
    rate = f"  about {speed(answer)} (within {answer.band:.0%} where it was measured)"
    if answer.prefill_tokens_per_s:
        rate += f", reading {answer.prefill_tokens_per_s:,.0f} tokens/s of a prompt"
    lines.append(rate)
    lines += [f"  {line}" for line in answer.hint.splitlines()]
    if explain:
        lines += ["", *items(answer), "", *basis(answer, rig)]
    return lines


def items(answer: Answer) -> list[str]:
    """Every item of the bytes, device and host apart."""
    width = max((len(name) for _, name, _ in answer.items), default=0)
    lines = []
    for where, title, total in (
        ("device", "video memory", answer.device_bytes),
        ("host", "RAM", answer.host_bytes),
    ):
        rows = [(name, count) for place, name, count in answer.items if place == where and count]
        if rows:
            lines.append(f"  {title}, {total / 2**30:.2f} GiB")
            lines += [f"    {name:<{width}}  {count / 2**30:7.2f} GiB" for name, count in rows]
    return lines


def basis(answer: Answer, rig: Rig) -> list[str]:
    """Where each number comes from."""
    width = max((len(name) for name in answer.basis), default=0)
    return ["  what it rests on", *(f"    {name:<{width}}  {why}" for name, why in answer.basis.items())]
