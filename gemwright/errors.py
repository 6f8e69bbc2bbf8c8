"""The error tree: every failure a person can cause or meet ends as one line and an exit code."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class GemwrightError(Exception):
    """A failure with one clear line: what happened, where, and what to do about it.

    `exit_code` is what the command line returns: 1 the machine failed, 2 bad input or usage, 3 does not fit.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        line = f"{where}: {what}" if where is not None else what
        super().__init__(f"{line}. {fix}" if fix else line)


class MachineError(GemwrightError):
    """The machine, the network or a child process failed; the input was fine."""

    exit_code = 1


class InputError(GemwrightError):
    """A file, value or combination that a person gave cannot be used."""

    exit_code = 2


class DoesNotFit(GemwrightError):
    """The work asked for is larger than the memory allowed for it."""

    exit_code = 3


def needed(value: T | None) -> T:
    """`value`, which the order of calls guarantees."""
    if value is None:
        raise RuntimeError("called in the wrong order: a value that an earlier call leaves is missing")
    return value
