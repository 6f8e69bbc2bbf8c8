"""LoRA adapters: PEFT folders that PEFT loads, GGUF adapters that llama.cpp's layout asks for."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gemwright.errors import InputError, MachineError
from gemwright.spec import LINEARS, SPECS
from gemwright.weights import hf_folder, names
from gemwright.weights.gguf_writer import read_gguf_lora, write_gguf_lora
from gemwright.weights.hf_folder import write_hf_model
from gemwright.weights.pairs import Magnitudes, Pairs
from gemwright.weights.peft_files import read_peft_adapter, write_peft_adapter

TINY = replace(SPECS["270m"], name="tiny", layers=7, hidden=64, mlp=96, heads=4, kv_heads=2, head_dim=32, vocab=96)
RANK, ALPHA = 3, 6.0
# PEFT 0.21 still asks transformers 5 for a property by its old name.
OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(5)
    return {
        f"{layer}.{part}": (torch.randn(RANK, cols, generator=generator), torch.randn(rows, RANK, generator=generator))
        for layer in range(TINY.layers)
        for part, (rows, cols) in TINY.linear_shapes.items()
    }


@pytest.fixture
def folder(tmp_path: Path, pairs: Pairs) -> Path:
    write_peft_adapter(tmp_path / "adapter", TINY, RANK, ALPHA, pairs, "google/gemma-3-270m", LINEARS)
    return tmp_path / "adapter"


def assert_same(one: Pairs, other: Pairs) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name][0], other[name][0]) and torch.equal(one[name][1], other[name][1])


def test_peft_round_trip(folder: Path, pairs: Pairs) -> None:
    config, back = (adapter := read_peft_adapter(folder, TINY)).config, adapter.pairs
    assert adapter.scale == ALPHA / RANK and not adapter.magnitudes
    assert config["r"] == RANK and config["lora_alpha"] == ALPHA and config["peft_type"] == "LORA"
    assert config["target_modules"] == sorted(f"{part}_proj" for part in LINEARS)
    assert_same(back, pairs)


@OLD_NAME
def test_peft_loads_it_and_means_the_same(tmp_path: Path, folder: Path, pairs: Pairs) -> None:
    from peft import PeftModel
    from transformers import Gemma3ForCausalLM

    shapes = names.expected_shapes(TINY, TINY.vocab)
    base = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in shapes.items()}
    write_hf_model(tmp_path / "base", TINY, base)
    model = PeftModel.from_pretrained(Gemma3ForCausalLM.from_pretrained(tmp_path / "base"), folder)
    for name, (a, b) in pairs.items():
        module = model.get_submodule(names.to_peft(name))
        torch.testing.assert_close(module.get_delta_weight("default"), ALPHA / RANK * (b @ a))


@pytest.fixture
def magnitudes(pairs: Pairs) -> Magnitudes:
    generator = torch.Generator().manual_seed(6)
    return {name: 0.1 + torch.rand(len(b), generator=generator) for name, (_, b) in pairs.items()}


@OLD_NAME
@pytest.mark.parametrize("rslora", [False, True], ids=("plain", "rslora"))
@pytest.mark.parametrize("dora", [False, True], ids=("lora", "dora"))
def test_peft_reads_and_saves_every_kind(
    tmp_path: Path, pairs: Pairs, magnitudes: Magnitudes, rslora: bool, dora: bool
) -> None:
    from peft import PeftModel
    from transformers import Gemma3ForCausalLM

    own = magnitudes if dora else {}
    ours = tmp_path / "ours"
    write_peft_adapter(ours, TINY, RANK, ALPHA, pairs, "base", LINEARS, rslora=rslora, magnitudes=own)
    shapes = names.expected_shapes(TINY, TINY.vocab)
    write_hf_model(tmp_path / "base", TINY, {name: torch.ones(shape) for name, shape in shapes.items()})
    model = PeftModel.from_pretrained(Gemma3ForCausalLM.from_pretrained(tmp_path / "base"), ours)
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    for folder in (ours, tmp_path / "saved"):
        adapter = read_peft_adapter(folder, TINY)
        assert adapter.config["r"] == RANK and adapter.config["use_dora"] == dora
        assert adapter.scale == model.get_submodule(names.to_peft("3.up")).scaling["default"]
        assert adapter.scale == ALPHA / (math.sqrt(RANK) if rslora else RANK)
        assert_same(adapter.pairs, pairs)
        assert adapter.magnitudes.keys() == own.keys()
        assert all(torch.equal(adapter.magnitudes[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("3.up"), "3.up has no magnitudes"),
        (lambda m: m.update({"3.up": torch.ones(5)}), r"3.up has magnitudes \(5,\), not \(96,\)"),
        (lambda m: m.update({"9.up": torch.ones(96)}), "9.up has magnitudes"),
    ],
    ids=("missing", "short", "other"),
)
def test_magnitudes_that_do_not_fit(
    tmp_path: Path, pairs: Pairs, magnitudes: Magnitudes, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    changed = dict(magnitudes)
    change(changed)
    with pytest.raises(InputError, match=said):
        write_peft_adapter(tmp_path / "a", TINY, RANK, ALPHA, pairs, "x", LINEARS, magnitudes=changed)
    assert not (tmp_path / "a").exists()


def test_magnitudes_that_the_config_denies(tmp_path: Path, pairs: Pairs, magnitudes: Magnitudes) -> None:
    write_peft_adapter(tmp_path / "a", TINY, RANK, ALPHA, pairs, "x", LINEARS, magnitudes=magnitudes)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"use_dora": False}), encoding="utf-8")
    with pytest.raises(InputError, match="use_dora is False, but the weights have magnitudes"):
        read_peft_adapter(tmp_path / "a")


@pytest.mark.parametrize("qtype", ["F32", "F16"])
def test_gguf_round_trip(tmp_path: Path, pairs: Pairs, qtype: str) -> None:
    path = tmp_path / "adapter.gguf"
    write_gguf_lora(path, TINY, "gemma-3-270m", ALPHA, pairs, qtype=qtype)
    alpha, back = read_gguf_lora(path, TINY)
    assert alpha == ALPHA
    kind = torch.float32 if qtype == "F32" else torch.float16
    assert_same(back, {name: (a.to(kind).float(), b.to(kind).float()) for name, (a, b) in pairs.items()})


def test_gguf_has_llamacpps_layout(tmp_path: Path, pairs: Pairs) -> None:
    write_gguf_lora(tmp_path / "adapter.gguf", TINY, "gemma-3-270m", ALPHA, pairs)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    said = {key: reader.fields[key].contents() for key in ("general.type", "adapter.type", "general.architecture")}
    assert said == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "gemma3"}
    assert reader.fields["adapter.lora.alpha"].contents() == ALPHA
    shapes = {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors}
    assert shapes["blk.2.ffn_down.weight.lora_a"] == (96, RANK)
    assert shapes["blk.2.ffn_down.weight.lora_b"] == (RANK, 64)


LLAMACPP = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.n_gpu_layers = sys.argv[1], 64, False, 0
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[2], float(sys.argv[3]))]
prompt = {"prompt": "The capital of France is", "n_predict": 8, "temperature": 0}
print("ANSWER", repr(xllamacpp.Server(params).handle_completions(prompt)["choices"][0]["text"]))
"""


