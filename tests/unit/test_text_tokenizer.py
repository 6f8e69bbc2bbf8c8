"""The tokenizer on a small vocabulary: merging, bytes, control tokens, streaming, damaged files."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.errors import InputError
from gemwright.text.pieces import Encoder
from gemwright.text.tokenizer import BYTE, CONTROL, NORMAL, SPACE, USER_DEFINED, Tokenizer

CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>"]
USER = ["\n", "\n\n", "  ", "   ", "<td>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]
# In order of score: "aa" before "aaa" before "ab"; "a b" crosses a space; single characters come last.
PIECES = ["aa", "aaa", "ab", f"{SPACE}a", f">{SPACE}<", "aab", "hel", "lo", *"abhelo<>td/us", SPACE, "п", "漢"]


def metadata() -> dict[str, Any]:
    tokens = CONTROLS + USER + BYTES + PIECES
    types = [CONTROL] * len(CONTROLS) + [USER_DEFINED] * len(USER) + [BYTE] * 256 + [NORMAL] * len(PIECES)
    scores = [-1000.0] * (len(tokens) - len(PIECES)) + [-float(rank) for rank in range(len(PIECES))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": False,
    }


TOKENIZER = Tokenizer.from_gguf(metadata())
TOKENS = metadata()["tokenizer.ggml.tokens"]


def pieces(text: str) -> list[str]:
    return [TOKENS[id_] for id_ in TOKENIZER.encode(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("aab", ["aab"]),
        ("aaab", ["aaa", "b"]),
        ("aaaaa", ["aa", "aaa"]),  # aa aa a: of two equal-scored ways to "aaa" only the one that exists
        ("hello", ["h", "e", "l", "lo"]),  # "hel" cannot be reached by pairs
        ("a a", ["a", f"{SPACE}a"]),
        ("> <", [">", SPACE, "<"]),  # crosses a space, but its halves are not pieces
        ("a\n\n\na", ["a", "\n\n", "\n", "a"]),
        ("a    a", ["a", "   ", f"{SPACE}a"]),
        ("<td>", ["<td>"]),
        ("é", ["<0xC3>", "<0xA9>"]),
        ("\x00", ["<0x00>"]),
        ("<eos>", ["<", "e", "o", "s", ">"]),
        ("漢п", ["漢", "п"]),
    ],
)
def test_encode(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


def test_leftmost_of_equal_scores_is_merged_first() -> None:
    tokens, types = [*BYTES, "aa", "a"], [BYTE] * 256 + [NORMAL] * 2
    tokenizer = Tokenizer(tokens, [-float(id_) for id_ in range(258)], types)
    assert [tokens[id_] for id_ in tokenizer.encode("aaaaa")] == ["aa", "aa", "a"]


def merged(text: str) -> list[int]:
    """llama.cpp's rule in its plainest words: user-defined tokens first, then the best pair, the leftmost of equals."""
    defined = re.compile("|".join(map(re.escape, sorted(USER, key=len, reverse=True))))
    ids: list[int] = []
    start = 0
    for found in [*defined.finditer(text), None]:
        parts = list(text[start : found.start() if found else len(text)].replace(" ", SPACE))
        while pairs := [(PIECES.index(a + b), at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in PIECES]:
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        for part in parts:
            ids += (
                [TOKENS.index(part, -len(PIECES))]
                if part in PIECES
                else [TOKENS.index(BYTES[b]) for b in part.encode()]
            )
        if found:
            ids.append(TOKENS.index(found.group()))
            start = found.end()
    return ids


def hastened(encode: Encoder) -> Encoder:
    """A copy that has seen much text."""
    copy: Encoder = pickle.loads(pickle.dumps(encode))
    copy.hasten()
    return copy


QUICK = hastened(TOKENIZER.encode)


@given(st.text(alphabet="ab \n<>td/hel1п漢▁é") | st.text())
def test_ids_are_those_of_the_plain_rule_however_much_was_encoded_before(text: str) -> None:
    assert QUICK(text) == TOKENIZER.encode(text) == merged(text)


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[list[str], list[str], list[str]]:
    """Characters, user-defined pieces, and those of several characters in order of score."""
    signs = draw(st.lists(st.sampled_from("abcd01<>/.\n\t é漢😀п\u200d\ue000"), min_size=2, unique=True))
    some = st.text(alphabet=signs, min_size=1, max_size=5)
    defined = draw(st.lists(some, max_size=4, unique=True))
    longer = draw(st.lists(some.filter(lambda text: len(text) > 1 and text not in defined), max_size=20, unique=True))
    return [sign for sign in signs if sign not in defined], defined, longer


@settings(max_examples=300)
@given(vocabularies(), st.data())
def test_both_ways_give_the_same_ids_for_any_vocabulary(
    vocabulary: tuple[list[str], list[str], list[str]], data: st.DataObject
) -> None:
    signs, defined, longer = vocabulary
    normal = [text.replace(" ", SPACE) for text in (*longer, *signs)]
    scores = [*(-1000.0 for _ in (*CONTROLS, *defined, *BYTES)), *(-float(rank) for rank in range(len(normal)))]
    types = [CONTROL] * len(CONTROLS) + [USER_DEFINED] * len(defined) + [BYTE] * 256 + [NORMAL] * len(normal)
    encode = Encoder([*CONTROLS, *defined, *BYTES, *normal], scores, types)
    quick = hastened(encode)
    parts = st.lists(st.sampled_from([*signs, *defined, *longer, " ", "x", "é"])).map("".join)
    for text in data.draw(st.lists(parts | st.text(), max_size=10)):
        assert quick(text) == encode(text)
        assert quick(text * 40) == encode(text * 40)


def test_much_text_is_reason_to_hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemwright.text.pieces._WHEN_QUICK", 10)
    encode: Encoder = pickle.loads(pickle.dumps(TOKENIZER.encode))
    for length, quick in ((10, False), (1, True)):
        encode("a" * length)
        assert bool(encode._quick) is quick


def test_what_quick_encoding_cannot_merge_is_left_to_sentencepiece() -> None:
    assert QUICK._quick and sorted(QUICK._quick._left_out) == ["> <", "hel"]  # across a space; not reached by pairs
    for encode in (QUICK, pickle.loads(pickle.dumps(QUICK))):
        assert encode._quick and [TOKENS[id_] for id_ in encode("hel > <")] == ["h", "e", "l", SPACE, ">", SPACE, "<"]


@pytest.mark.parametrize(
    ("pieces", "scores"),
    [
        (["ab", "ba", "a", "b"], [0, 0, -1, -2]),
        (["ab", "a"], [0, -1]),
        ([*map("a".ljust, range(2, 50)), "a"], range(49)),
    ],
    ids=["equal scores", "a character that is no piece", "many pieces across spaces"],
)
def test_some_vocabularies_stay_with_sentencepiece(pieces: list[str], scores: Sequence[float]) -> None:
    pieces = [piece.replace(" ", SPACE) for piece in pieces]
    encode = Encoder([*BYTES, *pieces], [*[-9.0] * 256, *scores], [BYTE] * 256 + [NORMAL] * len(pieces))
    quick = hastened(encode)
    assert quick._quick is None and quick("bab") == encode("bab")


@pytest.mark.parametrize("control", CONTROLS)
def test_control_tokens_are_never_made_from_text(control: str) -> None:
    assert TOKENS.index(control) not in TOKENIZER.encode(f"a{control}a {control}\n{control}")


@pytest.mark.parametrize("encode", [TOKENIZER.encode, QUICK])
def test_half_a_surrogate_pair_is_refused(encode: Encoder) -> None:
    with pytest.raises(InputError, match=r"U\+D83D"):
        encode("a\ud83d")


@given(st.text() | st.text(alphabet="ab \n<>tdh\u2028é漢😀"))
def test_decode_gives_the_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text.replace(SPACE, " ")


@given(st.lists(st.integers(0, len(TOKENS) - 1)))
def test_stream_equals_decode(ids: list[int]) -> None:
    stream = TOKENIZER.stream()
    assert "".join([*map(stream.feed, ids), stream.flush()]) == TOKENIZER.decode(ids)


def test_stream_never_splits_a_character() -> None:
    stream = TOKENIZER.stream()
    assert [stream.feed(id_) for id_ in TOKENIZER.encode("😀a")] == ["", "", "", "😀", "a"]
    assert stream.flush() == ""


def test_decode_of_bytes_that_are_no_text() -> None:
    ids = [TOKENS.index("<0xF0>"), TOKENS.index("<0x9F>"), TOKENS.index("a"), TOKENS.index("<0xFF>")]
    assert TOKENIZER.decode([*ids, TOKENS.index("<eos>")]) == "\ufffda\ufffd"
    with pytest.raises(InputError, match="outside the vocabulary"):
        TOKENIZER.decode([len(TOKENS)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": None}, "no tokenizer"),
        ({"tokenizer.ggml.model": "gpt2"}, "not SentencePiece"),
        ({"tokenizer.ggml.scores": [0.0]}, "inconsistent"),
        ({"tokenizer.ggml.scores": ["x"]}, "damaged"),
        ({"tokenizer.ggml.add_space_prefix": True}, "leading space"),
        ({"tokenizer.ggml.token_type": [NORMAL] * len(TOKENS)}, "byte tokens"),
    ],
)
def test_unusable_metadata_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tokenizer.from_gguf(metadata() | change)


def huggingface_json() -> dict[str, Any]:
    """As Gemma's file is: runs of spaces are written with the sign for a space, `<unused0>` is not called special."""
    added = [
        {"id": id_, "content": text.replace(" ", SPACE), "special": text in CONTROLS[:4]}
        for id_, text in enumerate(CONTROLS + USER)
    ]
    vocabulary = {text.replace(" ", SPACE): id_ for id_, text in enumerate(TOKENS)}
    return {"added_tokens": added, "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}


@given(st.text(alphabet="ab \n<>tdheloun0s/é"))
def test_huggingface_folder_gives_the_same_ids(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "hf"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(huggingface_json()), encoding="utf-8")
    tokenizer = Tokenizer.from_model(SimpleNamespace(path=folder, metadata={}))
    for sample in (text, "<eos><unused0>a   a"):
        assert tokenizer.encode(sample) == TOKENIZER.encode(sample)


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"model": {"vocab": {"a": 5}}}', '{"model": {"vocab": {"a": 0}}}']
)
def test_unusable_huggingface_folder_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.from_huggingface(tmp_path)
