"""How much memory this process has taken, and how much it may take for keeping things unpacked."""

from __future__ import annotations

import sys

import psutil

from gemwright.spec import ModelSpec


def peak_rss_bytes() -> int:
    """The most ordinary memory that this process has held so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """The ordinary memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def activation_bytes(spec: ModelSpec, tokens: int, itemsize: int) -> int:
    """What the backward of all layers keeps of `tokens` tokens when nothing is recomputed."""
    joint = sum(spec.linear_shapes[part][0] for part in ("q", "k", "v"))
    heads = (2 * spec.heads + spec.kv_heads) * spec.head_dim
    return spec.layers * tokens * itemsize * (6 * spec.hidden + joint + heads + 4 * spec.mlp)


def spare_bytes() -> int:
    """Half of the memory that is free now: what may go into unpacked weights and kept activations."""
    return int(psutil.virtual_memory().available) // 2
