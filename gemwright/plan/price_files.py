"""Dated, sourced prices read from TOML: the files shipped beside this module, and one of the user's laid over them."""

from __future__ import annotations

import datetime
import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gemwright.errors import InputError
from gemwright.spec import SPECS

SHIPPED = ("home.toml", "rented.toml", "hosted.toml")
# Of each number: its unit, and the least and the most that is no slip of a key.
_NUMBERS: Mapping[str, tuple[str, float, float]] = {
    "price_per_kwh": ("{currency} a kWh", 1e-4, 10),
    "usd": ("USD a unit", 1e-6, 1e3),
    "vram_gb": ("GB", 1, 4096),
    "price": ("{currency} a{n} {per}", 1e-3, 1e5),
    "setup": ("{currency} once", 0, 1e5),
    "price_in": ("{currency} a million tokens", 1e-4, 1e3),
    "price_out": ("{currency} a million tokens", 1e-4, 1e3),
}
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "electricity": ("price_per_kwh", "currency", "date", "source"),
    "rates": ("usd", "date", "source"),
    "rented": ("name", "machine", "vram_gb", "price", "per", "currency", "date", "source", "setup"),
    "hosted": ("provider", "size", "price_in", "price_out", "currency", "date", "source"),
}
_OPTIONAL = ("setup",)
_DATE = re.compile(r"20\d\d-\d\d(-\d\d)?")


@dataclass(frozen=True)
class Figure:
    """A price in US dollars and what it rests on."""

    usd: float
    basis: str


@dataclass(frozen=True)
class Offer:
    """A machine to rent; `per` is "hour" or "month"."""

    name: str
    machine: str
    vram_gb: float
    per: str
    price_usd: float
    setup_usd: float
    basis: str


@dataclass(frozen=True)
class TokenPrice:
    """What a provider asks for a million tokens of one size."""

    provider: str
    size: str
    usd_per_million_tokens_in: float
    usd_per_million_tokens_out: float
    basis: str


@dataclass(frozen=True)
class Prices:
    """All prices in US dollars: shipped ones with the user's laid over them.

    `usd_per` is what one unit of a currency is worth; `hosted_fallback` counts only where nothing better is known.
    """

    kwh: Figure
    usd_per: Mapping[str, Figure]
    rented: Mapping[str, Offer]
    hosted: tuple[TokenPrice, ...]
    hosted_fallback: tuple[TokenPrice, ...]

    def offer(self, name: str) -> Offer:
        """The rented machine of that name. Raises InputError with near names."""
        if name in self.rented:
            return self.rented[name]
        raise InputError(f"no rented machine is named {name!r:.60}", fix=_near(name, self.rented))


def bounded(value: float, field: str, unit: str, least: float, most: float, where: object = None) -> float:
    """`value` if it is a number from `least` to `most`; else InputError naming field and unit."""
    fix = f"Give a number from {least:g} to {most:g} {unit}."
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{field} is {_shown(value)}, not a number", where=where, fix=fix)
    if not least <= value <= most:
        raise InputError(f"{field} is {_shown(value)} {unit}", where=where, fix=fix)
    return float(value)


