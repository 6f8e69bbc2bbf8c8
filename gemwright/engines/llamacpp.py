"""llama.cpp in a child process: its crash, or a corrupt model, is an error here and not our end."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from gemwright.engines.adapters import find_gguf_lora, is_peft
from gemwright.engines.child_process import Answers, ChildError, ChildProcess, Message
from gemwright.engines.header import read_header
from gemwright.engines.protocol import Generation, Sampling
from gemwright.errors import InputError, MachineError
from gemwright.spec import EOS, ModelSpec, spec_from_gguf

CHILD = "gemwright.engines.llamacpp_child"
# Up to here window layers keep the whole context too, so that a cached prefix is never computed again.
WHOLE_CACHE_BYTES = 512 << 20


class LlamaCpp:
    """A GGUF served by llama.cpp, with GGUF LoRA adapters.

    `context` tokens are kept for each of `parallel` requests side by side; an adapter is named by any path that
    `gemwright.engines.adapters` knows. Raises InputError where llama.cpp refuses the file, MachineError where the
    child cannot run; without `wait` only `wait_loaded` does, and must come before anything else.
    """

    name = "llamacpp"

    def __init__(
        self,
        model: Path,
        *,
        adapter: Path | None = None,
        context: int = 4096,
        parallel: int = 1,
        threads: int | None = None,
        wait: bool = True,
    ) -> None:
        self.spec = _check_model(model)
        self.model, self.parallel = model, parallel
        self._context = min(context, self.spec.context)
        self._threads = threads or physical_cores()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._found: dict[Path, Path] = {}
        self._active = adapter
        try:
            if adapter is not None:
                self._found[adapter] = self._find(adapter)
            self._child = self._begin()
        except BaseException:
            self._tidy()
            raise
        if wait:
            self.wait_loaded()

    def wait_loaded(self) -> None:
        """Return when the model is loaded; where it cannot be, this ends and raises as the constructor."""
        try:
            self._child.wait_loaded()
        except ChildError as error:
            self.close()
            raise self._load_error(error) from None
        except BaseException:
            self._child.close(grace_s=0)
            self._tidy()
            raise

    @property
    def context(self) -> int:
        """Tokens (prompt and answer together) that fit."""
        return self._context

    def encode(self, text: str) -> list[int]:
        """llama.cpp's own token ids of `text`: no BOS, and control tokens written in it stay text."""
        with self._ask({"op": "encode", "text": text}) as answers:
            ids: list[int] = next(answers)["ids"]
        return ids

    def generate(
        self, prompt_ids: list[int], sampling: Sampling, on_text: Callable[[str], None] | None = None
    ) -> Generation:
        """See `Engine.generate`."""
        clock = _Clock()
        pieces: list[str] = []
        done: Message = {"reason": "cancelled"}
        with self._ask(self._generate_order(prompt_ids, sampling, quiet=False)) as answers:
            try:
                for answer in answers:
                    if "done" in answer:
                        done = answer["done"]
                        break
                    clock.tick()
                    pieces.append(answer["text"])
                    if on_text:
                        on_text(answer["text"])
            except KeyboardInterrupt:
                done = {"reason": "cancelled"}
        return clock.generation("".join(pieces), len(prompt_ids), done, len(pieces))

    def generate_many(
        self,
        prompts: list[list[int]],
        sampling: Sampling | list[Sampling],
        on_done: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """Answer `prompts`, `parallel` of them side by side; `on_done(index, answer)` as each ends.

        `sampling` is one for all, or one a prompt.
        """
        each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
        orders = [self._generate_order(ids, one, quiet=True) for ids, one in zip(prompts, each, strict=True)]
        results: dict[int, Generation] = {}
        with self._ask(*orders) as answers:
            for answer in answers:
                index = answer["index"]
                results[index] = _timed_by_the_child(answer["all"], len(prompts[index]), answer["done"])
                if on_done:
                    on_done(index, results[index])
                if len(results) == len(prompts):
                    break
        return [results[index] for index in range(len(prompts))]

    def score(self, ids: list[int], start: int = 1, on_progress: Callable[[int], None] | None = None) -> list[float]:
        """Natural log-probability of each of ids[start:] given all ids before it; `on_progress(done)` on the way."""
        if not 1 <= start <= len(ids):
            raise InputError(f"start {start} is not within 1 to {len(ids)}", where="score", fix="Give BOS and text.")
        if start == len(ids):
            return []
        self._check_room(len(ids) - 1)
        found: dict[int, float] = {}
        order = {"op": "score", "ids": ids, "start": start, "body": {"lora": self._scales(), "cache_prompt": True}}
        with self._ask(order) as answers:
            for answer in answers:
                if "done" in answer:
                    break
                found[answer["at"]] = answer["logprob"]
                if on_progress:
                    on_progress(len(found))
        return [found[at] for at in range(start, len(ids))]

    def load_adapter(self, path: Path | None) -> None:
        """Use the GGUF LoRA at `path`, or none. One already loaded is only switched on; a new one reloads the model."""
        if path is not None and path not in self._found:
            found = self._find(path)
            self._child.close()
            self._found[path] = found
            try:
                self._child = self._begin()
                self.wait_loaded()
            except BaseException:
                del self._found[path]
                raise
        self._active = path

    def close(self) -> None:
        """End the child; more than once is fine."""
        self._child.close()
        self._tidy()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _order(self) -> Message:
        return {
            "model": str(self.model),
            "adapters": [str(path) for path in self._found.values()],
            "context": self._context,
            "parallel": self.parallel,
            "threads": self._threads,
            "whole_cache": self._cache_bytes() <= WHOLE_CACHE_BYTES,
            "eos": EOS,
        }

    def _find(self, adapter: Path) -> Path:
        if self._scratch is None and is_peft(adapter):
            self._scratch = tempfile.TemporaryDirectory(prefix="gemwright-", ignore_cleanup_errors=True)
        return find_gguf_lora(adapter, self.spec, Path(self._scratch.name) if self._scratch else adapter)

    def _tidy(self) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _cache_bytes(self) -> int:
        """Keys and values in fp16 if every layer keeps the whole context of every slot."""
        spec = self.spec
        return 4 * spec.layers * spec.kv_heads * spec.head_dim * self._context * self.parallel

    def _begin(self) -> ChildProcess:
        """A child that has begun to load the model."""
        child = ChildProcess(CHILD)
        child.begin_to_load(self._order())
        return child

    def _load_error(self, error: ChildError) -> InputError | MachineError:
        where = " with ".join(map(str, (self.model, *self._found)))
        line = error.line
        if error.kind == "import":
            return MachineError(f"llama.cpp cannot start ({line})", where="xllamacpp", fix="Install it again.")
        if error.code == -9 or "alloc" in line or "memory" in line:
            fix = "Close other programs or use a smaller model."
            return MachineError(f"llama.cpp had no memory for it ({line})", where=where, fix=fix)
        return InputError(f"llama.cpp cannot load it ({line})", where=where, fix="Fetch or write the file again.")

    @contextlib.contextmanager
    def _ask(self, *orders: Message) -> Iterator[Answers]:
        """`ChildProcess.ask` with its errors said as ours."""
        try:
            with self._child.ask(*orders) as answers:
                yield answers
        except ChildError as error:
            fix = "Start it again; if it happens again, the file or the memory of the machine is at fault."
            raise MachineError(f"llama.cpp failed ({error.line})", where=self.model, fix=fix) from None

    def _scales(self) -> list[Message]:
        return [{"id": at, "scale": 1.0 if path == self._active else 0.0} for at, path in enumerate(self._found)]

    def _check_room(self, tokens: int) -> None:
        if tokens >= self._context:
            raise InputError(
                f"{tokens} tokens do not fit the context of {self._context}",
                where="prompt",
                fix="Shorten it or ask for a longer context.",
            )

    def _generate_order(self, ids: list[int], sampling: Sampling, *, quiet: bool) -> Message:
        if not ids:
            raise InputError("is empty", where="prompt", fix="Give at least one token.")
        self._check_room(len(ids))
        body = {
            "prompt": ids,
            "n_predict": min(sampling.max_tokens, self._context - len(ids)),
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": self._context,
            "samplers": ["penalties", "top_k", "top_p", "min_p", "temperature"],
            "cache_prompt": True,
            "lora": self._scales(),
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        return {"op": "generate", "quiet": quiet, "body": body}


class _Clock:
    """Times one answer from the moment it is made."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.first: float | None = None
        self.last = self.begin

    def tick(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last

    def generation(self, text: str, prompt_tokens: int, done: Message, heard: int) -> Generation:
        reason = done["reason"]
        tokens = done.get("tokens", heard) - (reason == "stop")
        if self.first is None:
            self.tick()
        first = self.first or self.last
        span, count = (
            (self.last - first, tokens - 1) if tokens > 1 and self.last > first else (self.last - self.begin, tokens)
        )
        return Generation(text, prompt_tokens, tokens, count / max(span, 1e-9), first - self.begin, reason)


def _timed_by_the_child(text: str, prompt_tokens: int, done: Message) -> Generation:
    """An answer that did not stream, with llama.cpp's own times: the prompt's, then the decoding's."""
    tokens = done["tokens"] - (done["reason"] == "stop")
    speed = tokens / max(done["decode_s"], 1e-9)
    return Generation(text, prompt_tokens, tokens, speed, done["prompt_s"], done["reason"])


def physical_cores() -> int:
    """Cores that compute (hyper-threads not counted), as far as this process may use them; OMP_NUM_THREADS rules."""
    if (asked := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(asked) > 0:
        return int(asked)
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def _check_model(model: Path) -> ModelSpec:
    """The spec of a GGUF by its header; InputError where it is none or not Gemma 3."""
    if model.is_dir():
        fix = "Give a GGUF, or use --engine pytorch."
        raise InputError("llama.cpp cannot run a safetensors folder", where=model, fix=fix)
    return spec_from_gguf(read_header(model).scalars, model)
