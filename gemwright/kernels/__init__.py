"""The mathematics, once: plain PyTorch forward and backward of each operation."""

import os

# Fused multiply-adds, as Triton has always made them: from 3.9 it warns unless told, from 3.10 it stops.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
