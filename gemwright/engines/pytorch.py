"""Our own decoder as an engine: slower than llama.cpp, exactly what was trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from gemwright.engines.adapters import find_gguf_lora, is_peft, is_run
from gemwright.engines.protocol import Generation, Sampling
from gemwright.errors import InputError
from gemwright.model.decoder import Gemma
from gemwright.model.generate import generate
from gemwright.spec import ModelSpec
from gemwright.text.tokenizer import Tokenizer
from gemwright.weights.gguf_writer import read_gguf_lora
from gemwright.weights.model_file import open_model
from gemwright.weights.pairs import Magnitudes, Pairs
from gemwright.weights.peft_files import read_peft_adapter


class PyTorch:
    """A model file run by `gemwright.model`; parameters as `open_engine`."""

    name = "pytorch"

    def __init__(
        self, model: Path, *, adapter: Path | None = None, context: int = 4096, threads: int | None = None
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        file = open_model(model)
        self.spec = file.spec
        self.context = min(context, file.spec.context)
        pairs = None if adapter is None else _read_adapter(adapter, self.spec)
        self._tokenizer = Tokenizer.from_model(file)
        self._model: Gemma = Gemma.load(file)
        self._put_on(pairs)

    def encode(self, text: str) -> list[int]:
        """See `Engine.encode`."""
        return self._tokenizer.encode(text)

    def generate(
        self, prompt_ids: list[int], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> Generation:
        """See `Engine.generate`."""
        self._check_room(len(prompt_ids))
        stream, said, count, reason = self._tokenizer.stream(), list[str](), 0, "stop"
        limit = min(sampling.max_tokens, self.context - len(prompt_ids))
        begin = first = last = time.perf_counter()

        def say(text: str) -> None:
            said.append(text)
            if text and on_text:
                on_text(text)

        try:
            for id_ in generate(self._model, prompt_ids, sampling):
                count += 1
                last = time.perf_counter()
                first = last if count == 1 else first
                say(stream.feed(id_))
                if count == limit:
                    reason = "length"
                    break
            say(stream.flush())
        except KeyboardInterrupt:
            reason = "cancelled"
        speed = (count - 1) / max(last - first, 1e-9) if count > 1 else count / max(last - begin, 1e-9)
        return Generation("".join(said), len(prompt_ids), count, speed, first - begin, reason)

    def score(self, ids: list[int], start: int = 1, on_progress: Callable[[int], None] | None = None) -> list[float]:
        """See `Engine.score`; all positions in one pass."""
        if not 1 <= start <= len(ids):
            raise InputError(f"start {start} is not within 1 to {len(ids)}", where="score", fix="Give BOS and text.")
        if start == len(ids):
            return []
        self._check_room(len(ids) - 1)
        scores: list[float] = self._model.log_probs(ids)[start - 1 :].tolist()
        if on_progress:
            on_progress(len(scores))
        return scores

    def load_adapter(self, path: Path | None) -> None:
        """See `Engine.load_adapter`."""
        self._put_on(None if path is None else _read_adapter(path, self.spec))

    def close(self) -> None:
        """Nothing is held beyond this object."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put_on(self, found: tuple[Pairs, float, Magnitudes] | None) -> None:
        if found is None:
            self._model.load_adapter(None)
        else:
            self._model.load_adapter(*found)

    def _check_room(self, tokens: int) -> None:
        if not 0 < tokens < self.context:
            what = "is empty" if tokens == 0 else f"{tokens} tokens do not fit the context of {self.context}"
            raise InputError(what, where="prompt", fix="Give at least one token, and fewer than the context.")


def _read_adapter(path: Path, spec: ModelSpec) -> tuple[Pairs, float, Magnitudes]:
    """(pairs, scale, DoRA's magnitudes) of a run folder, a PEFT folder or a GGUF LoRA."""
    folder = path / "adapter" if is_run(path, spec) else path
    if is_peft(folder):
        adapter = read_peft_adapter(folder, spec)
        return adapter.pairs, adapter.scale, adapter.magnitudes
    alpha, pairs = read_gguf_lora(find_gguf_lora(path, spec, path), spec)
    return pairs, alpha / next(iter(pairs.values()))[0].shape[0], {}
