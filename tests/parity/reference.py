"""What parity is measured against: transformers' Gemma 3 with the weights of our files, and the five sizes in small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from torch import nn

from gemwright.layout import adapter_parameters
from gemwright.model.lora import LoRA
from gemwright.model.residency import Residency
from gemwright.spec import SPECS, ModelSpec
from gemwright.train.batches import Encoded
from gemwright.weights import names
from gemwright.weights.model_file import ModelFile
from gemwright.weights.quants import unpack

# PEFT 0.21 still asks transformers 5 for a property by its old name.
OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def _small(size: str, **shape: Any) -> ModelSpec:
    return replace(SPECS[size], name=f"small-{size}", context=2048, vocab=515, **shape)


# What is peculiar to a size stays: heads that share keys, heads wider or narrower than hidden, the scaled RoPE of the
# sizes from 4B up, the query scalar of 27B (hidden / heads, not the head's width). The sixth layer is the first global.
SMALL = {
    "270m": _small("270m", layers=7, hidden=96, mlp=224, heads=4, kv_heads=1, head_dim=32, query_scalar=32, window=9),
    "1b": _small("1b", layers=8, hidden=160, mlp=320, heads=4, kv_heads=1, head_dim=64, query_scalar=64, window=16),
    "4b": _small("4b", layers=7, hidden=256, mlp=512, heads=8, kv_heads=4, head_dim=32, query_scalar=32, window=11),
    "12b": _small("12b", layers=7, hidden=256, mlp=768, heads=8, kv_heads=4, head_dim=64, query_scalar=64, window=8),
    "27b": _small("27b", layers=13, hidden=192, mlp=416, heads=8, kv_heads=4, head_dim=16, query_scalar=24, window=20),
}


def config_of(spec: ModelSpec, vocab: int | None = None) -> Any:
    """The transformers config of a shape, with the keys that Google publishes."""
    from transformers import Gemma3TextConfig

    scaling = {} if spec.rope_global_scale == 1 else {"rope_type": "linear", "factor": spec.rope_global_scale}
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(spec.layers)]
    return Gemma3TextConfig(
        vocab_size=vocab or spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.mlp,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        query_pre_attn_scalar=spec.query_scalar,
        sliding_window=spec.window,
        layer_types=kinds,
        max_position_embeddings=spec.context,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": spec.rope_local_base},
            "full_attention": {"rope_type": "default", "rope_theta": spec.rope_global_base} | scaling,
        },
        attn_implementation="eager",
    )


def transformers_model(file: ModelFile, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own decoder, with every weight unpacked from `file`; ours has no part in its arithmetic."""
    from transformers import Gemma3ForCausalLM

    with torch.device("meta"):
        model = Gemma3ForCausalLM(config_of(file.spec))
    weights = {}
    for ours, stored in file.tensors.items():
        value = unpack(stored.data, stored.qtype).view(stored.shape)
        if ours.endswith("norm") and file.folded:
            value = value - 1
        weights[names.to_hf(ours)] = nn.Parameter(value.to(dtype), requires_grad=False)
    missing, extra = model.load_state_dict(weights, strict=False, assign=True)
    assert not extra and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    _rebuild_buffers(model)
    return model.eval()


