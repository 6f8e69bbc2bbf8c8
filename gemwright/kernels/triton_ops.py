"""The Triton twins of what `kernels.dispatch` exports: same signatures, same meaning, one launch each.

Memory-bound all: each input is read once, computed in fp32, rounded once on store; nothing is atomic, so results are
deterministic. Row offsets are int64. Tensors lie on the current CUDA device, their last dimension without gaps.
"""

from gemwright.kernels.triton_cross_entropy import softmax_chunk
from gemwright.kernels.triton_fp8 import join_tail, quantise_rows, turn
from gemwright.kernels.triton_geglu import geglu, geglu_backward
from gemwright.kernels.triton_heads import norm_rope, norm_rope_backward
from gemwright.kernels.triton_norm import norm_add_norm, rms_norm, rms_norm_backward

__all__ = [
    "geglu",
    "geglu_backward",
    "join_tail",
    "norm_add_norm",
    "norm_rope",
    "norm_rope_backward",
    "quantise_rows",
    "rms_norm",
    "rms_norm_backward",
    "softmax_chunk",
    "turn",
]
