"""Letters of another script that look like the ones around them: Latin, Cyrillic and Greek inside one word.

Rules: Unicode UTS #39 (mixed-script detection, section 5.1; confusables, section 4). Letters that science, units and
inflected foreign names mix on purpose are left alone: a word counts only where its odd letters all have a double.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import regex

Script = Literal["Latin", "Cyrillic", "Greek"]

# From Unicode's confusables.txt (security/confusables), the letters of these three scripts in everyday use. A row is
# Latin, Cyrillic, Greek, with "-" where a script has no double. Small k, m, t and b are doubles of capitals' forms.
_DOUBLES: Final = """
AАΑ BВΒ CС- EЕΕ HНΗ IІΙ JЈ- KКΚ MМΜ NNΝ OОΟ PРΡ SЅ- TТΤ XХΧ YУΥ ZZΖ
aа- cс- eе- iі- jј- oоο pр- sѕ- xх- yу- ёё- ëё- ËЁ- ïї- ÏЇ- hһ- VѴ- vѵ- WԜ- wԝ- QԚ- qԛ- dԁ-
-ГΓ -ПΠ -ФΦ
"""
_INTO_CYRILLIC_ONLY: Final = {"k": "к", "m": "м", "t": "т"}
_INTO_GREEK_ONLY: Final = {"a": "α", "i": "ι", "k": "κ", "p": "ρ", "t": "τ", "u": "υ", "v": "ν", "x": "χ", "y": "γ"}
_INTO_GREEK_ONLY_CYRILLIC: Final = {"а": "α", "р": "ρ", "к": "κ", "т": "τ", "х": "χ", "і": "ι", "у": "γ"}
_INTO_CYRILLIC_ONLY_GREEK: Final = {"α": "а", "ρ": "р", "κ": "к", "τ": "т", "χ": "х", "ι": "і", "π": "п", "υ": "и"}
# Letters that only old or rare alphabets use: offered by the table, but no proof that a word is of that script.
_RARE: Final = frozenset("һѵѴԜԝԚԛԁ")

_SCRIPTS: Final[tuple[Script, ...]] = ("Latin", "Cyrillic", "Greek")
_LETTER: Final = {script: regex.compile(rf"\p{{Script={script}}}") for script in _SCRIPTS}
_LATIN: Final = "A-Za-z\u00c0-\u024f"
_GREEK: Final = "\u0370-\u03ff\u1f00-\u1fff"
_CYRILLIC: Final = "\u0400-\u052f"
_OTHER: Final = _GREEK + _CYRILLIC


def _borders(letters: str, others: str) -> re.Pattern[str]:
    """One of `letters` beside one of `others`, or Greek beside Cyrillic; a stress mark may stand between.

    One set of characters comes first and all conditions look back on it: only so does `re` search quickly.
    """
    pairs = ((letters, others), (_GREEK, _CYRILLIC), (_CYRILLIC, _GREEK))
    wanted = [pair for pair in pairs if pair[0] in letters + _GREEK]
    sides = [f"(?<=[{a}])(?=\u0301?[{b}])|(?<=[{b}\u0301][{a}])" for a, b in wanted]
    return re.compile(f"[{letters}{_GREEK}](?:{'|'.join(sides)})")


# The same borders, sought from the side that a text has fewer of: ten times as fast.
_FROM_LATIN: Final = _borders(_LATIN, _OTHER)
_FROM_OTHER: Final = _borders(_OTHER, _LATIN)
_HAS_OTHER: Final = re.compile(f"[{_OTHER}]")
_IN_WORD: Final = regex.compile(r"[\p{L}\p{M}]")
_CONTEXT: Final = 200
# No Slavic word begins so: there Latin p stands for the Cyrillic letter of its sound, not of its shape.
_NEVER_FIRST: Final = re.compile("[рР][рлнкшсРЛНКШС]")


@dataclass(frozen=True)
class Lookalike:
    """A word at `start` that mixes scripts, the word it was meant to be, and the script of that."""

    start: int
    word: str
    repaired: str
    script: Script

    @property
    def odd(self) -> str:
        """The letters that do not belong and their script, which no eye tells: "Latin a, o"."""
        pairs = zip(self.word, self.repaired, strict=True)
        letters = dict.fromkeys(letter for letter, meant in pairs if letter != meant)
        scripts = dict.fromkeys(str(_script(letter)) for letter in letters)
        return f"{' and '.join(scripts)} {', '.join(letters)}"


def lookalikes(text: str) -> Iterator[Lookalike]:
    """Words of `text` whose letters of another script look like the script that the rest of the word is in."""
    if text.isascii() or not _HAS_OTHER.search(text):
        return
    end = 0
    sample = text[:_CONTEXT]
    is_latin = len(sample.encode("utf-8", "replace")) < 1.5 * len(sample)
    for border in (_FROM_OTHER if is_latin else _FROM_LATIN).finditer(text):
        if border.start() < end:
            continue
        start, end = _word(text, border.start(), end)
        found = _meant(text[start:end], text[max(0, start - _CONTEXT) : start] + text[end : end + _CONTEXT])
        if found:
            yield Lookalike(start, text[start:end], *found)


def repaired(text: str) -> str:
    """`text` with each such word as it was meant to be."""
    parts, at = [], 0
    for found in lookalikes(text):
        parts += [text[at : found.start], found.repaired]
        at = found.start + len(found.word)
    return "".join(parts) + text[at:]


def _word(text: str, at: int, floor: int) -> tuple[int, int]:
    start = at
    while start > floor and _IN_WORD.match(text[start - 1]):
        start -= 1
    while at < len(text) and _IN_WORD.match(text[at]):
        at += 1
    return start, at


def _script(letter: str) -> Script | None:
    return next((script for script in _SCRIPTS if _LETTER[script].match(letter)), None)


def _meant(word: str, context: str) -> tuple[str, Script] | None:
    """(the word in one script, that script); None where it is not a matter of look-alikes."""
    scripts = [_script(letter) for letter in word]
    counts = {script: scripts.count(script) for script in _SCRIPTS if script in scripts}
    if len(counts) < 2:
        return None
    possible = [target for target in counts if all(_double(c, s, target) for c, s in zip(word, scripts, strict=True))]
    possible = [target for target in possible if _proves(word, scripts, target)]
    if not possible or _is_inflected(word, scripts, possible, context):
        return None
    most = max(counts[target] for target in possible)
    target = max((t for t in possible if counts[t] == most), key=lambda t: _count(context, t))
    if counts[target] < 2 < len(word) and not word.isupper():
        return None
    meant = "".join(_double(c, s, target) or c for c, s in zip(word, scripts, strict=True))
    if target == "Cyrillic" and word[0] in "pP" and _NEVER_FIRST.match(meant):
        meant = {"p": "п", "P": "П"}[word[0]] + meant[1:]
    return meant, target


def _double(letter: str, script: Script | None, target: Script) -> str | None:
    """What `letter` is in the target script: itself where it is of it or of none; None where nothing looks like it."""
    return letter if script in (None, target) else _TABLE[target].get(letter)


def _proves(word: str, scripts: list[Script | None], target: Script) -> bool:
    """Greek letters in Latin words are science more often than mistakes: only capitals and omicron count there."""
    if target == "Latin" and "Greek" in scripts:
        return len(word) > 3
    # One Greek letter beside one Latin is a formula; Greek words are longer.
    return target != "Greek" or scripts.count("Greek") > 2


def _is_inflected(word: str, scripts: list[Script | None], possible: list[Script], context: str) -> bool:
    """A Latin name with a Cyrillic ending glued on ("GitHubа" in a Russian text): written so on purpose."""
    letters = [script for script in scripts if script]
    tail = len(letters) - letters.index("Cyrillic") if "Cyrillic" in letters else 0
    head = len(letters) - tail
    if head < 2 or not tail or letters != ["Latin"] * head + ["Cyrillic"] * tail:
        return False
    name, ending = word[:head], word[head:]
    if name.isupper() and ending.islower():
        return True
    return possible == ["Latin"] and _count(context, "Cyrillic") > _count(context, "Latin")


def _count(text: str, script: Script) -> int:
    return len(_LETTER[script].findall(text))


def _tables() -> dict[Script, dict[str, str]]:
    table: dict[Script, dict[str, str]] = {script: {} for script in _SCRIPTS}
    for latin, cyrillic, greek in (tuple(row) for row in _DOUBLES.split()):
        row = {"Latin": latin, "Cyrillic": cyrillic, "Greek": greek}
        for target in _SCRIPTS:
            for source in _SCRIPTS:
                if source != target and _script(row[source]) == source and _script(row[target]) == target:
                    table[target].setdefault(row[source], row[target])
    table["Cyrillic"] |= _INTO_CYRILLIC_ONLY | _INTO_CYRILLIC_ONLY_GREEK
    table["Greek"] |= _INTO_GREEK_ONLY | _INTO_GREEK_ONLY_CYRILLIC
    table["Cyrillic"] = {source: double for source, double in table["Cyrillic"].items() if double not in _RARE}
    return table


_TABLE: Final = _tables()
