"""Writes GGUF files through the `gguf` library: whole models, tensor by tensor, and LoRA adapters for llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, RopeScalingType
from torch import Tensor

from gemwright.errors import InputError
from gemwright.runs import atomic_path
from gemwright.spec import RANDOM_KEY, ModelSpec, scalar
from gemwright.weights import names
from gemwright.weights.gguf_reader import GGUFFile, StoredTensor, open_gguf
from gemwright.weights.pairs import Pairs, check_pairs
from gemwright.weights.quants import row_bytes, unpack


@dataclass(frozen=True)
class Piece:
    """One tensor to write: its GGUF name, shape (rows, cols), type, and how its bytes (uint8) are made when due."""

    name: str
    shape: tuple[int, ...]
    qtype: str
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, ours: str, tensor: StoredTensor) -> Piece:
        """A tensor by our name, as it is stored."""
        return cls(names.to_gguf(ours), tensor.shape, tensor.qtype, lambda: tensor.data)


def write_gguf_model(
    path: Path,
    spec: ModelSpec,
    pieces: Sequence[Piece],
    *,
    tokenizer_from: GGUFFile | None = None,
    file_type: str = "F16",
    is_random: bool = False,
) -> None:
    """Write a model that llama.cpp loads; only one tensor is in memory at a time.

    The tokenizer is copied from `tokenizer_from`; without one the file has none and states its vocabulary's size.
    Norm weights must come folded (1 + w).
    """
    with atomic_path(path) as part:
        writer = GGUFWriter(part, "gemma3")
        _add_spec(writer, spec, file_type)
        if is_random:
            writer.add_bool(RANDOM_KEY, True)
            writer.add_uint32("gemma3.attention.query_scalar", int(spec.query_scalar))
        if tokenizer_from is None:
            writer.add_tokenizer_model("none")
            writer.add_vocab_size(spec.vocab)
        else:
            _copy_tokenizer(writer, tokenizer_from)
        _write(writer, pieces)


def write_gguf_lora(
    path: Path, spec: ModelSpec, base_name: str, alpha: float, pairs: Pairs, *, qtype: str = "F32"
) -> None:
    """Write an adapter as llama.cpp's convert_lora_to_gguf.py does; `pairs` by our names: A [r, in], B [out, r]."""
    check_pairs(spec, pairs, path)
    kind = {"F32": np.float32, "F16": np.float16}[qtype]
    with atomic_path(path) as part:
        writer = GGUFWriter(part, "gemma3")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
        writer.add_name(f"LoRA for {base_name}")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_name)
        for ours, pair in pairs.items():
            for side, value in zip("ab", pair, strict=True):
                array = value.detach().cpu().float().contiguous().numpy().astype(kind)
                writer.add_tensor(f"{names.to_gguf(ours)}.lora_{side}", array)
        _finish(writer, writer.write_tensors_to_file)


def read_gguf_lora(path: Path, spec: ModelSpec) -> tuple[float, Pairs]:
    """(alpha, pairs in fp32) of an adapter; InputError where it is none, is damaged or belongs to another model."""
    gguf = open_gguf(path)
    if scalar(gguf.metadata, "general.type") != "adapter" or scalar(gguf.metadata, "adapter.type") != "lora":
        raise InputError("is not a LoRA adapter", where=path, fix="Give the adapter.gguf of a run.")
    alpha = gguf.metadata.get("adapter.lora.alpha")
    if not isinstance(alpha, float):
        raise InputError("states no adapter.lora.alpha", where=path, fix="Export the adapter again.")
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in gguf.tensors.items():
        stem, _, side = name.rpartition(".lora_")
        ours = names.from_gguf(stem)
        if ours is None or side not in ("a", "b") or tensor.qtype not in ("F32", "F16", "BF16"):
            raise InputError(
                f"{name} ({tensor.qtype}) is no LoRA tensor of Gemma 3", where=path, fix="Export it again."
            )
        sides.setdefault(ours, {})[side] = unpack(tensor.data, tensor.qtype)
    for ours, pair in sides.items():
        if len(pair) < 2:
            raise InputError(f"{ours} has only one half of its LoRA pair", where=path, fix="Export the adapter again.")
    pairs = {ours: (pair["a"], pair["b"]) for ours, pair in sides.items()}
    check_pairs(spec, pairs, path)
    return alpha, pairs


def _add_spec(writer: GGUFWriter, spec: ModelSpec, file_type: str) -> None:
    writer.add_type("model")
    writer.add_name(f"Gemma 3 {spec.name}")
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.mlp)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_sliding_window(spec.window)
    writer.add_rope_freq_base(spec.rope_global_base)
    if spec.rope_global_scale != 1:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(spec.rope_global_scale)
    kinds = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): kind for kind in LlamaFileType}
    with suppress(KeyError):  # K types alone name no mix; llama.cpp then says "guessed"
        writer.add_file_type(kinds[file_type])
    writer.add_quantization_version(2)


def _copy_tokenizer(writer: GGUFWriter, source: GGUFFile) -> None:
    for key in source.metadata:
        if not key.startswith("tokenizer."):
            continue
        kind, is_array = source.metadata.kind(key)
        value = source.metadata[key]
        if is_array and len(value):  # the library cannot write an empty one
            items = value if kind == GGUFValueType.STRING else value.tolist()
            writer.add_key_value(key, items, GGUFValueType.ARRAY, sub_type=kind)
        elif not is_array:
            writer.add_key_value(key, value, kind)


def _write(writer: GGUFWriter, pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        shape = (*piece.shape[:-1], row_bytes(piece.shape[-1], piece.qtype))
        size = int(np.prod(shape))
        writer.add_tensor_info(piece.name, shape, np.dtype(np.uint8), size, GGMLQuantizationType[piece.qtype])

    def tensors() -> None:
        writer.write_ti_data_to_file()
        for piece in pieces:
            writer.write_tensor_data(piece.make().reshape(-1).numpy())

    _finish(writer, tensors)


def _finish(writer: GGUFWriter, write_tensors: Callable[[], None]) -> None:
    """Write header, metadata and tensors in the order the format has them; the file is closed whatever happens."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        write_tensors()
    finally:
        writer.close()
