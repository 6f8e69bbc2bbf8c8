"""Files of prices: the shipped ones whole and dated, a person's own broken in every way."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemwright.errors import InputError
from gemwright.plan.price_files import SHIPPED, Prices, load_prices
from gemwright.spec import SPECS

ROW = {
    "name": '"box"',
    "machine": '"a box"',
    "vram_gb": "24",
    "price": "0.5",
    "per": '"hour"',
    "currency": '"EUR"',
    "date": '"2026-11-01"',
    "source": '"a test"',
}


def rented(**change: str | None) -> str:
    row = {field: value for field, value in (ROW | change).items() if value is not None}
    return "[[rented]]\n" + "\n".join(f"{field} = {value}" for field, value in row.items())


def read(tmp_path: Path, text: str | bytes) -> Prices:
    file = tmp_path / "mine.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_prices(file)


def test_shipped_files_are_whole_dated_and_sourced() -> None:
    prices = load_prices()
    folder = resources.files("gemwright.plan") / "prices"
    assert sorted(f.name for f in folder.iterdir() if f.name.endswith(".toml")) == sorted(SHIPPED)
    rows = [
        row
        for name in SHIPPED
        for kind, rows in tomllib.loads((folder / name).read_text(encoding="utf-8")).items()
        for row in (rows if isinstance(rows, list) else [rows] if kind == "electricity" else rows.values())
    ]
    assert len(rows) >= 15
    assert all("2025-10" <= row["date"] <= "2026-11-25" and len(row["source"]) > 10 for row in rows)
    assert len(prices.rented) == sum("vram_gb" in row for row in rows), "two offers share a name"
    assert {o.per for o in prices.rented.values()} == {"hour", "month"}
    assert {"server-20gb", "l4", "a100-80gb", "h100-80gb", "rtx4090", "rtx3090"} <= set(prices.rented)
    assert {o.size for o in prices.hosted_fallback} == {"4b", "12b", "27b"} <= set(SPECS)
    assert prices.hosted == () and 0.05 < prices.kwh.usd < 1 and 0.5 < prices.usd_per["EUR"].usd < 2


def test_conversion_and_setup_fee(tmp_path: Path) -> None:
    rate = '[rates.EUR]\nusd = 2\ndate = "2026-11"\nsource = "a test"\n'
    box = read(tmp_path, rate + rented(setup="10")).offer("box")
    assert (box.price_usd, box.setup_usd, box.vram_gb, box.per) == (1.0, 20.0, 24.0, "hour")
    assert box.basis == "0.5 EUR an hour and 10 EUR once, 2026-11-01, a test; 1 EUR = 2 USD, 2026-11, a test"
    assert "no set-up fee stated" in read(tmp_path, rented(per='"month"', price="90")).offer("box").basis


def test_an_own_rate_converts_the_shipped_offers_too(tmp_path: Path) -> None:
    prices = read(tmp_path, '[rates.EUR]\nusd = 2\ndate = "2026-11"\nsource = "a test"\n')
    assert prices.offer("server-20gb").price_usd == 368 and prices.kwh.usd == 2 * 0.2872


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (rented(price="-1"), "price is -1 EUR an hour"),
        (rented(price="0"), "price is 0 EUR an hour"),
        (rented(price="nan"), "price is nan EUR an hour"),
        (rented(price="inf"), "price is inf EUR an hour"),
        (rented(price="9e9", per='"month"'), "price is 9e+09 EUR a month"),
        (rented(price="true"), "price is True, not a number"),
        (rented(price='"0.5"'), "price is '0.5', not a number"),
        (rented(price="[1]"), "price is a list, not a number"),
        (rented(price="0x" + "f" * 5000), "price is a number of more than 15 digits EUR"),
        (rented(price="9" * 5000), "is not TOML"),
        (rented(setup="-1"), "setup is -1 EUR once"),
        (rented(vram_gb="0"), "vram_gb is 0 GB"),
        (rented(vram_gb=None), "lacks vram_gb (GB)"),
        (rented(price=None, source=None), "lacks price (EUR an hour), source"),
        (rented(currency='"DEM"'), "currency 'DEM' is unknown. Known: USD, EUR. Or give [rates.CODE]"),
        (rented(currency="5"), "currency is 5"),
        (rented(per='"week"'), "per 'week' is unknown. Known: hour, month"),
        (rented(date='"yesterday"'), "date is 'yesterday'"),
        (rented(date='"2026-02-31"'), "date is '2026-02-31'"),
        (rented(date="2026-11-25T10:00:00"), "date is '2026-11-25 10:00:00'"),
        (rented(source='""'), "source is ''"),
        (rented(source='"a\\nb"'), "source is 'a\\nb'"),
        (rented() + "\nprize = 3", "unknown field 'prize'. Did you mean price or per?"),
        ("[[rentals]]\nname = 1", "unknown table 'rentals'. Did you mean rented or rates?"),
        ("rented = 3", "rented is not a list of tables"),
        ("rented = [3]", "rented holds 3, not a table"),
        ("rates = 3", "rates is not a table"),
        ("rates.euro = {}", "'euro' is no currency"),
        ("rates.EUR = 1.1", "rates holds 1.1, not a table"),
        ('[rates.EUR]\nusd = 0\ndate = "2026-11"\nsource = "a"', "usd is 0 USD a unit"),
        ("electricity = 0.3", "electricity holds 0.3, not a table"),
        ("[electricity]\nprice_per_kwh = 30", "electricity: lacks currency, date, source"),
        (
            '[electricity]\nprice_per_kwh = 30\ncurrency = "EUR"\ndate = "2026-11"\nsource = "a"',
            "price_per_kwh is 30 EUR a kWh",
        ),
        (
            '[[hosted]]\nprovider = "a"\nsize = "7b"\nprice_in = 1\nprice_out = 1\ncurrency = "USD"\ndate = "2026-11"\n'
            'source = "a"',
            "size '7b' is unknown",
        ),
        ("[[rented]", "is not TOML"),
        (b"\xff\xfe\x00", "is not TOML"),
        ("a = " + "[" * 50_000, "is not TOML"),
    ],
)
def test_a_bad_file_is_one_line_with_file_field_and_unit(text: str | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    line = str(caught.value)
    assert said in line and line.startswith(str(tmp_path / "mine.toml")) and "\n" not in line and len(line) < 600


def test_a_missing_file_and_a_folder_are_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load_prices(path)


ODD = ["1", "-1", "0.0", "nan", "1e400", "true", "[]", "{}", "{a = 1}", "[[1]]", "2026-11-25", "10:00:00"]
TEXTS = ['""', '"EUR"', '"hour"', '"4b"', '"\\u0000"', "'''\n\n'''", "0x" + "f" * 40]
VALUES = st.sampled_from([*ODD, *TEXTS])
NAMES = st.sampled_from([*ROW, "setup", "size", "provider", "price_in", "price_out", "usd", "other"])
TABLES = st.sampled_from(["[[rented]]", "[[hosted]]", "[electricity]", "[rates.EUR]", "[rates]", "[rented]", "[x]"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=TABLES, fields=st.dictionaries(NAMES, VALUES), whole=st.booleans())
def test_any_table_is_read_or_refused_in_one_line(
    table: str, fields: dict[str, str], whole: bool, tmp_path: Path
) -> None:
    row = (ROW if whole else {}) | fields
    text = table + "\n" + "\n".join(f"{field} = {value}" for field, value in row.items())
    try:
        read(tmp_path, text)
    except InputError as error:
        assert "\n" not in str(error) and "mine.toml" in str(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    try:
        read(tmp_path, content)
    except InputError as error:
        assert "\n" not in str(error) and "mine.toml" in str(error)
