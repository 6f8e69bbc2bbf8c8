"""Opens a model in the engine asked for, with an adapter that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from gemwright.engines.llamacpp import LlamaCpp
from gemwright.engines.protocol import Engine
from gemwright.errors import GemwrightError, InputError

CONTEXT = 4096
_ahead: dict[tuple[object, ...], LlamaCpp] = {}


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
        begun = _ahead.pop((model, adapter, context, parallel, threads), None)
        if begun is None:
            close_ahead()
            return LlamaCpp(model, adapter=adapter, context=context, parallel=parallel, threads=threads)
        begun.wait_loaded()
        return begun
    if engine == "pytorch":
        from gemwright.engines.pytorch import PyTorch

        return PyTorch(model, adapter=adapter, context=context, threads=threads)
    raise InputError(f"{engine!r} is not known", where="engine", fix="Choose llamacpp or pytorch.")


def open_ahead(words: Sequence[str]) -> None:
    """Begin to load what the command line `words` seem to ask for, before they are read properly.

    `open_engine` takes it where it is asked for the same, and says what is wrong where this could not begin.
    """
    given = dict(pairwise(words))
    model = _local(given.get("--model") or given.get("-m") or "")
    adapter, threads = given.get("--adapter") or given.get("-a"), given.get("--threads")
    if model is None or not (threads or "1").isdecimal():
        return
    wanted = (model, Path(adapter) if adapter else None, CONTEXT, 1, int(threads) if threads else None)
    with suppress(GemwrightError, OSError):
        _ahead[wanted] = LlamaCpp(model, adapter=wanted[1], context=CONTEXT, threads=wanted[4], wait=False)


def close_ahead() -> None:
    """End what was begun and never taken."""
    while _ahead:
        _ahead.popitem()[1].close()


def _local(name: str) -> Path | None:
    """The file that a `--model` means, if that is known without any network."""
    if Path(name).is_file():
        return Path(name)
    from gemwright.runs import home
    from gemwright.weights import catalogue

    source = catalogue.find(name)
    path = home() / "models" / source.file if source is not None and source.repo is None else None
    return path if path is not None and path.is_file() else None
