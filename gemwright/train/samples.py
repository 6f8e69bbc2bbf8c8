"""What the model under training writes after fixed prompts, at every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemwright.data.read import read_examples
from gemwright.errors import InputError
from gemwright.kernels.dispatch import rms_norm
from gemwright.runs import Lines, RunFolder
from gemwright.spec import END_OF_TURN, EOS, PAD
from gemwright.text.chat import Message, encode_prompt
from gemwright.train.batches import Encoded, make_row
from gemwright.train.setup import Setup
from gemwright.train.step import forward_states

PROMPTS, MAX_TOKENS = 3, 48
STOPS = (EOS, END_OF_TURN)


@dataclass(frozen=True)
class Prompt:
    """A text and the ids that the model continues."""

    text: str
    ids: list[int]


def read_prompts(file: Path | None, data: Path, encode: Callable[[str], list[int]], seq: int) -> list[Prompt]:
    """One prompt a line of `file`, or the first of `data` that fit a row of `seq` tokens with their answers.

    InputError where the file has none, or one is too long.
    """
    if file is None:
        return _first_of(data, encode, seq)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=file, fix="Check --sample-prompts.") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if line:
            ids = encode_prompt([Message("user", line)], encode)
            if len(ids) + MAX_TOKENS > seq:
                what = f"the prompt has {len(ids)} tokens, and with an answer it must fit {seq}"
                raise InputError(what, where=f"{file}:{number}", fix="Shorten it, or use a larger --seq.")
            prompts.append(Prompt(line, ids))
    if not prompts:
        raise InputError("holds no prompt", where=file, fix="Write one prompt a line.")
    return prompts
