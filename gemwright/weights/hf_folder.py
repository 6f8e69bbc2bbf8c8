"""Hugging Face model folders: reads config.json and (sharded) safetensors, writes a folder transformers loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gemwright.errors import InputError
from gemwright.runs import atomic_path, write_json
from gemwright.spec import BOS, EOS, PAD, RANDOM_KEY, ModelSpec
from gemwright.weights import names
from gemwright.weights.gguf_reader import StoredTensor

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_SHARD_BYTES = 4 << 30
_BESIDE = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.|(language_model\.)?lm_head\.")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as a dictionary."""
    return read_object(folder / "config.json")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model, by name; InputError where one is missing."""
    index = folder / _INDEX
    if not index.is_file():
        found = [_SINGLE]
    else:
        mapping = read_object(index).get("weight_map")
        if not isinstance(mapping, dict) or not all(_plain_name(file) for file in mapping.values()):
            raise InputError("has no usable weight_map", where=index, fix="Fetch the folder again.")
        found = sorted(set(mapping.values()))
    for file in found:
        if not (folder / file).is_file():
            raise InputError("no such file", where=folder / file, fix="Fetch the folder again.")
    return [folder / file for file in found]


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The decoder's tensors by their own names, memory-mapped; vision and a tied copy of the head are left out."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, tensor in read_safetensors(file, wanted=lambda name: not _BESIDE.match(name)).items():
            if tensor.dtype not in _TYPES:
                what = f"tensor {name} has the type {str(tensor.dtype).removeprefix('torch.')}, which is not supported"
                raise InputError(what, where=file, fix=f"Give {', '.join(_TYPES.values())}.")
            data = tensor.contiguous().view(torch.uint8)
            tensors[name] = StoredTensor(name, tuple(tensor.shape), _TYPES[tensor.dtype], data)
    return tensors


def read_safetensors(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Tensor]:
    """The tensors of one file whose names are `wanted`; InputError where it is missing or damaged."""
    if not file.is_file():
        raise InputError("no such file", where=file, fix="Check the path, or fetch the folder again.")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"not a whole safetensors file ({what})", where=file, fix="Fetch it again.") from None


def write_safetensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one file as transformers and PEFT read it; OSError where the disk refuses."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_hf_model(
    folder: Path, spec: ModelSpec, tensors: Mapping[str, torch.Tensor], *, is_random: bool = False
) -> None:
    """Write `tensors` (by our names, norms folded as 1 + w) as a text-only model folder that transformers loads.

    All take the embedding's dtype. Give the norms in fp32: 1 + w in bf16 has already lost bits of w.
    """
    dtype = tensors["embed"].dtype
    with atomic_path(folder) as part:
        part.mkdir()
        shards: list[dict[str, torch.Tensor]] = [{}]
        filled = 0
        for ours, tensor in tensors.items():
            value = (tensor.float() - 1).to(dtype) if ours.endswith("norm") else tensor.to(dtype)
            if filled and filled + value.nbytes > _SHARD_BYTES:
                shards.append({})
                filled = 0
            filled += value.nbytes
            shards[-1][names.to_hf(ours)] = value.contiguous()
        _write_shards(part, shards)
        mark = {RANDOM_KEY: True} if is_random else {}
        write_json(part / "config.json", _config(spec, len(tensors["embed"]), dtype) | mark)


def _write_shards(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    if len(shards) == 1:
        write_safetensors(folder / _SINGLE, shards[0])
        return
    mapping: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard)
        mapping |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": mapping})


def _config(spec: ModelSpec, vocab_rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a text-only Gemma 3; keys as published with google/gemma-3-270m."""
    scaling = None if spec.rope_global_scale == 1 else {"rope_type": "linear", "factor": spec.rope_global_scale}
    kinds = ["full_attention" if spec.is_global(layer) else "sliding_attention" for layer in range(spec.layers)]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.mlp,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "sliding_window": spec.window,
        "_sliding_window_pattern": spec.global_every,
        "layer_types": kinds,
        "max_position_embeddings": spec.context,
        "query_pre_attn_scalar": int(spec.query_scalar),
        "rope_theta": spec.rope_global_base,
        "rope_local_base_freq": spec.rope_local_base,
        "rope_scaling": scaling,
        "rms_norm_eps": spec.norm_eps,
        "vocab_size": vocab_rows,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _plain_name(file: Any) -> bool:
    return isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError where it is missing or something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file", where=file, fix="Give a Hugging Face model folder or a .gguf file.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise InputError("not JSON", where=file, fix="Fetch it again.") from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=file, fix="Fetch it again.")
    return value
