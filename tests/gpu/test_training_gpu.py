"""Training on a GPU: the same bits wherever the weights are, gradients as near to fp32 as plain bf16's.

python -m pytest --noconftest -m gpu tests/gpu

The CPU's fp32 path is the reference; that is tested against autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from gemwright.layout import Keep
from gemwright.model.activations import Offloaded, OnDevice
from gemwright.model.decoder import Gemma
from gemwright.model.lora import LoRA
from gemwright.model.residency import UnpackedResidency
from gemwright.model.streamed import StreamedResidency
from gemwright.spec import LINEARS, SPECS, ModelSpec
from gemwright.train import graphs as graphs_of_steps
from gemwright.train import step
from gemwright.train.batches import Encoded, make_row
from gemwright.train.graphs import Graphs
from gemwright.train.setup import use_expandable_segments
from gemwright.train.step import Work, forward_backward
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.quants import QTYPES
from gemwright.weights.random_model import write_random_gguf

pytestmark = pytest.mark.gpu
GPU, CPU, BF16 = torch.device("cuda", 0), torch.device("cpu"), torch.bfloat16
LENGTHS = (5, 41, 117, 1, 23, 19, 2, 80)


def small(size: str, **shape: Any) -> ModelSpec:
    return replace(SPECS[size], name=f"small-{size}", context=4096, **{"vocab": 515, **shape})


SMALL = {
    "270m": small("270m", layers=7, hidden=96, mlp=224, heads=4, kv_heads=1, head_dim=32, query_scalar=32, window=9),
    "12b": small("12b", layers=7, hidden=256, mlp=768, heads=8, kv_heads=4, head_dim=64, query_scalar=64, window=64),
    "27b": small("27b", layers=8, hidden=192, mlp=416, heads=8, kv_heads=4, head_dim=16, query_scalar=24, window=20),
}
TRUE = {
    "27b": replace(SPECS["27b"], name="true-27b", layers=4, vocab=4096, global_every=2),
    "4b": replace(SPECS["4b"], name="true-4b", layers=4, vocab=4096, global_every=2),
    "1b": replace(SPECS["1b"], name="true-1b", layers=7, vocab=4096),
}
Made = Callable[[ModelSpec, str], ModelFile]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("models")

    def make(spec: ModelSpec, qtype: str) -> ModelFile:
        path = folder / f"{spec.name}-{spec.window}-{qtype}.gguf"
        if not path.exists():
            write_random_gguf(path, spec, qtype, seed=1)
        return open_model(path)

    return make


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=False)
    yield
    torch.use_deterministic_algorithms(False)


def documents(spec: ModelSpec, lengths: Sequence[int], labelled: float = 0.5, seed: int = 0) -> list[Encoded]:
    draw = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        ids = torch.randint(0, spec.vocab, (n,), generator=draw).tolist()
        made.append(Encoded(ids, (torch.rand(n, generator=draw) < labelled).tolist()))
    return made


def new_lora(spec: ModelSpec, device: torch.device, dtype: torch.dtype, **settings: Any) -> LoRA:
    lora = LoRA(
        spec, settings.pop("rank", 16), 16, settings.pop("targets", LINEARS), dtype=dtype, device=device, **settings
    )
    values = torch.empty(lora.master.shape).normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    lora.master.copy_(values)
    lora.refresh()
    return lora


def on_gpu(
    file: ModelFile,
    rows: Sequence[Sequence[Encoded]],
    *,
    resident: Sequence[int] | None = None,
    slots: int = 2,
    source: Any = "auto",
    keep: Keep = Keep.PRODUCTS,
    host: bool = False,
    chunk: int = 1 << 30,
    delay: int = 0,
    steps: int = 1,
    lora: LoRA | None = None,
    **settings: Any,
) -> tuple[float, Tensor]:
    spec = file.spec
    lora = lora or new_lora(spec, GPU, BF16, **settings)
    where = range(spec.layers) if resident is None else resident
    residency = StreamedResidency(
        file, GPU, tails=lora.tails(), resident=where, slots=slots, source=source, head_rows=1024
    )
    if delay and residency._source is not None:
        delayed(residency, delay)
    store = Offloaded([host] * spec.layers, GPU) if host else OnDevice()
    made = [make_row(spec, row, GPU, BF16) for row in rows]
    for _ in range(steps):
        lora.grad.zero_()
        loss = forward_backward(Gemma(residency, lora), made, Work(keep, chunk, 256, 1024), store, seed=3).loss
    residency.close()
    if isinstance(store, Offloaded):
        store.close()
    return loss, lora.grad.clone()


def delayed(residency: StreamedResidency, cycles: int) -> None:
    """Every copy of a layer starts late, so that whoever does not wait for it reads what was there before."""
    source = residency._source
    whole = source.copy

    def copy(layer: int, slot: Tensor, ready: torch.cuda.Event) -> Any:
        with torch.cuda.stream(source.stream):
            torch.cuda._sleep(cycles)
        return whole(layer, slot, ready)

    source.copy = copy  # type: ignore[method-assign]


def on_cpu(
    file: ModelFile, rows: Sequence[Sequence[Encoded]], dtype: torch.dtype, **settings: Any
) -> tuple[float, Tensor]:
    lora = new_lora(file.spec, CPU, dtype, **settings)
    made = [make_row(file.spec, row) for row in rows]
    done = forward_backward(Gemma(UnpackedResidency(file, dtype), lora), made, seed=3)
    return done.loss, lora.grad.clone()


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.cpu().double() - exact.double()).norm() / exact.double().norm())


VARIANTS: dict[str, dict[str, Any]] = {
    "streamed": {"resident": ()},
    "three slots": {"resident": (), "slots": 3},
    "one slot": {"resident": (), "slots": 1},
    "mixed": {"resident": (1, 2)},
    "delayed": {"resident": (), "delay": 20_000_000},
    "three slots delayed": {"resident": (0,), "slots": 3, "delay": 20_000_000},
    "pinned": {"resident": (), "source": "pinned"},
    "pageable": {"resident": (), "source": "pageable"},
    "two steps": {"resident": (), "steps": 2},
    "input kept": {"resident": (), "keep": Keep.INPUT},
    "narrow on the host": {"resident": (2,), "keep": Keep.NARROW, "host": True},
    "heads on the host": {"resident": (), "keep": Keep.HEADS, "host": True, "delay": 20_000_000},
    "input on the host": {"resident": (), "keep": Keep.INPUT, "host": True, "steps": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", ["12b", "27b"])
def test_where_weights_and_activations_are_changes_no_bit(
    made: Made, deterministic: None, size: str, variant: str
) -> None:
    file = made(SMALL[size], "Q4_0")
    docs = documents(file.spec, LENGTHS)
    rows = [docs[:3], docs[3:]]
    loss, gradient = on_gpu(file, rows)
    again, other = on_gpu(file, rows, **VARIANTS[variant])
    assert loss == again and torch.equal(gradient, other) and bool(gradient.any())


@pytest.mark.parametrize("size", list(TRUE))
def test_true_layers_stream_without_a_wrong_bit(made: Made, deterministic: None, size: str) -> None:
    """A 27B layer of 232 MB and its scratch of 830 MB: large enough for every recycled buffer to be recycled."""
    file = made(TRUE[size], "Q4_0")
    docs = documents(file.spec, (700, 1300))
    loss, gradient = on_gpu(file, [docs])
    for slots, delay in ((2, 0), (3, 0), (2, 200_000_000)):
        streamed = on_gpu(file, [docs], resident=(), slots=slots, delay=delay, keep=Keep.NARROW, host=True)
        assert streamed[0] == loss and torch.equal(streamed[1], gradient)


@pytest.mark.parametrize("qtype", QTYPES)
def test_gradients_of_every_type_are_as_near_to_fp32_as_plain_bf16s(made: Made, qtype: str) -> None:
    file = made(SMALL["12b"], qtype)
    rows = [documents(file.spec, LENGTHS)]
    exact_loss, exact = on_cpu(file, rows, torch.float32)
    _, plain = on_cpu(file, rows, BF16)
    loss, ours = on_gpu(file, rows, resident=())
    assert loss == pytest.approx(exact_loss, rel=2e-3)
    assert error(ours, exact) <= 1.1 * error(plain, exact) + 1e-3


CASES: dict[str, dict[str, Any]] = {
    "rank 3": {"rank": 3},
    "rank 5, some targets": {"rank": 5, "targets": ("q", "v", "down")},
    "one target": {"targets": ("up",)},
    "chunks": {"chunk": 37},
    "chunks, input kept": {"chunk": 64, "keep": Keep.INPUT},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", ["270m", "27b"])
def test_gradients_of_odd_arrangements(made: Made, size: str, case: str) -> None:
    settings = dict(CASES[case])
    lora = {key: settings.pop(key) for key in ("rank", "targets") if key in settings}
    file = made(SMALL[size], "Q8_0")
    rows = [documents(file.spec, LENGTHS)]
    exact_loss, exact = on_cpu(file, rows, torch.float32, **lora)
    _, plain = on_cpu(file, rows, BF16, **lora)
    loss, ours = on_gpu(file, rows, **settings, **lora)
    assert loss == pytest.approx(exact_loss, rel=2e-3)
    assert error(ours, exact) <= 1.2 * error(plain, exact) + 1e-3


def test_gradients_beyond_the_window_and_past_a_long_row(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemwright.kernels import attend

    file = made(SMALL["12b"], "Q4_0")
    rows = [documents(file.spec, (700, 30, 65, 64, 63))]
    exact_loss, exact = on_cpu(file, rows, torch.float32)
    _, plain = on_cpu(file, rows, BF16)
    bound = 1.1 * error(plain, exact) + 1e-3
    for long in (1 << 20, 100):
        monkeypatch.setattr(attend, "LONG", long)
        loss, ours = on_gpu(file, rows, chunk=200 if long == 100 else 1 << 30)
        assert loss == pytest.approx(exact_loss, rel=2e-3) and error(ours, exact) <= bound


@pytest.mark.parametrize("long", [1 << 20, 100])
def test_tokens_of_an_image_see_each_other_both_ways(made: Made, monkeypatch: pytest.MonkeyPatch, long: int) -> None:
    from gemwright.kernels import attend

    monkeypatch.setattr(attend, "LONG", long)
    file = made(SMALL["12b"], "Q4_0")
    docs = documents(file.spec, (700, 30, 65, 64, 63))
    pictured = [replace(docs[0], images=((5, 40), (300, 500))), replace(docs[1], images=((0, 30),)), *docs[2:]]
    exact_loss, exact = on_cpu(file, [pictured], torch.float32)
    _, plain = on_cpu(file, [pictured], BF16)
    loss, ours = on_gpu(file, [pictured])
    assert loss == pytest.approx(exact_loss, rel=2e-3) and error(ours, exact) <= 1.1 * error(plain, exact) + 1e-3
    assert error(on_gpu(file, [docs])[1], exact) > 0.5  # as if there were no images


def test_many_documents_keep_to_their_memory(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention's backward takes 128 rows of fp32 sums a document: 600 of 4 tokens would be 33 times its own."""
    from gemwright.kernels import attend

    device = torch.device("cuda")
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v, do = (torch.randn(2400, h, 128, generator=draw, device=device, dtype=BF16) for h in (16, 4, 4, 16))
    results, peaks = [], []
    for room in (attend.document_room, lambda tokens: 1 << 30):
        monkeypatch.setattr(attend, "document_room", room)
        attention = attend.Flash([4] * 600, None, device)
        out, kept = attention.forward(q, k, v)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results.append(attention.backward(do, q, k, v, out, kept))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < 6 * q.numel() * 2 + 2 * 4 * attend.document_room(2400) * 16 * 128 and peaks[1] > 4 * peaks[0]
    for ours, whole in zip(*results, strict=True):
        assert error(ours, whole.cpu()) < 2e-3