def _rebuild_buffers(model: Any) -> None:
    """Computed buffers do not come from a file: make those of the meta model anew on the CPU."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding, Gemma3TextScaledWordEmbedding

    model.model.rotary_emb = Gemma3RotaryEmbedding(model.config)
    old, dtype = model.model.embed_tokens, model.model.embed_tokens.weight.dtype
    scale = model.config.hidden_size**0.5
    new = Gemma3TextScaledWordEmbedding(1, 1, None, embed_scale=scale)
    new.weight, new.num_embeddings, new.embedding_dim = old.weight, *old.weight.shape
    model.model.embed_tokens = new.to(dtype)
    assert not [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert not [name for name, tensor in model.named_buffers() if tensor.is_meta]


def with_peft(model: Any, lora: LoRA) -> Any:
    """`model` inside PEFT, with the values of `lora`'s masters in the model's dtype."""
    from peft import LoraConfig, get_peft_model

    targets = [f"{part}_proj" for part in lora.targets]
    kind = {"use_rslora": lora.stabilised, "use_dora": lora.dora}
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, **kind)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, (a, b) in lora.pairs().items():
        module = wrapped.get_submodule(names.to_peft(name))
        module.lora_A.default.weight.data.copy_(a)
        module.lora_B.default.weight.data.copy_(b)
    for name, magnitude in lora.magnitudes().items():
        wrapped.get_submodule(names.to_peft(name)).lora_magnitude_vector.default.weight.data.copy_(magnitude)
    return wrapped


# Our name of a linear layer -> the gradients of its A and B and, with DoRA, of its magnitudes.
Gradients: TypeAlias = dict[str, tuple[torch.Tensor, ...]]


def peft_loss_and_gradients(model: Any, lora: LoRA, documents: Sequence[Encoded]) -> tuple[float, Gradients]:
    """Mean loss over the labelled tokens of `documents`, each passed alone, and the gradient of each A, B (and m)."""
    model.zero_grad()
    labelled = sum(sum(d.labelled[1:]) for d in documents)
    total = 0.0
    for document in documents:
        masks = {"attention_mask": image_masks(model, document)} if document.images else {}
        logits = model(input_ids=torch.tensor([document.ids]), **masks).logits[0, :-1].float()
        kept = torch.tensor(document.labelled[1:], dtype=torch.bool)
        if kept.any():
            target = torch.tensor(document.ids[1:])[kept]
            loss = nn.functional.cross_entropy(logits[kept], target, reduction="sum") / labelled
            loss.backward()
            total += float(loss.detach())
    gradients = {}
    for name in lora.pairs():
        module = model.get_submodule(names.to_peft(name))
        learned = [module.lora_A.default, module.lora_B.default]
        learned += [module.lora_magnitude_vector.default] if lora.dora else []
        gradients[name] = tuple(part.weight.grad.detach().float().clone() for part in learned)
    return total, gradients


def image_masks(model: Any, document: Encoded) -> dict[str, torch.Tensor]:
    """What tokens see in transformers' own Gemma 3 with images, by the kind of layer."""
    from transformers.models.gemma3 import modeling_gemma3 as theirs

    kinds = torch.zeros(1, len(document.ids), dtype=torch.long)
    for begin, end in document.images:
        kinds[0, begin:end] = 1
    masks: dict[str, torch.Tensor] = theirs.create_masks_for_vision_model(
        config=model.config,
        inputs_embeds=torch.zeros(1, len(document.ids), 1),
        attention_mask=None,
        cache=None,
        position_ids=None,
        block_sequence_ids=theirs.get_block_sequence_ids_for_mask(kinds),
    )
    return masks


def our_gradients(lora: LoRA) -> Gradients:
    """A copy of the gradient of every pair (and m)."""
    magnitudes = lora.magnitude_gradients()
    return {
        name: tuple(g.clone() for g in (*pair, *([magnitudes[name]] if lora.dora else [])))
        for name, pair in lora.gradients().items()
    }


def fill(lora: LoRA, seed: int = 0, size: float = 0.05) -> None:
    """Give every A and B values that matter (B of a new adapter is zero)."""
    pairs = lora.master[: adapter_parameters(lora.spec, lora.rank, lora.targets)]
    pairs.normal_(0, size, generator=torch.Generator().manual_seed(seed))
    lora.refresh()


def move_magnitudes(lora: LoRA, residency: Residency, seed: int = 1, size: float = 0.2) -> None:
    """Give DoRA magnitudes that differ from the norms of the weights (with a new adapter they are those)."""
    lora.measure(residency)
    generator = torch.Generator().manual_seed(seed)
    for magnitude in lora.magnitudes().values():
        magnitude.mul_(1 + size * torch.randn(magnitude.shape, generator=generator))
    lora.refresh()


def documents(spec: ModelSpec, lengths: Sequence[int], seed: int = 0, labelled: float = 0.4) -> list[Encoded]:
    """Random token ids, a share of them targets."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(0, spec.vocab, (length,), generator=rng).tolist()
        made.append(Encoded(ids, (torch.rand(length, generator=rng) < labelled).tolist()))
    return made
