"""The price of a job: here, on a rented machine, by a hosted API; what owning saves, and what money leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from gemwright.errors import InputError
from gemwright.plan.break_even import BreakEven, against_api, against_rent, check_purchase, rented_usd
from gemwright.plan.hosted import HostedCost, check_size, check_tokens, hosted, token_prices
from gemwright.plan.price_files import Figure, Offer, Prices, bounded, load_prices
from gemwright.spec import SPECS

WIDTH = 100
SHOWN = 3
BESIDE = {
    "privacy": "here nothing leaves; rented, it lies on another's disk; hosted, each prompt is sent away",
    "latency": "first token here: reading the prompt; rented: and the network; hosted: and the queue",
    "control": "here and rented you keep the version you chose; hosted, the provider may end it",
}
LEFT_OUT = "left out: VAT, storage and traffic if rented; repair and resale of your own; free hosted tiers"


@dataclass(frozen=True)
class HereCost:
    """Electricity of a job on the machine at hand."""

    price_usd: float
    hours: float
    kwh: float
    usd_per_kwh: float
    basis: str


@dataclass(frozen=True)
class RentedCost:
    """What a rented machine costs for a job of so many hours."""

    name: str
    machine: str
    vram_gb: float
    price_usd: float
    hours: float
    basis: str


@dataclass(frozen=True)
class Settings:
    """What a person may say about prices; everything else comes from dated files.

    `usd_per_kwh` replaces the file's price; `purchase_usd` 0 means that the machine is there already. `hours_a_month`
    is how long a machine rented by the month works. `rented_hours` are the job's hours on machines by name, where a
    plan knows them: else it is taken to last as long as here. `vram_gb` leaves smaller rented machines out. With
    `training` the tokens are trained on, which the hosted prices are not for.
    """

    usd_per_kwh: float | None = None
    purchase_usd: float = 0.0
    hours_a_month: float = 730.0
    vram_gb: float = 0.0
    rented_hours: Mapping[str, float] = field(default_factory=dict)
    training: bool = False
    watts_basis: str = "as given"
    prices_file: Path | None = None
    on: date = field(default_factory=date.today)


@dataclass(frozen=True)
class Claim:
    """A price once claimed, and today's."""

    what: str
    claimed: str
    today: str
    basis: str


@dataclass(frozen=True)
class Cost:
    """A job's price here, rented and hosted (cheapest first), and from where on owning is cheaper."""

    size: str
    tokens_in: float
    tokens_out: float
    watts: float
    watts_basis: str
    here: HereCost
    rented: tuple[RentedCost, ...]
    hosted: tuple[HostedCost, ...]
    hosted_basis: str
    break_even: tuple[BreakEven, ...]

    def lines(self) -> list[str]:
        """At most 15 lines of at most 100 columns for a terminal."""
        rows = [("here", self.here.price_usd, f"{self.here.kwh:.3g} kWh at {self.here.basis}")]
        rows += [(f"rented {r.name}", r.price_usd, f"{_hours(r.hours)} {r.basis}") for r in self.rented[:SHOWN]]
        rows += [
            (f"hosted {h.provider}", h.price_usd, f"{_per_million(h)} a million, {h.basis}")
            for h in self.hosted[:SHOWN]
        ]
        name = max(len(label) for label, _, _ in rows)
        title = f"Price of this job in US$: {self.size}, {_hours(self.here.hours)} at {self.watts:g} W"
        title += f", {_tokens(self.tokens_in)} tokens in, {_tokens(self.tokens_out)} out"
        shown = [title, *(f"  {label:<{name}}  {_money(usd):>9}  {basis}" for label, usd, basis in rows)]
        shown += [] if self.rented else ["  rented: no machine of the catalogue has so much memory"]
        shown += [] if self.hosted else [f"  hosted: {self.hosted_basis}"]
        shown += [f"  owning pays {even.words}" for even in self.break_even]
        shown += [f"  {what}: {said}" for what, said in BESIDE.items()]
        shown.append(f"  {LEFT_OUT}")
        return [line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in shown]

    def as_json(self) -> dict[str, Any]:
        """Everything: units in names, each number's basis beside it, None for a break-even that never comes."""
        evens = [asdict(even) | {"words": even.words} for even in self.break_even]
        return asdict(self) | {"break_even": evens, "beside": dict(BESIDE), "left_out": LEFT_OUT, "currency": "USD"}


def here(seconds: float, watts: float, price_per_kwh: Figure) -> HereCost:
    """Electricity for `seconds` at `watts` drawn from the wall. Raises InputError."""
    bounded(seconds, "seconds", "s", 1e-6, 3e8)
    bounded(watts, "watts", "W", 0.1, 1e5)
    bounded(price_per_kwh.usd, "price_per_kwh", "USD a kWh", 1e-4, 10)
    kwh = seconds * watts / 3.6e6
    said = f"${price_per_kwh.usd:.4g} a kWh: {price_per_kwh.basis}"
    return HereCost(kwh * price_per_kwh.usd, seconds / 3600, kwh, price_per_kwh.usd, said)


