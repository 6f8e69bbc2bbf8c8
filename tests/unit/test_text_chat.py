"""The chat template against a Jinja rendering of the published one, and the labels of a training example."""

from __future__ import annotations

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemwright.errors import InputError
from gemwright.spec import BOS, END_OF_TURN, EOS, START_OF_TURN
from gemwright.text.chat import Message, TrainOn, encode_example, render_prompt

# The text part of Gemma 3's published template.
TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}"""
MARKERS = {"<bos>": BOS, "<start_of_turn>": START_OF_TURN, "<end_of_turn>": END_OF_TURN}
TEXTS = st.text(alphabet="ab \n\tп漢\u00a0", max_size=12)


def encode(text: str) -> list[int]:
    """One id per character, but a run of newlines is one, as in Gemma."""
    ids: list[int] = []
    for char in text:
        if char == "\n" and ids and ids[-1] >= 2_000_000:
            ids[-1] += 1
        else:
            ids.append(2_000_000 if char == "\n" else 1000 + ord(char))
    return ids


def encode_rendered(text: str) -> list[int]:
    """What a tokenizer that knows the markers makes of the rendered template."""
    for marker in MARKERS:
        text = text.replace(marker, f"\0{marker}\0")
    return [id_ for part in text.split("\0") for id_ in ([MARKERS[part]] if part in MARKERS else encode(part))]


def official(messages: list[dict[str, str]], prompt: bool) -> list[int]:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    return encode_rendered(template.render(messages=messages, bos_token="<bos>", add_generation_prompt=prompt))


def conversation(texts: list[str], system: str | None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@given(st.lists(TEXTS, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1), TEXTS | st.none())
def test_prompt_equals_the_published_template(texts: list[str], system: str | None) -> None:
    messages = conversation(texts, system)
    assert render_prompt(messages, encode) == official(messages, prompt=True)


@given(st.lists(TEXTS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0), TEXTS | st.none())
def test_example_equals_the_published_template(texts: list[str], system: str | None) -> None:
    messages = conversation(texts, system)
    ids, labelled = encode_example(messages, encode)
    assert ids + encode("\n") == official(messages, prompt=False)
    assert len(ids) == len(labelled)
    prompt = render_prompt(messages[:-1], encode)
    assert ids[: len(prompt)] == prompt
    assert [i for i, learn in zip(ids, labelled, strict=True) if learn][-1] == END_OF_TURN


@pytest.mark.parametrize(
    ("train_on", "learned"),
    [("model", [*"bd"]), ("last", [*"d"]), ("all", [*"abcd"])],
)
def test_targets_are_text_and_its_end(train_on: TrainOn, learned: list[str]) -> None:
    messages = [Message(role, text) for role, text in zip(("user", "model") * 2, "abcd", strict=True)]
    ids, labelled = encode_example(messages, encode, train_on)
    expected = [id_ for text in learned for id_ in (*encode(text), END_OF_TURN)]
    assert [id_ for id_, learn in zip(ids, labelled, strict=True) if learn] == expected


def test_what_follows_the_last_target_is_left_out() -> None:
    messages = [Message("user", "a"), Message("model", "b"), Message("user", "c")]
    ids, labelled = encode_example(messages, encode)
    assert ids[-1] == END_OF_TURN and labelled[-1]
    assert ids == encode_example(messages[:2], encode)[0]


def test_markers_in_text_stay_text() -> None:
    ids = render_prompt([Message("user", "<end_of_turn>\n<start_of_turn>model")], encode)
    assert [ids.count(marker) for marker in MARKERS.values()] == [1, 2, 1]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("", "no user turn"),
        ("system", "no user turn"),
        ("model", "role 'model' where 'user' belongs"),
        ("user user", "turn 2 has role 'user'"),
        ("user system", "turn 2 has role 'system'"),
        ("user model tool", "turn 3 has role 'tool'"),
        ("user model", "ends with the model's turn"),
    ],
)
def test_wrong_roles_are_refused(roles: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render_prompt([Message(role, "x") for role in roles.split()], encode)


def test_an_example_without_an_answer_is_refused() -> None:
    with pytest.raises(InputError, match="no model turn"):
        encode_example([Message("user", "x")], encode)


def test_plain_text_is_learned_whole() -> None:
    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    for role, end in (("document", [EOS]), ("passage", [])):
        ids, labelled = encode_example([{"role": role, "content": "ab"}], encode)
        assert ids == [BOS, ord("a"), ord("b"), *end]
        assert labelled == [False] + [True] * (2 + len(end))
    with pytest.raises(InputError, match="role 'document'"):
        encode_example([{"role": "document", "content": "a"}, {"role": "model", "content": "b"}], encode)
