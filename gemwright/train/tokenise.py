"""Examples to ids and targets in several processes at once, in order: the result is the same for any number of them.

Worker processes import neither torch nor a model; what a worker holds is the vocabulary, as for much text, and a batch.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import SpawnContext
from typing import NamedTuple

from gemwright.data.read import Example
from gemwright.data.store import packed
from gemwright.errors import GemwrightError, InputError, MachineError
from gemwright.text.chat import Message, TrainOn, encode_example
from gemwright.text.pieces import Encoder

_BATCH_CHARACTERS = 1 << 18


class Batch(NamedTuple):
    """Examples, the number of tokens of each, and all their tokens as a store keeps them."""

    examples: list[Example]
    lengths: list[int]
    tokens: bytes


class _Refused(NamedTuple):
    """An error as it comes from another process: about which example of the batch, what, and what to do."""

    at: int
    what: str
    fix: str | None


_Result = tuple[list[int], bytes] | _Refused
_Submit = Callable[[list[Example]], Callable[[], _Result]]


def tokenised(
    examples: Iterable[Example], encode: Encoder, train_on: TrainOn, workers: int
) -> Generator[Batch, None, None]:
    """Batches in the order of `examples`; with one worker in this process, else in so many others.

    Raises the first error in that order, whether the reader's or (InputError, with its line) the template's, and
    MachineError where a worker process is killed.
    """
    waiting: deque[tuple[list[Example], GemwrightError | None, Callable[[], _Result]]] = deque()
    with _submitting(encode, train_on, workers) as submit:
        for batch, failure in _batches(examples):
            waiting.append((batch, failure, submit(batch)))
            if len(waiting) > 2 * workers:
                yield _taken(*waiting.popleft())
        while waiting:
            yield _taken(*waiting.popleft())


def _batches(examples: Iterable[Example]) -> Iterator[tuple[list[Example], GemwrightError | None]]:
    """Examples of some 256 K characters at a time; where the reader fails, what came before it and the error."""
    batch: list[Example] = []
    characters, failure = 0, None
    try:
        for example in examples:
            batch.append(example)
            characters += sum(len(turn["content"]) for turn in example.messages)
            if characters >= _BATCH_CHARACTERS:
                yield batch, None
                batch, characters = [], 0
    except GemwrightError as error:
        failure = error
    if batch or failure:
        yield batch, failure


def _taken(batch: list[Example], failure: GemwrightError | None, result: Callable[[], _Result]) -> Batch:
    done = result()
    if isinstance(done, _Refused):
        example = batch[done.at]
        raise InputError(done.what, where=f"{example.path}:{example.line}", fix=done.fix)
    if failure:
        raise failure
    return Batch(batch, *done)


def _encoded(encode: Encoder, train_on: TrainOn, batch: list[Example]) -> _Result:
    lengths, tokens = [], bytearray()
    for index, example in enumerate(batch):
        try:
            ids, labelled = encode_example(
                [Message(m["role"], m["content"]) for m in example.messages], encode, train_on
            )
        except GemwrightError as error:
            return _Refused(index, error.what, error.fix)
        lengths.append(len(ids))
        tokens += packed(ids, labelled)
    return lengths, bytes(tokens)


@contextmanager
def _submitting(encode: Encoder, train_on: TrainOn, workers: int) -> Iterator[_Submit]:
    """What takes a batch and gives what waits for its result."""
    if workers == 1:
        yield lambda batch: partial(_encoded, encode, train_on, batch)
        return
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, spawn, _begin, (_quick(encode, spawn), train_on)) as pool:
            try:
                with _ctrl_c_not_inherited():
                    for ready in [pool.submit(os.getpid) for _ in range(workers)]:
                        ready.cancel()
                yield lambda batch: pool.submit(_in_worker, batch).result
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool:
        what = "a process that was tokenising has been killed, perhaps for want of memory"
        raise MachineError(what, fix="Close other programs, or use fewer --workers.") from None


def _quick(encode: Encoder, spawn: SpawnContext) -> bytes:
    """An encoder for much text, made once for all workers, and in a process that gives its memory back."""
    with ProcessPoolExecutor(1, spawn, _leave_to_parent) as pool:
        with _ctrl_c_not_inherited():
            made = pool.submit(_hastened, encode)
        return made.result()


def _hastened(encode: Encoder) -> bytes:
    encode.hasten()
    return pickle.dumps(encode)


@contextmanager
def _ctrl_c_not_inherited() -> Iterator[None]:
    """Processes started within leave Ctrl-C to this one, even while they start."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_encode_batch: Callable[[list[Example]], _Result]


def _begin(quick: bytes, train_on: TrainOn) -> None:
    global _encode_batch
    _leave_to_parent()
    _encode_batch = partial(_encoded, pickle.loads(quick), train_on)


def _leave_to_parent() -> None:
    """In a new process: leave Ctrl-C to the parent, and end when it has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _in_worker(batch: list[Example]) -> _Result:
    return _encode_batch(batch)
