"""Packing: every example once an epoch, rows that fit, an order that repeats, labels inside their document."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.layout import FILL_STEP
from gemwright.model.decoder import rope_tables
from gemwright.spec import BOS, PAD, SPECS
from gemwright.train.batches import IGNORED, OPEN_ROWS, Encoded, bucket, make_row, pack, shared, steps

SPEC = SPECS["270m"]
SEQ = 60
Lengths = st.lists(st.integers(1, SEQ), min_size=1, max_size=80)
Documents = st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=8)


def examples(lengths: list[int]) -> list[Encoded]:
    return [Encoded([BOS, *range(10, 9 + n)], [False, *[True] * (n - 1)]) for n in lengths]


@given(Lengths, st.integers(0, 2**31 - 1), st.integers(0, 5))
def test_every_example_once_in_rows_that_fit(lengths: list[int], seed: int, epoch: int) -> None:
    rows = pack(examples(lengths), SEQ, seed, epoch)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= SEQ for row in rows)
    assert [*rows] == [*pack(examples(lengths), SEQ, seed, epoch)]


def best_fit(lengths: list[int], seq: int, seed: int, epoch: int) -> list[list[int]]:
    """The rule in its plainest words."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    closed: list[list[int]] = []
    opened: list[list[int]] = []

    def used(row: list[int]) -> int:
        return sum(lengths[i] for i in row)

    for index in order:
        fitting = [row for row in opened if used(row) + lengths[index] <= seq]
        if fitting:
            max(fitting, key=used).append(index)
            continue
        if len(opened) == OPEN_ROWS:
            fullest = max(opened, key=used)
            opened.remove(fullest)
            closed.append(fullest)
        opened.append([index])
    return closed + sorted(opened, key=used, reverse=True)


@settings(max_examples=40)
@given(st.lists(st.integers(1, SEQ), max_size=300), st.integers(0, 99), st.integers(0, 3))
def test_packing_is_best_fit(lengths: list[int], seed: int, epoch: int) -> None:
    assert [*pack(examples(lengths), SEQ, seed, epoch)] == best_fit(lengths, SEQ, seed, epoch)


def test_another_seed_or_epoch_is_another_order() -> None:
    made = examples([7] * 100)
    orders = [[*pack(made, SEQ, seed, epoch)] for seed in (0, 1) for epoch in (0, 1)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))


@settings(max_examples=30)
@given(st.lists(st.integers(5, 40), min_size=100, max_size=200), st.integers(0, 9))
def test_rows_are_nearly_full(lengths: list[int], seed: int) -> None:
    rows = pack(examples(lengths), 200, seed, 0)
    assert len(rows) <= 1.1 * sum(lengths) / 200 + 2


@given(Lengths, st.integers(1, 9), st.integers(0, 99), st.integers(0, 3))
def test_without_packing_steps_are_of_like_length(lengths: list[int], rows: int, seed: int, epoch: int) -> None:
    order = [*bucket(examples(lengths), rows, seed, epoch)]
    assert sorted(order) == [[i] for i in range(len(lengths))] and order == [
        *bucket(examples(lengths), rows, seed, epoch)
    ]
    whole = len(lengths) // rows
    spans = sorted(
        (min(step), max(step))
        for step in ([lengths[i] for [i] in order[s * rows : (s + 1) * rows]] for s in range(whole))
    )
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(spans))


def test_without_packing_short_and_long_steps_take_turns() -> None:
    made = examples([*range(1, 65)] * 2)
    first = [[len(made[row[0]].ids) for row in bucket(made, 4, seed, 0)][::4] for seed in (0, 1)]
    assert first[0] != sorted(first[0]) and first[0] != first[1]


