"""The five sizes, and what a file that claims one of them must say."""

from __future__ import annotations

from typing import Any

import pytest

from gemwright.errors import InputError
from gemwright.spec import RANDOM_KEY, SPECS, spec_from_config, spec_from_gguf

# Parameters of the decoder in millions, embedding of 262,144 rows included (technical report, table 1, rounded there).
MILLIONS = {"270m": 268, "1b": 1000, "4b": 3880, "12b": 11766, "27b": 27009}


def metadata(size: str, **changes: Any) -> dict[str, Any]:
    spec = SPECS[size]
    said = {
        "block_count": spec.layers,
        "embedding_length": spec.hidden,
        "feed_forward_length": spec.mlp,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.sliding_window": spec.window,
        "context_length": spec.context,
        "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    }
    return {"general.architecture": "gemma3"} | {f"gemma3.{key}": value for key, value in (said | changes).items()}


def config(size: str) -> dict[str, Any]:
    spec = SPECS[size]
    return {
        "model_type": "gemma3_text",
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.mlp,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "sliding_window": spec.window,
        "max_position_embeddings": spec.context,
        "query_pre_attn_scalar": spec.query_scalar,
        "rope_theta": 1_000_000,
        "rope_local_base_freq": 10_000,
        "rms_norm_eps": 1e-6,
        "_sliding_window_pattern": 6,
    }


@pytest.mark.parametrize("size", SPECS)
def test_sizes_have_the_published_number_of_parameters(size: str) -> None:
    spec = SPECS[size]
    layer = sum(rows * cols for rows, cols in spec.linear_shapes.values()) + sum(spec.norm_shapes.values())
    total = spec.vocab * spec.hidden + spec.layers * layer + spec.hidden
    assert total / 1e6 == pytest.approx(MILLIONS[size], rel=0.002)


def test_one_layer_in_six_is_global() -> None:
    spec = SPECS["270m"]
    assert [layer for layer in range(spec.layers) if spec.is_global(layer)] == [5, 11, 17]


@pytest.mark.parametrize("size", SPECS)
def test_recognised_from_gguf_and_config(size: str) -> None:
    assert spec_from_gguf(metadata(size), "f") is SPECS[size]
    assert spec_from_config(config(size), "f") is SPECS[size]
    assert spec_from_config({"model_type": "gemma3", "text_config": config(size)}, "f") is SPECS[size]


def test_the_metadata_of_googles_own_27b() -> None:
    """What gemma-3-27b-it-q4_0.gguf states, apart from its tokenizer."""
    said = metadata("27b", **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "vision.block_count": 27})
    assert spec_from_gguf(said | {"general.file_type": 2, "gemma3.attention.value_length": 128}, "f") is SPECS["27b"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("feed_forward_length", 2049), ("attention.head_count_kv", 4), ("rope.freq_base", 1e4), ("block_count", 26)],
)
def test_a_mismatch_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        spec_from_gguf(metadata("270m", **{field: value}), "file.gguf")
    assert "file.gguf" in str(caught.value) and "gemma3." in str(caught.value)
    if field != "block_count":
        assert f"gemma3.{field}" in str(caught.value)


def test_a_mismatch_in_a_config_names_the_field() -> None:
    with pytest.raises(InputError, match="sliding_window is 1024"):
        spec_from_config(config("270m") | {"sliding_window": 1024}, "f")
    with pytest.raises(InputError, match="rope_local_base is 1"):
        spec_from_config(config("270m") | {"rope_local_base_freq": 1}, "f")


def test_other_models() -> None:
    with pytest.raises(InputError, match="'llama'"):
        spec_from_gguf({"general.architecture": "llama"}, "f")
    with pytest.raises(InputError, match="'gemma2'"):
        spec_from_config({"model_type": "gemma2"}, "f")
    with pytest.raises(InputError, match="match no size"):
        spec_from_gguf(metadata("270m", block_count=5, embedding_length=100), "f")


def test_random_files_may_have_any_sensible_shape() -> None:
    said = metadata("270m", block_count=7, embedding_length=64) | {RANDOM_KEY: True, "gemma3.vocab_size": 512}
    spec = spec_from_gguf(said, "f")
    assert (spec.layers, spec.hidden, spec.vocab, spec.norm_eps) == (7, 64, 512, 1e-6)
    tiny = spec_from_config(config("270m") | {"num_hidden_layers": 7, "vocab_size": 512, RANDOM_KEY: True}, "f")
    assert (tiny.layers, tiny.vocab, tiny.rope_local_base) == (7, 512, 10_000)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_count", 1 << 40),
        ("block_count", 0),
        ("embedding_length", "wide"),
        ("attention.head_count", True),
        ("attention.head_count_kv", 3),
        ("feed_forward_length", None),
        ("attention.key_length", 2.5),
    ],
)
def test_random_files_with_senseless_numbers(field: str, value: Any) -> None:
    with pytest.raises(InputError):
        spec_from_gguf(metadata("270m", **{field: value}) | {RANDOM_KEY: True}, "f")
