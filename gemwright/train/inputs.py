"""What a fine-tune begins with: model, examples and device, checked, and a record by which a later process goes on."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemwright import __version__
from gemwright.errors import InputError
from gemwright.model.lora import check_targets
from gemwright.model.precision import choose_dtype
from gemwright.report import say
from gemwright.text.tokenizer import Tokenizer
from gemwright.train.batches import Encoded
from gemwright.train.config import TrainConfig
from gemwright.train.prepare import prepare, spoken
from gemwright.train.samples import Prompt, read_prompts
from gemwright.train.setup import check_compute, check_placing, choose_device
from gemwright.train.validate import hold_out
from gemwright.train.writers import check_installed
from gemwright.weights.model_file import ModelFile, open_model
from gemwright.weights.pull import resolve_model

# Settings that say where and how long the work is done, and change no result.
_FREE = {"data", "model", "out", "validation", "threads", "recompute", "vram", "residency", "source"}
_FREE |= {"save_every", "keep", "until", "max_hours", "sample_prompts", "tensorboard", "trackio"}
_FREE |= {"precision"}  # the dtype that came of it is in `compute`
_DIGESTS = ("base_sha256", "data_sha256", "validation_sha256", "tokens_sha256")
_PRECISION = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Inputs:
    """A fine-tune's material; `record` is what its `config.json` says, but for what is known only later."""

    config: TrainConfig
    file: ModelFile
    device: torch.device
    dtype: torch.dtype
    examples: Sequence[Encoded]
    validation: Sequence[Encoded] | None
    record: dict[str, Any]
    tokenizer: Tokenizer
    prompts: list[Prompt] | None = None


def read_inputs(config: TrainConfig) -> Inputs:
    """Open, read and check all that `config` names. Raises InputError; nothing is written."""
    check_installed(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    check_compute(config.compute, device)
    check_placing(config, device)
    dtype = choose_dtype(config.precision, device)
    file = open_model(resolve_model(config.model))
    if config.seq > file.spec.context:
        raise InputError(
            f"{config.seq} tokens exceed the model's context", where="--seq", fix=f"Use {file.spec.context} at most."
        )
    check_targets(file.spec, config.rank, config.targets)
    tokenizer = Tokenizer.from_model(file)
    encode, asked = tokenizer.encode, config.sample_prompts
    prompts = read_prompts(asked, encode, config.seq) if asked else None
    make = partial(prepare, encode=encode, train_on=config.train_on, seq=config.seq, workers=config.threads)
    data = make(config.data, on_progress=spoken(say))
    held = make(config.validation, on_progress=spoken(say)) if config.validation else None
    examples: Sequence[Encoded] = data.examples
    validation: Sequence[Encoded] | None = held.examples if held else None
    if config.holdout:
        examples, validation = hold_out(examples, config.holdout, config.seed)
    record = config.model_dump(mode="json") | {
        "data": _place(config.data),
        "model": _place(config.model),
        "validation": config.validation and _place(config.validation),
        "sample_prompts": asked and _place(asked),
        "alpha": config.scaled_alpha,
        "compute": "fp8" if config.compute == "fp8" else str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "examples": len(examples),
        "validation_examples": len(validation or []),
        "base": {"path": str(file.path.absolute()), "size": file.spec.name, "type": file.quantization},
        "data_sha256": data.data_sha256,
        "validation_sha256": held and held.data_sha256,
        "tokens_sha256": hashlib.sha256(
            "".join(each.examples.sha256 for each in (data, held) if each).encode()
        ).hexdigest(),
        "versions": {"gemwright": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    return Inputs(config, file, device, dtype, examples, validation, record, tokenizer, prompts)


def settings_of(record: Mapping[str, Any], out: Path, **limits: Any) -> TrainConfig:
    """The settings that a run's `config.json` records, for going on in `out`; time limits are given anew each time."""
    settings = {name: record[name] for name in TrainConfig.model_fields if name in record}
    if record["compute"] in _PRECISION:
        settings |= {"compute": "bf16", "precision": _PRECISION[record["compute"]]}
    return TrainConfig(**(settings | {"out": out, "until": None, "max_hours": None} | limits))


def origin_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record must be the same for a run to go on: settings that shape it, and digests of its files."""
    names = [name for name in (*TrainConfig.model_fields, *_DIGESTS) if name not in _FREE]
    known = {"base_sha256": record["base"].get("sha256"), **record}
    return {name: known[name] for name in names if name in known}  # an older version has not all of them


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """InputError naming the first difference between what a run was started from and what is there `now`."""
    what = {
        "base_sha256": (record["base"]["path"], "not the base model that the run was started with"),
        "data_sha256": (record["data"], "the data changed since the run was started"),
        "validation_sha256": (record["validation"], "the data changed since the run was started"),
        "tokens_sha256": (record["data"], "the chat template or the tokenizer gives other tokens than at the start"),
    }
    fix = "Put it back as it was, or start a new run."
    for name, before in then.items():
        if (before is None and name in what) or before == now.get(name):
            continue
        if name in what:
            where, text = what[name]
            raise InputError(f"{text} (SHA-256 {before[:12]}, now {str(now.get(name))[:12]})", where=where, fix=fix)
        flag = f"--{name.replace('_', '-')}"
        raise InputError(f"{now.get(name)!r} now, and {before!r} at the checkpoint", where=flag, fix=fix)


def say_versions(record: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say where other versions go on with a run, which may round otherwise."""
    before, after = record.get("versions", {}), now["versions"]
    changed = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after.get(name)]
    if changed:
        say(f"other versions than at the start ({', '.join(changed)}): results may differ in their last bits")


def _place(name: str | Path) -> str:
    """The path, from everywhere, of a model or data that is here; else its name on the Hub."""
    return str(Path(name).absolute()) if Path(name).exists() else str(name)
