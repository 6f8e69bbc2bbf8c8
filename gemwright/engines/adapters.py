"""Finds the LoRA adapter meant by a path (run folder, PEFT folder, GGUF LoRA) and checks that it fits the model.

Shapes are read from headers without torch; only a PEFT folder that llama.cpp is to use has to be converted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemwright.engines.header import read_header
from gemwright.errors import InputError
from gemwright.spec import LINEARS, ModelSpec

_GGUF_PARTS = dict(
    zip(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), LINEARS, strict=True)
)
_TRAINED_ON = "Give the model that the adapter was trained on."


def find_gguf_lora(path: Path, spec: ModelSpec, scratch: Path) -> Path:
    """The GGUF LoRA of `path`, checked against `spec`; a PEFT folder is converted into `scratch`.

    InputError for DoRA, for which llama.cpp has no arithmetic.
    """
    run = is_run(path, spec)
    _refuse_dora(path / "adapter" if run else path)
    if is_peft(path):
        return _convert(path, spec, scratch)
    found = path / "adapter.gguf" if run else path
    if not found.is_file():
        _missing(path)
    check_gguf_lora(found, spec)
    return found


def is_peft(path: Path) -> bool:
    """Whether `path` is an adapter folder in PEFT's layout."""
    return (path / "adapter_config.json").is_file()


def _refuse_dora(folder: Path) -> None:
    if is_peft(folder) and _read(folder / "adapter_config.json").get("use_dora"):
        raise InputError("llama.cpp cannot run a DoRA adapter", where=folder, fix="Use --engine pytorch.")


def is_run(path: Path, spec: ModelSpec) -> bool:
    """Whether `path` is a run folder; InputError where its run was on another size of model."""
    config = path / "config.json"
    if not config.is_file():
        return False
    base = _read(config).get("base")
    size = base.get("size") if isinstance(base, dict) else None
    if size is not None and size != spec.name:
        what = f"adapter for another model: trained on Gemma 3 {size}, this is Gemma 3 {spec.name}"
        raise InputError(what, where=path, fix=_TRAINED_ON)
    return True


def _read(config: Path) -> dict[str, Any]:
    try:
        value = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({error})", where=config, fix="Give the --out of a finished run.") from None
    return value if isinstance(value, dict) else {}


def _missing(path: Path) -> None:
    if not path.exists():
        raise InputError("no such adapter", where=path, fix="Give a run folder, a PEFT folder or a GGUF LoRA.")
    raise InputError("holds no adapter", where=path, fix="Give a finished run, a PEFT folder or a GGUF LoRA.")


def check_gguf_lora(path: Path, spec: ModelSpec) -> None:
    """InputError where the GGUF at `path` is no LoRA, or has a pair that `spec` has no place for."""
    header = read_header(path)
    if header.scalars.get("general.type") != "adapter" or header.tensors is None:
        raise InputError("is not a LoRA adapter", where=path, fix="Give the adapter.gguf of a run.")
    for name, shape in header.tensors.items():
        layer, part, side = _place(name)
        wanted = spec.linear_shapes.get(part) if layer is not None and layer < spec.layers else None
        if wanted is None or len(shape) != 2 or (shape[1] != wanted[1] if side == "a" else shape[0] != wanted[0]):
            what = f"adapter for another model: {name} has the shape {shape}"
            raise InputError(f"{what}, which does not fit Gemma 3 {spec.name}", where=path, fix=_TRAINED_ON)


def _place(name: str) -> tuple[int | None, str, str]:
    """(layer, our linear, "a" or "b") of a name like `blk.3.attn_q.weight.lora_a`."""
    parts = name.split(".")
    if len(parts) != 5 or parts[0] != "blk" or not parts[1].isdecimal() or parts[4] not in ("lora_a", "lora_b"):
        return None, "", ""
    return int(parts[1]), _GGUF_PARTS.get(parts[2], ""), parts[4][-1]


def _convert(folder: Path, spec: ModelSpec, scratch: Path) -> Path:
    from gemwright.weights.gguf_writer import write_gguf_lora
    from gemwright.weights.peft_files import read_peft_adapter

    adapter = read_peft_adapter(folder, spec)
    made = scratch / f"{len(list(scratch.iterdir()))}.gguf"
    write_gguf_lora(made, spec, spec.name, adapter.scale * adapter.config["r"], adapter.pairs)
    return made
