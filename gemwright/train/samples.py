"""What the model under training writes after fixed prompts, likeliest token by likeliest token, at every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemwright.errors import InputError
from gemwright.kernels.dispatch import rms_norm
from gemwright.kernels.products import product
from gemwright.runs import Lines, RunFolder
from gemwright.spec import END_OF_TURN, EOS, PAD
from gemwright.text.chat import Message, render_prompt
from gemwright.text.tokenizer import Tokenizer
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


def read_prompts(file: Path, encode: Callable[[str], list[int]], seq: int) -> list[Prompt]:
    """A user's turn a line of `file`; InputError where it has none, or one does not fit `seq` tokens with an answer."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        fix = "Give --sample-prompts a text file with one prompt a line."
        raise InputError(f"cannot be read: {error.strerror or error}", where=file, fix=fix) from error
    prompts = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line:
            continue
        ids = render_prompt([Message("user", line)], encode)
        if len(ids) + MAX_TOKENS > seq:
            what = f"the prompt has {len(ids)} tokens, and with {MAX_TOKENS} more it must fit {seq}"
            raise InputError(what, where=f"{file}:{number}", fix="Shorten it, or use a larger --seq.")
        prompts.append(Prompt(line, ids))
    if not prompts:
        raise InputError("holds no prompt", where=file, fix="Write one prompt a line.")
    return prompts


def first_prompts(examples: Sequence[Encoded], decode: Callable[[Sequence[int]], str], seq: int) -> list[Prompt]:
    """What comes before the first answer in the first PROMPTS of `examples` that leave room for one in `seq` tokens."""
    prompts: list[Prompt] = []
    for at in range(min(len(examples), 100)):
        example = examples[at]
        ids = [int(i) for i in example.ids[: list(example.labelled).index(True)]]
        if ids and len(ids) + MAX_TOKENS <= seq:
            text = decode(ids).removeprefix("user\n").removesuffix("model\n")
            prompts.append(Prompt(text.strip(), ids))
        if len(prompts) == PROMPTS:
            break
    return prompts


class Samples:
    """Writes rows of `step`, `prompt` and `text` to `samples.jsonl`."""

    def __init__(self, setup: Setup, run: RunFolder, prompts: Sequence[Prompt], tokenizer: Tokenizer, seq: int) -> None:
        self._setup, self._prompts, self._tokenizer, self._seq = setup, prompts, tokenizer, seq
        self.log = Lines(run.path / "samples.jsonl")
        self.look: Callable[[Mapping[str, Any]], None] = lambda row: None

    def after_evaluation(self, row: Mapping[str, Any]) -> None:
        """Have every prompt continued, in rows that are no longer than those trained on."""
        for group in _groups(self._prompts, self._seq):
            found = continue_greedily(self._setup, [prompt.ids for prompt in group], MAX_TOKENS)
            for prompt, ids in zip(group, found, strict=True):
                sample = {"step": row["step"], "prompt": prompt.text, "text": self._tokenizer.decode(ids)}
                self.log.add(sample)
                self.look(sample)


def _groups(prompts: Sequence[Prompt], seq: int) -> Iterator[list[Prompt]]:
    group: list[Prompt] = []
    for prompt in prompts:
        if group and sum(len(one.ids) + MAX_TOKENS for one in (*group, prompt)) > seq:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


@torch.inference_mode()
def continue_greedily(setup: Setup, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """At most `most` ids after each prompt, up to the end of a turn (which is not among them).

    All prompts lie in one row, which passes the model anew for each token: where layers stream, a pass costs the same
    for one prompt as for all, and nothing is kept that training has no room for.
    """
    written: list[list[int]] = [[] for _ in prompts]
    open_ones = list(range(len(prompts)))
    for _ in range(most):
        texts = [[*prompts[i], *written[i]] for i in open_ones]
        still = []
        for i, token in zip(open_ones, _next_tokens(setup, texts), strict=True):
            if token not in STOPS:
                written[i].append(token)
                still.append(i)
        open_ones = still
        if not open_ones:
            break
    return written


def _next_tokens(setup: Setup, texts: Sequence[Sequence[int]]) -> list[int]:
    model, work = setup.model, setup.work
    # One more token whose label asks for the state before it: that of the text's last.
    asked = [Encoded([*ids, PAD], [False] * len(ids) + [True]) for ids in texts]
    row = make_row(model.spec, asked, setup.device, setup.dtype)
    (x,) = forward_states(model, [row], work)
    h, _ = rms_norm(x[: len(texts)], model.residency.final_norm, model.spec.norm_eps)
    return _likeliest(setup, h)


def _likeliest(setup: Setup, h_MD: Tensor) -> list[int]:
    residency, rows = setup.model.residency, setup.work.head_rows
    best = torch.full((len(h_MD),), -torch.inf, device=h_MD.device)
    token = torch.zeros(len(h_MD), dtype=torch.long, device=h_MD.device)
    for start in range(0, residency.vocab, rows):
        logits = product(h_MD, residency.head_rows(start, min(start + rows, residency.vocab))).float()
        top, at = logits.max(dim=1)
        token = torch.where(top > best, at + start, token)
        best = torch.maximum(best, top)
    found: list[int] = token.tolist()
    return found
