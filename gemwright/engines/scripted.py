"""A fake engine for tests: what it says and how likely it finds a token are given beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from gemwright.engines.protocol import Generation, Sampling
from gemwright.errors import InputError


class Scripted:
    """Says `replies` in turn (the last for ever), a word at a time; every token has the log-probability `logprob(id)`.

    A token id is a UTF-8 byte plus 256, so that none is a control token. `prompts` and `adapters` record the calls.
    """

    name = "scripted"

    def __init__(
        self,
        replies: Sequence[str] = ("",),
        logprob: Callable[[int], float] = lambda id_: -1.0,
        context: int = 4096,
    ) -> None:
        self.replies, self.logprob, self.context = list(replies), logprob, context
        self.prompts: list[list[int]] = []
        self.adapters: list[Path | None] = []
        self.closed = False

    def encode(self, text: str) -> list[int]:
        """One id a byte."""
        return [256 + byte for byte in text.encode("utf-8")]

    def generate(
        self, prompt_ids: list[int], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> Generation:
        """The next reply, cut to `max_tokens` words."""
        if len(prompt_ids) >= self.context:
            raise InputError(f"{len(prompt_ids)} tokens do not fit {self.context}", where="prompt", fix="Shorten it.")
        self.prompts.append(list(prompt_ids))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        words = reply.split(" ")
        said: list[str] = []
        reason = "length" if len(words) > sampling.max_tokens else "stop"
        try:
            for index, word in enumerate(words[: sampling.max_tokens]):
                said.append(word if index == 0 else f" {word}")
                if on_text:
                    on_text(said[-1])
        except KeyboardInterrupt:
            reason = "cancelled"
        return Generation("".join(said), len(prompt_ids), len(said), 1000.0, 0.001, reason)

    def score(self, ids: list[int], start: int = 1, on_progress: Callable[[int], None] | None = None) -> list[float]:
        """`logprob` of each of ids[start:]."""
        if on_progress:
            on_progress(len(ids) - start)
        return [self.logprob(id_) for id_ in ids[start:]]

    def load_adapter(self, path: Path | None) -> None:
        """Record it."""
        self.adapters.append(path)

    def close(self) -> None:
        """Record it."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
