"""The hand-written backward of a whole model against autograd through transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import (
    OLD_NAME,
    SMALL,
    Gradients,
    documents,
    fill,
    move_magnitudes,
    our_gradients,
    peft_loss_and_gradients,
    transformers_model,
    with_peft,
)

from gemwright.kernels.cross_entropy import ROWS
from gemwright.layout import Keep
from gemwright.model.decoder import Gemma
from gemwright.model.lora import LoRA
from gemwright.model.residency import LayerWeights, UnpackedResidency
from gemwright.spec import LINEARS, ModelSpec
from gemwright.train.batches import Encoded, make_row, shared
from gemwright.train.step import StepLoss, Work, forward_backward
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.random_model import write_random_gguf

pytestmark = OLD_NAME
LENGTHS = (5, 41, 17, 1, 23, 19, 2)
RANK, ALPHA = 3, 4.5
KINDS = [("270m", "Q5_0"), ("270m", "F16"), ("1b", "Q4_0"), ("4b", "Q4_K"), ("4b", "BF16"), ("12b", "Q6_K")]
KINDS += [("27b", "Q8_0")]
Made = Callable[[ModelSpec, str], ModelFile]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, files = tmp_path_factory.mktemp("models"), dict[Path, ModelFile]()

    def make(spec: ModelSpec, qtype: str) -> ModelFile:
        path = folder / f"{spec.name}-{spec.vocab}-{spec.window}-{qtype}.gguf"
        if path not in files:
            write_random_gguf(path, spec, qtype, seed=1)
            files[path] = open_model(path)
        return files[path]

    return make


def new_lora(
    spec: ModelSpec, dtype: torch.dtype = torch.float32, targets: Sequence[str] = LINEARS, dropout: float = 0.0
) -> LoRA:
    lora = LoRA(spec, RANK, ALPHA, targets, dtype=dtype, dropout=dropout)
    fill(lora)
    return lora


def new_dora(file: ModelFile, dtype: torch.dtype = torch.float32, **settings: Any) -> LoRA:
    """With magnitudes that are those of the weights in fp32, moved, whatever the dtype computed in."""
    lora = LoRA(file.spec, RANK, ALPHA, dtype=dtype, **({"dora": True} | settings))
    fill(lora)
    move_magnitudes(lora, UnpackedResidency(file, torch.float32, 0))
    return lora


def step(
    file: ModelFile,
    lora: LoRA,
    packed: Sequence[Sequence[Encoded]],
    dtype: torch.dtype = torch.float32,
    *,
    keep: Keep = Keep.ALL,
    chunk: int = 1 << 30,
    seed: int = 0,
    budget: int | None = None,
) -> tuple[StepLoss, Gradients]:
    """One step over `packed` rows of documents; a `budget` of zero bytes unpacks every layer on each visit."""
    lora.grad.zero_()
    model = Gemma(UnpackedResidency(file, dtype, budget), lora)
    rows = [make_row(file.spec, row) for row in packed]
    return forward_backward(model, rows, Work(keep, chunk), seed=seed), our_gradients(lora)


def assert_close(ours: Gradients, theirs: Gradients, share: float) -> None:
    """Each A and B (and m) differ by no more than `share` of the tensor's largest value."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert len(ours[name]) == len(theirs[name])
        for side, mine, right in zip("ABm", ours[name], theirs[name], strict=False):
            size = float(right.abs().max())
            assert size > 0, f"{name} {side} of the reference is zero"
            error = float((mine - right).abs().max()) / size
            assert error <= share, f"{name} {side}: {error:.2e} of its largest value"


def flat(pairs: Gradients) -> torch.Tensor:
    return torch.cat([side.flatten() for pair in pairs.values() for side in pair]).double()


def assert_same(one: Gradients, other: Gradients) -> None:
    assert torch.equal(flat(one), flat(other))


@pytest.mark.parametrize(("size", "qtype"), KINDS)
def test_every_adapter_gradient_is_autograds(made: Made, size: str, qtype: str) -> None:
    file = made(SMALL[size], qtype)
    lora, docs = new_lora(file.spec), documents(file.spec, LENGTHS)
    done, ours = step(file, lora, [docs])
    loss, theirs = peft_loss_and_gradients(with_peft(transformers_model(file), lora), lora, docs)
    assert done.loss == pytest.approx(loss, rel=1e-5)
    assert done.tokens == sum(LENGTHS) and done.labelled == sum(sum(d.labelled[1:]) for d in docs)
    assert_close(ours, theirs, 2e-4)


