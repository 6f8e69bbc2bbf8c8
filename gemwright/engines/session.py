"""A single prompt, and a conversation that keeps its history within the engine's context."""

from __future__ import annotations

import sys
from collections.abc import Callable

from gemwright.engines.protocol import Engine, Generation, Sampling
from gemwright.errors import InputError
from gemwright.spec import BOS
from gemwright.text.chat import Message, render_prompt

OnText = Callable[[str], None]


def run_prompt(
    engine: Engine, prompt: str, *, raw: bool = False, sampling: Sampling, on_text: OnText | None = None
) -> Generation:
    """Answer `prompt` as a user's turn, or continue it as it stands where `raw`."""
    ids = [BOS, *engine.encode(prompt)] if raw else render_prompt([Message("user", prompt)], engine.encode)
    return engine.generate(ids, sampling, on_text)


def say_on_stderr(line: str) -> None:
    """The default `note` of a Chat."""
    print(line, file=sys.stderr)


class Chat:
    """A conversation. Where it outgrows the context the oldest turns are left out of the prompt, and `note` says so."""

    def __init__(
        self, engine: Engine, sampling: Sampling, system: str | None = None, note: OnText = say_on_stderr
    ) -> None:
        self.engine, self.sampling, self.note = engine, sampling, note
        self._system = [Message("system", system)] if system else []
        self.messages: list[Message] = []
        self._dropped = 0

    def reset(self) -> None:
        """Forget all turns; the system text stays."""
        self.messages, self._dropped = [], 0

    def say(self, text: str, on_text: OnText | None = None) -> Generation:
        """The model's answer to `text`. A Ctrl-C keeps what was said so far ("cancelled"); an error forgets `text`."""
        asked = [*self.messages, Message("user", text)]
        ids, dropped = self._fit(asked)
        answer = self.engine.generate(ids, self.sampling, on_text)
        if dropped > self._dropped:
            self.note(f"The oldest {dropped} messages no longer fit the context and are left out.")
            self._dropped = dropped
        self.messages = [*asked, Message("model", answer.text)]
        return answer

    def _fit(self, asked: list[Message]) -> tuple[list[int], int]:
        """Prompt ids that leave room for the answer, and how many of the oldest messages they leave out."""
        room = self.engine.context - min(self.sampling.max_tokens, self.engine.context // 4)
        for dropped in range(self._dropped, len(asked), 2):
            ids = render_prompt([*self._system, *asked[dropped:]], self.engine.encode)
            if len(ids) <= room:
                return ids, dropped
        raise InputError(
            f"this message takes {len(ids)} tokens, the context leaves {room}", where="chat", fix="Shorten it."
        )