def _shown(value: object) -> str:
    """`value` for one line of an error, whatever a file holds in its place."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**15:
        return "a number of more than 15 digits"
    if isinstance(value, (int, float, str)):
        return f"{value:g}" if isinstance(value, float) else f"{value!r:.60}"
    return f"a {type(value).__name__}"


def load_prices(user_file: Path | None = None) -> Prices:
    """The shipped prices, with those of `user_file` in place of equal ones (same name, provider and size, currency).

    Raises InputError naming file, table and field for a file that cannot be read, broken TOML, an unknown table, field
    or currency, a missing field, or a number out of bounds.
    """
    folder = resources.files("gemwright.plan") / "prices"
    shipped = [(name, _parsed((folder / name).read_bytes(), name)) for name in SHIPPED]
    user = [(str(user_file), _parsed(_bytes(user_file), user_file))] if user_file is not None else []
    rates = {"USD": Figure(1.0, "US dollars")}
    for where, tables in [*shipped, *user]:
        rates |= {code: _rate(code, table, where) for code, table in _named(tables, "rates", where).items()}
    power = Figure(0.0, "")
    rented: dict[str, Offer] = {}
    for where, tables in [*shipped, *user]:
        if "electricity" in tables:
            power = _electricity(tables["electricity"], where, rates)
        rented |= {offer.name: offer for offer in (_offer(t, where, rates) for t in _rows(tables, "rented", where))}
    ours, theirs = (
        tuple(_tokens(row, where, rates) for where, tables in files for row in _rows(tables, "hosted", where))
        for files in (shipped, user)
    )
    return Prices(power, rates, rented, hosted=theirs, hosted_fallback=ours)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        fix = "Give a TOML file of prices (docs/cost.md)."
        raise InputError(f"cannot be read ({error.strerror})", where=path, fix=fix) from None


def _parsed(content: bytes, where: object) -> dict[str, Any]:
    try:
        tables = tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        what = " ".join(str(error).split()) or "nested too deep"
        raise InputError(f"is not TOML: {what:.120}", where=where, fix="Correct that line.") from None
    for name in tables:
        if name not in _FIELDS:
            raise InputError(f"unknown table {name!r:.60}", where=where, fix=_near(name, _FIELDS))
    return tables


def _near(name: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}."


def _rows(tables: Mapping[str, Any], kind: str, where: object) -> list[Any]:
    rows = tables.get(kind, [])
    if not isinstance(rows, list):
        raise InputError(f"{kind} is not a list of tables", where=where, fix=f"Begin each offer with [[{kind}]].")
    return rows


def _named(tables: Mapping[str, Any], kind: str, where: object) -> dict[str, Any]:
    named = tables.get(kind, {})
    if not isinstance(named, dict):
        raise InputError(f"{kind} is not a table", where=where, fix=f"Write [{kind}.EUR].")
    return named


def _checked(table: Any, kind: str, where: object, known: Mapping[str, Figure]) -> dict[str, Any]:
    """`table` with every field there, of its type, in bounds, and the currency one that `known` converts."""
    if not isinstance(table, dict):
        raise InputError(f"{kind} holds {_shown(table)}, not a table", where=where, fix="See docs/cost.md.")
    label = " ".join([kind, *(_shown(table[key]) for key in ("name", "provider", "size") if key in table)])
    for field in table:
        if field not in _FIELDS[kind]:
            raise InputError(f"{label}: unknown field {field!r:.60}", where=where, fix=_near(field, _FIELDS[kind]))
    if missing := [field for field in _FIELDS[kind] if field not in table and field not in _OPTIONAL]:
        units = [f"{field} ({_unit(field, table)})" if field in _NUMBERS else field for field in missing]
        raise InputError(f"{label}: lacks {', '.join(units)}", where=where, fix="Each price needs its basis.")
    row: dict[str, Any] = dict(table)
    if isinstance(row["date"], datetime.date):
        row["date"] = str(row["date"])
    for field, value in row.items():
        if field in _NUMBERS:
            _, least, most = _NUMBERS[field]
            bounded(value, f"{label}: {field}", _unit(field, row), least, most, where)
        elif not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise InputError(f"{label}: {field} is {_shown(value)}", where=where, fix="Give a line of text in quotes.")
    if not _is_date(row["date"]):
        raise InputError(f"{label}: date is {row['date']!r:.60}", where=where, fix="Write 2026-11-25 or 2026-11.")
    _choice(row, label, "currency", known, where)
    _choice(row, label, "per", {"hour": 0, "month": 0}, where)
    _choice(row, label, "size", SPECS, where)
    return row


def _is_date(text: str) -> bool:
    """Whether `text` is a day or a month."""
    try:
        datetime.date.fromisoformat(text if len(text) > 7 else f"{text}-01")
    except ValueError:
        return False
    return _DATE.fullmatch(text) is not None


def _unit(field: str, table: Mapping[str, Any]) -> str:
    """The unit of a number; the currency and the time as the row names them, where it names them properly."""
    per, currency = table.get("per"), table.get("currency")
    per = per if per in ("hour", "month") else "hour or month"
    currency = currency if isinstance(currency, str) and re.fullmatch("[A-Z]{3}", currency) else "USD"
    return _NUMBERS[field][0].format(currency=currency, n="n" * per.startswith("h"), per=per)


def _choice(table: Mapping[str, Any], label: str, field: str, known: Mapping[str, object], where: object) -> None:
    if field in table and table[field] not in known:
        fix = f"Known: {', '.join(known)}."
        fix += " Or give [rates.CODE] with usd, date and source." if field == "currency" else ""
        raise InputError(f"{label}: {field} {table[field]!r:.60} is unknown", where=where, fix=fix)


def _rate(code: str, table: Any, where: object) -> Figure:
    if code == "USD" or not re.fullmatch("[A-Z]{3}", code):
        raise InputError(f"rates: {code!r:.60} is no currency to convert", where=where, fix="Write a code such as EUR.")
    row = _checked(table, "rates", where, {})
    return Figure(float(row["usd"]), f"1 {code} = {row['usd']:g} USD, {row['date']}, {row['source']}")


def _basis(row: Mapping[str, Any], said: str, rates: Mapping[str, Figure]) -> str:
    """What was said, when and where, and the conversion where there is one."""
    foreign = f"; {rates[row['currency']].basis}" if row["currency"] != "USD" else ""
    return f"{said}, {row['date']}, {row['source']}{foreign}"


def _electricity(table: Any, where: object, rates: Mapping[str, Figure]) -> Figure:
    row = _checked(table, "electricity", where, rates)
    usd = row["price_per_kwh"] * rates[row["currency"]].usd
    return Figure(usd, _basis(row, f"{row['price_per_kwh']:g} {_unit('price_per_kwh', row)}", rates))


def _offer(table: Any, where: object, rates: Mapping[str, Figure]) -> Offer:
    row = _checked(table, "rented", where, rates)
    usd = rates[row["currency"]].usd
    said = f"{row['price']:g} {_unit('price', row)}"
    if "setup" in row:
        said += f" and {row['setup']:g} {_unit('setup', row)}"
    elif row["per"] == "month":
        said += ", no set-up fee stated"
    setup = row.get("setup", 0.0) * usd
    basis = _basis(row, said, rates)
    return Offer(row["name"], row["machine"], float(row["vram_gb"]), row["per"], row["price"] * usd, setup, basis)


def _tokens(table: Any, where: object, rates: Mapping[str, Figure]) -> TokenPrice:
    row = _checked(table, "hosted", where, rates)
    usd = rates[row["currency"]].usd
    said = f"{row['price_in']:g} in, {row['price_out']:g} out {_unit('price_in', row)}"
    basis = _basis(row, said, rates)
    return TokenPrice(row["provider"], row["size"], row["price_in"] * usd, row["price_out"] * usd, basis)