@pytest.mark.parametrize(("size", "qtype"), KINDS)
def test_every_dora_gradient_is_autograds(made: Made, size: str, qtype: str) -> None:
    file = made(SMALL[size], qtype)
    lora, docs = new_dora(file), documents(file.spec, LENGTHS)
    done, ours = step(file, lora, [docs])
    loss, theirs = peft_loss_and_gradients(with_peft(transformers_model(file), lora), lora, docs)
    assert done.loss == pytest.approx(loss, rel=1e-5)
    assert_close(ours, theirs, 2e-4)


@pytest.mark.parametrize("kind", [{"dora": False}, {}], ids=("lora", "dora"))
def test_rank_stabilised_gradients_are_autograds(made: Made, kind: dict[str, bool]) -> None:
    file = made(SMALL["270m"], "Q5_0")
    lora, docs = new_dora(file, stabilised=True, **kind), documents(file.spec, LENGTHS)
    done, ours = step(file, lora, [docs])
    loss, theirs = peft_loss_and_gradients(with_peft(transformers_model(file), lora), lora, docs)
    assert done.loss == pytest.approx(loss, rel=1e-5)
    assert_close(ours, theirs, 2e-4)


@pytest.mark.parametrize("targets", [("q", "v"), ("k", "down"), ("o",), ("up",)], ids="+".join)
def test_dora_gradients_of_some_targets_only(made: Made, targets: tuple[str, ...]) -> None:
    file = made(SMALL["4b"], "Q4_K")
    lora, docs = new_dora(file, targets=targets), documents(file.spec, LENGTHS)
    ours = step(file, lora, [docs])[1]
    assert_close(ours, peft_loss_and_gradients(with_peft(transformers_model(file), lora), lora, docs)[1], 2e-4)


@pytest.mark.parametrize("targets", [("q", "v"), ("k", "down"), ("o",), ("up",)], ids="+".join)
def test_gradients_of_some_targets_only(made: Made, targets: tuple[str, ...]) -> None:
    file = made(SMALL["4b"], "Q4_K")
    lora, docs = new_lora(file.spec, targets=targets), documents(file.spec, LENGTHS)
    ours = step(file, lora, [docs])[1]
    assert_close(ours, peft_loss_and_gradients(with_peft(transformers_model(file), lora), lora, docs)[1], 2e-4)


def test_gradients_of_a_document_beyond_window_and_block_under_a_head_of_several_chunks(made: Made) -> None:
    spec = replace(SMALL["27b"], layers=7, window=100, vocab=ROWS + 507)
    file = made(spec, "Q8_0")
    lora, docs = new_lora(spec), documents(spec, (30, 555, 3), labelled=0.1)
    ours = step(file, lora, [docs])[1]
    assert_close(ours, peft_loss_and_gradients(with_peft(transformers_model(file), lora), lora, docs)[1], 5e-4)


@pytest.mark.parametrize(("size", "qtype"), KINDS)
def test_what_documents_share_is_as_if_each_had_its_own(made: Made, size: str, qtype: str) -> None:
    file = made(SMALL[size], qtype)  # with windows of 8 to 20 tokens
    lora, (head, *tails) = new_lora(file.spec), documents(file.spec, (30, 12, 300, 25, 7, 40))
    docs = [
        Encoded([*head.ids[:n], *d.ids], [False] * n + d.labelled)
        for n, d in zip((30, 30, 21, 5, 30), tails, strict=True)
    ]
    done, ours = step(file, lora, [docs])
    assert sum(map(len, shared(docs))) >= 30 + 21 + 5 + 30 and done.tokens == sum(len(d.ids) for d in docs)
    loss, theirs = peft_loss_and_gradients(with_peft(transformers_model(file), lora), lora, docs)
    assert done.loss == pytest.approx(loss, rel=1e-5)
    assert_close(ours, theirs, 3e-4)


