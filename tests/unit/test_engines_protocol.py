"""Sampling rules, the scripted engine, opening by name, and a conversation within its context."""

from pathlib import Path

import pytest

from gemwright.engines.open import open_engine
from gemwright.engines.protocol import Engine, Sampling
from gemwright.engines.scripted import Scripted
from gemwright.engines.session import Chat, run_prompt
from gemwright.errors import InputError
from gemwright.spec import BOS, END_OF_TURN, START_OF_TURN


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_an_impossible_sampling_names_the_value(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        Sampling(**{name: value})


def test_a_prompt_is_a_turn_or_raw() -> None:
    engine: Engine = Scripted(["Hello there"])
    heard: list[str] = []
    answer = run_prompt(engine, "hi", sampling=Sampling(), on_text=heard.append)
    assert (answer.text, "".join(heard), answer.stop_reason) == ("Hello there", "Hello there", "stop")
    run_prompt(engine, "hi", raw=True, sampling=Sampling())
    turn, raw = engine.prompts
    assert turn[:2] == [BOS, START_OF_TURN] and END_OF_TURN in turn
    assert raw == [BOS, *engine.encode("hi")]


def test_a_chat_remembers_and_resets() -> None:
    engine = Scripted(["one", "two", "three"])
    chat = Chat(engine, Sampling(), system="Be brief.")
    chat.say("first")
    chat.say("second")
    assert [message.content for message in chat.messages] == ["first", "one", "second", "two"]
    assert engine.prompts[1][: len(engine.prompts[0])] == engine.prompts[0], "the prefix stays, so the cache holds"
    chat.reset()
    chat.say("again")
    assert len(chat.messages) == 2
    assert engine.prompts[2][:14] == engine.prompts[0][:14], "the system text is still there"


def test_a_chat_that_outgrows_its_context_drops_the_oldest_turns_aloud() -> None:
    notes: list[str] = []
    engine = Scripted(["short"], context=200)
    chat = Chat(engine, Sampling(max_tokens=8), note=notes.append)
    for _ in range(6):
        chat.say("a message of thirty characters")
    assert notes and "left out" in notes[0]
    assert all(len(prompt) <= 192 for prompt in engine.prompts)
    assert len(chat.messages) == 12, "the history itself is whole"
    with pytest.raises(InputError, match="tokens"):
        chat.say("x" * 500)
    assert len(chat.messages) == 12, "a message that failed is not kept"


def test_a_cancelled_answer_keeps_what_was_said() -> None:
    def interrupt(text: str) -> None:
        if text.strip() == "two":
            raise KeyboardInterrupt

    chat = Chat(Scripted(["one two three"]), Sampling())
    answer = chat.say("count", interrupt)
    assert (answer.stop_reason, chat.messages[-1].content) == ("cancelled", "one two")


def test_an_unknown_engine_or_context_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not known"):
        open_engine(tmp_path / "x.gguf", engine="other")
    with pytest.raises(InputError, match="context"):
        open_engine(tmp_path / "x.gguf", context=1)