def test_llamacpp_loads_and_applies_it(real_model: Path, tmp_path: Path) -> None:
    spec, generator = SPECS["270m"], torch.Generator().manual_seed(0)
    pairs = {
        f"{layer}.{part}": (torch.randn(8, cols, generator=generator), torch.randn(rows, 8, generator=generator) / 2500)
        for layer in range(spec.layers)
        for part, (rows, cols) in spec.linear_shapes.items()
    }
    write_gguf_lora(tmp_path / "a.gguf", spec, "gemma-3-270m", 16, pairs)
    answers = []
    for scale in ("0", "1"):
        command = [sys.executable, "-c", LLAMACPP, str(real_model), str(tmp_path / "a.gguf"), scale]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
        answers += re.findall(r"ANSWER (.*)", done.stdout)
    assert len(answers) == 2 and answers[0] != answers[1]


def test_an_adapter_of_another_model_is_named(folder: Path, tmp_path: Path, pairs: Pairs) -> None:
    other = SPECS["270m"]
    said = r"has A \(3, 96\) and B \(64, 3\); Gemma 3 270m wants \[r, 2048\] and \[640, r\]"
    with pytest.raises(InputError, match=said):
        read_peft_adapter(folder, other)
    with pytest.raises(InputError, match=r"changes 6\.down, which Gemma 3 tiny does not have"):
        read_peft_adapter(folder, replace(TINY, layers=6))
    write_gguf_lora(tmp_path / "a.gguf", TINY, "x", ALPHA, pairs)
    with pytest.raises(InputError, match="wants"):
        read_gguf_lora(tmp_path / "a.gguf", other)
    with pytest.raises(InputError, match="wants"):
        write_gguf_lora(tmp_path / "b.gguf", other, "x", ALPHA, pairs)
    assert not (tmp_path / "b.gguf").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hf_folder, "save_file", refuse)
    with pytest.raises(MachineError, match="No space left on device"):
        write_peft_adapter(tmp_path / "adapter", TINY, RANK, ALPHA, pairs, "x", LINEARS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"use_dora": True}, "use_dora is True, but the weights have no magnitudes"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": 4}, "does not have the rank 4"),
        ({"r": "3"}, "r is '3'"),
    ],
)
def test_other_kinds_of_adapter(folder: Path, change: dict[str, object], said: str) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        read_peft_adapter(folder)


def test_damaged_adapters(folder: Path, tmp_path: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    half = {name: tensor.clone() for name, tensor in tensors.items() if "layers.3.mlp.up_proj.lora_B" not in name}
    save_file(half, weights)
    with pytest.raises(InputError, match=r"3\.up has only one half"):
        read_peft_adapter(folder)
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(InputError, match="lm_head"):
        read_peft_adapter(folder)
    weights.write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_peft_adapter(folder)
    with pytest.raises(InputError, match="no such file"):
        read_peft_adapter(tmp_path / "none")
    with pytest.raises(InputError, match="no LoRA pairs"):
        write_peft_adapter(tmp_path / "empty", TINY, RANK, ALPHA, {}, "x", LINEARS)
    assert not (tmp_path / "empty").exists()
