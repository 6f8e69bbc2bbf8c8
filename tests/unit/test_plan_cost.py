"""The price of a job: exact sums, break-even against the very cost functions it compares, no network, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from datetime import UTC, date, datetime
from pathlib import Path

import genai_prices
import pytest
from genai_prices import data_snapshot
from hypothesis import given
from hypothesis import strategies as st

from gemwright.errors import InputError
from gemwright.plan import hosted as hosted_module
from gemwright.plan.break_even import against_api, against_rent, rented_usd
from gemwright.plan.cost import BESIDE, Settings, claims, claims_lines, cost_of, here, rented
from gemwright.plan.hosted import hosted, library_prices, token_prices
from gemwright.plan.price_files import Figure, Offer, load_prices
from gemwright.spec import SPECS

DAY = date(2026, 11, 25)
PRICES = load_prices()
SETTINGS = Settings(on=DAY)
SIZES_SOLD = ("4b", "12b", "27b")


def offer(price: float, per: str, setup: float = 0.0) -> Offer:
    return Offer("box", "a box", 24, per, price, setup, "a test")


# --- sums


def test_electricity_is_watts_times_time_times_price() -> None:
    cost = here(3600, 1000, Figure(0.25, "a test"))
    assert (cost.price_usd, cost.kwh, cost.hours, cost.usd_per_kwh) == (0.25, 1.0, 1.0, 0.25)
    assert cost.basis == "$0.25 a kWh: a test"
    assert here(7200, 500, Figure(0.5, "")).price_usd == 0.5


def test_rent_by_the_hour_is_exact_and_by_the_month_every_month_begun() -> None:
    assert rented(2.5, offer(2.0, "hour")).price_usd == 5.0
    assert rented(2.5, offer(2.0, "hour", setup=1.0)).price_usd == 6.0
    monthly = offer(200.0, "month", setup=50.0)
    assert [rented(hours, monthly).price_usd for hours in (1, 730, 731, 1461)] == [250, 250, 450, 650]
    assert rented(41, monthly, hours_a_month=40).price_usd == 450


def test_hosted_price_is_what_the_library_itself_computes() -> None:
    at = datetime(2026, 11, 25, 12, tzinfo=UTC)
    usage = genai_prices.Usage(input_tokens=3_000_000, output_tokens=500_000)
    for size in SIZES_SOLD:
        costs = hosted(3e6, 5e5, size, PRICES, DAY)
        assert len(costs) >= 2 and costs == sorted(costs, key=lambda cost: cost.price_usd)
        theirs = genai_prices.calc_price(
            usage, f"google.gemma-3-{size}-it", provider_id="aws", genai_request_timestamp=at
        )
        ours = next(cost for cost in costs if cost.provider == "aws")
        assert ours.price_usd == pytest.approx(float(theirs.total_price), rel=1e-12)
        assert all("genai-prices" in cost.basis and str(DAY) in cost.basis for cost in costs)


def test_hosted_follows_the_day_asked_for() -> None:
    def openrouter(day: date) -> float:
        return next(o for o in library_prices("4b", day) if o.provider == "openrouter").usd_per_million_tokens_in

    assert openrouter(date(2026, 9, 1)) == 0.02 and openrouter(DAY) == 0.04


def test_library_data_is_read_and_not_a_copy_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data_snapshot.get_snapshot()
    only = dataclasses.replace(whole, providers=[p for p in whole.providers if p.id == "novita"])
    monkeypatch.setattr(data_snapshot, "_custom_snapshot", only)
    assert {cost.provider for cost in hosted(1e6, 1e6, "27b", PRICES, DAY)} == {"novita"}


def test_no_other_model_is_taken_for_gemma_3() -> None:
    names = [o.basis for size in SPECS for o in library_prices(size, DAY)]
    assert names and not any(word in name.lower() for name in names for word in ("3n", "sea-lion", ":free", "gemma-2"))


@pytest.mark.parametrize("size", SIZES_SOLD)
def test_shipped_figures_stand_in_only_where_the_library_has_none(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not {o.provider for o in token_prices(size, PRICES, DAY)} & {"cheapest seen", "dearest seen"}
    monkeypatch.setattr(hosted_module, "library_prices", lambda size, on: [])
    offers = hosted(1e6, 1e6, size, PRICES, DAY)
    assert [o.provider for o in offers] == ["cheapest seen", "dearest seen"]
    assert all("August 2026" in o.basis for o in offers)


def test_what_nobody_sells_is_said() -> None:
    for size in ("270m", "1b"):
        cost = cost_of(60, 100, 1000, 1000, size, SETTINGS)
        assert cost.hosted == () and f"no price for {size} is known" in "\n".join(cost.lines())


# --- properties

TOKENS = st.floats(1, 1e13)
MONEY = st.floats(0.001, 1e5)


@given(st.sampled_from(SIZES_SOLD), TOKENS, TOKENS, st.floats(0, 1e12), st.floats(0, 1e12))
def test_more_tokens_are_never_cheaper(size: str, ins: float, outs: float, more_in: float, more_out: float) -> None:
    less, more = (
        {o.provider: o.price_usd for o in hosted(i, o, size, PRICES, DAY)}
        for i, o in ((ins, outs), (ins + more_in, outs + more_out))
    )
    assert less.keys() == more.keys() and all(0 < less[name] <= more[name] for name in less)


@given(st.floats(0.01, 4e4), st.floats(0, 4e4), MONEY, st.sampled_from(["hour", "month"]), st.floats(1, 730))
def test_more_hours_are_never_cheaper(hours: float, more: float, price: float, per: str, month: float) -> None:
    each = offer(price, per)
    assert rented_usd(hours, each, month) <= rented_usd(hours + more, each, month)
    power = Figure(0.3, "")
    assert here(hours * 3600, 100, power).price_usd <= here((hours + more) * 3600, 100, power).price_usd


@given(
    st.floats(0, 1e5),
    st.floats(1e-4, 5),
    st.floats(0.01, 3000),
    st.floats(0, 500),
    st.sampled_from(["hour", "month"]),
    st.floats(1, 730),
    st.floats(0.05, 20),
    st.floats(1.001, 50),
)
def test_break_even_against_rent_agrees_with_both_bills(
    purchase: float, power: float, price: float, setup: float, per: str, month: float, ratio: float, beyond: float
) -> None:
    box = offer(price, per, setup)
    even = against_rent(purchase, power, box, month, ratio)

    def owning_saves(hours: float) -> float:
        return rented_usd(hours * ratio, box, month) - purchase - hours * power

    slack = 1e-6 * (purchase + setup + price)
    if even.hours is None:
        # At the end of paid months (or at any hour) the rent has gained nothing, however long.
        unit = (1 if per == "hour" else month) / ratio
        for units in (1, 10, 1000):
            if 1e-6 <= units * unit * ratio <= 1e6:
                assert owning_saves(units * unit * (1 - 1e-12)) <= setup - purchase + slack * units
    elif even.hours == 0:
        assert owning_saves(1e-3 / ratio + 1e-3) > -slack
    elif 1e-6 <= even.hours * ratio <= 1e6 / beyond:
        assert owning_saves(even.hours * beyond) > -slack * beyond
        last = even.hours * (1 - 1e-9)
        assert owning_saves(last) <= slack


@given(st.floats(0, 1e5), st.floats(1e-4, 1e3), st.floats(1e-4, 1e3), st.floats(1, 1e9), st.floats(0.01, 1e4))
def test_break_even_against_an_api_agrees_with_both_bills(
    purchase: float, mine: float, theirs: float, tokens: float, hours: float
) -> None:
    even = against_api(purchase, mine, theirs, tokens, hours, "api")
    if even.tokens is None or even.hours is None:
        assert even.tokens is None and even.hours is None and theirs <= mine
        return
    jobs = even.tokens / tokens
    assert purchase + jobs * mine == pytest.approx(jobs * theirs, rel=1e-9)
    assert even.hours == pytest.approx(jobs * hours)
    more = 2 * jobs + 1
    rounding = 1e-9 * more * theirs
    assert purchase + more * mine < more * theirs + rounding


def test_break_even_of_a_whole_job_agrees_with_its_own_figures() -> None:
    settings = dataclasses.replace(SETTINGS, purchase_usd=500.0)
    cost = cost_of(600, 200, 3e6, 5e5, "27b", settings)
    api = cost.break_even[-1]
    assert api.against == cost.hosted[0].provider and api.tokens is not None
    jobs = api.tokens / 3.5e6
    owned = 500 + here(600 * jobs, 200, PRICES.kwh).price_usd
    bought = hosted(3e6 * jobs, 5e5 * jobs, "27b", PRICES, DAY)[0].price_usd
    assert owned == pytest.approx(bought)


def test_never_at_once_and_in_practice_never_are_said() -> None:
    assert "never" in against_rent(0, 2.0, offer(1.0, "hour"), 730).words
    assert against_rent(0, 0.1, offer(1.0, "hour"), 730).words == "at once against box"
    assert against_rent(900, 0.1, offer(1.0, "hour"), 730).words == "against box after 1,000 hours of work"
    late = against_api(1e4, 0.1, 0.101, 1e6, 10, "api").words
    assert late == "in practice never against api: after 10 T tokens, 11,408 years day and night"
    assert against_api(0, 0.2, 0.1, 1e6, 10, "api").words.startswith("never against api")


def test_faster_rented_machines_are_compared_at_their_own_hours() -> None:
    slow = cost_of(36_000, 250, 1e6, 1e6, "4b", dataclasses.replace(SETTINGS, purchase_usd=500.0))
    planned = dataclasses.replace(SETTINGS, purchase_usd=500.0, rented_hours={"h100-80gb": 0.05})
    fast = cost_of(36_000, 250, 1e6, 1e6, "4b", planned)
    assert fast.rented[0].name == "h100-80gb" and fast.rented[0].price_usd == pytest.approx(0.05 * 2.89)
    assert fast.rented[0].basis.startswith("as planned; 2.89 USD an hour")
    assert fast.break_even[0].hours is None and slow.break_even[0].hours is not None


# --- what is shown


@pytest.mark.parametrize("size", SPECS)
@pytest.mark.parametrize("settings", [SETTINGS, Settings(on=DAY, purchase_usd=9e6, usd_per_kwh=0.4, hours_a_month=1)])
def test_lines_fit_a_terminal(size: str, settings: Settings) -> None:
    for seconds, watts, tokens in ((1e-3, 1, 1), (3.6e4, 250, 1e6), (3e8, 1e5, 1e15)):
        lines = cost_of(seconds, watts, tokens, tokens, size, settings).lines()
        assert len(lines) <= 15 and max(map(len, lines)) <= 100
        whole = [line for line in lines if line.strip().startswith((*BESIDE, "left out", "owning", "Price"))]
        assert len(whole) == 7 + (size in SIZES_SOLD) and not any("…" in line for line in whole)


def test_json_holds_a_basis_for_every_part_and_no_infinity() -> None:
    cost = cost_of(3600, 250, 1e6, 2e5, "4b", dataclasses.replace(SETTINGS, watts_basis="nvml, this run"))
    read = json.loads(json.dumps(cost.as_json(), allow_nan=False))
    parts = [read["here"], *read["rented"], *read["hosted"], *read["break_even"]]
    assert all(part["basis"] for part in parts) and read["watts_basis"] == "nvml, this run"
    assert set(read["beside"]) == {"privacy", "latency", "control"}
    assert len(read["rented"]) == len(PRICES.rented)
    assert any(even["hours"] is None and even["words"].startswith("never") for even in read["break_even"])


def test_small_machines_are_left_out_and_training_is_not_compared_with_answers() -> None:
    cost = cost_of(3600, 250, 1e6, 0, "4b", Settings(on=DAY, vram_gb=40, training=True))
    assert {bill.name for bill in cost.rented} == {"a100-80gb", "a100-80gb-shared", "h100-80gb"}
    assert cost.hosted == () and "not for training" in cost.hosted_basis
    none = cost_of(3600, 250, 1e6, 0, "4b", Settings(on=DAY, vram_gb=2000))
    assert "no machine of the catalogue" in "\n".join(none.lines())


def test_claims_stand_beside_todays_prices() -> None:
    rows = claims(PRICES, DAY)
    assert rows[0].claimed == "$200" and rows[0].today == f"${184 * PRICES.usd_per['EUR'].usd:,.0f}"
    assert [row.what for row in rows[1:]] == [f"hosted {size}, a million tokens" for size in SPECS]
    assert all(row.basis for row in rows)
    lines = claims_lines(rows)
    assert len(lines) == 7 and max(map(len, lines)) <= 100
    assert lines[1].split()[-2:] == ["$200", rows[0].today]


# --- start, network


PROBE = """
import socket, sys
def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname": raise AssertionError("network: " + event)
sys.addaudithook(refuse)
from gemwright.plan import cost
loaded = {"torch", "numpy", "transformers", "genai_prices", "httpx2"} & set(sys.modules)
assert not loaded, loaded
from datetime import date
job = cost.cost_of(3600, 250, 1e6, 1e6, "4b", cost.Settings(on=date(2026, 11, 25)))
assert job.hosted and "genai_prices" in sys.modules and "torch" not in sys.modules
import threading
assert threading.active_count() == 1
try: socket.socket()
except AssertionError: pass
else: raise SystemExit("the hook does not see sockets")
print(len(job.lines()))
"""


def test_nothing_heavy_is_imported_and_no_socket_is_opened() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "14", done.stderr


# --- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"job_seconds": 0}, "seconds is 0 s"),
        ({"job_seconds": -1.5}, "seconds is -1.5 s"),
        ({"job_seconds": math.inf}, "seconds is inf s"),
        ({"watts": math.nan}, "watts is nan W"),
        ({"watts": 1e6}, "watts is 1e+06 W"),
        ({"tokens_in": -1}, "tokens_in is -1 tokens"),
        ({"tokens_in": 0, "tokens_out": 0}, "both 0 tokens"),
        ({"tokens_out": 1e30}, "tokens_out is 1e+30 tokens"),
        ({"size": "7b"}, "size '7b' is unknown"),
        ({"settings": Settings(usd_per_kwh=-0.1)}, "price_per_kwh is -0.1 USD a kWh"),
        ({"settings": Settings(purchase_usd=-1)}, "purchase_usd is -1 USD"),
        ({"settings": Settings(hours_a_month=0)}, "hours_a_month is 0 h"),
        ({"settings": Settings(vram_gb=-1)}, "vram_gb is -1 GB"),
        ({"settings": Settings(rented_hours={"h100": 1})}, "Did you mean h100-80gb"),
        ({"settings": Settings(rented_hours={"h100-80gb": 0})}, "hours is 0 h"),
    ],
)
def test_bad_values_are_named_with_their_unit(change: dict[str, object], said: str) -> None:
    job: dict[str, object] = {"job_seconds": 60, "watts": 100, "tokens_in": 1, "tokens_out": 1, "size": "4b"}
    with pytest.raises(InputError) as caught:
        cost_of(**(job | {"settings": SETTINGS} | change))  # type: ignore[arg-type]
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_persons_file_is_used(tmp_path: Path) -> None:
    mine = tmp_path / "prices.toml"
    mine.write_text(
        """
