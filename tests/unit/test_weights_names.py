"""The name table goes both ways for every tensor of every size."""

from __future__ import annotations

import gguf
import pytest

from gemwright.spec import LINEARS, SPECS
from gemwright.weights import names


@pytest.mark.parametrize("size", SPECS)
def test_every_name_returns(size: str) -> None:
    shapes = names.expected_shapes(SPECS[size], 262_144)
    assert len(shapes) == 2 + 13 * SPECS[size].layers
    for ours in shapes:
        assert names.from_gguf(names.to_gguf(ours)) == ours
        for prefix in names.HF_PREFIXES:
            assert names.from_hf(names.to_hf(ours, prefix)) == ours
        if ours.split(".")[-1] in LINEARS:
            assert names.from_peft(names.to_peft(ours)) == ours


def test_agrees_with_the_librarys_table() -> None:
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 26)
    for ours in names.expected_shapes(SPECS["1b"], 262_144):
        hf = names.to_hf(ours).removesuffix(".weight")
        assert f"{table.get_name(hf)}.weight" == names.to_gguf(ours)


@pytest.mark.parametrize(
    "name",
    ["output.weight", "blk.3.attn_q.bias", "blk.attn_q.weight", "blk.3.token_embd.weight", "v.blk.0.attn_q.weight", ""],
)
def test_not_the_decoders_in_gguf(name: str) -> None:
    assert names.from_gguf(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight",
        "layers.0.self_attn.q_proj.weight",
    ],
)
def test_not_the_decoders_in_hf(name: str) -> None:
    assert names.from_hf(name) is None


def test_peft_of_the_multimodal_model() -> None:
    assert names.from_peft("base_model.model.model.language_model.layers.2.mlp.up_proj") == "2.up"
    assert names.from_peft("base_model.model.model.layers.2.input_layernorm") is None
