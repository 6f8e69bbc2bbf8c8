"""Opens a GGUF file: everything it claims is checked against its real size, tensors stay memory-mapped.

Source: ggml/docs/gguf.md. Types and block sizes come from the `gguf` library; its own reader makes one array view
per token, which takes ten seconds on Gemma's vocabulary, so the walk over the header is done here.
"""

from __future__ import annotations

import mmap
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType

from gemwright.errors import InputError, MachineError

_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_MAX_DIMS = 4
_FETCH_AGAIN = "The file is damaged or incomplete; fetch it again."


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in its file; `shape` in PyTorch's order, `data` uint8 [rows, bytes per row] or [bytes]."""

    name: str
    shape: tuple[int, ...]
    qtype: str
    data: torch.Tensor


@dataclass(frozen=True)
class _Value:
    """Where a metadata value lies: `kind` of a scalar, string or array item; `count` is None for a single value."""

    kind: int
    start: int
    count: int | None


class Metadata(Mapping[str, Any]):
    """Metadata by key, decoded when asked for: numbers, strings, lists of strings, NumPy arrays of numbers."""

    def __init__(self, file: _Cursor, values: dict[str, _Value]) -> None:
        self._file, self._values = file, values
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            self._decoded[key] = self._file.decode(self._values[key], key)
        return self._decoded[key]

    def kind(self, key: str) -> tuple[GGUFValueType, bool]:
        """(type of the value or of an array's items, whether it is an array)."""
        value = self._values[key]
        return GGUFValueType(value.kind), value.count is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF; the mapping lives as long as any of its tensors."""

    path: Path
    metadata: Metadata
    tensors: dict[str, StoredTensor]


def open_gguf(path: Path | str) -> GGUFFile:
    """Open and check a GGUF; InputError where it is missing, not a GGUF, truncated or damaged."""
    path = Path(path)
    cursor = _Cursor(path, _map(path))
    if cursor.u32() != GGUF_MAGIC:
        raise InputError("not a GGUF file", where=path, fix="Give a .gguf file or a Hugging Face model folder.")
    version = cursor.u32()
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0 and version != 0
        what = "big-endian GGUF" if swapped else f"GGUF version {version}"
        raise InputError(f"{what} is not supported", where=path, fix="Convert it with a current llama.cpp.")
    n_tensors, n_values = cursor.u64(), cursor.u64()
    metadata = Metadata(cursor, _read_values(cursor, n_values))
    infos = _read_infos(cursor, n_tensors)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.damaged(f"alignment {alignment!r} is not a power of two of at least 8")
    base = -(-cursor.at // alignment) * alignment
    return GGUFFile(path, metadata, {name: _tensor(cursor, name, base, *rest) for name, rest in infos.items()})


class _Cursor:
    """Reads little-endian values from a mapped file and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.size = path, data, 0, len(data)

    def damaged(self, what: str) -> InputError:
        return InputError(what, where=self.path, fix=_FETCH_AGAIN)

    def take(self, size: int) -> int:
        """Step over `size` bytes; where they start."""
        start = self.at
        if size > self.size - start:
            raise self.damaged(f"header ends early ({size} bytes wanted at byte {start} of {self.size})")
        self.at = start + size
        return start

    def room_for(self, count: int, each: int, what: str) -> int:
        """`count`, once that many items of at least `each` bytes can still follow."""
        if count * each > self.size - self.at:
            raise self.damaged(f"claims {count} {what}, more than the file can hold")
        return count

    def u32(self) -> int:
        value: int = struct.unpack_from("<I", self.data, self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = struct.unpack_from("<Q", self.data, self.take(8))[0]
        return value

    def text(self, what: str) -> str:
        size = self.u64()
        start = self.take(size)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8 text") from None

    def skip_texts(self, count: int) -> None:
        """Step over `count` strings; a loop on local names, since a vocabulary has 262,144 of them."""
        read, data, at, size = struct.Struct("<Q").unpack_from, self.data, self.at, self.size
        for _ in range(count):
            if at + 8 > size:
                break
            at += 8 + read(data, at)[0]
        if at > size or (count and self.at == at):
            raise self.damaged("a list of strings runs past the end of the file")
        self.at = at

    def decode(self, value: _Value, key: str) -> Any:
        """The value itself. Arrays of numbers are read-only views of the file."""
        if value.kind == GGUFValueType.STRING:
            texts = self._texts(value.start, 1 if value.count is None else value.count, key)
            return texts[0] if value.count is None else texts
        if value.count is None:
            return struct.unpack_from("<" + _SCALARS[value.kind], self.data, value.start)[0]
        kind = np.dtype("<" + _SCALARS[value.kind].replace("?", "B"))
        numbers = np.frombuffer(self.data, kind, value.count, value.start)
        return numbers != 0 if value.kind == GGUFValueType.BOOL else numbers

    def _texts(self, at: int, count: int, key: str) -> list[str]:
        read, data, texts = struct.Struct("<Q").unpack_from, self.data, []
        try:
            for _ in range(count):
                end = at + 8 + read(data, at)[0]
                texts.append(data[at + 8 : end].decode("utf-8"))
                at = end
        except UnicodeDecodeError:
            raise self.damaged(f"{key} is not UTF-8 text") from None
        return texts


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise InputError("no such file", where=path, fix="Check the path, or see 'gemwright pull --help'.") from None
    except ValueError:
        raise InputError("the file is empty", where=path, fix=_FETCH_AGAIN) from None
    except IsADirectoryError:
        raise InputError("is a folder, not a GGUF file", where=path, fix="Name the file inside it.") from None
    except PermissionError:
        what = "is a folder, not a GGUF file" if path.is_dir() else "may not be read"
        raise InputError(what, where=path, fix="Check the path and its permissions.") from None
    except OSError as error:
        raise MachineError(f"cannot read: {error.strerror or error}", where=path) from error


def _read_values(cursor: _Cursor, count: int) -> dict[str, _Value]:
    values: dict[str, _Value] = {}
    for _ in range(cursor.room_for(count, 13, "metadata values")):
        key = cursor.text("a metadata key")
        if key in values:
            raise cursor.damaged(f"metadata key {key!r} occurs twice")
        values[key] = _read_value(cursor, key)
    return values


def _read_value(cursor: _Cursor, key: str) -> _Value:
    kind, count = cursor.u32(), None
    if kind == GGUFValueType.ARRAY:
        kind, count = cursor.u32(), cursor.u64()
    start = cursor.at
    if kind == GGUFValueType.STRING:
        cursor.skip_texts(cursor.room_for(1 if count is None else count, 8, f"strings in {key}"))
    elif kind in _SCALARS:
        size = struct.calcsize("<" + _SCALARS[kind])
        cursor.take(size * cursor.room_for(1 if count is None else count, size, f"values in {key}"))
    else:
        raise cursor.damaged(f"{key} has the unknown value type {kind}")
    return _Value(kind, start, count)


def _read_infos(cursor: _Cursor, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Name -> (dimensions in the file's order, type number, offset) of each tensor."""
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(cursor.room_for(count, 32, "tensors")):
        name = cursor.text("a tensor name")
        n_dims = cursor.u32()
        if name in infos or not 1 <= n_dims <= _MAX_DIMS:
            raise cursor.damaged(
                f"tensor {name!r} " + ("occurs twice" if name in infos else f"has {n_dims} dimensions")
            )
        dims = tuple(cursor.u64() for _ in range(n_dims))
        infos[name] = (dims, cursor.u32(), cursor.u64())
    return infos


def _tensor(cursor: _Cursor, name: str, base: int, dims: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    try:
        qtype = GGMLQuantizationType(kind)
    except ValueError:
        raise InputError(f"tensor {name} has the unknown type {kind}", where=cursor.path, fix=_FETCH_AGAIN) from None
    block, size = GGML_QUANT_SIZES[qtype]
    if min(dims) < 1 or dims[0] % block or offset % 8:
        raise cursor.damaged(f"tensor {name} of type {qtype.name} cannot have dimensions {dims} at offset {offset}")
    per_row, rows = dims[0] // block * size, prod(dims[1:])
    start, end = base + offset, base + offset + per_row * rows
    if end > cursor.size:
        raise cursor.damaged(f"tensor {name} ends at byte {end:,}, but the file has {cursor.size:,}")
    data = _whole(cursor)[start:end]
    shape = tuple(reversed(dims))
    return StoredTensor(name, shape, qtype.name, data.view(rows, per_row) if len(shape) > 1 else data)


def _whole(cursor: _Cursor) -> torch.Tensor:
    """The whole file as uint8. PyTorch warns that it could be written to; nothing here does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(cursor.data, dtype=torch.uint8)
