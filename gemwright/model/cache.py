"""Keys and values of the tokens seen so far; local layers keep only their window."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gemwright.kernels.attend import Attention, Kept
from gemwright.spec import ModelSpec


class KVCache:
    """One sequence's cache; k and v of a layer are [K, T, E] with T the tokens that a next one can still see."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.length = spec, 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * spec.layers

    def advance(self, tokens: int) -> None:
        """All layers have taken `tokens` more."""
        self.length += tokens

    @property
    def bytes(self) -> int:
        """Size of everything held."""
        return sum(t.numel() * t.element_size() for pair in self._layers if pair for t in pair)

    def attention(self, layer: int) -> Attention:
        """The attention of a layer: store the new keys and values, then look back at all that the layer may see."""
        return _LookBack(self, layer)

    def look_back(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention's output [N, H, E] of N new tokens, whose k and v [N, K, E] are taken in."""
        window = None if self.spec.is_global(layer) else self.spec.window
        keys, values = k.transpose(0, 1), v.transpose(0, 1)
        past = self._layers[layer]
        if past is not None:
            keys, values = torch.cat([past[0], keys], 1), torch.cat([past[1], values], 1)
        age = torch.arange(q.shape[0])[:, None] + (keys.shape[1] - q.shape[0]) - torch.arange(keys.shape[1])
        seen = age >= 0 if window is None else (age >= 0) & (age < window)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None], values[None], seen, scale=1.0, enable_gqa=True
        )
        keep = keys.shape[1] if window is None else window - 1
        first = max(0, keys.shape[1] - keep)
        self._layers[layer] = keys[:, first:].contiguous(), values[:, first:].contiguous()
        return out[0].transpose(0, 1).to(q.dtype)


class _LookBack:
    """A layer's attention through the cache; nothing is trained through it."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
        return self._cache.look_back(self._layer, q, k, v), ()

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Kept
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("a cache is for generating")
