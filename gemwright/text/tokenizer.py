"""Text to token ids and back, built from the model file's own vocabulary, with llama.cpp's exact ids.

The vocabulary is SentencePiece BPE: characters are merged pair by pair, the best-scored piece first and the leftmost
of equals. A rank-of-pair BPE cannot express that ("aaa" can be made of "a"+"aa" or "aa"+"a", one score, two ranks), so
the merging is SentencePiece's own or one by its rule. Reference: llama.cpp `src/llama-vocab.cpp`,
`llm_tokenizer_spm_session`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gemwright.errors import InputError
from gemwright.text.pieces import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Encoder


class ModelWithTokenizer(Protocol):
    """What `Tokenizer.from_model` needs of a model file."""

    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...


class Tokenizer:
    """Gemma's tokenizer. Control tokens such as `<eos>` are never made from text: written in text they stay text."""

    def __init__(self, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> None:
        """`tokens`, `scores`, `types`: one entry per id, as in GGUF's `tokenizer.ggml.*`."""
        self._tokens = tokens
        self._types = types
        self._byte_of = {id_: int(tokens[id_][3:5], 16) for id_ in range(len(tokens)) if types[id_] == BYTE}
        self.encode = Encoder(tokens, scores, types)

    @classmethod
    def from_model(cls, model: ModelWithTokenizer) -> Tokenizer:
        """The tokenizer of an opened model: a GGUF's metadata, or `tokenizer.json` in a Hugging Face folder."""
        if model.path.is_dir():
            return cls.from_huggingface(model.path)
        return cls.from_gguf(model.metadata, where=model.path)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, where: object = None) -> Tokenizer:
        """Built from `tokenizer.ggml.*`; InputError where it is missing, inconsistent, or of another kind."""
        kind = metadata.get("tokenizer.ggml.model")
        if kind is None:
            raise InputError("the file holds no tokenizer", where=where, fix=_ANOTHER_FILE)
        if kind != "llama":
            raise InputError(f"tokenizer is {kind!r}, not SentencePiece ('llama')", where=where, fix=_ANOTHER_FILE)
        try:
            tokens = [str(text) for text in metadata["tokenizer.ggml.tokens"]]
            scores = [float(score) for score in metadata["tokenizer.ggml.scores"]]
            types = [int(kind) for kind in metadata["tokenizer.ggml.token_type"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"tokenizer metadata is damaged ({error})", where=where, fix=_ANOTHER_FILE) from error
        if metadata.get("tokenizer.ggml.add_space_prefix", True):
            raise InputError("tokenizer adds a leading space, Gemma's does not", where=where, fix=_ANOTHER_FILE)
        return cls._checked(tokens, scores, types, where)

    @classmethod
    def from_huggingface(cls, folder: Path) -> Tokenizer:
        """Built from `tokenizer.json`; Gemma's ids lie in order of score, which the file itself does not hold."""
        path = folder / "tokenizer.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            vocabulary: dict[str, int] = dict(content["model"]["vocab"])
            added = {int(entry["id"]): entry for entry in content.get("added_tokens", [])}
            tokens = _by_id(vocabulary, added)
            types = [_type_of(text, added.get(id_)) for id_, text in enumerate(tokens)]
        except FileNotFoundError:
            raise InputError("tokenizer.json is missing", where=folder, fix="Copy it from the same model.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a Gemma tokenizer ({error})", where=path, fix=_ANOTHER_FILE) from error
        tokens = [text.replace(SPACE, " ") if types[id_] == USER_DEFINED else text for id_, text in enumerate(tokens)]
        return cls._checked(tokens, [-float(id_) for id_ in range(len(tokens))], types, path)

    @classmethod
    def _checked(cls, tokens: list[str], scores: list[float], types: list[int], where: object) -> Tokenizer:
        if not len(tokens) == len(scores) == len(types):
            lengths = f"{len(tokens)} tokens, {len(scores)} scores, {len(types)} types"
            raise InputError(f"tokenizer is inconsistent: {lengths}", where=where, fix=_ANOTHER_FILE)
        in_bytes = {text for text, kind in zip(tokens, types, strict=True) if kind == BYTE}
        if in_bytes != {f"<0x{value:02X}>" for value in range(256)}:
            raise InputError("tokenizer lacks the 256 byte tokens", where=where, fix=_ANOTHER_FILE)
        try:
            return cls(tokens, scores, types)
        except ValueError as error:
            raise InputError(f"tokenizer cannot be used ({error})", where=where, fix=_ANOTHER_FILE) from error

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return len(self._tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control tokens have none, bytes that form no UTF-8 become U+FFFD."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")

    def bytes_of(self, id_: int) -> bytes:
        """What one token adds to the text, in UTF-8."""
        if not 0 <= id_ < len(self._tokens):
            raise InputError(f"token id {id_} is outside the vocabulary of {len(self._tokens)}")
        kind = self._types[id_]
        if kind == BYTE:
            return bytes([self._byte_of[id_]])
        if kind in (CONTROL, UNKNOWN):
            return b""
        text = self._tokens[id_]
        return (text if kind == USER_DEFINED else text.replace(SPACE, " ")).encode("utf-8")

    def piece(self, id_: int) -> str:
        """How the vocabulary writes one token (`<bos>`, `<0xF0>`), but spaces as spaces."""
        text = self._tokens[id_]
        return text.replace(SPACE, " ") if self._types[id_] == NORMAL else text

    def is_text(self, id_: int) -> bool:
        """Whether a token is characters of text: no control token and no single byte."""
        return self._types[id_] in (NORMAL, USER_DEFINED)

    def stream(self) -> StreamDecoder:
        """A decoder to feed one id at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns ids into text as they come and never hands out part of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id_: int) -> str:
        """The text that is complete with this id; "" while a character is still unfinished."""
        return self._utf8.decode(self._tokenizer.bytes_of(id_))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else ""."""
        return self._utf8.decode(b"", final=True)


_ANOTHER_FILE = "Take the model file of a Gemma 3 model."


def _by_id(vocabulary: Mapping[str, int], added: Mapping[int, Any]) -> list[str]:
    texts = {id_: text for text, id_ in vocabulary.items()} | {id_: entry["content"] for id_, entry in added.items()}
    return [texts[id_] for id_ in range(len(texts))]


def _type_of(text: str, added: Mapping[str, Any] | None) -> int:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return BYTE
    if added is None:
        return NORMAL
    return CONTROL if added["special"] or text.startswith("<unused") else USER_DEFINED
