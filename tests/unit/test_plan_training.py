"""What fits, and how: arrangements under a budget of video memory, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemwright.errors import DoesNotFit
from gemwright.layout import Keep, adapter_parameters
from gemwright.plan.training import (
    Arrangement,
    Card,
    Job,
    arrange,
    budget_for,
    described,
    estimate,
    itemise,
    itemised,
    kept_bytes,
)
from gemwright.report import bytes_of
from gemwright.spec import LINEARS, SPECS

GIB = 2**30
H100 = Card(640e12, 55e9, 2.6e12)
DESKTOP = Card(40e12, 6.5e9, 250e9)


def job(size: str, rows: int, seq: int, rank: int = 16) -> Job:
    spec = SPECS[size]
    layer = sum(r * c for r, c in spec.linear_shapes.values()) * 18 // 32
    return Job(spec, layer, spec.vocab * spec.hidden * 18 // 32, rank, LINEARS, seq, rows)


@pytest.mark.parametrize("size", SPECS)
@pytest.mark.parametrize(("rows", "seq"), [(1, 512), (4, 2048), (64, 128), (1, 8192)])
def test_every_size_trains_in_eight_gib(size: str, rows: int, seq: int) -> None:
    for card in (H100, DESKTOP):
        plan = arrange(job(size, rows, seq), 7 * GIB, card, 48 * GIB)
        assert plan.predicted_bytes == sum(plan.items.values()) <= 7 * GIB
        assert all(count >= 0 for count in plan.items.values()) and plan.step_s > 0
        assert len(plan.keep) == len(plan.on_host) == SPECS[size].layers
        assert plan.host_bytes <= 48 * GIB


@pytest.mark.parametrize(("size", "seq"), [("4b", 131_072), ("12b", 65_536), ("27b", 32_768)])
def test_long_rows_fit_eight_gib(size: str, seq: int) -> None:
    plan = arrange(job(size, 1, seq), 8 * GIB, H100, 100 * GIB)
    assert plan.chunk < seq and plan.predicted_bytes <= 8 * GIB


@settings(max_examples=25)
@given(
    size=st.sampled_from(sorted(SPECS)),
    rows=st.integers(1, 16),
    seq=st.sampled_from([100, 512, 2048, 5000]),
    budget=st.integers(1, 40),
    rank=st.sampled_from([1, 8, 64]),
)
@example(size="27b", rows=1, seq=5000, budget=15, rank=8)  # of whose layers only two kept theirs on the GPU
def test_no_arrangement_exceeds_its_budget_and_more_is_never_slower(
    size: str, rows: int, seq: int, budget: int, rank: int
) -> None:
    asked = job(size, rows, seq, rank)
    try:
        plan = arrange(asked, budget * GIB, H100, 64 * GIB)
    except DoesNotFit:
        return
    assert plan.predicted_bytes <= budget * GIB
    roomier = arrange(asked, 2 * budget * GIB, H100, 64 * GIB)
    assert roomier.step_s <= plan.step_s * 1.01


@settings(max_examples=25)
@given(size=st.sampled_from(sorted(SPECS)), rows=st.integers(1, 8), budget=st.integers(5, 30))
def test_a_plan_fits_the_smallest_budget_under_which_it_may_be_chosen(size: str, rows: int, budget: int) -> None:
    asked = job(size, rows, 1024)
    plan = arrange(asked, budget * GIB, H100, 64 * GIB)
    again = arrange(asked, budget_for(plan), H100, 64 * GIB)
    assert again.step_s <= plan.step_s * 1.05 and budget_for(plan) <= budget * GIB + 2


def test_layers_that_stay_lend_their_link_to_those_that_come_only_in_part() -> None:
    asked = job("12b", 1, 2048)
    keep, away = (Keep.NARROW,) * 48, (True,) * 48
    half = estimate(asked, itemise(asked, Arrangement(24, 2, keep, away, 1, 2048, 2048, 4096)), H100)
    none, all_of_them = (
        estimate(asked, itemise(asked, Arrangement(count, 2, keep, away, 1, 2048, 2048, 4096)), H100)
        for count in (0, 48)
    )
    assert all_of_them.step_s < half.step_s < (none.step_s + all_of_them.step_s) / 2


@pytest.mark.parametrize("size", ["4b", "27b"])
def test_the_budget_that_an_error_names_is_enough_and_hardly_less_is(size: str) -> None:
    asked = job(size, 1, 2048)
    with pytest.raises(DoesNotFit) as caught:
        arrange(asked, GIB // 2, H100, 64 * GIB)
    named = bytes_of(str(caught.value).split("--vram ")[1].split(",")[0])
    assert arrange(asked, named, H100, 64 * GIB).predicted_bytes <= named
    with pytest.raises(DoesNotFit):
        arrange(asked, int(named * 0.97), H100, 64 * GIB)


def test_residency_and_what_is_kept_can_be_asked_for() -> None:
    asked = job("4b", 4, 2048)
    assert arrange(asked, 40 * GIB, H100, 64 * GIB, residency="resident").resident == SPECS["4b"].layers
    assert arrange(asked, 40 * GIB, H100, 64 * GIB, residency="streamed").resident == 0
    always = arrange(asked, 40 * GIB, H100, 64 * GIB, keeps=(Keep.INPUT,))
    assert set(always.keep) == {Keep.INPUT} and always.step_s > arrange(asked, 40 * GIB, H100, 64 * GIB).step_s


def test_little_host_memory_keeps_activations_few() -> None:
    asked = job("27b", 4, 2048)
    roomy, poor = (arrange(asked, 8 * GIB, H100, free * GIB) for free in (100, 12))
    assert poor.host_bytes < 12 * GIB * 0.7 < roomy.host_bytes


def test_items_count_what_is_known_exactly() -> None:
    asked = job("12b", 1, 1024, rank=8)
    plan = Arrangement(3, 2, (Keep.NARROW,) * 48, (False,) * 48, 1, 1024, 1024, 4096)
    items = itemise(asked, plan).items
    assert items["resident layers, packed"] == 3 * asked.layer_bytes
    assert items["ring of layers, packed"] == 2 * asked.layer_bytes
    assert items["activations kept on the GPU"] == 48 * 1024 * kept_bytes(asked, Keep.NARROW)
    trained = adapter_parameters(asked.spec, 8, LINEARS)
    assert 18 * trained <= items["adapters, gradients, optimizer"] < 18 * trained + GIB // 50
    levels = [kept_bytes(asked, keep) for keep in list(Keep)[:-1]]
    assert levels == sorted(levels) and levels[0] == 2 * asked.spec.hidden + 4


def test_it_is_told_in_words_and_lines() -> None:
    plan = arrange(job("27b", 4, 2048), 8 * GIB, H100, 100 * GIB)
    assert "of 62 layers resident" in described(plan, 62) and "in RAM" in described(plan, 62)
    lines = itemised(plan, 8 * GIB)
    assert len(lines) >= 8 and "of 8.00 GiB" in lines[-2] and "activations in RAM" in lines[-1]


def test_a_slower_link_makes_more_layers_resident() -> None:
    asked = job("12b", 1, 2048)
    slow = H100._replace(link=6e9)
    assert arrange(asked, 8 * GIB, slow, 64 * GIB).resident >= arrange(asked, 8 * GIB, H100, 64 * GIB).resident


def test_dora_and_determinism_cost_memory() -> None:
    asked = job("4b", 1, 2048)
    plan = Arrangement(34, 0, (Keep.INPUT,) * 34, (False,) * 34, 1, 2048, 2048, 4096)
    plain = itemise(asked, plan).predicted_bytes
    for more in ({"dora": True}, {"ordered_on": 132}):
        assert itemise(replace(asked, **more), plan).predicted_bytes >= plain


def exhaustive(asked: Job, budget: int, card: Card, host_free: int) -> float:
    """The least seconds over a grid that the search itself never walks: any count of residents, layers here, chunk."""
    layers, best = asked.spec.layers, float("inf")
    tokens = asked.rows * asked.row_tokens
    for joined in {1, asked.rows}:
        for chunk in {c for c in (1024, 2048, 4096, 8192) if c <= joined * asked.row_tokens} | {
            joined * asked.row_tokens
        }:
            for resident in range(0, layers + 1, max(1, layers // 12)):
                for here in range(0, layers + 1, max(1, layers // 12)):
                    for host in (Keep.INPUT, Keep.NARROW, Keep.HEADS):
                        if kept_bytes(asked, host) * tokens * (layers - 2) > 0.7 * host_free and host > Keep.INPUT:
                            continue
                        for device in (Keep.INPUT, Keep.NARROW, Keep.HEADS, Keep.PRODUCTS):
                            keep = tuple(device if i >= layers - here else host for i in range(layers))
                            away = tuple(i < layers - here for i in range(layers))
                            rows = 8192 if chunk >= 4096 else 4096
                            slots = min(2, layers - resident)
                            plan = Arrangement(resident, slots, keep, away, joined, chunk, min(8192, chunk), rows)
                            plan = itemise(asked, plan)
                            if plan.predicted_bytes <= budget:
                                best = min(best, estimate(asked, plan, card).step_s)
    return best


@pytest.mark.parametrize(
    ("size", "rows", "seq", "budget", "card"),
    [("4b", 1, 2048, 7, H100), ("4b", 4, 512, 5, DESKTOP), ("1b", 2, 1024, 4, DESKTOP)],
)
def test_a_grid_finds_nothing_better_by_more_than_two_percent(
    size: str, rows: int, seq: int, budget: int, card: Card
) -> None:
    asked = job(size, rows, seq)
    found = arrange(asked, budget * GIB, card, 48 * GIB)
    assert found.step_s <= 1.02 * exhaustive(asked, budget * GIB, card, 48 * GIB)
