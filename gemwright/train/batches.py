"""From conversations to packed rows of tokens, in an order that is a pure function of seed, epoch and position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemwright.data.read import read_examples
from gemwright.errors import GemwrightError, InputError
from gemwright.kernels.attend import Attention
from gemwright.kernels.heads import Table
from gemwright.layout import LABEL_STEP, ROW_STEP, label_step, rounded
from gemwright.model.decoder import plan_attention, rope_tables
from gemwright.spec import PAD, ModelSpec
from gemwright.text.chat import Message, TrainOn, encode_example

CPU = torch.device("cpu")
OPEN_ROWS = 32
IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One example: token ids, and for each whether it is a target."""

    ids: list[int]
    labelled: list[bool]


@dataclass(frozen=True)
class Row:
    """One micro-batch: documents one after another, filled up to a whole ROW_STEP by one more of PAD tokens.

    ids [N] int64; `at` [M] positions whose next token is a target, and those `targets` [M], filled up to a whole
    LABEL_STEP by unlabelled positions with IGNORED; attention and rotation tables as (local, global).
    `tokens` and `labelled` count without what was filled up.
    """

    ids: Tensor
    at: Tensor
    targets: Tensor
    attention: tuple[Attention, Attention]
    tables: tuple[Table, Table]
    tokens: int
    labelled: int


def encode_file(path: Path, encode: Callable[[str], list[int]], train_on: TrainOn, seq: int) -> list[Encoded]:
    """All examples of a file as ids; InputError with the line where one cannot be used or is longer than `seq`."""
    encoded, longest, where = [], 0, 0
    for example in read_examples(path):
        messages = [Message(turn["role"], turn["content"]) for turn in example.messages]
        try:
            ids, labelled = encode_example(messages, encode, train_on)
        except GemwrightError as error:
            raise InputError(error.what, where=f"{path}:{example.line}", fix=error.fix) from error
        if len(ids) > longest:
            longest, where = len(ids), example.line
        encoded.append(Encoded(ids, labelled))
    if longest > seq:
        long = sum(len(e.ids) > seq for e in encoded)
        raise InputError(
            f"{long} of {len(encoded)} examples are longer than {seq} tokens, the longest has {longest}",
            where=f"{path}:{where}",
            fix=f"Use --seq {longest} or shorten them.",
        )
    return encoded


def labelled_shares(examples: Sequence[Encoded]) -> tuple[float, float]:
    """Of all tokens the share that are targets, and the most that any example has, and so any row of them."""
    counts = [(len(example.ids), sum(example.labelled)) for example in examples]
    return sum(n for _, n in counts) / sum(n for n, _ in counts), max(labelled / n for n, labelled in counts)


def pack(examples: Sequence[Encoded], seq: int, seed: int, epoch: int) -> list[list[int]]:
    """Rows of example indices for one epoch: shuffled, then each put into the fullest open row that still holds it."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    rows: list[list[int]] = []
    open_rows: list[tuple[int, list[int]]] = []  # (tokens, indices)
    for index in order:
        size = len(examples[index].ids)
        fitting = [i for i, (used, _) in enumerate(open_rows) if used + size <= seq]
        if fitting:
            best = max(fitting, key=lambda i: open_rows[i][0])
            used, members = open_rows[best]
            open_rows[best] = (used + size, [*members, index])
        else:
            if len(open_rows) == OPEN_ROWS:
                fullest = max(range(OPEN_ROWS), key=lambda i: open_rows[i][0])
                rows.append(open_rows.pop(fullest)[1])
            open_rows.append((size, [index]))
    return rows + [members for _, members in sorted(open_rows, key=lambda row: -row[0])]


def make_row(
    spec: ModelSpec,
    documents: Sequence[Encoded],
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    full: int | None = None,
) -> Row:
    """Lay documents end to end; positions begin at 0 in each, and no label crosses from one to the next.

    The tensors are on `device`, for a model computing in `dtype`. `full` fills the row up to so many tokens and its
    labels in few sizes, so that nearly all rows have the same shapes.
    """
    tokens = sum(len(d.ids) for d in documents)
    fill = (full or rounded(tokens, ROW_STEP)) - tokens
    step = LABEL_STEP if full is None else label_step(full)
    if fill:
        documents = [*documents, Encoded([PAD] * fill, [False] * fill)]
    lengths = [len(d.ids) for d in documents]
    ids = torch.tensor([i for d in documents for i in d.ids])
    learned = torch.tensor([flag for d in documents for flag in [*d.labelled[1:], False]])
    at, spare = learned.nonzero()[:, 0], (~learned).nonzero()[:, 0]
    targets = ids[at + 1]
    spare = spare[: max(step, rounded(len(at), step)) - len(at)]
    positions = torch.cat([torch.arange(n) for n in lengths])
    at, padded = torch.cat([at, spare]), torch.cat([targets, torch.full_like(spare, IGNORED)])
    return Row(
        ids.to(device),
        at.to(device),
        padded.to(device),
        plan_attention(spec, lengths, device, dtype, uniform=full is not None),
        rope_tables(spec, positions.to(device)),
        tokens,
        len(targets),
    )


def steps(
    examples: Sequence[Encoded], seq: int, rows_per_step: int, seed: int, first: int = 0
) -> Iterator[tuple[float, list[list[Encoded]]]]:
    """Endless steps of up to `rows_per_step` rows of documents, from step `first` on, each with the epochs passed then.

    No step spans two epochs. A pure function of its arguments: the steps from `first` on are the same whoever asks.
    """
    passed_steps, epoch = 0, 0
    while True:
        rows = pack(examples, seq, seed, epoch)
        for start in range(0, len(rows), rows_per_step):
            if passed_steps >= first:
                chosen = rows[start : start + rows_per_step]
                passed = epoch + (start + len(chosen)) / len(rows)
                yield passed, [[examples[i] for i in members] for members in chosen]
            passed_steps += 1
        epoch += 1
