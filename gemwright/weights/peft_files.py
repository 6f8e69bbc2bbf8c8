"""Adapters in PEFT's layout: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gemwright.errors import InputError
from gemwright.runs import atomic_path
from gemwright.spec import ModelSpec
from gemwright.weights import names
from gemwright.weights.hf_folder import read_object, read_safetensors, write_safetensors
from gemwright.weights.pairs import Magnitudes, Pairs, check_magnitudes, check_pairs

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MAGNITUDES = "lora_magnitude_vector"
# Ways of PEFT to change the arithmetic of a pair that we have not.
_UNSUPPORTED = ("fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")


@dataclass(frozen=True)
class PeftAdapter:
    """What a folder holds: its config, its pairs and, with DoRA, its magnitudes, all fp32 and by our names."""

    config: Mapping[str, Any]
    pairs: Pairs
    magnitudes: Magnitudes

    @property
    def scale(self) -> float:
        """What multiplies B A: alpha / r, or alpha / sqrt(r) with rank stabilisation."""
        rank = self.config["r"]
        return float(self.config["lora_alpha"]) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def write_peft_adapter(
    folder: Path,
    spec: ModelSpec,
    rank: int,
    alpha: float,
    pairs: Pairs,
    base_model: str,
    targets: Sequence[str],
    *,
    rslora: bool = False,
    magnitudes: Magnitudes | None = None,
) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads; everything by our names, `magnitudes` for DoRA."""
    magnitudes = magnitudes or {}
    check_pairs(spec, pairs, folder)
    check_magnitudes(pairs, magnitudes, folder)
    tensors: dict[str, Tensor] = {}
    for ours, (a, b) in pairs.items():
        tensors[f"{names.to_peft(ours)}.lora_A.weight"] = a.detach().cpu().float().contiguous()
        tensors[f"{names.to_peft(ours)}.lora_B.weight"] = b.detach().cpu().float().contiguous()
    for ours, magnitude in magnitudes.items():
        tensors[f"{names.to_peft(ours)}.{_MAGNITUDES}"] = magnitude.detach().cpu().float().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": rslora,
        "use_dora": bool(magnitudes),
        "inference_mode": True,
        "target_modules": sorted(names.PARTS[target][1].rpartition(".")[2] for target in targets),
    }
    with atomic_path(folder) as part:
        part.mkdir()
        write_safetensors(part / _WEIGHTS, tensors)
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (part / _CONFIG).write_text(text, encoding="utf-8")


def read_peft_adapter(folder: Path, spec: ModelSpec | None = None) -> PeftAdapter:
    """The adapter in `folder`, checked against `spec` when given.

    Raises InputError for a missing or damaged file, another method than LoRA (also rank-stabilised) and DoRA, or an
    adapter of another model.
    """
    where = folder / _CONFIG
    config = read_object(where)
    odd = [key for key in _UNSUPPORTED if config.get(key)]
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or odd:
        what = f"uses {', '.join(odd)}" if odd else f"peft_type is {config.get('peft_type')!r}, not 'LORA'"
        raise InputError(what, where=where, fix="Give a plain LoRA adapter.")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise InputError(f"r is {rank!r} and lora_alpha {alpha!r}", where=where, fix="Give a whole adapter folder.")
    pairs, magnitudes = _pair_up(read_safetensors(folder / _WEIGHTS), folder / _WEIGHTS)
    for name, (a, b) in pairs.items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise InputError(f"{name} does not have the rank {rank}", where=where, fix="Give a whole adapter folder.")
    if spec is not None:
        check_pairs(spec, pairs, folder)
    if bool(config.get("use_dora")) != bool(magnitudes):
        what = f"use_dora is {config.get('use_dora')}, but the weights have {'' if magnitudes else 'no '}magnitudes"
        raise InputError(what, where=where, fix="Give a whole adapter folder.")
    check_magnitudes(pairs, magnitudes, where)
    return PeftAdapter(config, pairs, magnitudes)


def _pair_up(tensors: dict[str, Tensor], where: Path) -> tuple[Pairs, Magnitudes]:
    sides: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, side = name.removesuffix(".weight").rpartition(".lora_")
        ours = names.from_peft(module)
        if ours is not None and side == _MAGNITUDES.removeprefix("lora_"):
            magnitudes[ours] = tensor.float()
            continue
        if ours is None or side not in ("A", "B"):
            raise InputError(f"{name} is no LoRA tensor of Gemma 3's text layers", where=where, fix="Train it again.")
        sides.setdefault(ours, {})[side] = tensor.float()
    for ours, pair in sides.items():
        if len(pair) < 2:
            raise InputError(f"{ours} has only one half of its LoRA pair", where=where, fix="Train it again.")
    return {ours: (pair["A"], pair["B"]) for ours, pair in sides.items()}, magnitudes