@pytest.mark.parametrize("keep", [Keep.ALL, Keep.NARROW])
@pytest.mark.parametrize("size", ["4b", "27b"])
def test_tokens_of_an_image_see_each_other_both_ways(made: Made, size: str, keep: Keep) -> None:
    file = made(SMALL[size], "Q8_0")  # windows of 11 and 20 tokens, so images longer and shorter than that
    lora, docs = new_lora(file.spec), documents(file.spec, (60, 320, 33))
    pictured = [replace(d, images=i) for d, i in zip(docs, [((3, 40),), ((10, 15), (250, 320)), ()], strict=True)]
    done, ours = step(file, lora, [pictured], keep=keep)
    loss, theirs = peft_loss_and_gradients(with_peft(transformers_model(file), lora), lora, pictured)
    assert done.loss == pytest.approx(loss, rel=1e-5)
    assert_close(ours, theirs, 3e-4)
    assert step(file, lora, [docs], keep=keep)[0].loss != pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("size", ["270m", "27b"])
def test_bf16_is_as_near_to_fp32_as_plain_bf16(made: Made, size: str) -> None:
    file = made(SMALL[size], "BF16")
    lora, docs = new_lora(file.spec), documents(file.spec, LENGTHS)
    exact = flat(peft_loss_and_gradients(with_peft(transformers_model(file), lora), lora, docs)[1])
    bf16 = torch.bfloat16
    plain = flat(peft_loss_and_gradients(with_peft(transformers_model(file, bf16), lora), lora, docs)[1])
    ours = flat(step(file, new_lora(file.spec, bf16), [docs], bf16)[1])
    error, plain_error = (float((x - exact).norm() / exact.norm()) for x in (ours, plain))
    assert error <= plain_error + 1e-3, f"{error:.4f}, plain bf16 {plain_error:.4f}"


@pytest.mark.parametrize("size", ["270m", "27b"])
def test_bf16_dora_is_as_near_to_fp32_as_plain_bf16(made: Made, size: str) -> None:
    file = made(SMALL[size], "BF16")
    lora, docs = new_dora(file), documents(file.spec, LENGTHS)
    exact = peft_loss_and_gradients(with_peft(transformers_model(file), lora), lora, docs)[1]
    bf16 = torch.bfloat16
    plain = peft_loss_and_gradients(with_peft(transformers_model(file, bf16), lora), lora, docs)[1]
    ours = step(file, new_dora(file, bf16), [docs], bf16)[1]
    for side in range(3):  # the gradients of m would vanish beside those of A and B, or drown them
        error, plain_error = (apart(one, exact, side) for one in (ours, plain))
        assert error <= plain_error + 1e-3, f"{'ABm'[side]}: {error:.4f}, plain bf16 {plain_error:.4f}"


def apart(one: Gradients, other: Gradients, side: int) -> float:
    """The distance of all gradients of one kind, as a share of their norm."""
    mine, right = (torch.cat([g[side].flatten() for g in them.values()]).double() for them in (one, other))
    return float((mine - right).norm() / right.norm())


@pytest.mark.parametrize("dora", [False, True], ids=("lora", "dora"))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
@pytest.mark.parametrize("keep", [keep for keep in Keep if keep < Keep.ALL], ids=lambda keep: keep.name)
def test_recompute_changes_no_bit(made: Made, keep: Keep, dtype: torch.dtype, dropout: float, dora: bool) -> None:
    file = made(SMALL["270m"], "Q5_0")
    lora, docs = new_dora(file, dtype, dropout=dropout, dora=dora), documents(file.spec, LENGTHS)
    rows = [docs[:3], docs[3:]]
    kept = step(file, lora, rows, dtype, seed=7)
    again = step(file, lora, rows, dtype, keep=keep, seed=7)
    assert kept[0].loss == again[0].loss
    assert_same(kept[1], again[1])


@pytest.mark.parametrize("dora", [False, True], ids=("lora", "dora"))
@pytest.mark.parametrize("keep", list(Keep), ids=lambda keep: keep.name)
def test_chunks_of_tokens_change_the_order_of_sums_alone(made: Made, keep: Keep, dora: bool) -> None:
    file = made(SMALL["12b"], "Q6_K")
    lora, docs = new_dora(file, dora=dora), documents(file.spec, LENGTHS)
    whole = step(file, lora, [docs])
    parts = step(file, lora, [docs], keep=keep, chunk=37)
    assert parts[0].loss == pytest.approx(whole[0].loss, rel=1e-6)
    assert_close(parts[1], whole[1], 1e-4)


