"""Tokenised examples on disk, memory-mapped: written once, checked on opening, read in any order without loading.

A folder of three files. `tokens.bin`: a little-endian uint32 for each token of all examples in order, the id in its
lower 31 bits and in the highest whether it is a target. `lengths.bin`: a uint32 for each example. `meta.json`: the
counts, what its maker said about it, and SHA-256 of the two others and of itself.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from gemwright.errors import GemwrightError

FORMAT: Final = 1
FILES: Final = ("tokens.bin", "lengths.bin")
_WORD: Final = np.dtype("<u4")
_TARGET: Final = 1 << 31
_COUNTED_AT_ONCE: Final = 1024  # examples


@dataclass(frozen=True)
class Encoded:
    """One example: token ids, and for each whether it is a target; first and last (exclusive) tokens of its images."""

    ids: list[int]
    labelled: list[bool]
    images: tuple[tuple[int, int], ...] = ()

    @property
    def inputs(self) -> int:
        """How many tokens a loss depends on: those before the last target, and all of an image that began there.

        All where nothing is a target.
        """
        last = next((i for i in range(len(self.ids) - 1, 0, -1) if self.labelled[i]), len(self.ids))
        return max([last, *(end for begin, end in self.images if begin < last)])


class DamagedStore(GemwrightError):
    """The files are not those that were written."""


def packed(ids: Sequence[int], labelled: Sequence[bool]) -> bytes:
    """One example as it lies in `tokens.bin`."""
    words = np.array(ids, _WORD)
    words |= np.array(labelled, _WORD) << np.uint32(31)
    return words.tobytes()


class StoreWriter:
    """Writes a store into a folder of its own; the caller makes that folder appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._tokens = (folder / "tokens.bin").open("wb")
        self._sha256 = hashlib.sha256()
        self._labelled = 0
        self.lengths = array("I")

    def add(self, lengths: Sequence[int], tokens: bytes) -> None:
        """Append examples of these lengths, `packed` one after another."""
        self._tokens.write(tokens)
        self._sha256.update(tokens)
        self.lengths.extend(lengths)
        self._labelled += int(np.count_nonzero(np.frombuffer(tokens, _WORD) & np.uint32(_TARGET)))

    def finish(self, about: dict[str, Any]) -> None:
        """Write what is known at the end; `about` is JSON and comes back as `Stored.about`."""
        self.close()
        lengths = np.array(self.lengths, _WORD).tobytes()
        (self._folder / "lengths.bin").write_bytes(lengths)
        meta = {
            "format": FORMAT,
            "examples": len(self.lengths),
            "tokens": sum(self.lengths),
            "labelled": self._labelled,
            "sha256": {"tokens.bin": self._sha256.hexdigest(), "lengths.bin": hashlib.sha256(lengths).hexdigest()},
            "about": about,
        }
        text = json.dumps({"meta": meta, "sha256": _sha256_of(meta)}, ensure_ascii=False, indent=2) + "\n"
        (self._folder / "meta.json").write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Let go of the files; needed before a folder is removed on some systems."""
        self._tokens.close()


class Stored(Sequence[Encoded]):
    """The examples of a store; each is read from the file when asked for.

    `lengths` [examples] uint32 counts tokens; `tokens` and `labelled` are their sums; `sha256` is of all of it.
    """

    def __init__(self, folder: Path) -> None:
        """Open and check every byte. DamagedStore where a file is missing, short, changed or of another format."""
        self.folder = folder
        try:
            meta = read_meta(folder)
            examples: int = meta["examples"]
            self.tokens: int = meta["tokens"]
            self.labelled: int = meta["labelled"]
            self.about: dict[str, Any] = meta["about"]
            self.sha256 = hashlib.sha256("".join(meta["sha256"][name] for name in FILES).encode()).hexdigest()
            for name, count in zip(FILES, (self.tokens, examples), strict=True):
                _check(folder / name, count * _WORD.itemsize, meta["sha256"][name])
            self.lengths = np.fromfile(folder / "lengths.bin", _WORD)
            self._words = np.memmap(folder / "tokens.bin", _WORD, mode="r") if self.tokens else np.zeros(0, _WORD)
        except (OSError, ValueError) as error:
            raise DamagedStore(f"cannot be read ({error})", where=folder) from error
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        if int(self._ends[-1] if examples else 0) != self.tokens:
            raise DamagedStore("lengths and tokens do not agree", where=folder)

    @property
    def bytes(self) -> int:
        """What the store takes on disk, without `meta.json`."""
        return (self.tokens + len(self.lengths)) * _WORD.itemsize

    @cached_property
    def targets(self) -> NDArray[np.uint32]:
        """[examples] How many targets each has, counted in one pass over the file."""
        counts = np.zeros(len(self), np.uint32)
        starts = self._ends - self.lengths
        for first in range(0, len(self), _COUNTED_AT_ONCE):
            some = slice(first, first + _COUNTED_AT_ONCE)
            flags = self._words[int(starts[some][0]) : int(self._ends[some][-1])] >= _TARGET
            before = np.concatenate(([0], np.cumsum(flags, dtype=np.int64)))
            counts[some] = before[self._ends[some] - starts[first]] - before[starts[some] - starts[first]]
        return counts

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        end = int(self._ends[at])
        words = self._words[end - int(self.lengths[at]) : end]
        return Encoded((words & np.uint32(_TARGET - 1)).tolist(), (words >= _TARGET).tolist())


def read_meta(folder: Path) -> dict[str, Any]:
    """What `meta.json` says of a store: format, examples, tokens, labelled, sha256, about.

    Raises DamagedStore where it is not whole; the other files are not looked at.
    """
    try:
        written = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta: dict[str, Any] = written["meta"]
        is_whole = written["sha256"] == _sha256_of(meta)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedStore(f"meta.json cannot be read ({type(error).__name__})", where=folder) from error
    if not is_whole:
        raise DamagedStore("meta.json is not as it was written", where=folder)
    if meta["format"] != FORMAT:
        raise DamagedStore(f"format {meta['format']}, not {FORMAT}", where=folder)
    return meta


def _sha256_of(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _check(file: Path, size: int, sha256: str) -> None:
    if (found := file.stat().st_size) != size:
        raise DamagedStore(f"{file.name} has {found} bytes, not {size}", where=file.parent)
    with file.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != sha256:
            raise DamagedStore(f"{file.name} is not as it was written", where=file.parent)
