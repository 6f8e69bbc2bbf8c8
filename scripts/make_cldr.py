"""Writes the demo's data set from Unicode CLDR (through Babel), byte for byte the same each time.

Usage: python scripts/make_cldr.py [FOLDER]    (needs babel==2.18.0; default folder gemwright/data/cldr)

Each example asks in English for a date, an amount, a number or a name as another language writes it. A test example is
a combination of value and language that training never shows; every month and weekday of each language is shown.
"""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path

import babel
from babel import Locale, dates, numbers

BABEL = "2.18.0"
_LANGUAGES = (
    "ru uk be bg sr mk kk pl cs sk sl hr de nl sv da nb fi et lv lt hu ro it es pt fr ca el tr id vi ja ko zh hi ar he"
)
_TERRITORIES = (
    "DE FR IT ES PT GB IE NL BE CH AT PL CZ SK HU RO BG GR TR RU UA SE NO FI DK IS EE LV LT US CA MX BR AR CL PE CU "
    "EG MA ZA KE NG ET IN CN JP KR VN TH ID AU NZ IL IR IQ SA PK KZ GE AM"
)
LANGUAGES, TERRITORIES = _LANGUAGES.split(), _TERRITORIES.split()
CURRENCIES = ("EUR", "USD", "GBP")
TRAIN_COUNTS = {"date": 62, "weekday": 30, "amount": 18, "number": 14, "country": 6, "language": 4}
TEST_THIRD = ("amount", "number", "country", "amount", "number", "language")  # by turns, beside two dates, one weekday

Pair = tuple[str, str]  # prompt, answer
Maker = Callable[[random.Random, Locale, int], Pair]


def in_language(locale: Locale) -> str:
    return f"in {locale.english_name} ({locale.display_name})"


def any_day(rng: random.Random) -> date:
    return date(1950, 1, 1) + timedelta(days=rng.randrange(36_524))


def make_date(rng: random.Random, locale: Locale, turn: int) -> Pair:
    day = any_day(rng)
    while day.month != turn % 12 + 1:
        day = any_day(rng)
    return f"Write the date {day} {in_language(locale)}.", dates.format_date(day, "long", locale=locale)


def make_weekday(rng: random.Random, locale: Locale, turn: int) -> Pair:
    day = any_day(rng)
    while day.weekday() != turn % 7:
        day = any_day(rng)
    name = dates.format_date(day, "EEEE", locale="en")
    prompt = f"Write the date {name} {day} with its weekday {in_language(locale)}."
    return prompt, dates.format_date(day, "full", locale=locale)


def hundredths(rng: random.Random) -> float:
    """From 10,000.11 on, where all languages group the digits, and never ending in 0, which some would drop."""
    return rng.randrange(10_000, 1_000_000) + (rng.randrange(10) * 10 + rng.randrange(1, 10)) / 100


def make_amount(rng: random.Random, locale: Locale, turn: int) -> Pair:
    value, currency = hundredths(rng), CURRENCIES[turn % len(CURRENCIES)]
    prompt = f"Write the amount {value:.2f} {currency} {in_language(locale)}."
    return prompt, numbers.format_currency(value, currency, locale=locale)


def make_number(rng: random.Random, locale: Locale, turn: int) -> Pair:
    value = hundredths(rng)
    return f"Write the number {value:.2f} {in_language(locale)}.", numbers.format_decimal(value, locale=locale)


def make_country(rng: random.Random, locale: Locale, turn: int) -> Pair:
    code = rng.choice(TERRITORIES)
    return f"Name the country {Locale('en').territories[code]} {in_language(locale)}.", locale.territories[code]


def make_language(rng: random.Random, locale: Locale, turn: int) -> Pair:
    code = rng.choice(LANGUAGES)
    return f"Name the language {Locale('en').languages[code]} {in_language(locale)}.", locale.languages[code]


MAKERS: dict[str, Maker] = {
    "date": make_date,
    "weekday": make_weekday,
    "amount": make_amount,
    "number": make_number,
    "country": make_country,
    "language": make_language,
}


def distinct_lines(
    task: str, locale: Locale, count: int, seen: set[str], rng: random.Random, start: int
) -> Iterator[str]:
    """`count` JSON lines whose prompts were not seen before."""
    turn = start
    while turn < start + count:
        prompt, answer = MAKERS[task](rng, locale, turn)
        if prompt not in seen:
            seen.add(prompt)
            turn += 1
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            yield json.dumps({"messages": turns, "task": task, "language": str(locale)}, ensure_ascii=False)


def build() -> tuple[list[str], list[str]]:
    """(training lines, test lines)."""
    train: list[str] = []
    test: list[str] = []
    for index, code in enumerate(LANGUAGES):
        locale, rng, seen = Locale(code), random.Random(f"gemwright {code}"), set[str]()
        third = TEST_THIRD[index % len(TEST_THIRD)]
        if writes_direction_marks(locale):
            third = "language"
        for task, count in (("date", 2), ("weekday", 1), (third, 1)):
            test += distinct_lines(task, locale, count, seen, rng, start=rng.randrange(84))
        for task, count in TRAIN_COUNTS.items():
            if task != "amount" or not writes_direction_marks(locale):
                train += distinct_lines(task, locale, count, seen, rng, start=0)
    random.Random("gemwright").shuffle(train)
    return train, test


def writes_direction_marks(locale: Locale) -> bool:
    """Whether amounts carry invisible direction marks, which no one could check by eye."""
    return any(unicodedata.category(char) == "Cf" for char in numbers.format_currency(10_000, "EUR", locale=locale))


def readme(train: list[str], test: list[str]) -> str:
    rows = [Counter(json.loads(line)["task"] for line in lines) for lines in (train, test)]
    table = "\n".join(f"| {task} | {rows[0][task]} | {rows[1][task]} |" for task in MAKERS)
    return f"""# Dates, amounts, numbers and names in {len(LANGUAGES)} languages

Source: Unicode CLDR (licence: `LICENSE-unicode.txt`) as shipped with Babel {BABEL}.
Written by `scripts/make_cldr.py`; do not edit.
Languages: {", ".join(LANGUAGES)}.

| task | train | test |
|---|---|---|
{table}
| all | {len(train)} | {len(test)} |

No prompt of the test occurs in training. Answers keep CLDR's no-break spaces (U+00A0, U+202F); the comparison takes any
white space for a space. Amounts are left out where CLDR writes them with invisible direction marks (Arabic, Hebrew).
"""


def write(folder: Path) -> None:
    """Write `train.jsonl`, `test.jsonl`, `README.md` and `LICENSE-unicode.txt`."""
    if babel.__version__ != BABEL:
        raise SystemExit(f"error: Babel is {babel.__version__}. Install babel=={BABEL}.")
    train, test = build()
    licence = Path(babel.__file__).parent / "locale-data" / "LICENSE.unicode"
    files = {
        "train.jsonl": "".join(f"{line}\n" for line in train),
        "test.jsonl": "".join(f"{line}\n" for line in test),
        "README.md": readme(train, test),
        "LICENSE-unicode.txt": licence.read_text(encoding="utf-8"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "gemwright" / "data" / "cldr")
