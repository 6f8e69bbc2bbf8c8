"""The Gemma 3 text decoder over packed weights: whole sequences, packed batches, or step by step with a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gemwright.errors import InputError, needed
from gemwright.kernels.attend import Attention, plan
from gemwright.kernels.cross_entropy import linear_cross_entropy
from gemwright.kernels.dispatch import rms_norm
from gemwright.kernels.heads import Table
from gemwright.kernels.products import product
from gemwright.kernels.rope import rope_table
from gemwright.layout import Keep
from gemwright.model.cache import KVCache
from gemwright.model.layer import LayerPass
from gemwright.model.lora import LoRA, lora_from_pairs
from gemwright.model.precision import choose_dtype
from gemwright.model.residency import Residency, UnpackedResidency
from gemwright.spec import ModelSpec
from gemwright.weights.model_file import ModelFile


def rope_tables(spec: ModelSpec, positions: Tensor) -> tuple[Table, Table]:
    """(local, global) rotation tables for int64 `positions` [N]."""
    local = rope_table(positions, spec.head_dim, spec.rope_local_base, 1.0)
    return local, rope_table(positions, spec.head_dim, spec.rope_global_base, spec.rope_global_scale)


def plan_attention(
    spec: ModelSpec,
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    uniform: bool = False,
    images: Sequence[tuple[int, int]] = (),
    pasts: Sequence[Sequence[int]] = (),
) -> tuple[Attention, Attention]:
    """(local, global) attention for packed documents of `lengths`; one object where the window changes nothing.

    With `uniform` rows of as many tokens have attention of one kind (see `Flash`). `images` are the first and last
    (exclusive) tokens of each, counted over all documents, `pasts` what they share (see `kernels.attention`).
    """
    whole = [len(past) + length for past, length in zip(pasts or [()] * len(lengths), lengths, strict=True)]
    longest = sum(lengths) if uniform else max(whole)
    everything = plan(lengths, None, device, dtype, uniform=uniform, images=images, pasts=pasts)
    if longest <= spec.window:
        return everything, everything
    return plan(lengths, spec.window, device, dtype, uniform=uniform, images=images, pasts=pasts), everything


class Gemma:
    """A decoder; its weights come from `residency`, its adapters (if any) from `lora`."""

    def __init__(self, residency: Residency, lora: LoRA | None = None) -> None:
        self.residency, self.lora, self.spec = residency, lora, residency.spec
        if lora is not None:
            lora.measure(residency)

    @classmethod
    def load(cls, file: ModelFile, dtype: torch.dtype | None = None, budget_bytes: int | None = None) -> Gemma:
        """A decoder over a model file; `dtype` None takes what is fastest here."""
        return cls(UnpackedResidency(file, dtype or choose_dtype("auto"), budget_bytes))

    def load_adapter(
        self,
        pairs: Mapping[str, tuple[Tensor, Tensor]] | None,
        scale: float = 1.0,
        magnitudes: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put an adapter on (or take it off with None); `scale` multiplies B A, `magnitudes` are DoRA's."""
        if pairs is None:
            self.lora = None
            return
        rank = next(iter(pairs.values()))[0].shape[0]
        self.lora = lora_from_pairs(self.spec, pairs, scale * rank, self.residency.dtype, magnitudes)
        self.lora.measure(self.residency)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids or min(ids) < 0 or max(ids) >= self.residency.vocab:
            raise InputError("token ids must be at least one, each within the vocabulary", where="prompt")
        if len(ids) > self.spec.context:
            raise InputError(
                f"{len(ids)} tokens exceed the context of {self.spec.context}", where="prompt", fix="Shorten it."
            )

    @torch.inference_mode()
    def hidden(self, ids: Sequence[int], cache: KVCache | None = None) -> Tensor:
        """States after the final norm [N, D] of one sequence, or of its next tokens when `cache` holds the earlier."""
        self._check_ids(ids)
        past = cache.length if cache else 0
        tables = rope_tables(self.spec, torch.arange(past, past + len(ids)))
        cpu, dtype = torch.device("cpu"), self.residency.dtype
        packed = plan_attention(self.spec, [len(ids)], cpu, dtype) if cache is None else None
        x = self.residency.embed(torch.tensor(ids))
        for i in range(self.spec.layers):
            whole = self.spec.is_global(i)
            attention = packed[whole] if packed is not None else needed(cache).attention(i)
            visit = LayerPass(self.spec, i, tables[whole], attention, self.lora)
            x = visit.forward(x, self.residency.layer(i), keep=Keep.INPUT)
            self.residency.release(i)
        if cache is not None:
            cache.advance(len(ids))
        return rms_norm(x, self.residency.final_norm, self.spec.norm_eps)[0]

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], cache: KVCache | None = None, *, last: bool = False) -> Tensor:
        """Logits fp32 [N, vocab] of every position, or [1, vocab] of the last one only."""
        h = self.hidden(ids, cache)
        h = h[-1:] if last else h
        chunks = [
            product(h, self.residency.head_rows(a, min(a + 16_384, self.residency.vocab))).float()
            for a in range(0, self.residency.vocab, 16_384)
        ]
        return torch.cat(chunks, dim=1)

    @torch.inference_mode()
    def log_probs(self, ids: Sequence[int]) -> Tensor:
        """Natural log-probability of each of ids[1:] given its prefix, fp32 [len(ids) - 1]."""
        h = self.hidden(ids)[:-1]
        target = torch.tensor(ids[1:])
        nll, _ = linear_cross_entropy(h, self.residency.head_rows, self.residency.vocab, target)
        return -nll
