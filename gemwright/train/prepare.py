"""Training data as a store of tokens, made once for a file's bytes, a tokenizer, a template and what is to be learned.

The length of rows is no part of that: packing goes by lengths alone and is done anew each epoch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gemwright.data.locate import locate
from gemwright.data.read import Example, examples_in
from gemwright.data.store import FORMAT, DamagedStore, Stored, StoreWriter, read_meta
from gemwright.errors import InputError, MachineError
from gemwright.host import read_cpu
from gemwright.report import LINE_EVERY_S, say
from gemwright.runs import atomic_path, home
from gemwright.text.chat import TEMPLATE, TrainOn
from gemwright.text.pieces import Encoder
from gemwright.train.tokenise import Batch, tokenised

# All processes together are to stay under 1 GB: this one with torch and a model's header, and the workers.
_RAM_BYTES, _PARENT_BYTES, _WORKER_BYTES = 970_000_000, 380_000_000, 190_000_000
_BYTES_A_WORKER = 16_000_000  # less is tokenised here while a process would still be starting
_LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
_BLOCK_BYTES = 1 << 22
Report = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A store and how it came about: `workers` processes took `seconds`; both 0 where it was there already.

    `data_sha256` is of the data's file, or of the names and digests of several.
    """

    examples: Stored
    data_sha256: str
    workers: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Input:
    """The data's files as they are; `sha256` is of names and bytes, `lines` is 0 where none can be counted."""

    files: tuple[Path, ...]
    sha256: str
    data_sha256: str
    bytes: int
    lines: int
    stamp: tuple[tuple[int, int], ...]


