"""Look-alike letters: what is a mistake is found and repaired, what people mix on purpose is left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemwright.text.scripts import lookalikes, repaired

MEANT = """T-shirt в магазине|iPhone и iPad|USB-кабель|Wi-Fi сеть|5 км и 10 µm|10 μm|Δx → 0
α-helix|β-блокаторы|sinα|cosβ|日本語カタカナひらがなABC|東京tower|GitHubа больше нет, мы ушли
iPhoneов нет|SMSка пришла|PDFки лежат|VIPы|в 3D-печать|ΔT = 5|λx.x|Ωm|кВт|МэВ
pH раствора|π-электроны|Ваня and Masha|ДНКаза|e-mail|IT-шник|C++ и C#|x² + y²
Ленін і Україна|мій їжак|Ђорђе|σπίτι|Ελλάδα|naïve café|Straße|Łódź|Việt Nam|kΩ|ЭВМ
ATP-аза|Р2Р|ξ-function|x-координата|хэш SHA|μTorrent|LaTeX-документ|εxy|dα|dx/dt
αβγ-filter|за́мок и замо́к|10 кОм|H₂O и СО₂|Ёлка и ёж|한국어 text|नमस्ते world
שלום world|E = mc²"""

MIXED = [
    ("\u041fp\u0438\u0432e\u0442", "\u041f\u0440\u0438\u0432\u0435\u0442"),  # Привет with Latin p, e
    ("p\u0440\u0438\u0432\u0435\u0442", "\u043f\u0440\u0438\u0432\u0435\u0442"),  # привет with Latin p for п
    ("C\u043a\u043e\u0440\u043e\u0441\u0442\u044c", "\u0421\u043a\u043e\u0440\u043e\u0441\u0442\u044c"),  # Скорость
    ("\u0432o\u0434a", "\u0432\u043e\u0434\u0430"),  # вода
    ("\u043da\u0443\u043aa", "\u043d\u0430\u0443\u043a\u0430"),  # наука
    ("CHE\u0413", "\u0421\u041d\u0415\u0413"),  # СНЕГ
    ("\u0435\u0449\u00eb", "\u0435\u0449\u0451"),  # ещё with Latin e diaeresis
    ("\u041ai\u0457\u0432", "\u041a\u0456\u0457\u0432"),  # Київ... with Latin i
    ("\u0430pple pie", "apple pie"),  # Cyrillic а
    ("p\u0430yp\u0430l account", "paypal account"),
    ("microsoft \u043effice", "microsoft office"),
    ("\u0397ello world", "Hello world"),  # Greek Eta
    ("\u0395\u03bb\u03bb\u03ac\u03b4a", "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1"),  # Ελλάδα with Latin a
    ("\u0434\u03bf\u043c", "\u0434\u043e\u043c"),  # дом with Greek omicron
]  # fmt: skip


@pytest.mark.parametrize("text", [text for line in MEANT.splitlines() for text in line.split("|")])
def test_what_is_meant_is_left_alone(text: str) -> None:
    assert list(lookalikes(text)) == [] and repaired(text) == text


@pytest.mark.parametrize(("text", "meant"), MIXED)
def test_what_is_mixed_is_repaired(text: str, meant: str) -> None:
    assert repaired(f"<{text}>, 1.") == f"<{meant}>, 1."
    assert list(lookalikes(meant)) == []


def test_place_word_and_script() -> None:
    text = "\u043e\u0434\u0438\u043d \u0434\u0432a \u0442p\u0438"
    first, second = lookalikes(text)
    assert (first.start, first.word, first.repaired, first.script) == (
        5,
        "\u0434\u0432a",
        "\u0434\u0432\u0430",
        "Cyrillic",
    )
    assert (first.odd, second.odd) == ("Latin a", "Latin p")
    assert text[second.start : second.start + len(second.word)] == second.word


LETTERS = st.text(alphabet="aeopcxABTabиеокДжαοΔλ -'\u0301日1", max_size=30)


@given(LETTERS)
def test_repair_is_whole_and_final(text: str) -> None:
    found = list(lookalikes(text))
    mended = repaired(text)
    assert len(mended) == len(text) and repaired(mended) == mended
    assert (mended != text) == bool(found)
    inside = {at for word in found for at in range(word.start, word.start + len(word.word))}
    assert all(text[at] == mended[at] for at in range(len(text)) if at not in inside)


@given(
    st.text(alphabet="абвгдежзийклмнопрстуфхцчшщъыьэюяёії ", max_size=40) | st.text(alphabet="abcxyzé ", max_size=40)
)
def test_one_script_alone_is_never_found(text: str) -> None:
    assert list(lookalikes(text)) == []
