"""The tokenizer's ids are llama.cpp's, without one difference, on the real vocabulary."""

from __future__ import annotations

import argparse
import ast
import http.client
import inspect
import json
import random
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import babel
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemwright.text.chat import render_prompt
from gemwright.text.tokenizer import Tokenizer
from gemwright.weights.gguf_reader import open_gguf

Tokenize = Callable[..., list[int]]
UNUSUAL = [
    *(" ", "\n", "\t", "\r", "\r\n", "\x00", "\x01", "\x7f", "\u00a0", "\u202f", "\u2028", "\ufeff", "▁", "\u200d"),
    *(
        "a",
        "aa",
        "aaa",
        "-",
        "--",
        "=",
        "0",
        "00",
        ".",
        "#",
        "e",
        "é",
        "e\u0301",
        "б",
        "漢",
        "ก",
        "้",
        "😀",
        "👨‍👩‍👧",
        "\ufe0f",
    ),
    *("<", ">", "/", "<td>", "</td>", "<tr", "table>", ">▁</", "> </", "[multimodal]", "<start_of_image>", "<unused5>"),
    *("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "user\n", "<0x41>", "\U0010ffff", "\ue000", "\ufffd"),
]


@pytest.fixture(scope="module")
def llamacpp(real_model: Path) -> Iterator[Tokenize]:
    """llama.cpp's own tokenizer, asked through the server of the wheel."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(real_model)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 64, 1, False
    server = xllamacpp.Server(parameters)
    connection = http.client.HTTPConnection(server.listening_address.removeprefix("http://"))

    def tokenize(text: str, special: bool = False) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": special}
        try:
            return ask(body)
        except ConnectionError:  # it hangs up after some idle seconds, which making tables may take
            connection.close()
            return ask(body)

    def ask(body: dict[str, Any]) -> list[int]:
        connection.request("POST", "/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"})
        tokens: list[int] = json.load(connection.getresponse())["tokens"]
        return tokens

    yield tokenize
    connection.close()


@pytest.fixture(scope="module", params=["at first", "after much text"])
def tokenizer(request: pytest.FixtureRequest, real_model: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_model(open_gguf(real_model))
    if request.param == "after much text":
        tokenizer.encode.hasten()
        assert tokenizer.encode._quick
    return tokenizer


def assert_same(tokenizer: Tokenizer, llamacpp: Tokenize, texts: list[str]) -> None:
    different = [text for text in texts if tokenizer.encode(text) != llamacpp(text)]
    assert not different, f"{len(different)} of {len(texts)} differ, first {different[0]!r}"


def test_names_in_every_locale(tokenizer: Tokenizer, llamacpp: Tokenize) -> None:
    texts = []
    for identifier in babel.localedata.locale_identifiers():
        locale = babel.Locale.parse(identifier)
        names = [*locale.territories.values(), *locale.languages.values(), *locale.currencies.values()]
        texts.append(f"{locale.display_name}: {', '.join(map(str, names[:: 1 if len(identifier) == 2 else 9]))}\n")
    assert_same(tokenizer, llamacpp, texts)


def test_every_character(tokenizer: Tokenizer, llamacpp: Tokenize) -> None:
    assigned = [chr(point) for point in range(0x110000) if unicodedata.category(chr(point)) not in ("Cs", "Cn", "Co")]
    texts = ["".join(assigned[at : at + 256]) for at in range(0, len(assigned), 256)]
    assert_same(tokenizer, llamacpp, [*texts, *(" ".join(text[:64]) for text in texts)])


def test_code(tokenizer: Tokenizer, llamacpp: Tokenize) -> None:
    assert_same(tokenizer, llamacpp, [inspect.getsource(module) for module in (argparse, ast, textwrap, http.client)])


def test_pieces_in_random_order(tokenizer: Tokenizer, llamacpp: Tokenize) -> None:
    rng = random.Random(0)
    texts = [
        tokenizer.decode(rng.choices(range(tokenizer.vocab_size), k=12)).replace("\ufffd", "") for _ in range(3000)
    ]
    assert_same(tokenizer, llamacpp, texts)


def test_pieces_of_letters_and_signs_in_all_company(tokenizer: Tokenizer, llamacpp: Tokenize) -> None:
    """Those that may reach from one word into the next, and emoji of several characters."""
    pieces = {tokenizer.decode([id_]).strip() for id_ in range(tokenizer.vocab_size) if tokenizer.is_text(id_)}
    mixed = sorted(piece for piece in pieces if any(map(str.isalnum, piece)) and not piece.isalnum())
    signs = sorted(piece for piece in pieces if len(piece) > 1 and not any(map(str.isalnum, piece)))
    emoji = ["👩‍🚀", "🏳️‍🌈", "👍🏽", "🇺🇦", "1️⃣", "❤️", "👨‍👩‍👧‍👦", "☎️", "󠁧"]
    rng = random.Random(2)
    some = [*rng.sample(mixed, 2500), *rng.sample(signs, 1500), *emoji]
    around = ("", " ", "  ", "a", "я", "1", ".", "> ", "\n", "漢", "(", "۔", "\u200d")
    assert_same(tokenizer, llamacpp, [f"{rng.choice(around)}{piece}{rng.choice(around)}{piece} b" for piece in some])


def test_runs_of_unusual_text(tokenizer: Tokenizer, llamacpp: Tokenize) -> None:
    rng = random.Random(1)
    texts = []
    for _ in range(6000):
        few = rng.sample(UNUSUAL, rng.choice((1, 2, 3, len(UNUSUAL))))
        texts.append("".join(rng.choice(few) * rng.randint(1, rng.choice((2, 80))) for _ in range(rng.randint(1, 12))))
    assert_same(tokenizer, llamacpp, texts)


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.lists(st.sampled_from(UNUSUAL) | st.characters(codec="utf-8")).map("".join))
def test_any_text(tokenizer: Tokenizer, llamacpp: Tokenize, text: str) -> None:
    assert tokenizer.encode(text) == llamacpp(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_chat_template(tokenizer: Tokenizer, llamacpp: Tokenize) -> None:
    prompt = render_prompt(
        [
            {"role": "system", "content": "Отвечай кратко."},
            {"role": "user", "content": "  Hello,\n\n  world "},
            {"role": "assistant", "content": "Привет!"},
            {"role": "user", "content": "日付は？"},
        ],
        tokenizer.encode,
    )
    rendered = (
        "<bos><start_of_turn>user\nОтвечай кратко.\n\nHello,\n\n  world<end_of_turn>\n<start_of_turn>model\nПривет!"
        "<end_of_turn>\n<start_of_turn>user\n日付は？<end_of_turn>\n<start_of_turn>model\n"
    )
    assert prompt == llamacpp(rendered, special=True)
