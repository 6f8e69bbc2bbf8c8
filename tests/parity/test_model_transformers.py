"""Our decoder's logits against transformers' in fp32, whole and step by step, and the five true sizes by shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import SMALL, config_of, documents, transformers_model
from torch import Tensor

from gemwright.data.read import read_examples
from gemwright.errors import InputError
from gemwright.model.cache import KVCache
from gemwright.model.decoder import Gemma
from gemwright.spec import BOS, SPECS
from gemwright.text.chat import render_prompt
from gemwright.text.tokenizer import Tokenizer
from gemwright.weights import names
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.random_model import write_random_gguf

QTYPES = {"270m": "Q5_0", "1b": "Q4_0", "4b": "Q4_K", "12b": "Q6_K", "27b": "Q8_0"}
TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Широка страна моя родная, много в ней лесов, полей и рек.",
    "東京は日本の首都であり、世界最大の都市の一つです。",
    "1 2 3 5 8 13 21 34 55 89",
    '{"name": "Ada", "born": 1815, "tags": ["maths", "engines"]}',
    "🙂🙃🎉 emoji 👩‍👩‍👧‍👦 and ﬁne ligatures",
    "A",
    "\n\n\n   \t  ",
    "In the beginning God created the heaven and the earth. And the earth was without form, and void;",
    "SELECT name, count(*) FROM people GROUP BY name ORDER BY 2 DESC;",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 6,
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt.",
]
LONG = (300, 512, 513, 700, 1100, 1500)


def prompts(encode: Any) -> list[list[int]]:
    """Twenty: short ones of many kinds, a chat, and real text up to 1,500 tokens, so beyond the window of 512."""
    made = [[BOS, *encode(text)] for text in TEXTS[:-1]]
    made.append(render_prompt([{"role": "user", "content": TEXTS[-1]}], encode))
    story: list[int] = []
    for example in read_examples(Path(__file__).parents[2] / "gemwright" / "data" / "cldr" / "train.jsonl"):
        story += encode(" ".join(turn["content"] for turn in example.messages) + "\n")
        if len(story) > max(LONG):
            break
    return made + [[BOS, *story[: length - 1]] for length in LONG]


@pytest.fixture(scope="module")
def real(real_model: Path) -> Iterator[tuple[Gemma, Any, list[list[int]]]]:
    file = open_model(real_model)
    ours = Gemma.load(file, torch.float32, budget_bytes=0)
    yield ours, transformers_model(file), prompts(Tokenizer.from_model(file).encode)


@torch.inference_mode()
def largest_difference(ours: Gemma, theirs: Any, ids: list[int], positions: Tensor | slice = slice(None)) -> float:
    """Over the whole vocabulary, 128 positions at a time: 1,500 x 262,144 logits are 1.6 GB."""
    mine, their = (h[positions] for h in (ours.hidden(ids), theirs.model(torch.tensor([ids])).last_hidden_state[0]))
    worst = 0.0
    for start in range(0, ours.residency.vocab, 32_768):
        head = ours.residency.head_rows(start, min(start + 32_768, ours.residency.vocab))
        theirs_head = theirs.lm_head.weight[start : start + len(head)]
        assert torch.equal(head, theirs_head)
        for at in range(0, len(mine), 128):
            worst = max(worst, float((mine[at : at + 128] @ head.t() - their[at : at + 128] @ head.t()).abs().max()))
    return worst


@pytest.mark.parametrize("which", [0, 2, 19])
def test_real_270m_logits(real: tuple[Gemma, Any, list[list[int]]], which: int) -> None:
    """Every position of short prompts; of 1,500 tokens every 16th, those where the window begins to matter, the end."""
    ours, theirs, all_prompts = real
    ids = all_prompts[which]
    positions = list(range(len(ids))) if len(ids) < 100 else [*range(0, len(ids), 16), *range(508, 516), len(ids) - 1]
    assert largest_difference(ours, theirs, ids, torch.tensor(positions)) <= 1e-3


@pytest.mark.slow
def test_real_270m_logits_of_twenty_prompts_at_every_position(real: tuple[Gemma, Any, list[list[int]]]) -> None:
    ours, theirs, all_prompts = real
    assert len(all_prompts) == 20 and max(map(len, all_prompts)) == 1500
    found = {f"{i} ({len(ids)})": largest_difference(ours, theirs, ids) for i, ids in enumerate(all_prompts)}
    print({prompt: f"{error:.1e}" for prompt, error in found.items()})
    assert max(found.values()) <= 1e-3, found


@torch.inference_mode()
def test_real_270m_logits_and_log_probs_are_those_of_the_hidden_states(
    real: tuple[Gemma, Any, list[list[int]]],
) -> None:
    ours, theirs, all_prompts = real
    ids = all_prompts[1]
    right = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours.logits(ids), right, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.logits(ids, last=True), right[-1:], rtol=0, atol=1e-3)
    wanted = torch.log_softmax(right[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(ours.log_probs(ids), wanted, rtol=0, atol=1e-3)


@pytest.fixture(scope="module", params=SMALL)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    path = tmp_path_factory.mktemp("small") / f"{request.param}.gguf"
    write_random_gguf(path, SMALL[request.param], QTYPES[request.param], seed=3)
    return open_model(path)


@torch.inference_mode()
def test_small_shapes_of_each_size(small: ModelFile) -> None:
    ours, theirs = Gemma.load(small, torch.float32), transformers_model(small)
    for length in (1, 2, small.spec.window, small.spec.window + 1, 123, 300):
        ids = documents(small.spec, [length], seed=length)[0].ids
        right = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(ours.logits(ids), right, rtol=1e-4, atol=2e-5 * float(right.abs().max()))


def stepwise(model: Gemma, ids: list[int], sizes: Sequence[int]) -> tuple[Tensor, KVCache]:
    """Logits of `ids` passed in pieces of `sizes` (the last repeated to the end) with one cache."""
    cache, pieces, at = KVCache(model.spec), [], 0
    while at < len(ids):
        size = sizes[min(len(pieces), len(sizes) - 1)]
        pieces.append(model.logits(ids[at : at + size], cache))
        at += size
    return torch.cat(pieces), cache


@pytest.mark.parametrize("sizes", [(1,), (50, 1), (7,), (30, 13, 1, 40), (100,)], ids=str)
def test_cache_changes_nothing(small: ModelFile, sizes: tuple[int, ...]) -> None:
    model = Gemma.load(small, torch.float32)
    ids = documents(small.spec, [100])[0].ids
    whole = model.logits(ids)
    pieces, cache = stepwise(model, ids, sizes)
    assert cache.length == 100
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=2e-5 * float(whole.abs().max()))


def test_cache_holds_no_more_than_windows_and_global_layers(small: ModelFile) -> None:
    spec = small.spec
    cache = stepwise(Gemma.load(small, torch.float32), documents(spec, [200])[0].ids, (64, 1))[1]
    whole = sum(spec.is_global(layer) for layer in range(spec.layers))
    token = 2 * spec.kv_heads * spec.head_dim * 4
    assert cache.bytes <= token * (whole * 200 + (spec.layers - whole) * spec.window)


def test_cache_of_the_real_model_beyond_its_window(real: tuple[Gemma, Any, list[list[int]]]) -> None:
    ours, _, all_prompts = real
    ids = all_prompts[-3][:560]
    cache = KVCache(ours.spec)
    ours.hidden(ids[:500], cache)
    pieces = [ours.hidden(ids[500:525], cache), *(ours.hidden([id_], cache) for id_ in ids[525:532])]
    pieces.append(ours.hidden(ids[532:], cache))
    whole = ours.hidden(ids)[500:]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("ids", [[], [-1], [515], [0] * 2049], ids=("none", "negative", "beyond", "long"))
def test_ids_that_cannot_be(small: ModelFile, ids: list[int]) -> None:
    with pytest.raises(InputError):
        Gemma.load(small, torch.float32).logits(ids)


@pytest.mark.parametrize("size", SPECS)
def test_true_sizes_have_the_shapes_of_transformers(size: str) -> None:
    from transformers import Gemma3ForCausalLM

    with torch.device("meta"):
        model = Gemma3ForCausalLM(config_of(SPECS[size]))
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ours = {names.to_hf(name): shape for name, shape in names.expected_shapes(SPECS[size], 262_144).items()}
    assert theirs == ours
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx({"270m": 0.268, "1b": 1.0, "4b": 3.88, "12b": 11.77, "27b": 27.0}[size], rel=0.01)
