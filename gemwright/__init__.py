"""gemwright plans, runs, fine-tunes, checks, exports and serves Google's Gemma 3 on the machine its user owns."""

import os

__version__ = "0.1.0"

# PyTorch's CPU library keeps a compiled product for each shape it has met, 1,024 of them in two caches unless told so
# before it loads. Packed rows bring new shapes: that was 1 GB more in a fine-tune.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "256")
