"""Exact and near duplicates among all rows in bounded memory: a digest and a MinHash signature a row, compared last.

Near: one-permutation MinHash (Li, Owen, Zhang 2012) over 8-character pieces of the text with its white space made
even; 64 bins, in 8 bands of 8 to find candidates (Leskovec, Rajaraman, Ullman: Mining of Massive
Datasets, chapter 3).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gemwright.data.shapes import Entry

THRESHOLD: Final = 0.85  # of the pieces in common (Jaccard), as the signatures estimate it
MOST_SIGNATURES: Final = 2_000_000  # 128 bytes each
_BINS, _BANDS, _PIECE = 64, 8, 8
_EMPTY = np.uint16(0xFFFF)
_BATCH_CHARACTERS = 1 << 19
_LONGEST_CHARACTERS = 1 << 16
_PRIME, _PRIME_32 = np.uint64(0x9E3779B97F4A7C15), np.uint32(0x9E3779B1)
# glibc gives freed blocks of over 128 KiB back to the system, and their return costs page faults that are four fifths
# of the time here, until a larger block was freed once.
_KEPT_BY_MALLOC: Final = 24 << 20

Signatures = NDArray[np.uint16]


@dataclass(frozen=True)
class Pair:
    """Row `at` repeats row `of` (both counted from 0 in the order they were added); `share` 1.0 where exactly."""

    at: int
    of: int
    share: float


class Fingerprints:
    """What is remembered of each row: 8 bytes exactly, and for the first two million 128 bytes of likeness."""

    def __init__(self, most_signatures: int = MOST_SIGNATURES) -> None:
        self._most = most_signatures
        self._digests = bytearray()
        self._waiting: list[str] = []
        self._characters = self._signed = 0
        self._blocks: list[Signatures] = []
        np.empty(_KEPT_BY_MALLOC, np.uint8)

    def __len__(self) -> int:
        return len(self._digests) // 8

    @property
    def is_partial(self) -> bool:
        """Whether rows were added that near duplicates are not looked for among."""
        return len(self) > self._most

    def add(self, entry: Entry) -> None:
        """Remember a row."""
        first = entry.messages[0]["role"] if entry.messages else entry.format
        exact = f"{first}\x1e{entry.whole}".encode()
        self._digests += hashlib.blake2b(exact, digest_size=8).digest()
        if self._signed < self._most:
            self._signed += 1
            self._waiting.append(" ".join(entry.whole[:_LONGEST_CHARACTERS].split()))
            self._characters += len(self._waiting[-1])
            if self._characters >= _BATCH_CHARACTERS:
                self._sign()

    def pairs(self) -> tuple[list[Pair], list[Pair]]:
        """(exact, near) duplicates within, each row named once with the earliest that it repeats."""
        digests, signatures = self._all()
        first = _earliest(digests)
        exact = [Pair(int(at), int(first[at]), 1.0) for at in np.flatnonzero(first != np.arange(len(first)))]
        alone = np.flatnonzero(first[: len(signatures)] == np.arange(len(signatures)))
        return exact, _near(signatures, alone)

    def pairs_with(self, other: Fingerprints) -> list[Pair]:
        """Rows of this one that repeat a row of `other` (which `of` counts), exactly or nearly."""
        (mine, likeness), (theirs, their_likeness) = self._all(), other._all()
        order = np.argsort(theirs, kind="stable")
        at = np.searchsorted(theirs[order], mine)
        hit = at < len(theirs)
        hit[hit] = theirs[order][at[hit]] == mine[hit]
        found = {int(row): Pair(int(row), int(order[at[row]]), 1.0) for row in np.flatnonzero(hit)}
        count = len(their_likeness)
        both = np.concatenate([their_likeness, likeness])
        for pair in _near(both, np.arange(len(both)), boundary=count):
            found.setdefault(pair.at - count, Pair(pair.at - count, pair.of, pair.share))
        return [found[row] for row in sorted(found)]

    def _all(self) -> tuple[NDArray[np.uint64], Signatures]:
        if self._waiting:
            self._sign()
        self._blocks = [np.concatenate([np.empty((0, _BINS), np.uint16), *self._blocks])]
        return np.frombuffer(bytes(self._digests), dtype=np.uint64), self._blocks[0]

    def _sign(self) -> None:
        self._blocks.append(_signatures(self._waiting))
        self._waiting, self._characters = [], 0


def _signatures(texts: list[str]) -> Signatures:
    """[len(texts), 64] least hash in each bin, of all texts at once; a bin without a piece holds _EMPTY."""
    texts = [text if len(text) >= _PIECE else text.ljust(_PIECE, "\x1f") for text in texts]
    lengths = np.array([len(text) for text in texts])
    hashes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32) * _PRIME_32
    step = 1
    while step < _PIECE:  # from pieces of `step` characters to pieces of twice as many
        hashes = (hashes[:-step] * _PRIME_32) ^ (hashes[step:] + (hashes[:-step] >> np.uint32(13)))
        step *= 2
    hashes = (hashes ^ (hashes >> np.uint32(16))) * _PRIME_32
    hashes ^= hashes >> np.uint32(15)
    row = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)[: len(hashes)]
    last = np.repeat(np.cumsum(lengths) - _PIECE, lengths)[: len(hashes)]
    inside = np.arange(len(hashes)) <= last  # a piece does not reach into the next row
    hashes, row = hashes[inside], row[inside]
    bins = row * np.int32(_BINS) + (hashes >> np.uint32(26)).astype(np.int32)
    least = np.full(len(texts) * _BINS, _EMPTY, dtype=np.uint16)
    np.minimum.at(least, bins, (hashes >> np.uint32(10)).astype(np.uint16))
    return least.reshape(len(texts), _BINS)


def _earliest(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each row the first row with the same key."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    return first[which]


def _near(signatures: Signatures, rows: NDArray[np.int64], boundary: int = 0) -> list[Pair]:
    """Near duplicates among `rows`, of an earlier one; with `boundary` only rows from there on, of rows before it."""
    best: dict[int, Pair] = {}
    for band in np.split(signatures, _BANDS, axis=1):
        used = rows[(band[rows] != _EMPTY).any(axis=1)]
        key = np.zeros(len(used), dtype=np.uint64)
        for column in band[used].T.astype(np.uint64):
            key = (key ^ column) * _PRIME
            key ^= key >> np.uint64(31)
        first = used[_earliest(key)] if len(used) else used
        for of in {0: first, 1: _previous(key, used)}.values():
            other = (of != used) & (used >= boundary) & ((of < boundary) | (boundary == 0))
            for at, earlier, share in zip(
                used[other], of[other], _share(signatures, used[other], of[other]), strict=True
            ):
                if share >= THRESHOLD and (at not in best or earlier < best[int(at)].of):
                    best[int(at)] = Pair(int(at), int(earlier), float(share))
    return [best[at] for at in sorted(best)]


def _previous(key: NDArray[np.uint64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the last one before it with the same key, itself where there is none."""
    order = np.argsort(key, kind="stable")
    previous = rows.copy()
    same = key[order][1:] == key[order][:-1]
    previous[order[1:][same]] = rows[order[:-1][same]]
    return previous


def _share(signatures: Signatures, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
    """Estimated Jaccard likeness: equal bins among those that either row fills."""
    parts = [np.empty(0)]
    for start in range(0, len(a), 1 << 16):
        left, right = signatures[a[start : start + (1 << 16)]], signatures[b[start : start + (1 << 16)]]
        filled = ((left != _EMPTY) | (right != _EMPTY)).sum(axis=1)
        equal = ((left == right) & (left != _EMPTY)).sum(axis=1)
        parts.append(equal / np.maximum(filled, 1))
    return np.concatenate(parts)