def prepare(
    data: Path,
    encode: Encoder,
    train_on: TrainOn,
    *,
    seq: int,
    workers: int | None = None,
    report: Report = say,
    on_progress: Callable[[int, float], None] = lambda examples, share: None,
) -> Prepared:
    """The store of `data`, made now or earlier; a damaged one is said aloud and made again.

    `workers` is the most processes to tokenise in. `on_progress` hears how many examples are done and which share that
    is (0 where unknown). InputError where an example cannot be used or is longer than `seq` tokens, MachineError where
    the disk refuses or a process is killed.
    """
    found = _look(data, report)
    settings = {
        "data": found.sha256,
        "tokenizer": encode.digest,
        "template": TEMPLATE,
        "train_on": train_on,
        "format": FORMAT,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    folder = stores() / key
    with _alone(folder, report):
        prepared = _kept(folder, found, report)
        if prepared is None:
            start, used = time.monotonic(), _workers(workers, found.bytes, report)
            about = {"name": data.name, "settings": settings}
            with closing(tokenised(examples_in(found.files, data), encode, train_on, used)) as batches:
                _make(folder, data, found, batches, about, on_progress)
            prepared = Prepared(Stored(folder), found.data_sha256, used, time.monotonic() - start)
    _check_lengths(prepared.examples, seq, found.files)
    return prepared


def spoken(report: Report) -> Callable[[int, float], None]:
    """An `on_progress` that says a line every ten seconds."""
    said_at = time.monotonic()

    def hear(examples: int, share: float) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= LINE_EVERY_S:
            said_at = time.monotonic()
            report(f"tokenising: {examples:,} examples" + (f", {share:.0%}" if share else ""))

    return hear


def stores() -> Path:
    """The folder that holds a folder for each store."""
    return home() / "prepared"


def stored_sets() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each store's folder and what its `meta.json` says; damaged ones are left out."""
    for folder in sorted(stores().glob("[!.]*/")):
        try:
            yield folder, read_meta(folder)
        except DamagedStore:
            continue


def clear() -> int:
    """Remove all stores, and what broken attempts have left; the bytes that were freed."""
    freed = sum(file.stat().st_size for file in stores().rglob("*") if file.is_file())
    try:
        if stores().exists():
            shutil.rmtree(stores())
    except OSError as error:
        what = f"cannot be removed: {error.strerror or error}"
        raise MachineError(what, where=stores(), fix="End what still uses it.") from error
    return freed


def _look(data: Path, report: Report) -> _Input:
    files = locate(data, report).files
    digest, own, lines = hashlib.sha256(), hashlib.sha256(), 0
    for file in files:
        own = hashlib.sha256()
        try:
            with file.open("rb") as handle:
                while block := handle.read(_BLOCK_BYTES):
                    own.update(block)
                    lines += block.count(b"\n")
        except FileNotFoundError:
            raise InputError("no such file", where=file, fix="Check the path of the data.") from None
        except OSError as error:
            reason = "is a folder" if file.is_dir() else f"cannot be read: {error.strerror or error}"
            raise InputError(reason, where=file, fix="Check the path and its permissions.") from error
        digest.update(json.dumps([file.name, own.hexdigest()]).encode())
    countable = all(file.suffix.lower() in _LINES for file in files)
    stamp = _stamp(files)
    sha256 = digest.hexdigest()
    data_sha256 = own.hexdigest() if len(files) == 1 else sha256
    return _Input(files, sha256, data_sha256, sum(size for size, _ in stamp), lines if countable else 0, stamp)


def _stamp(files: tuple[Path, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((about.st_size, about.st_mtime_ns) for about in (file.stat() for file in files))


@contextmanager
def _alone(folder: Path, report: Report) -> Iterator[None]:
    """Hold the lock of a store, so that two programs do not make it at once."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report("another gemwright prepares the same data; waiting for it")
            lock.acquire()
    except OSError as error:
        what = f"cannot write: {error.strerror or error}"
        raise MachineError(what, where=folder.parent, fix="Set GEMWRIGHT_HOME to another folder.") from error
    try:
        yield
    finally:
        lock.release()


def _kept(folder: Path, found: _Input, report: Report) -> Prepared | None:
    if not folder.exists():
        return None
    try:
        return Prepared(Stored(folder), found.data_sha256)
    except DamagedStore as damage:
        report(f"prepared data is damaged ({damage.what}); preparing again")
        return None


def _workers(most: int | None, size: int, report: Report) -> int:
    """Processes for `size` bytes of data: `most`, else as many as threads if their memory allows it."""
    useful = max(1, size // _BYTES_A_WORKER)
    if most is not None:
        return min(most, useful)
    threads = read_cpu([], Path("/"), {}).threads or 1
    fitting = (_RAM_BYTES - _PARENT_BYTES) // _WORKER_BYTES
    if min(threads, useful) > fitting:
        report(f"tokenising in {fitting} of {threads} threads to stay under 1 GB of RAM; --workers says otherwise")
    return min(threads, useful, fitting)


def _make(
    folder: Path,
    data: Path,
    found: _Input,
    batches: Iterator[Batch],
    about: dict[str, Any],
    on_progress: Callable[[int, float], None],
) -> None:
    longest, where = 0, (0, 0)
    for stale in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(stale, ignore_errors=True)
    with atomic_path(folder) as part:
        writer = StoreWriter(part)
        try:
            for examples, lengths, tokens in batches:
                writer.add(lengths, tokens)
                top = max(lengths)
                if top > longest:
                    longest, where = top, _place(examples[lengths.index(top)], found.files)
                line = examples[-1].line
                on_progress(len(writer.lengths), min(1.0, line / found.lines) if found.lines else 0.0)
            if _stamp(found.files) != found.stamp:
                raise InputError("was changed while it was read", where=data, fix="Start again.")
            writer.finish(about | {"longest": longest, "longest_at": where})
        finally:
            writer.close()


def _place(example: Example, files: tuple[Path, ...]) -> tuple[int, int]:
    """(number of the file, line)"""
    return files.index(example.path) if example.path in files else 0, example.line


def _check_lengths(examples: Stored, seq: int, files: tuple[Path, ...]) -> None:
    longest = examples.about["longest"]
    if longest <= seq:
        return
    file, line = examples.about["longest_at"]
    raise InputError(
        f"{int((examples.lengths > seq).sum())} of {len(examples)} examples are longer than {seq} tokens, "
        f"the longest has {longest}",
        where=f"{files[file]}:{line}",
        fix=f"Use --seq {longest} or shorten them.",
    )
