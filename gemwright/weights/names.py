"""The one table of tensor names: ours, GGUF's, Hugging Face's and PEFT's.

Ours: `embed`, `final_norm`, and for layer i `f"{i}.{part}"` with a part of `PARTS`.
"""

from __future__ import annotations

import re

from gemwright.spec import LINEARS, ModelSpec

# part: (GGUF, Hugging Face), both without the layer's prefix and without ".weight"
PARTS: dict[str, tuple[str, str]] = {
    "q": ("attn_q", "self_attn.q_proj"),
    "k": ("attn_k", "self_attn.k_proj"),
    "v": ("attn_v", "self_attn.v_proj"),
    "o": ("attn_output", "self_attn.o_proj"),
    "gate": ("ffn_gate", "mlp.gate_proj"),
    "up": ("ffn_up", "mlp.up_proj"),
    "down": ("ffn_down", "mlp.down_proj"),
    "attn_norm": ("attn_norm", "input_layernorm"),
    "attn_post_norm": ("post_attention_norm", "post_attention_layernorm"),
    "mlp_norm": ("ffn_norm", "pre_feedforward_layernorm"),
    "mlp_post_norm": ("post_ffw_norm", "post_feedforward_layernorm"),
    "q_norm": ("attn_q_norm", "self_attn.q_norm"),
    "k_norm": ("attn_k_norm", "self_attn.k_norm"),
}
_WHOLE = {"embed": ("token_embd", "embed_tokens"), "final_norm": ("output_norm", "norm")}
# How folders of different ages and kinds begin the names of the language model.
HF_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
PEFT_PREFIX = "base_model.model.model."

_FROM_GGUF = {gguf: ours for ours, (gguf, _) in (PARTS | _WHOLE).items()}
_FROM_HF = {hf: ours for ours, (_, hf) in (PARTS | _WHOLE).items()}


def to_gguf(ours: str) -> str:
    """`3.q` -> `blk.3.attn_q.weight`."""
    if ours in _WHOLE:
        return f"{_WHOLE[ours][0]}.weight"
    layer, part = ours.split(".")
    return f"blk.{layer}.{PARTS[part][0]}.weight"


def to_hf(ours: str, prefix: str = "model.") -> str:
    """`3.q` -> `model.layers.3.self_attn.q_proj.weight`."""
    if ours in _WHOLE:
        return f"{prefix}{_WHOLE[ours][1]}.weight"
    return f"{prefix}{_hf_module(ours)}.weight"


def to_peft(ours: str) -> str:
    """`3.q` -> the module's name inside a PEFT adapter, without `.lora_A.weight`."""
    return PEFT_PREFIX + _hf_module(ours)


def from_gguf(name: str) -> str | None:
    """Our name of a GGUF tensor; None for one that is no part of the decoder."""
    if match := re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name):
        return _ours(match[1], _FROM_GGUF.get(match[2]))
    return None


def from_hf(name: str) -> str | None:
    """Our name of a Hugging Face tensor, with any of `HF_PREFIXES`; None for one that is no part of the decoder."""
    for prefix in HF_PREFIXES:
        rest = name.removeprefix(prefix)
        if rest != name and (match := re.fullmatch(r"(?:layers\.(\d+)\.)?([\w.]+)\.weight", rest)):
            return _ours(match[1], _FROM_HF.get(match[2]))
    return None


def from_peft(module: str) -> str | None:
    """Our name of a PEFT module such as `base_model.model.model.layers.3.self_attn.q_proj`, text-only or not."""
    inner = module.removeprefix("base_model.model.")
    ours = from_hf(f"{inner}.weight")
    return ours if ours is not None and ours.split(".")[-1] in LINEARS else None


def expected_shapes(spec: ModelSpec, vocab_rows: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the decoder by our name, with its shape in PyTorch's order."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (vocab_rows, spec.hidden), "final_norm": (spec.hidden,)}
    for layer in range(spec.layers):
        shapes |= {f"{layer}.{part}": shape for part, shape in spec.linear_shapes.items()}
        shapes |= {f"{layer}.{part}": (length,) for part, length in spec.norm_shapes.items()}
    return shapes


def _hf_module(ours: str) -> str:
    layer, part = ours.split(".")
    return f"layers.{layer}.{PARTS[part][1]}"


def _ours(layer: str | None, part: str | None) -> str | None:
    if part is None or (layer is None) != (part in _WHOLE):
        return None
    return part if layer is None else f"{int(layer)}.{part}"
