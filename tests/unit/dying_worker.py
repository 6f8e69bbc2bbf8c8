"""An encoder that takes its worker process down; a module of its own, since that process imports it."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

from gemwright.text.pieces import Encoder


class DiesInItsResult(Encoder):
    """In a worker process it dies when half of its first result is written."""

    def __call__(self, text: str) -> list[int]:
        if multiprocessing.parent_process():
            Connection._send = half_and_die  # type: ignore[attr-defined]
        return super().__call__(text)


def half_and_die(self: Connection, content: bytes, write: object = None) -> None:
    os.write(self.fileno(), content[: len(content) // 2])
    os._exit(9)
