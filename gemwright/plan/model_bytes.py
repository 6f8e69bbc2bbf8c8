"""How many bytes a model has and where, from a GGUF's header alone or from what its publisher's file is known to hold.

The header may be read over HTTP range requests, so that a model is weighed before it is downloaded. Format:
ggml-org/ggml docs/gguf.md; sizes of blocks: ggml's type table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from gemwright.errors import InputError, MachineError
from gemwright.spec import SPECS, ModelSpec, spec_from_gguf

# Type number -> (name, values a block, bytes a block).
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_BY_NAME = {name: (values, size) for name, values, size in TYPES.values()}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 1 << 21


@dataclass(frozen=True)
class ModelBytes:
    """A model's bytes: `embed` the tied embedding, `layers` those of each layer, `by_type` all by number format.

    `total` is the file's size, metadata included where it is known. `basis` says where the numbers come from.
    """

    spec: ModelSpec
    embed: int
    layers: tuple[int, ...]
    by_type: Mapping[str, int]
    total: int
    basis: str
    embed_type: str = "F16"
    vision: int = field(default=0)

    @property
    def largest_layer(self) -> int:
        """What a slot of a ring must hold."""
        return max(self.layers)


def matrix_bytes(rows: int, cols: int, kind: str) -> int:
    """Packed size of a matrix; columns that do not fill blocks of 256 fall back as llama.cpp's do."""
    values, size = _BY_NAME[kind]
    if cols % values:
        values, size = _BY_NAME[{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.get(kind, "Q8_0")]
    return rows * cols // values * size


def weights_of(count: int, kind: str) -> float:
    """How many weights `count` bytes of a type are."""
    values, size = _BY_NAME[kind]
    return count * values / size


def published(name: str) -> ModelBytes:
    """The file that `gemwright pull NAME` fetches: 270m as Q4_K_M, larger instruction-tuned ones as Google's QAT Q4_0.

    Google's QAT files keep the embedding in F16; what ends in -pt is BF16.
    """
    size, base = name.removesuffix("-it").removesuffix("-pt"), name.endswith("-pt")
    if size not in SPECS:
        raise InputError(f"unknown model {name!r}", where="MODEL", fix=f"Known: {', '.join(SPECS)}, or a GGUF file.")
    if size == "270m":
        return weighed(SPECS[size], "Q5_0", "Q8_0", "as the file on PyPI is made (Q4_K_M, about)")
    kind, embed = ("Q4_0", "F16") if not base else ("BF16", "BF16")
    return weighed(SPECS[size], kind, embed, f"as published: {kind}, embedding {embed}")


def weighed(spec: ModelSpec, kind: str, embed_kind: str, basis: str) -> ModelBytes:
    """A model whose linear layers are all of one type."""
    norms = 4 * sum(spec.norm_shapes.values())
    linear = sum(matrix_bytes(rows, cols, kind) for rows, cols in spec.linear_shapes.values())
    embed = matrix_bytes(spec.vocab, spec.hidden, embed_kind)
    by_type = {kind: linear * spec.layers, "F32": norms * spec.layers + 4 * spec.hidden}
    by_type[embed_kind] = by_type.get(embed_kind, 0) + embed
    metadata = 6 * 10**6
    total = sum(by_type.values()) + metadata
    return ModelBytes(spec, embed, (linear + norms,) * spec.layers, by_type, total, basis, embed_kind)


class Source(Protocol):
    """Something that bytes are read from in order."""

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, or fewer at the end."""

    def skip(self, size: int) -> None:
        """Step over bytes."""


class FileSource:
    """A file on this machine."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        """See `Source.read`."""
        return self._file.read(size)

    def skip(self, size: int) -> None:
        """See `Source.skip`."""
        self._file.seek(size, 1)


class HttpSource:
    """A file behind a URL, fetched by range requests of 2 MiB; nothing is asked for beyond the header."""

    def __init__(self, url: str, timeout_s: float = 20.0) -> None:
        self._url, self._timeout_s, self._at, self._block = url, timeout_s, 0, (0, b"")
        self.size: int | None = None
        self.requests = 0

    def read(self, size: int) -> bytes:
        """See `Source.read`."""
        parts = []
        while size > 0:
            start, data = self._block
            if not start <= self._at < start + len(data):
                start, data = self._block = (self._at, self._fetch(max(size, _BLOCK)))
                if not data:
                    break
            piece = data[self._at - start : self._at - start + size]
            parts.append(piece)
            self._at += len(piece)
            size -= len(piece)
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """See `Source.skip`."""
        self._at += size

    def _fetch(self, size: int) -> bytes:
        import urllib.error  # with its TLS a third of the start of a plan that asks for no address
        import urllib.request

        request = urllib.request.Request(self._url, headers={"Range": f"bytes={self._at}-{self._at + size - 1}"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                self.requests += 1
                if answer.status != 206:
                    raise MachineError("the server sends no parts of files", where=self._url, fix="Download it first.")
                total = answer.headers.get("Content-Range", "").rpartition("/")[2]
                self.size = int(total) if total.isdigit() else self.size
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 416:
                return b""
            raise MachineError(f"HTTP {error.code}", where=self._url, fix="Check the address.") from error
        except OSError as error:
            raise MachineError(f"cannot be reached ({error})", where=self._url, fix="Check the network.") from error


def weigh(where: str | Path) -> ModelBytes:
    """The bytes of a GGUF, a path or an http(s) address, from its header. InputError where that is damaged."""
    if str(where).startswith(("http://", "https://")):
        source = HttpSource(str(where))
        return _weigh(source, str(where), lambda: source.size)
    path = Path(where)
    try:
        with path.open("rb") as file:
            return _weigh(FileSource(file), path, lambda: path.stat().st_size)
    except FileNotFoundError:
        raise InputError("no such file", where=path, fix="Check the path, or name a size such as 4b.") from None
    except OSError as error:
        raise InputError(f"cannot read it: {error.strerror or error}", where=path, fix="Check the path.") from error


def _weigh(source: Source, where: object, size_of: object) -> ModelBytes:
    try:
        metadata, tensors = _header(source)
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError):
        raise InputError("damaged or cut short in its header", where=where, fix="Fetch the file again.") from None
    except ValueError as error:
        raise InputError(str(error), where=where, fix="Give a GGUF of Gemma 3.") from None
    spec = spec_from_gguf(metadata, where)
    layers, embed, vision, by_type = [0] * spec.layers, 0, 0, dict[str, int]()
    embed_type = "F16"
    for name, dims, kind in tensors:
        if kind not in TYPES:
            raise InputError(f"tensor {name} has the unknown type {kind}", where=where, fix="Use another quantization.")
        label, values, block = TYPES[kind]
        count = 1
        for dim in dims:
            count *= dim
        size = count // values * block
        by_type[label] = by_type.get(label, 0) + size
        parts = name.split(".")
        if parts[0] == "blk" and len(parts) > 1 and parts[1].isdigit() and int(parts[1]) < spec.layers:
            layers[int(parts[1])] += size
        elif parts[0] == "token_embd":
            embed, embed_type = size, label
        elif parts[0] in ("v", "mm"):
            vision += size
    if not embed or not all(layers):
        raise InputError("lacks tensors of some layers", where=where, fix="Fetch the file again.")
    total = size_of() if callable(size_of) else None
    whole = sum(by_type.values())
    basis = "the file's header"
    return ModelBytes(spec, embed, tuple(layers), by_type, total or whole, basis, embed_type, vision)


def _header(source: Source) -> tuple[dict[str, object], list[tuple[str, tuple[int, ...], int]]]:
    """(scalar metadata, [(name, dimensions, type number)])."""
    if source.read(4) != b"GGUF":
        raise ValueError("not a GGUF file")
    (version,) = _take(source, "<I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not known")
    n_tensors, n_values = _take(source, "<QQ")
    if n_tensors > 1 << 16 or n_values > 1 << 16:
        raise ValueError(f"claims {n_tensors} tensors and {n_values} values")
    metadata: dict[str, object] = {}
    for _ in range(n_values):
        key, (kind,) = _text(source), _take(source, "<I")
        if kind == _ARRAY:
            metadata[key] = range(_skip_array(source))
        else:
            metadata[key] = _text(source) if kind == _STRING else _take(source, "<" + _SCALARS[kind])[0]
    return metadata, list(_infos(source, n_tensors))


def _infos(source: Source, count: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for _ in range(count):
        name, (n_dims,) = _text(source), _take(source, "<I")
        if not 1 <= n_dims <= 4:
            raise ValueError(f"tensor {name!r} has {n_dims} dimensions")
        dims = _take(source, f"<{n_dims}Q")
        kind, _ = _take(source, "<IQ")
        yield name, dims, kind


def _take(source: Source, form: str) -> tuple[int, ...]:
    return struct.unpack(form, source.read(struct.calcsize(form)))


def _text(source: Source) -> str:
    (size,) = _take(source, "<Q")
    if size > 1 << 20:
        raise ValueError(f"holds a name of {size} bytes")
    return source.read(size).decode("utf-8")


def _skip_array(source: Source) -> int:
    """Step over an array; how many items it has."""
    (kind,), (count,) = _take(source, "<I"), _take(source, "<Q")
    if kind == _STRING:
        for _ in range(count):
            source.skip(*_take(source, "<Q"))
    elif kind in _SCALARS:
        source.skip(count * struct.calcsize("<" + _SCALARS[kind]))
    else:
        raise ValueError(f"holds an array of unknown type {kind}")
    return int(count)
