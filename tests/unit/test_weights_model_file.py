"""Models on disk: GGUF and Hugging Face folders, written, opened again and refused where something is off."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemwright.errors import InputError
from gemwright.spec import SPECS, ModelSpec
from gemwright.weights import hf_folder, names
from gemwright.weights.gguf_reader import StoredTensor
from gemwright.weights.gguf_writer import Piece, write_gguf_lora, write_gguf_model
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.quants import QTYPES, unpack
from gemwright.weights.random_model import write_random_gguf

TINY = replace(
    SPECS["270m"], name="tiny", layers=7, hidden=64, mlp=256, heads=4, kv_heads=2, head_dim=64, vocab=96, window=16
)


def values(model: ModelFile) -> dict[str, torch.Tensor]:
    """All tensors by our names in fp32, norms folded."""
    return {
        name: model.norm(name) if name.endswith("norm") else unpack(tensor.data, tensor.qtype)
        for name, tensor in model.tensors.items()
    }


def rewrite(path: Path, source: Path, change: dict[str, StoredTensor | None]) -> Path:
    """`source` again with some tensors changed or (None) left out."""
    model = open_model(source)
    tensors = model.tensors | change
    pieces = [Piece.of(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    write_gguf_model(path, model.spec, pieces, is_random=True)
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_random_gguf(path, TINY, "Q8_0", seed=3)
    return path


@pytest.fixture
def tiny_folder(tiny_gguf: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    hf_folder.write_hf_model(folder, TINY, values(open_model(tiny_gguf)), is_random=True)
    return folder


def test_the_real_model(real_model: Path) -> None:
    model = open_model(real_model)
    assert model.spec is SPECS["270m"] and model.quantization == "Q4_K_M" and model.folded
    assert len(model.tensors) == 236 and model.tensors["embed"].shape == (262_144, 640)
    assert model.bytes() == 253_113_024
    assert model.sha256() == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.mark.parametrize("qtype", QTYPES)
def test_random_models_of_every_type(tmp_path: Path, qtype: str) -> None:
    wide = replace(TINY, hidden=256)
    write_random_gguf(tmp_path / "a.gguf", wide, qtype, seed=1)
    write_random_gguf(tmp_path / "b.gguf", wide, qtype, seed=1)
    model = open_model(tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert model.spec == wide and model.quantization == qtype
    for name in ("embed", "3.q", "6.down"):
        assert model.tensors[name].qtype == qtype
        weight = unpack(model.tensors[name].data, qtype)
        assert weight.shape == model.tensors[name].shape
        assert weight.std().item() == pytest.approx(0.02, rel=0.05) and abs(weight.mean().item()) < 0.0015
    assert model.norm("0.attn_norm").mean().item() == pytest.approx(1, abs=0.05)


def test_random_falls_back_where_columns_do_not_fill_blocks(tmp_path: Path) -> None:
    write_random_gguf(tmp_path / "m.gguf", TINY, "Q4_K")
    model = open_model(tmp_path / "m.gguf")
    assert model.tensors["0.q"].qtype == "Q5_0" and model.tensors["0.down"].qtype == "Q4_K"
    with pytest.raises(InputError, match="cannot write IQ1_S"):
        write_random_gguf(tmp_path / "n.gguf", TINY, "IQ1_S")
    assert not (tmp_path / "n.gguf").exists()


def test_the_librarys_reader_reads_what_we_write(tiny_gguf: Path) -> None:
    reader = gguf.GGUFReader(tiny_gguf)
    model = open_model(tiny_gguf)
    for tensor in reader.tensors:
        ours = model.tensors[names.from_gguf(tensor.name) or ""]
        assert tensor.data.tobytes() == ours.data.numpy().tobytes()


def test_a_folder_holds_the_same_model(tiny_gguf: Path, tiny_folder: Path) -> None:
    model = open_model(tiny_folder)
    assert replace(model.spec, name="tiny") == TINY and not model.folded and model.quantization == "F32"
    for name, value in values(open_model(tiny_gguf)).items():
        torch.testing.assert_close(values(model)[name], value, rtol=0, atol=1e-7)
    assert len(model.sha256()) == 64 and model.bytes() > 1000


def test_transformers_loads_the_folder(tiny_gguf: Path, tiny_folder: Path) -> None:
    from transformers import Gemma3ForCausalLM

    loaded, info = Gemma3ForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = loaded.state_dict()
    for name, value in values(open_model(tiny_gguf)).items():
        wanted = value - 1 if name.endswith("norm") else value
        torch.testing.assert_close(state[names.to_hf(name)], wanted, rtol=0, atol=1e-7)
    text = loaded.config.get_text_config()
    assert text.layer_types == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert text.sliding_window == 16 and text.query_pre_attn_scalar == 256 and text.tie_word_embeddings


def test_sharded_and_multimodal_names(tiny_folder: Path) -> None:
    stored = load_file(tiny_folder / "model.safetensors")
    (tiny_folder / "model.safetensors").unlink()
    renamed = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    renamed["vision_tower.vision_model.post_layernorm.weight"] = torch.zeros(4, dtype=torch.int8)
    halves = {"one.safetensors": list(renamed)[:40], "two.safetensors": list(renamed)[40:]}
    for file, keys in halves.items():
        save_file({key: renamed[key].clone() for key in keys}, tiny_folder / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert len(open_model(tiny_folder).tensors) == len(stored)
    (tiny_folder / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"two\.safetensors: no such file"):
        open_model(tiny_folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"3.q": None}, r"blk\.3\.attn_q\.weight is missing"),
        ({"embed": None}, r"token_embd\.weight is missing"),
        ({"7.q": "3.q"}, r"blk\.7\.attn_q\.weight is no tensor of Gemma 3"),
        ({"3.k": "3.q"}, r"blk\.3\.attn_k\.weight has shape \(256, 64\), but .* has \(128, 64\)"),
    ],
)
def test_names_the_tensor_that_is_wrong(
    tmp_path: Path, tiny_gguf: Path, change: dict[str, str | None], said: str
) -> None:
    tensors = open_model(tiny_gguf).tensors
    changed = {name: None if other is None else tensors[other] for name, other in change.items()}
    with pytest.raises(InputError, match=said):
        open_model(rewrite(tmp_path / "bad.gguf", tiny_gguf, changed))


def test_names_an_unsupported_type(tmp_path: Path, tiny_gguf: Path) -> None:
    other = StoredTensor("", (256, 64), "IQ4_NL", torch.zeros(256, 36, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"blk\.2\.q\.weight|attn_q\.weight has the type IQ4_NL"):
        open_model(rewrite(tmp_path / "bad.gguf", tiny_gguf, {"2.q": other}))


def test_an_untied_head_is_refused_and_vision_is_left_aside(tmp_path: Path, tiny_gguf: Path) -> None:
    model = open_model(tiny_gguf)
    for name, fits in (("output.weight", False), ("v.blk.0.attn_q.weight", True)):
        extra = Piece(name, (2, 32), "F32", lambda: torch.zeros(2, 128, dtype=torch.uint8))
        pieces = [Piece.of(ours, tensor) for ours, tensor in model.tensors.items()]
        write_gguf_model(tmp_path / "m.gguf", TINY, [*pieces, extra], is_random=True)
        if fits:
            assert len(open_model(tmp_path / "m.gguf").tensors) == len(model.tensors)
        else:
            with pytest.raises(InputError, match="output head of its own"):
                open_model(tmp_path / "m.gguf")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    write_gguf_lora(tmp_path / "a.gguf", TINY, "tiny", 8, {"0.q": (torch.zeros(2, 64), torch.zeros(256, 2))})
    with pytest.raises(InputError, match="is a LoRA adapter"):
        open_model(tmp_path / "a.gguf")


def test_true_sizes_are_checked_too(tmp_path: Path, tiny_gguf: Path) -> None:
    model = open_model(tiny_gguf)
    write_gguf_model(tmp_path / "m.gguf", TINY, [Piece.of(n, t) for n, t in model.tensors.items()])
    with pytest.raises(InputError, match="match no size of Gemma 3"):
        open_model(tmp_path / "m.gguf")


def folder_fault(folder: Path, fault: str) -> None:
    weights = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    if fault == "no config":
        (folder / "config.json").unlink()
    elif fault == "not json":
        (folder / "config.json").write_bytes(b"\xff{")
    elif fault == "no weights":
        weights.unlink()
    elif fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif fault == "bias":
        save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(2)}, weights)
    elif fault == "type":
        save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.int32)}, weights)
    elif fault == "index":
        index = {"weight_map": {"a": "../../elsewhere.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no config", "no such file"),
        ("not json", "not JSON"),
        ("no weights", r"model\.safetensors: no such file"),
        ("cut", "not a whole safetensors file"),
        ("bias", "q_proj.bias is no tensor"),
        ("type", "has the type int32"),
        ("index", "no usable weight_map"),
    ],
)
def test_faulty_folders(tiny_folder: Path, tmp_path: Path, fault: str, said: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    folder_fault(folder, fault)
    with pytest.raises(InputError, match=said) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


def test_shards_when_large(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_folder, "_SHARD_BYTES", 200_000)
    hf_folder.write_hf_model(tmp_path / "hf", TINY, values(open_model(tiny_gguf)), is_random=True)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    assert len(open_model(tmp_path / "hf").tensors) == 2 + 13 * TINY.layers


@pytest.mark.parametrize("size", SPECS)
def test_configs_of_the_true_sizes_are_recognised(size: str) -> None:
    from gemwright.spec import spec_from_config

    spec: ModelSpec = SPECS[size]
    assert spec_from_config(hf_folder._config(spec, spec.vocab, torch.bfloat16), "f") is spec
