"""What every engine can do: encode, generate, score, and take an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from gemwright.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and penalty 1 switch a rule off.

    The defaults are those Google publishes for Gemma 3.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "from 0 (greedy) to 100"),
            ("top_k", self.top_k >= 0, "at least 0 (0: no limit)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0 (1: no penalty)"),
            ("seed", self.seed is None or 0 <= self.seed < 2**32 - 1, "from 0 to 4294967294"),
        )
        for name, fine, wanted in rules:
            if not fine:
                raise InputError(f"{getattr(self, name)} is not possible", where=name, fix=f"Give a value {wanted}.")


@dataclass(frozen=True)
class Generation:
    """One answer. `first_token_s` counts from the request, `tokens_per_s` is of the decoding after the first token.

    `stop_reason` is "stop" (the model ended its turn), "length" (max_tokens or the context is full) or "cancelled".
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float
    first_token_s: float
    stop_reason: str


class Engine(Protocol):
    """One loaded model. Token ids in, text out; closed by `close` or at the end of a `with`."""

    name: str

    @property
    def context(self) -> int:
        """Tokens (prompt and answer together) that fit."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS; control tokens written in the text stay text."""

    def generate(
        self, prompt_ids: list[int], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> Generation:
        """Continue `prompt_ids`; `on_text` gets whole characters as they come.

        Stops at <end_of_turn> and <eos>, which are not part of the text. Raises InputError where the prompt does not
        fit the context. KeyboardInterrupt ends the answer there ("cancelled") and leaves the engine usable.
        """

    def score(self, ids: list[int], start: int = 1, on_progress: Callable[[int], None] | None = None) -> list[float]:
        """Natural log-probability of each of ids[start:] given all ids before it; `on_progress(done)` on the way."""

    def load_adapter(self, path: Path | None) -> None:
        """Use the LoRA adapter at `path` from now on, or none."""

    def close(self) -> None:
        """Give everything back; more than once is fine."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
