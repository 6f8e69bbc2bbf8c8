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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import FrameType
from typing import Any, NamedTuple

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
    # An encoder for much text, made once for all workers, and in a process that gives its memory back.
    with _processes(1, pickle.dumps(partial(_hastened, train_on))) as ask:
        made = ask(encode)()
    with _processes(workers, made) as submit:
        yield submit


def _hastened(train_on: TrainOn, encode: Encoder) -> bytes:
    """`_encoded` of an encoder for much text, pickled."""
    encode.hasten()
    return pickle.dumps(partial(_encoded, encode, train_on))


@contextmanager
def _processes(count: int, made: bytes) -> Iterator[Callable[[Any], Callable[[], Any]]]:
    """`count` processes that call what is pickled in `made`: takes an argument and gives what waits for the result.

    Each has a pipe of its own: where one is killed it ends with it, even in the middle of a result. (A queue that all
    write to, as `concurrent.futures` has, waits for the rest of that result for ever.)
    """
    spawn = multiprocessing.get_context("spawn")
    idle: SimpleQueue[Connection] = SimpleQueue()
    what = "a process that was tokenising has been killed, perhaps for want of memory"
    killed = MachineError(what, fix="Close other programs, or use fewer --workers.")

    def ask(argument: object) -> Any:
        connection = idle.get()
        try:
            connection.send(argument)
            result = connection.recv()
        except (EOFError, OSError):
            raise killed from None
        finally:
            idle.put(connection)
        if isinstance(result, Exception):
            raise result
        return result

    with ThreadPoolExecutor(count) as threads, ExitStack() as running:
        with _ctrl_c_afterwards():
            for _ in range(count):
                ours, theirs = spawn.Pipe()
                process = spawn.Process(target=_serve, args=(theirs, made), daemon=True)
                try:
                    process.start()
                except BrokenPipeError:
                    raise killed from None
                running.callback(process.join)
                running.callback(process.kill)
                theirs.close()
                idle.put(ours)
        running.callback(threads.shutdown, wait=False, cancel_futures=True)
        yield lambda argument: threads.submit(ask, argument).result


def _serve(connection: Connection, made: bytes) -> None:
    """Answer call after call, for as long as the parent lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer = pickle.loads(made)
    with suppress(EOFError, OSError):  # the parent has ended
        while True:
            argument = connection.recv()
            try:
                result = answer(argument)
            except Exception as error:
                result = error
            connection.send(result)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


@contextmanager
def _ctrl_c_afterwards() -> Iterator[None]:
    """Ctrl-C takes effect when this ends; POSIX processes started within never get it, even while they start."""
    heard: list[tuple[int, FrameType | None]] = []
    in_main = threading.current_thread() is threading.main_thread()
    with ExitStack() as restored:
        if in_main:
            before = signal.signal(signal.SIGINT, lambda *call: heard.append(call))
            restored.callback(signal.signal, signal.SIGINT, before)
        if os.name == "posix":
            from multiprocessing import resource_tracker

            resource_tracker.ensure_running()  # or the first process started would start it, which unblocks Ctrl-C
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            restored.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        yield
    if heard and callable(before):
        before(*heard[0])
