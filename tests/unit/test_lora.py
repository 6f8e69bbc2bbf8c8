"""LoRA adapters: what a group of linears computes, which values it learns, what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from gemwright.errors import InputError
from gemwright.layout import GROUPS, adapter_parameters
from gemwright.model.lora import Linear, LoRA, lora_from_pairs
from gemwright.model.residency import LayerWeights
from gemwright.spec import LINEARS, SPECS

SPEC = replace(SPECS["270m"], name="tiny", layers=2, hidden=12, mlp=20, heads=2, kv_heads=1, head_dim=4, vocab=32)
RANK, ALPHA = 3, 4.5


def new(
    targets: tuple[str, ...] = LINEARS, dropout: float = 0.0, dtype: torch.dtype = torch.float32, dora: bool = False
) -> LoRA:
    lora = LoRA(SPEC, RANK, ALPHA, targets, dtype=dtype, dropout=dropout, seed=3, dora=dora)
    lora.master.normal_(generator=torch.Generator().manual_seed(1))
    lora.refresh()
    return lora


class Fixed:
    """A residency of the same few matrices for every layer, with `tail` columns of room in each."""

    def __init__(self, lora: LoRA, *, joined: bool = False, dtype: torch.dtype = torch.float32) -> None:
        shapes, rng = SPEC.linear_shapes, torch.Generator().manual_seed(2)
        self.matrices = {}
        for group, parts in GROUPS.items():
            rows, cols = sum(shapes[part][0] for part in parts), shapes[parts[0]][1]
            self.matrices[group] = torch.full((rows, cols + joined * lora.tails()[group]), math.nan, dtype=dtype)
            self.matrices[group][:, :cols] = torch.randn(rows, cols, generator=rng)

    def layer(self, index: int) -> LayerWeights:
        return LayerWeights(self.matrices, {})

    def release(self, index: int) -> None:
        pass


def filled(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    room = linear.room(x, *x.shape)
    room[:, : x.shape[1]] = x
    linear.fill(room)
    return room


def test_a_new_adapter_changes_nothing_and_starts_as_peft_does() -> None:
    lora = LoRA(SPEC, RANK, ALPHA, dtype=torch.float32, seed=3)
    for name, (a, b) in lora.pairs().items():
        rows, cols = SPEC.linear_shapes[name.split(".")[1]]
        assert a.shape == (RANK, cols) and b.shape == (rows, RANK)
        assert not b.any() and 0 < float(a.abs().max()) <= 1 / math.sqrt(cols)
    assert lora.master.dtype == torch.float32 and len(lora.pairs()) == SPEC.layers * len(LINEARS)
    assert torch.equal(LoRA(SPEC, RANK, ALPHA, dtype=torch.bfloat16, seed=3).master, lora.master)
    assert not torch.equal(LoRA(SPEC, RANK, ALPHA, dtype=torch.float32, seed=4).master, lora.master)


@pytest.mark.parametrize("targets", [LINEARS, ("q", "v"), ("v", "k", "down"), ("up",)], ids="+".join)
@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_its_linears_side_by_side(group: str, targets: tuple[str, ...]) -> None:
    lora, parts = new(targets), GROUPS[group]
    rows = [SPEC.linear_shapes[part][0] for part in parts]
    x = torch.randn(5, SPEC.linear_shapes[parts[0]][1], requires_grad=True)
    weight, dy = torch.randn(sum(rows), x.shape[1]), torch.randn(5, sum(rows))
    leaves = {n: (a.clone().requires_grad_(), b.clone().requires_grad_()) for n, (a, b) in lora.pairs().items()}
    pieces = []
    for part, own in zip(parts, weight.split(rows), strict=True):
        y = x @ own.t()
        if part in targets:
            a, b = leaves[f"1.{part}"]
            y = y + ALPHA / RANK * (x @ a.t() @ b.t())
        pieces.append(y)
    right = torch.cat(pieces, 1)
    right.backward(dy)
    linear = Linear(lora, 1, group)
    for joined in (False, True):
        lora.grad.zero_()
        used = weight
        if joined:
            used = torch.full((len(weight), weight.shape[1] + lora.tails()[group]), torch.nan)
            used[:, : weight.shape[1]] = weight
            lora.join(1, {name: used if name == group else torch.empty(1, 1) for name in GROUPS})
        room = filled(linear, x.detach())
        y = linear.forward(room, used, torch.empty_like(right))
        torch.testing.assert_close(y, right)
        torch.testing.assert_close(linear.backward(dy, used, room, y), x.grad, rtol=1e-5, atol=1e-4)
        for name, gradients in lora.gradients().items():
            for got, leaf in zip(gradients, leaves[name], strict=True):
                torch.testing.assert_close(got, torch.zeros_like(got) if leaf.grad is None else leaf.grad)


@pytest.mark.parametrize("joined", [False, True], ids=("apart", "joined"))
@pytest.mark.parametrize("targets", [LINEARS, ("q", "v"), ("v", "k", "down"), ("up",)], ids="+".join)
@pytest.mark.parametrize("group", GROUPS)
def test_dora_is_the_papers_formula(group: str, targets: tuple[str, ...], joined: bool) -> None:
    lora, parts = new(targets, dora=True), GROUPS[group]
    weights = Fixed(lora, joined=joined)
    lora.measure(weights)  # type: ignore[arg-type]
    cols = SPEC.linear_shapes[parts[0]][1]
    x, dy = torch.randn(5, cols, requires_grad=True), torch.randn(5, len(weights.matrices[group]))
    leaves = {
        name: [side.clone().requires_grad_() for side in (*pair, lora.magnitudes()[name])]
        for name, pair in lora.pairs().items()
    }
    pieces, row = [], 0
    for part in parts:
        own = weights.matrices[group][row : row + SPEC.linear_shapes[part][0], :cols]
        row += len(own)
        if part in targets:
            a, b, magnitude = leaves[f"1.{part}"]
            whole = own + ALPHA / RANK * (b @ a)
            whole = (magnitude / whole.norm(dim=1).detach())[:, None] * whole
        else:
            whole = own
        pieces.append(x @ whole.t())
    right = torch.cat(pieces, 1)
    right.backward(dy)
    linear = Linear(lora, 1, group)
    lora.join(1, weights.matrices)
    room = filled(linear, x.detach())
    y = linear.forward(room, weights.matrices[group], torch.empty_like(right))
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-4)
    assert linear.gradient_room(y) is not y or not any(part in targets for part in parts)
    torch.testing.assert_close(linear.backward(dy, weights.matrices[group], room, y), x.grad, rtol=1e-5, atol=1e-4)
    for name, pair in lora.gradients().items():
        for got, leaf in zip((*pair, lora.magnitude_gradients()[name]), leaves[name], strict=True):
            wanted = torch.zeros_like(got) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_new_dora_changes_nothing_and_has_the_weights_own_magnitudes(dtype: torch.dtype) -> None:
    lora = LoRA(SPEC, RANK, ALPHA, ("q", "down"), dtype=dtype, dora=True)
    weights = Fixed(lora, dtype=dtype)
    lora.measure(weights)  # type: ignore[arg-type]
    assert lora.master.numel() == adapter_parameters(SPEC, RANK, ("q", "down"), dora=True)
    assert lora.magnitudes().keys() == {"0.q", "0.down", "1.q", "1.down"}
    torch.testing.assert_close(lora.magnitudes()["1.down"], weights.matrices["down"].float().norm(dim=1))
    lora.join(0, weights.matrices)
    for group in ("qkv", "down"):
        gain = lora.gain(0, group)
        assert gain is not None and torch.equal(gain, torch.ones(len(weights.matrices[group])))
    assert lora.gain(0, "o") is None
    with_b = lora.master.clone().add_(0.5)
    lora.master.copy_(with_b)
    lora.refresh()
    lora.measure(weights)  # type: ignore[arg-type]  # magnitudes that are there stay
    assert torch.equal(lora.master, with_b)
    assert lora.gain(0, "down") is None  # as of no join since
    lora.join(0, weights.matrices)
    gain = lora.gain(0, "down")
    assert gain is not None and not torch.isclose(gain, torch.ones(len(gain))).any()


def test_a_frozen_row_of_zeros_stays_finite_under_dora() -> None:
    lora = LoRA(SPEC, RANK, ALPHA, ("o",), dtype=torch.float32, dora=True)
    weights = Fixed(lora)
    weights.matrices["o"][3] = 0
    lora.measure(weights)  # type: ignore[arg-type]
    linear = Linear(lora, 0, "o")
    lora.join(0, weights.matrices)
    room = filled(linear, torch.randn(4, 8))
    y = linear.forward(room, weights.matrices["o"], torch.empty(4, 12))
    dx = linear.backward(torch.randn(4, 12), weights.matrices["o"], room, y)
    assert dx is not None and dx.isfinite().all() and y.isfinite().all() and lora.grad.isfinite().all()


def test_rank_stabilisation_divides_by_the_root() -> None:
    assert LoRA(SPEC, 4, 6.0, ("k",), dtype=torch.float32, stabilised=True).scale == 3.0


def test_without_adapters_a_linear_is_a_product() -> None:
    x, weight = torch.randn(5, 12), torch.randn(12, 12)
    linear = Linear(None, 0, "o")
    room = filled(linear, x)
    assert torch.equal(linear.forward(room, weight, torch.empty(5, 12)), x @ weight.t())
    assert torch.equal(linear.backward(x, weight, room, x), x @ weight)


def test_dropout_has_the_same_mask_forward_and_backward() -> None:
    lora, x = new(dropout=0.5), torch.randn(64, 8)
    weight = torch.zeros(12, 8)
    linear = Linear(lora, 0, "o", seed=5)
    room = filled(linear, x)
    y = linear.forward(room, weight, torch.empty(64, 12))
    # With W = 0 the output is linear in the dropped-out x, so <dy, y> = <dx, x> only under one mask.
    dy = torch.randn(64, 12)
    dx = linear.backward(dy, weight, room, y)
    assert dx is not None
    torch.testing.assert_close((dx * x).sum(), (dy * y).sum(), rtol=1e-4, atol=1e-3)
    a = lora.pairs()["0.o"][0]
    untouched = torch.isclose(y, ALPHA / RANK * (x @ a.t() @ lora.pairs()["0.o"][1].t())).all(1)
    assert not untouched.any()


def test_bf16_copies_follow_fp32_masters() -> None:
    lora = new(("q",), dtype=torch.bfloat16)
    group = lora.group(0, "qkv")
    assert group is not None and group.a.dtype == torch.bfloat16
    lora.master.add_(1e-6)
    before = lora.master.clone()
    lora.refresh()
    assert torch.equal(lora.master, before) and torch.equal(group.a[:RANK], lora.pairs()["0.q"][0].to(torch.bfloat16))


def test_round_trip_through_pairs() -> None:
    lora = new(("q", "down"))
    again = lora_from_pairs(SPEC, lora.pairs(), ALPHA, torch.float32)
    assert torch.equal(again.master, lora.master) and again.targets == ("q", "down") and again.scale == lora.scale
    lora = new(("q", "down"), dora=True)
    again = lora_from_pairs(SPEC, lora.pairs(), ALPHA, torch.float32, lora.magnitudes())
    assert torch.equal(again.master, lora.master) and again.dora


def test_pairs_that_do_not_cover_every_layer_are_refused() -> None:
    pairs = dict(new(("q", "v")).pairs())
    pairs.pop("1.v")
    with pytest.raises(InputError, match=r"1\.v"):
        lora_from_pairs(SPEC, pairs, ALPHA, torch.float32)


def test_pairs_of_different_ranks_are_refused() -> None:
    pairs = dict(new(("q",)).pairs())
    pairs["1.q"] = (torch.ones(2, 12), torch.ones(8, 2))
    with pytest.raises(InputError, match="different ranks"):
        lora_from_pairs(SPEC, pairs, ALPHA, torch.float32)


@pytest.mark.parametrize(
    ("rank", "targets", "where"),
    [(0, LINEARS, "rank"), (5, ("k",), "rank"), (2, ("qkv",), "targets"), (2, (), "targets")],
)
def test_impossible_adapters_are_refused(rank: int, targets: tuple[str, ...], where: str) -> None:
    with pytest.raises(InputError, match=where):
        LoRA(SPEC, rank, 1.0, targets, dtype=torch.float32)


def test_the_largest_rank_is_taken() -> None:
    assert LoRA(SPEC, 4, 1.0, ("k",), dtype=torch.float32).rank == 4