[electricity]
price_per_kwh = 5.5
currency = "RUB"
date = 2026-11-01
source = "my bill"
[rates.RUB]
usd = 0.0125
date = "2026-11"
source = "my bank"
[[rented]]
name = "h100-80gb"
machine = "H100 of a friend"
vram_gb = 80
price = 1
per = "hour"
currency = "USD"
date = "2026-11"
source = "a friend"
[[hosted]]
provider = "aws"
size = "4b"
price_in = 0.01
price_out = 0.01
currency = "USD"
date = "2026-11"
source = "my contract"
""",
        encoding="utf-8",
    )
    cost = cost_of(3600, 1000, 1e6, 1e6, "4b", Settings(on=DAY, prices_file=mine))
    assert cost.here.price_usd == 5.5 * 0.0125 and "my bill" in cost.here.basis and "my bank" in cost.here.basis
    assert next(bill for bill in cost.rented if bill.name == "h100-80gb").price_usd == 1.0
    assert cost.hosted[0].provider == "aws" and cost.hosted[0].price_usd == 0.02
    assert [h.provider for h in cost.hosted].count("aws") == 1 and "my contract" in cost.hosted[0].basis
    given = cost_of(3600, 1000, 1e6, 1e6, "4b", Settings(on=DAY, prices_file=mine, usd_per_kwh=0.5))
    assert given.here.price_usd == 0.5 and "as given" in given.here.basis


def test_the_docs_table_and_example_are_what_the_program_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
    assert "\n".join(claims_lines(claims(PRICES, DAY))) in page
    example = tmp_path / "prices.toml"
    example.write_text(page.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    prices = load_prices(example)
    assert prices.offer("rtx4090").setup_usd == 5 and prices.kwh.usd == 6.43 * 0.0125
    assert [o.provider for o in prices.hosted] == ["our own contract"]
    shown = [f"{bill.price_usd:g}" for bill in PRICES.rented.values() if "USD an" in bill.basis]
    assert all(price in page for price in shown), shown
