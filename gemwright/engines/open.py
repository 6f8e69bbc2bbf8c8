"""Opens a model in the engine asked for, with an adapter that belongs to it."""

from __future__ import annotations

from pathlib import Path

from gemwright.engines.protocol import Engine
from gemwright.errors import InputError

CONTEXT = 4096


def open_engine(
    model: Path,
    *,
    engine: str = "llamacpp",
    adapter: Path | None = None,
    context: int | None = None,
    parallel: int = 1,
    threads: int | None = None,
) -> Engine:
    """The model at `model` (GGUF; for pytorch a safetensors folder too), ready to generate and score.

    `adapter` is a run folder, a PEFT folder or a GGUF LoRA. `context` (4,096) is capped at what the model was made
    for; `parallel` requests run side by side in llama.cpp. `threads` None means the physical cores.
    """
    context = CONTEXT if context is None else context
    if context < 2:
        raise InputError(f"{context} tokens are too few", where="context", fix="Give at least 2.")
    if engine == "llamacpp":
        from gemwright.engines.llamacpp import LlamaCpp

        return LlamaCpp(model, adapter=adapter, context=context, parallel=parallel, threads=threads)
    if engine == "pytorch":
        from gemwright.engines.pytorch import PyTorch

        return PyTorch(model, adapter=adapter, context=context, threads=threads)
    raise InputError(f"{engine!r} is not known", where="engine", fix="Choose llamacpp or pytorch.")