def rented(hours: float, offer: Offer, hours_a_month: float = 730.0) -> RentedCost:
    """The bill of `offer` for `hours` of work (`break_even.rented_usd`). Raises InputError."""
    usd = rented_usd(hours, offer, hours_a_month)
    return RentedCost(offer.name, offer.machine, offer.vram_gb, usd, hours, offer.basis)


def cost_of(
    job_seconds: float, watts: float, tokens_in: float, tokens_out: float, size: str, settings: Settings
) -> Cost:
    """The price of one job here, on every rented machine that is large enough, and at every provider of `size`.

    `job_seconds` and `watts` are this machine's. Raises InputError for a value that is negative, zero or absurd, an
    unknown size or machine, and a broken file of prices.
    """
    check_size(size)
    check_tokens(tokens_in, tokens_out)
    check_purchase(settings.purchase_usd)
    bounded(settings.vram_gb, "vram_gb", "GB", 0, 4096)
    prices = load_prices(settings.prices_file)
    kwh = prices.kwh if settings.usd_per_kwh is None else Figure(settings.usd_per_kwh, "as given")
    mine = here(job_seconds, watts, kwh)
    fitting = [offer for offer in prices.rented.values() if offer.vram_gb >= settings.vram_gb]
    bills = sorted(_bills(mine.hours, fitting, prices, settings), key=lambda bill: (bill.price_usd, bill.name))
    offers = [] if settings.training else hosted(tokens_in, tokens_out, size, prices, settings.on)
    tokens, each_hour = tokens_in + tokens_out, mine.price_usd / mine.hours
    evens = [
        against_rent(
            settings.purchase_usd, each_hour, prices.offer(bill.name), settings.hours_a_month, bill.hours / mine.hours
        )
        for bill in _cheapest(bills, prices)
    ]
    evens += [
        against_api(settings.purchase_usd, mine.price_usd, api.price_usd, tokens, mine.hours, api.provider)
        for api in offers[:1]
    ]
    why = "its prices are for answers, not for training" if settings.training else f"no price for {size} is known"
    basis = "a million tokens in and out, list prices" if offers else why
    return Cost(
        size, tokens_in, tokens_out, watts, settings.watts_basis, mine, tuple(bills), tuple(offers), basis, tuple(evens)
    )


def _cheapest(bills: list[RentedCost], prices: Prices) -> list[RentedCost]:
    """The lowest bill by the hour and the lowest by the month; `bills` are sorted."""
    by = {per: [bill for bill in bills if prices.offer(bill.name).per == per] for per in ("hour", "month")}
    return [some[0] for some in by.values() if some]


def _bills(hours: float, offers: list[Offer], prices: Prices, settings: Settings) -> list[RentedCost]:
    """Each machine's bill, for the hours that a plan gave it or else for those of this machine."""
    for name in settings.rented_hours:
        prices.offer(name)
    bills = []
    for offer in offers:
        bill = rented(settings.rented_hours.get(offer.name, hours), offer, settings.hours_a_month)
        said = "as planned" if offer.name in settings.rented_hours else "as here"
        bills.append(RentedCost(**asdict(bill) | {"basis": f"{said}; {bill.basis}"}))
    return bills


def claims(prices: Prices, on: date) -> list[Claim]:
    """The two prices that this project was begun with, beside today's."""
    server = prices.offer("server-20gb")
    if server.per != "month":
        raise InputError("rented 'server-20gb': per is 'hour'", fix="Give it by the month, or another name.")
    rows = [Claim("rented 20 GB server, a month", "$200", f"${server.price_usd:,.0f}", server.basis)]
    for size in SPECS:
        offers = token_prices(size, prices, on)
        low = min((o.usd_per_million_tokens_in for o in offers), default=None)
        high = max((o.usd_per_million_tokens_out for o in offers), default=None)
        today = "no offer known" if low is None else f"${low:.2f} in to ${high:.2f} out, {len(offers)} offers"
        basis = "; ".join(dict.fromkeys(o.basis for o in offers)) or "no price known"
        rows.append(Claim(f"hosted {size}, a million tokens", "$0.50 to $2", today, basis))
    return rows


def claims_lines(rows: list[Claim]) -> list[str]:
    """The claims as a table of three columns."""
    table = [("what", "claimed", "today"), *((row.what, row.claimed, row.today) for row in rows)]
    first, second = (max(len(line[i]) for line in table) for i in (0, 1))
    return [f"{what:<{first}}  {claimed:<{second}}  {today}" for what, claimed, today in table]


def _money(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 1 else f"${usd:.4f}" if usd >= 0.001 else f"${usd:.2g}"


def _per_million(offer: HostedCost) -> str:
    return f"${offer.usd_per_million_tokens_in:.3g}/${offer.usd_per_million_tokens_out:.3g}"


def _hours(hours: float) -> str:
    seconds = hours * 3600
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if seconds >= 60 else f"{seconds:.3g} s"


def _tokens(count: float) -> str:
    return f"{count / 1e6:.3g}M" if count >= 1e6 else f"{count:,.0f}"
