"""Running a GGUF planned: bytes of caches, layers on a GPU, speeds that move the right way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.errors import DoesNotFit, InputError
from gemwright.plan.model_bytes import published
from gemwright.plan.running import CACHE_BYTES, DRAFT, Place, alternatives, cache_bytes, run_plan, with_draft
from gemwright.spec import SPECS

GIB = 1 << 30
HOST = Place(35e9, 900e9, 56 * GIB)
CARD = Place(260e9, 37e12, 7 * GIB)


def test_window_layers_keep_their_window_and_a_batch() -> None:
    spec = SPECS["27b"]
    whole = 2 * 2 * spec.kv_heads * spec.head_dim
    globals_ = sum(spec.is_global(i) for i in range(spec.layers))
    expected = whole * (globals_ * 65_536 + (spec.layers - globals_) * 1536)
    assert cache_bytes(spec, 65_536) == expected
    assert cache_bytes(spec, 65_536, "q8_0") == pytest.approx(expected * CACHE_BYTES["q8_0"] / 2, rel=1e-6)


def test_a_small_cache_keeps_everything() -> None:
    spec = SPECS["270m"]
    assert cache_bytes(spec, 4096) == 4 * spec.layers * spec.kv_heads * spec.head_dim * 4096


@pytest.mark.parametrize("size", SPECS)
def test_more_video_memory_is_never_slower(size: str) -> None:
    speeds, layers = [], []
    for gib in (1, 3, 7, 15, 23):
        plan = run_plan(published(size), 4096, HOST, Place(CARD.memory_bytes_s, CARD.flops, gib * GIB))
        assert plan.device_bytes <= gib * GIB and plan.host_bytes <= HOST.room_bytes
        speeds.append(plan.decode_tokens_per_s)
        layers.append(plan.gpu_layers)
    assert speeds == sorted(speeds) and layers == sorted(layers)


@settings(max_examples=40)
@given(size=st.sampled_from(sorted(SPECS)), context=st.integers(1, 32_768), gib=st.integers(1, 64))
def test_a_plan_fits_or_says_what_it_needs(size: str, context: int, gib: int) -> None:
    host = Place(35e9, 900e9, gib * GIB)
    try:
        plan = run_plan(published(size), context, host, CARD)
    except DoesNotFit as error:
        assert "RAM" in error.what and error.exit_code == 3
        return
    assert plan.host_bytes <= host.room_bytes and plan.device_bytes <= CARD.room_bytes
    assert plan.decode_tokens_per_s > 0 and plan.prefill_tokens_per_s > plan.decode_tokens_per_s / 2


def test_a_context_beyond_the_models_is_refused() -> None:
    for context in (0, -1, SPECS["1b"].context + 1):
        with pytest.raises(InputError, match="--context"):
            run_plan(published("1b"), context, HOST)


def test_a_draft_helps_where_it_guesses_well() -> None:
    large, small = (run_plan(published(size), 4096, HOST) for size in ("27b", "270m"))
    alone = large.decode_tokens_per_s
    assert with_draft(large, small, 0.8) > 1.5 * alone > alone > with_draft(large, large, 0.1)


@pytest.mark.parametrize("size", SPECS)
@pytest.mark.parametrize("context", [4096, 32_768])
def test_what_is_named_beside_a_plan_fits_and_is_worth_it(size: str, context: int) -> None:
    for gpu in (None, CARD):
        plan = run_plan(published(size), context, HOST, gpu)
        found = alternatives(published(size), plan, HOST, gpu, published(DRAFT))
        assert [other.tokens_per_s for other in found] == sorted((o.tokens_per_s for o in found), reverse=True)
        for other in found:
            assert other.host_bytes <= HOST.room_bytes
            assert other.device_bytes <= CARD.room_bytes + (2 << 30) * other.what.startswith("2 GiB more")
            less = other.device_bytes + other.host_bytes < 0.9 * (plan.device_bytes + plan.host_bytes)
            assert less or other.tokens_per_s > 1.05 * plan.decode_tokens_per_s
        assert any("draft" in other.what for other in found) == (size in ("4b", "12b", "27b"))


def test_a_smaller_cache_is_named_where_it_brings_layers_to_the_gpu() -> None:
    plan = run_plan(published("12b"), 16_384, HOST, CARD)
    found = {o.what: o for o in alternatives(published("12b"), plan, HOST, CARD, published(DRAFT))}
    small = run_plan(published("12b"), 16_384, HOST, CARD, cache="q8_0")
    assert small.gpu_layers > plan.gpu_layers
    assert found["keys and values in q8_0"].tokens_per_s == small.decode_tokens_per_s


def test_narrow_vectors_make_a_token_dearer_and_a_prompt_cheaper_beside_fp32() -> None:
    wide, narrow = (run_plan(published("4b"), 4096, Place(1e12, 100e9, 56 * GIB, narrow=n)) for n in (False, True))
    assert narrow.decode_tokens_per_s < wide.decode_tokens_per_s
    assert narrow.prefill_tokens_per_s > wide.prefill_tokens_per_s