def test_what_layers_keep_lies_side_by_side(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(TRUE["1b"], "Q4_0")
    whole, gaps = step._head, []

    def head(*args: Any) -> Tensor:
        for segment in torch.cuda.memory_snapshot():
            used = [block["state"] != "inactive" for block in segment["blocks"]]
            last = max((i for i, in_use in enumerate(used) if in_use), default=0)
            gaps.extend(
                block["size"] for block, in_use in zip(segment["blocks"][:last], used, strict=False) if not in_use
            )
        return whole(*args)

    monkeypatch.setattr(step, "_head", head)
    torch.cuda.empty_cache()
    use_expandable_segments()
    try:
        on_gpu(file, [documents(file.spec, (8192,))], keep=Keep.PRODUCTS)
    finally:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
        torch.cuda.empty_cache()
    kept = 7 * 8192 * 2 * (3 * 1152 + 1024 + 1536 + 2 * 6912)
    assert sum(gaps) < 0.02 * kept


@pytest.mark.parametrize("where", ["resident", "streamed", "mixed", "host"])
def test_a_replayed_step_gives_the_same_bits(made: Made, deterministic: None, where: str) -> None:
    file = made(SMALL["12b"], "Q4_0")
    resident = {"resident": range(7), "mixed": (1, 4)}.get(where, ())
    steps = [[documents(file.spec, LENGTHS[i:] + LENGTHS[:i], seed=i)] for i in range(6)]
    found = []
    for graphed in (False, True):
        lora = new_lora(file.spec, GPU, BF16)
        residency = StreamedResidency(file, GPU, tails=lora.tails(), resident=resident, slots=2, head_rows=1024)
        store = Offloaded([where == "host"] * 7, GPU)
        model, work = Gemma(residency, lora), Work(Keep.NARROW, 1 << 30, 256, 1024)
        graphs = Graphs(model, residency, work, store)
        for packed in steps:
            rows = [make_row(file.spec, row, GPU, BF16, full=320) for row in packed]
            lora.grad.zero_()
            done = graphs.forward_backward(rows, 0) if graphed else forward_backward(model, rows, work, store)
            found.append((graphed, done.loss, lora.grad.clone()))
            lora.master.sub_(0.1 * lora.grad)
            lora.refresh()
        assert not graphed or len(graphs.captured) == 1
        residency.close()
        store.close()
    plain, replayed = ([(loss, grad) for g, loss, grad in found if g is graphed] for graphed in (False, True))
    for (loss, grad), (other_loss, other) in zip(plain, replayed, strict=True):
        assert loss == other_loss and torch.equal(grad, other) and bool(grad.any())


def test_a_capture_that_runs_out_of_memory_leaves_nothing_behind(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(SMALL["12b"], "Q4_0")
    whole, held = graphs_of_steps.forward_backward, []

    def short_of_memory(*args: Any, **settings: Any) -> Any:
        done = whole(*args, **settings)
        if torch.cuda.is_current_stream_capturing():
            held.append(torch.cuda.memory_allocated())
            raise torch.OutOfMemoryError("others took it")
        return done

    monkeypatch.setattr(graphs_of_steps, "forward_backward", short_of_memory)
    lora = new_lora(file.spec, GPU, BF16)
    residency = StreamedResidency(file, GPU, tails=lora.tails(), resident=(1,), slots=2, head_rows=1024)
    store = Offloaded([True] * 5 + [False] * 2, GPU)
    graphs = Graphs(Gemma(residency, lora), residency, Work(Keep.NARROW, 1 << 30, 256, 1024), store)
    rows = [make_row(file.spec, documents(file.spec, LENGTHS), GPU, BF16, full=320)]
    losses, allocated, reserved = [], [], []
    for _ in range(4):
        losses.append(graphs.forward_backward(rows, 0).loss)
        allocated.append(torch.cuda.memory_allocated())
        reserved.append(torch.cuda.memory_reserved())
    assert len(held) == 1 and not graphs.captured
    torch.rand(2, device=GPU)  # which fails where the capture has not ended
    assert len(set(losses)) == 1
    assert allocated[3] == allocated[1] and reserved[3] <= reserved[1]
    residency.close()
    store.close()


def test_a_document_does_not_notice_its_neighbours(made: Made) -> None:
    file = made(SMALL["27b"], "Q8_0")
    first, *others = documents(file.spec, (150, 90, 33))
    silent = [Encoded(d.ids, [False] * len(d.ids)) for d in others]
    changed = [Encoded([7] * len(d.ids), d.labelled) for d in silent]
    alone, with_others, with_changed = (on_gpu(file, [[first, *rest]])[0] for rest in ([], silent, changed))
    assert with_others == with_changed and alone == pytest.approx(with_others, rel=1e-3)


def test_rows_of_a_step_weigh_by_their_labels(made: Made) -> None:
    file = made(SMALL["12b"], "Q4_0")
    docs = documents(file.spec, LENGTHS)
    loss, whole = on_gpu(file, [docs])
    spread_loss, spread = on_gpu(file, [docs[r::3] for r in range(3)], resident=())
    assert spread_loss == pytest.approx(loss, rel=1e-3) and error(spread, whole.cpu()) < 1.5e-2


def test_dropout_is_drawn_again_in_the_backward(made: Made, deterministic: None) -> None:
    file = made(SMALL["12b"], "Q4_0")
    rows = [documents(file.spec, LENGTHS)]
    kept = on_gpu(file, rows, dropout=0.3)
    again = on_gpu(file, rows, dropout=0.3, keep=Keep.INPUT, resident=())
    assert kept[0] == again[0] and torch.equal(kept[1], again[1])
    assert not torch.equal(kept[1], on_gpu(file, rows)[1])
