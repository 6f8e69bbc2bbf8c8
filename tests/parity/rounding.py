"""llama.cpp's own rounding around products with packed weights, for tests: activations to 8 bits.

ggml multiplies a packed matrix with activations that it packs first: Q8_0 blocks of 32 beside Q4_0, Q5_0 and Q8_0
weights, Q8_K blocks of 256 beside K-quants (ggml-quants.c, quantize_row_q8_0 and quantize_row_q8_K).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemwright.layout import GROUPS
from gemwright.model.residency import LayerWeights, UnpackedResidency
from gemwright.weights.model_file import ModelFile

Round = Callable[[Tensor], Tensor]


def through_q8_0(x: Tensor) -> Tensor:
    """fp32 [N, cols] as its Q8_0 blocks stand for it: 127 steps to the highest of 32, the step kept in fp16."""
    blocks = x.reshape(-1, 32)
    highest = blocks.abs().amax(1, keepdim=True)
    q = torch.where(highest > 0, blocks * (127 / highest), 0).round()
    return (q * (highest / 127).half().float()).view(x.shape)


def through_q8_k(x: Tensor) -> Tensor:
    """fp32 [N, cols] as its Q8_K blocks stand for it: -127 for the value furthest from zero of 256, in fp32."""
    blocks = x.reshape(-1, 256)
    furthest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    q = torch.where(furthest != 0, blocks * (-127 / furthest), 0).round().clamp(max=127)
    return (q * (furthest / -127)).view(x.shape)


PARTNERS: dict[str, Round] = dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), through_q8_0) | dict.fromkeys(
    ("Q4_K", "Q5_K", "Q6_K"), through_q8_k
)


# What may multiply by a weight, oneDNN's own where PyTorch has it (`kernels.products`).
PRODUCTS = (torch.mm, torch.matmul, Tensor.mm, Tensor.matmul, Tensor.__matmul__)
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    PRODUCTS += (torch.ops.mkldnn._linear_pointwise,)


class Packed(Tensor):
    """A weight whose products see their other operand rounded as ggml would."""

    partner: Round

    @staticmethod
    def of(weight: Tensor, partner: Round) -> Packed:
        packed = weight.as_subclass(Packed)
        packed.partner = partner
        return packed

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        own = next(value for value in args if isinstance(value, Packed))
        plain = [value.as_subclass(Tensor) if isinstance(value, Packed) else value for value in args]
        if function is Tensor.t:
            return Packed.of(plain[0].t(), own.partner)
        if function in PRODUCTS and args[1] is own:
            plain[0] = own.partner(plain[0])
            return function(*plain, **kwargs or {})
        if function.__name__ == "__get__" or function is Tensor.__len__:  # its shape and the like
            return function(*plain)
        raise NotImplementedError(f"{function} of a packed weight")


class RoundingResidency(UnpackedResidency):
    """fp32 weights whose products round their activations as llama.cpp does for the type in the file."""

    def __init__(self, file: ModelFile) -> None:
        super().__init__(file, torch.float32)
        self._types = {name: stored.qtype for name, stored in file.tensors.items()}

    def layer(self, index: int) -> LayerWeights:
        weights = super().layer(index)
        matrices = {}
        for group, parts in GROUPS.items():
            (partner,) = {PARTNERS[self._types[f"{index}.{part}"]] for part in parts}
            matrices[group] = Packed.of(weights.matrices[group], partner)
        return LayerWeights(matrices, weights.norms)

    def head_rows(self, start: int, stop: int) -> Tensor:
        return Packed.of(super().head_rows(start, stop), PARTNERS[self._types["embed"]])


class ShakenEmbedding:
    """Mixed in before a residency: embeddings are off by a millionth, about what another order of fp32 sums does."""

    def embed(self, ids: Tensor) -> Tensor:
        x: Tensor = super().embed(ids)  # type: ignore[misc]
        return x * (1 + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))


class ShakenRounding(ShakenEmbedding, RoundingResidency):
    """Both."""


class ShakenPlain(ShakenEmbedding, UnpackedResidency):
    """fp32 throughout."""
