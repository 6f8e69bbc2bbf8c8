"""One Gemma 3 model on disk, GGUF file or Hugging Face folder, checked whole before anything is computed with it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import LlamaFileType

from gemwright.errors import InputError
from gemwright.spec import LINEARS, RANDOM_KEY, VOCAB_ROWS, ModelSpec, scalar, spec_from_config, spec_from_gguf
from gemwright.weights import hf_folder, names
from gemwright.weights.digest import sha256_file
from gemwright.weights.gguf_reader import StoredTensor, open_gguf
from gemwright.weights.quants import QTYPES, unpack

_VISION_GGUF = ("v.", "mm.")


@dataclass(frozen=True)
class ModelFile:
    """A checked model: `tensors` by our names, `metadata` of the GGUF or the folder's config.

    `folded` says whether the stored norm weights are 1 + w already (GGUF) or w (Hugging Face).
    """

    path: Path
    spec: ModelSpec
    tensors: dict[str, StoredTensor]
    metadata: Mapping[str, Any]
    quantization: str
    folded: bool

    def norm(self, name: str) -> torch.Tensor:
        """The fp32 weight of a norm by our name, always 1 + w."""
        weight = unpack(self.tensors[name].data, self.tensors[name].qtype)
        return weight if self.folded else weight.add_(1)

    def sha256(self) -> str:
        """Of the file; for a folder, of its weight files' digests in the order of their names."""
        if self.path.is_file():
            return sha256_file(self.path)
        digests = [sha256_file(file) for file in hf_folder.weight_files(self.path)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def bytes(self) -> int:
        """Size on disk, of the weights alone for a folder."""
        files = [self.path] if self.path.is_file() else hf_folder.weight_files(self.path)
        return sum(file.stat().st_size for file in files)


def open_model(path: Path | str) -> ModelFile:
    """Open and check a model; InputError names the first thing wrong: file, field, tensor, type or shape."""
    path = Path(path)
    return _open_folder(path) if path.is_dir() else _open_file(path)


def _open_file(path: Path) -> ModelFile:
    gguf = open_gguf(path)
    if scalar(gguf.metadata, "general.type") == "adapter":
        raise InputError("is a LoRA adapter, not a model", where=path, fix="Give it as --adapter beside its model.")
    spec = spec_from_gguf(gguf.metadata, path)
    stored = {name: tensor for name, tensor in gguf.tensors.items() if not name.startswith(_VISION_GGUF)}
    found = _by_our_names(stored, names.from_gguf, path)
    _check(found, spec, scalar(gguf.metadata, RANDOM_KEY) is True, path, names.to_gguf)
    return ModelFile(path, spec, found, gguf.metadata, _quantization(gguf.metadata, found), folded=True)


def _open_folder(path: Path) -> ModelFile:
    config = hf_folder.read_config(path)
    spec = spec_from_config(config, path / "config.json")
    found = _by_our_names(hf_folder.read_tensors(path), names.from_hf, path)
    _check(found, spec, config.get(RANDOM_KEY) is True, path, names.to_hf)
    return ModelFile(path, spec, found, config, _commonest(found), folded=False)


def _by_our_names(
    stored: dict[str, StoredTensor], rename: Callable[[str], str | None], path: Path
) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        ours = rename(name)
        if ours is None or ours in found:
            raise _extra(name, path)
        found[ours] = tensor
    return found


def _extra(name: str, path: Path) -> InputError:
    what = "an output head of its own" if name == "output.weight" else "no tensor of Gemma 3"
    return InputError(f"{name} is {what}", where=path, fix="Give an unmodified Gemma 3 (see 'gemwright pull').")


def _check(
    found: dict[str, StoredTensor], spec: ModelSpec, is_random: bool, path: Path, full_name: Callable[[str], str]
) -> None:
    """Every tensor there, none too many, shapes and types right."""
    if spec.layers > len(found):  # before anything is built from a layer count that damage made huge
        raise InputError(f"has {len(found)} tensors for {spec.layers} layers", where=path, fix="Fetch it again.")
    rows = found["embed"].shape[0] if "embed" in found else spec.vocab
    wanted = names.expected_shapes(spec, rows)
    for name in (name for name in wanted if name not in found):
        raise InputError(f"tensor {full_name(name)} is missing", where=path, fix="Fetch the file again.")
    for name, tensor in found.items():
        if name not in wanted:
            raise _extra(tensor.name, path)
        if tensor.shape != wanted[name]:
            what = f"tensor {tensor.name} has shape {tensor.shape}, but Gemma 3 {spec.name} has {wanted[name]}"
            raise InputError(what, where=path, fix="The file is damaged or not the model it says it is.")
        if tensor.qtype not in QTYPES:
            what = f"tensor {tensor.name} has the type {tensor.qtype}, which is not supported"
            raise InputError(what, where=path, fix=f"Give a file with {', '.join(QTYPES)} only.")
    if rows not in ((spec.vocab,) if is_random else VOCAB_ROWS):
        raise InputError(f"the embedding has {rows} rows, not {spec.vocab}", where=path, fix="Fetch the file again.")


def _quantization(metadata: Mapping[str, Any], found: dict[str, StoredTensor]) -> str:
    """The name people use for the mix, such as Q4_K_M."""
    number = scalar(metadata, "general.file_type")
    if number not in {kind.value for kind in LlamaFileType}:
        return _commonest(found)
    name = LlamaFileType(number).name
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _commonest(found: dict[str, StoredTensor]) -> str:
    """The type that most of the linear layers have."""
    counts = Counter(tensor.qtype for name, tensor in found.items() if name.split(".")[-1] in LINEARS)
    return counts.most_common(1)[0][0]
