"""Gemma 3's chat template as token ids, and which of them a fine-tune learns.

Markers are placed as ids and text is encoded apart from them, so `<end_of_turn>` typed by a user stays text.
Source: `chat_template` in the `tokenizer_config.json` published with Gemma 3 (instruction-tuned).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from gemwright.errors import InputError
from gemwright.spec import BOS, END_OF_TURN, EOS, START_OF_TURN

Encode = Callable[[str], list[int]]
TrainOn = Literal["all", "model", "last"]
TEMPLATE: Final = "gemma3/1"  # another for every change of the ids or labels that a conversation has
MODEL_ROLES: Final = ("model", "assistant")
PLAIN_ROLES: Final = ("document", "passage")


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system (first only), user, or model (also called assistant).

    Alone, it may also be plain text: a document, or a passage of one that goes on.
    """

    role: str
    content: str


def render_prompt(messages: Sequence[Message | Mapping[str, str]], encode: Encode) -> list[int]:
    """Ids of a conversation that the model is to continue: BOS, the turns, and an open model turn.

    InputError where the roles do not alternate or the last turn is the model's.
    """
    turns = _turns(messages)
    if turns[-1].role == "model":
        raise InputError("the conversation ends with the model's turn", fix="End it with a user message.")
    ids = [BOS]
    for turn in turns:
        ids += [START_OF_TURN, *encode(f"{turn.role}\n{turn.content}"), END_OF_TURN, *encode("\n")]
    return [*ids, START_OF_TURN, *encode("model\n")]


def encode_example(
    messages: Sequence[Message | Mapping[str, str]], encode: Encode, train_on: TrainOn = "model"
) -> tuple[list[int], list[bool]]:
    """A training example: ids, and True for each that is a target (text of a turn and its `<end_of_turn>`).

    `train_on`: targets are the model's turns, only the last of them, or all turns. What follows the last target is
    left out. InputError where the roles do not alternate or nothing is a target. Plain text has no turns: BOS, then
    all of it is a target, and EOS where the document ends.
    """
    if len(messages) == 1 and (plain := _message(messages[0])).role in PLAIN_ROLES:
        text = [*encode(plain.content), *([EOS] if plain.role == "document" else [])]
        return [BOS, *text], [False] + [True] * len(text)
    turns = _turns(messages)
    learned = _learned(turns, train_on)
    if not learned:
        raise InputError("the conversation has no model turn", fix="Add the answer that is to be learned.")
    newline = encode("\n")
    ids, labelled = [BOS], [False]
    for index, turn in enumerate(turns[: max(learned) + 1]):
        header = encode(f"{turn.role}\n")
        text = encode(f"{turn.role}\n{turn.content}")
        target = index in learned
        # Newlines that begin a system text join the header's newline into one token, which is then a target too.
        before = len(header) if text[: len(header)] == header else len(header) - 1
        ids += [START_OF_TURN, *text, END_OF_TURN, *newline]
        labelled += [False] * (1 + before) + [target] * (len(text) - before + 1) + [False] * len(newline)
    end = len(ids) - len(newline)
    return ids[:end], labelled[:end]


def _learned(turns: Sequence[Message], train_on: TrainOn) -> list[int]:
    by_model = [index for index, turn in enumerate(turns) if turn.role == "model"]
    if train_on == "all":
        return list(range(len(turns)))
    return by_model if train_on == "model" else by_model[-1:]


def _message(message: Message | Mapping[str, str]) -> Message:
    return message if isinstance(message, Message) else Message(message["role"], message["content"])


def _turns(messages: Sequence[Message | Mapping[str, str]]) -> list[Message]:
    """The turns as they are written: system text inside the first user turn, roles user and model, text trimmed."""
    turns = [_message(message) for message in messages]
    prefix = ""
    if turns and turns[0].role == "system":
        prefix = turns.pop(0).content + "\n\n"
    if not turns:
        raise InputError("the conversation has no user turn", fix="Begin with a user message.")
    written = []
    for index, turn in enumerate(turns):
        wanted = ("user",) if index % 2 == 0 else MODEL_ROLES
        if turn.role not in wanted:
            raise InputError(
                f"turn {index + 1} has role {turn.role!r} where {wanted[0]!r} belongs",
                fix="Alternate user and model, a system message only at the start.",
            )
        written.append(Message(wanted[0], (prefix if index == 0 else "") + turn.content.strip()))
    return written