@given(Documents)
def test_labels_never_cross_documents(flags: list[list[bool]]) -> None:
    documents = [Encoded([1000 * d + i for i in range(len(own))], own) for d, own in enumerate(flags)]
    row = make_row(SPEC, documents)
    needed = [i for d in documents for i in d.ids[: d.inputs]]
    assert row.ids[: len(needed)].tolist() == needed and row.tokens == sum(len(own) for own in flags)
    pairs = zip(row.at[: row.labelled], row.targets[: row.labelled].tolist(), strict=True)
    learned = [(row.ids[at].item(), target) for at, target in pairs]
    assert learned == [(d.ids[i - 1], d.ids[i]) for d in documents for i in range(1, len(d.ids)) if d.labelled[i]]
    assert all(before // 1000 == target // 1000 for before, target in learned)


@given(Documents)
def test_rows_and_labels_are_filled_up_without_effect(flags: list[list[bool]]) -> None:
    documents = [Encoded([7] * len(own), own) for own in flags]
    row, own_rows = make_row(SPEC, documents), row_count(documents)
    assert len(row.ids) % FILL_STEP == 0 and len(row.ids) - own_rows < FILL_STEP
    assert row.ids[own_rows:].eq(PAD).all() and row.targets[row.labelled :].eq(IGNORED).all()
    assert len(row.at) % FILL_STEP == 0 or len(row.at) == len(row.ids)
    assert len(row.at) == len(row.targets) == len(set(row.at.tolist()))  # a position twice would lose a gradient


def row_count(documents: list[Encoded]) -> int:
    return sum(d.inputs - len(past) for d, past in zip(documents, shared(documents), strict=True))


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=9), st.integers(0, 9)), min_size=1, max_size=9)
)
def test_documents_share_what_they_begin_with_and_no_label(drawn: list[tuple[list[int], int]]) -> None:
    documents = [Encoded(ids, [i >= first for i in range(len(ids))]) for ids, first in drawn]
    row, rows = make_row(SPEC, documents), list[list[int]]()
    start, known, learned = 0, set[tuple[int, ...]](), list[tuple[int, int]]()
    for document, past in zip(documents, shared(documents), strict=True):
        ids, flags = document.ids, document.labelled
        rows.append([*past, *range(start, start + document.inputs - len(past))])
        start += document.inputs - len(past)
        assert row.ids[rows[-1]].tolist() == ids[: document.inputs]
        for mine, right in zip(
            itertools.chain(*row.tables),
            itertools.chain(*rope_tables(SPEC, torch.arange(document.inputs))),
            strict=True,
        ):
            assert torch.equal(mine[rows[-1]], right)
        free = next((i for i, flag in enumerate(flags[1:]) if flag), len(ids) - 1)
        longest = max((n for n in range(free + 1) if n == 0 or tuple(ids[:n]) in known), default=0)
        assert len(past) == longest
        known |= {tuple(ids[:n]) for n in range(1, free + 1)}
        learned += [(rows[-1][i], ids[i + 1]) for i in range(len(ids) - 1) if flags[i + 1]]
    assert row.tokens == sum(len(d.ids) for d in documents)
    assert list(zip(row.at[: row.labelled].tolist(), row.targets[: row.labelled].tolist(), strict=True)) == learned


def test_what_comes_after_the_last_target_is_no_input_unless_rows_are_full() -> None:
    ids, flags = list(range(2, 12)), [False] * 5 + [True, False, True, False, False]
    whole, cut = Encoded(ids, flags, ((1, 3), (8, 10))), Encoded(ids[:8], flags[:8], ((1, 3),))
    row, short = make_row(SPEC, [whole, whole]), make_row(SPEC, [cut, cut])
    assert torch.equal(row.ids, short.ids) and torch.equal(row.at, short.at) and torch.equal(row.targets, short.targets)
    q, k, v = torch.randn(3, len(row.ids), 1, 8).unbind(0)
    for mine, right in zip(row.attention, short.attention, strict=True):
        assert torch.equal(mine.forward(q, k, v)[0], right.forward(q, k, v)[0])
    assert row.tokens == 20 and row.labelled == 4
    assert make_row(SPEC, [whole, whole], full=32).ids[:20].tolist() == [*ids, *ids]
    assert Encoded(ids, flags, ((1, 3), (4, 9))).inputs == 9  # what an image's tokens see lies behind them too


def test_positions_begin_anew_in_each_document() -> None:
    row = make_row(SPEC, examples([5, 1, 7]))
    positions = torch.tensor([*range(4), 0, *range(6), *range(FILL_STEP - 11)])
    for mine, right in zip(itertools.chain(*row.tables), itertools.chain(*rope_tables(SPEC, positions)), strict=True):
        assert torch.equal(mine, right)


@settings(max_examples=30)
@given(Lengths, st.integers(1, 5), st.integers(0, 9), st.integers(0, 40), st.booleans())
def test_steps_go_on_from_anywhere(lengths: list[int], rows: int, seed: int, first: int, packing: bool) -> None:
    made = examples(lengths)
    whole = itertools.islice(steps(made, SEQ, rows, seed, packing=packing), first, first + 5)
    assert list(whole) == list(itertools.islice(steps(made, SEQ, rows, seed, first, packing), 5))


@settings(max_examples=30)
@given(Lengths, st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_steps_go_through_whole_epochs(lengths: list[int], rows_per_step: int, seed: int, packing: bool) -> None:
    made = [Encoded([BOS, 100 + i, *[7] * (n - 1)], [False] + [True] * n) for i, n in enumerate(lengths)]
    stream = steps(made, SEQ + 1, rows_per_step, seed, packing=packing)
    for epoch in (1, 2):
        seen: list[int] = []
        passed = 0.0
        while passed < epoch:
            passed, rows = next(stream)
            assert 1 <= len(rows) <= rows_per_step and epoch - 1 < passed <= epoch
            seen += [int(i) - 100 for row in rows for document in row for i in document.ids if i >= 100]
        assert sorted(seen) == list(range(len(lengths)))
