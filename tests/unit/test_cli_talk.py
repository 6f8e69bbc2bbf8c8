"""The conversation loop: turns, slash commands, what a person's terminal and a pipe each get."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gemwright.data.read import read_examples
from gemwright.engines.protocol import Generation
from gemwright.errors import InputError
from gemwright.talk import talk
from gemwright.text.chat import Message


@dataclass
class Echo:
    """Answers every turn with the turn in capitals; `fault` is raised instead, once."""

    messages: list[Message] = field(default_factory=list)
    fault: BaseException | None = None
    stop_reason: str = "stop"

    def say(self, text: str, on_text: Any = None) -> Generation:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        self.messages += [Message("user", text), Message("model", text.upper())]
        return Generation(text.upper(), 3, 2, 10.0, 0.1, self.stop_reason)

    def reset(self) -> None:
        self.messages.clear()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def hold(chat: Echo, typed: str, monkeypatch: pytest.MonkeyPatch, person: bool = False) -> list[str]:
    """The answers given while `typed` is read."""
    monkeypatch.setattr(sys, "stdin", Terminal(typed) if person else io.StringIO(typed))
    answers: list[str] = []
    talk(chat, lambda done: answers.append(done.text), None)  # type: ignore[arg-type]
    return answers


def test_every_line_is_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hold(Echo(), "one\n\n  \ntwo\r\nпять", monkeypatch) == ["ONE", "TWO", "ПЯТЬ"]


def test_reset_and_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Echo()
    assert hold(chat, "one\n/reset\ntwo\n/exit\nthree\n", monkeypatch) == ["ONE", "TWO"]
    assert [message.content for message in chat.messages] == ["two", "TWO"]


def test_save_writes_what_tune_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "my talk.jsonl"
    hold(Echo(), f"привет\n/save {file}\n", monkeypatch)
    (example,) = read_examples(file)
    assert [turn["content"] for turn in example.messages] == ["привет", "ПРИВЕТ"]
    assert json.loads(file.read_text(encoding="utf-8"))["messages"][0]["role"] == "user"


def test_save_never_overwrites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="there already"):
        hold(Echo(), f"hi\n/save {tmp_path / 'mine'}\n", monkeypatch)
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "mine"


def test_unknown_command_ends_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="/dance"):
        hold(Echo(), "/dance\n", monkeypatch)


def test_a_person_sees_the_error_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Echo(fault=InputError("the conversation is too long", fix="/reset begins anew."))
    assert hold(chat, "one\n/help\n/save\n/dance\ntwo\n", monkeypatch, person=True) == ["TWO"]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error: the conversation is too long. /reset begins anew." in shown.err
    assert shown.err.count("you> ") == 6 and "/save FILE" in shown.err and "/dance" in shown.err


def test_interrupting_an_answer_ends_a_pipe_but_not_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        hold(Echo(stop_reason="cancelled"), "one\ntwo\n", monkeypatch)
    assert hold(Echo(stop_reason="cancelled"), "one\ntwo\n", monkeypatch, person=True) == ["ONE", "TWO"]
