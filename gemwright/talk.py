"""The conversation loop of `gemwright chat`: lines in, answers out, a few commands that begin with a slash."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gemwright.errors import GemwrightError, InputError
from gemwright.report import say
from gemwright.runs import atomic_path

if TYPE_CHECKING:
    from gemwright.engines.protocol import Generation
    from gemwright.engines.session import Chat

HELP = """/reset      forget the conversation
/save FILE  write it as one line of JSONL, ready for 'gemwright tune'
/help       show this
/exit       leave (so does Ctrl-D; Ctrl-C stops an answer)"""


def talk(chat: Chat, answer: Callable[[Generation], None], on_text: Callable[[str], None] | None) -> None:
    """Take every line of stdin as a turn until it ends or says /exit; `answer` gets each finished one.

    On a terminal an error is said and the conversation goes on; from a pipe it ends the program.
    """
    person = sys.stdin.isatty()
    for line in _typed() if person else _piped():
        try:
            if line.startswith("/"):
                if not _obey(line, chat):
                    return
                continue
            done = chat.say(line, on_text)
            if done.stop_reason == "cancelled" and not person:
                raise KeyboardInterrupt
            answer(done)
        except GemwrightError as error:
            if not person:
                raise
            say(f"error: {error}")


def _piped() -> Iterator[str]:
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\r\n")


def _typed() -> Iterator[str]:
    """Lines from a person, edited with readline where there is one; Ctrl-C drops the line, Ctrl-D ends."""
    if importlib.util.find_spec("readline"):
        import readline  # noqa: F401  (its import is what gives input() history and editing)
    while True:
        try:
            line = _line("you> ")
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /exit leaves)")
            continue
        except EOFError:
            say("")
            return
        if line.strip():
            yield line


def _line(prompt: str) -> str:
    """One line; the prompt never goes where the data goes."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _obey(line: str, chat: Chat) -> bool:
    """Do what a slash command says; False when the conversation is over."""
    word, _, rest = line.strip().partition(" ")
    if word in ("/exit", "/quit"):
        return False
    if word == "/help":
        say(HELP)
    elif word == "/reset":
        chat.reset()
        say("(forgotten)")
    elif word == "/save":
        _save(Path(rest.strip()), chat) if rest.strip() else say("error: /save: no file named. Write /save FILE.")
    else:
        raise InputError("no such command", where=word, fix="/help lists them.")
    return True


def _save(path: Path, chat: Chat) -> None:
    if path.exists():
        raise InputError("is there already", where=path, fix="Choose another name.")
    turns = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"messages": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"({len(turns)} turns saved to {path})")
