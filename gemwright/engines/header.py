"""A GGUF's facts read from its first kilobytes, without torch: scalars of the metadata, shapes of the tensors.

The whole file is checked by whoever loads it (`gemwright.weights`, llama.cpp); this answers what must be known before.
Format: ggml-org/ggml docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gemwright.errors import InputError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 20
_LONG_ARRAY = 4096


@dataclass(frozen=True)
class Header:
    """`tensors` (name -> shape, rows first) is None where a long array came before them, which ends the reading."""

    scalars: dict[str, Any]
    tensors: dict[str, tuple[int, ...]] | None


def read_header(path: Path) -> Header:
    """The header of the GGUF at `path`; InputError where it is missing, not a GGUF, or cut short."""
    try:
        with path.open("rb") as file:
            return _parse(file, path)
    except FileNotFoundError:
        raise InputError(
            "no such file", where=path, fix="Check the path, or fetch a model with 'gemwright pull'."
        ) from None
    except OSError as error:
        raise InputError(f"cannot read it: {error.strerror or error}", where=path, fix="Check the path.") from error
    except (struct.error, UnicodeDecodeError, ValueError, KeyError):
        raise InputError("damaged or cut short in its header", where=path, fix="Fetch the file again.") from None


def _parse(file: BinaryIO, path: Path) -> Header:
    magic = file.read(4)
    if magic != b"GGUF":
        raise InputError("not a GGUF file", where=path, fix="Give a GGUF of Gemma 3 (see 'gemwright pull').")
    version, tensor_count, key_count = _take(file, "<IQQ")
    if version not in (2, 3):
        raise InputError(f"GGUF version {version} is not known", where=path, fix="Give a version 2 or 3 file.")
    scalars: dict[str, Any] = {}
    for _ in range(key_count):
        key, (kind,) = _string(file), _take(file, "<I")
        if kind == _ARRAY:
            if not _skip_array(file):
                return Header(scalars, None)
            continue
        scalars[key] = _string(file) if kind == _STRING else _take(file, "<" + _SCALARS[kind])[0]
    tensors = {}
    for _ in range(tensor_count):
        name, (rank,) = _string(file), _take(file, "<I")
        if rank > 4:
            raise ValueError
        tensors[name] = tuple(reversed(_take(file, f"<{rank}Q")))
        _take(file, "<IQ")
    return Header(scalars, tensors)


def _skip_array(file: BinaryIO) -> bool:
    """Pass over a short array; False at a long one (a vocabulary), which is not worth the time."""
    kind, length = _take(file, "<IQ")
    if length > _LONG_ARRAY:
        return False
    for _ in range(length):
        _string(file) if kind == _STRING else _take(file, "<" + _SCALARS[kind])
    return True


def _take(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _string(file: BinaryIO) -> str:
    (length,) = _take(file, "<Q")
    if length > _LONGEST:
        raise ValueError
    data = file.read(length)
    if len(data) < length:
        raise ValueError
    return data.decode("utf-8")