class Joined(UnpackedResidency):
    """Matrices with room for the adapters' B at their right, as a GPU's scratch has them."""

    def layer(self, index: int) -> LayerWeights:
        """The matrix as it is, and values that must never be read beyond it."""
        weights, tails = super().layer(index), LoRA(self.spec, RANK, ALPHA, dtype=self.dtype).tails()
        wide = {name: F.pad(matrix, (0, tails[name]), value=torch.nan) for name, matrix in weights.matrices.items()}
        return replace(weights, matrices=wide)


@pytest.mark.parametrize("dora", [False, True], ids=("lora", "dora"))
@pytest.mark.parametrize("keep", [Keep.INPUT, Keep.NARROW, Keep.ALL], ids=lambda keep: keep.name)
def test_weights_joined_with_their_adapters_mean_the_same(made: Made, keep: Keep, dora: bool) -> None:
    file = made(SMALL["270m"], "Q5_0")
    lora, docs = new_dora(file, dora=dora), documents(file.spec, LENGTHS)
    rows = [docs[:3], docs[3:]]
    apart = step(file, lora, rows)
    lora.grad.zero_()
    model = Gemma(Joined(file, torch.float32), lora)
    done = forward_backward(model, [make_row(file.spec, row) for row in rows], Work(keep, 37))
    assert done.loss == pytest.approx(apart[0].loss, rel=1e-6)
    assert_close(our_gradients(lora), apart[1], 1e-4)


def test_where_the_weights_are_changes_no_bit(made: Made) -> None:
    file = made(SMALL["12b"], "Q6_K")
    lora, docs = new_lora(file.spec), documents(file.spec, LENGTHS)
    assert_same(step(file, lora, [docs])[1], step(file, lora, [docs], budget=0)[1])
    assert_same(step(file, lora, [docs])[1], step(file, lora, [docs], budget=4_000_000, keep=Keep.INPUT)[1])


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_rows_of_a_step_weigh_by_their_labelled_tokens(made: Made, rows: int) -> None:
    """However documents are spread over rows, the gradient is that of the mean over all labelled tokens."""
    file = made(SMALL["1b"], "Q4_0")
    lora, docs = new_lora(file.spec), documents(file.spec, LENGTHS)
    loss, whole = step(file, lora, [docs])
    spread_loss, spread = step(file, lora, [docs[r::rows] for r in range(rows)])
    assert spread_loss.loss == pytest.approx(loss.loss, rel=1e-6)
    assert_close(spread, whole, 1e-4)


def test_a_row_without_labels_adds_nothing(made: Made) -> None:
    file = made(SMALL["1b"], "Q4_0")
    lora, docs = new_lora(file.spec), documents(file.spec, LENGTHS)
    silent = [Encoded(d.ids, [False] * len(d.ids)) for d in docs]
    assert_close(step(file, lora, [docs, silent])[1], step(file, lora, [docs])[1], 1e-5)


def test_gradients_accumulate_over_calls(made: Made) -> None:
    file = made(SMALL["1b"], "Q4_0")
    lora, docs = new_lora(file.spec), documents(file.spec, LENGTHS)
    once = flat(step(file, lora, [docs])[1])
    model = Gemma(UnpackedResidency(file, torch.float32), lora)
    forward_backward(model, [make_row(file.spec, docs)])
    torch.testing.assert_close(flat(our_gradients(lora)), 2 * once, rtol=1e-5, atol=1e-7)


def test_dropout_follows_its_seed_and_leaves_the_mean_alone(made: Made) -> None:
    file = made(SMALL["270m"], "Q5_0")
    docs = documents(file.spec, LENGTHS)
    plain = flat(step(file, new_lora(file.spec), [docs])[1])
    lora = new_lora(file.spec, dropout=0.2)
    drawn = [flat(step(file, lora, [docs], seed=seed)[1]) for seed in range(12)]
    assert torch.equal(drawn[0], flat(step(file, lora, [docs], seed=0)[1])) and not torch.equal(drawn[0], drawn[1])
    apart = [float((g - plain).norm() / plain.norm()) for g in drawn]
    together = float((torch.stack(drawn).mean(0) - plain).norm() / plain.norm())
    assert together < 0.6 * min(apart), (together, min(apart))
