"""The one place that chooses between a kernel's plain PyTorch and its Triton form."""

from gemwright.kernels.cross_entropy import softmax_chunk
from gemwright.kernels.geglu import geglu, geglu_backward
from gemwright.kernels.heads import norm_rope, norm_rope_backward
from gemwright.kernels.norm import norm_add_norm, rms_norm, rms_norm_backward

__all__ = [
    "geglu",
    "geglu_backward",
    "norm_add_norm",
    "norm_rope",
    "norm_rope_backward",
    "rms_norm",
    "rms_norm_backward",
    "softmax_chunk",
]
