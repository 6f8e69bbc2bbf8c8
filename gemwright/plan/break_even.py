"""After how many hours or tokens a machine of one's own is cheaper for good than a rented one or a hosted API."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemwright.errors import InputError
from gemwright.plan.price_files import Offer, bounded

HOURS_A_YEAR = 8766.0
MOST_YEARS = 10.0


@dataclass(frozen=True)
class BreakEven:
    """Owning is cheaper beyond `hours` of work (and `tokens`, where tokens are what is paid for); None: never."""

    against: str
    hours: float | None
    tokens: float | None
    basis: str

    @property
    def words(self) -> str:
        """One phrase; a break-even beyond the machine's likely life is said to be one."""
        if self.hours is None:
            return f"never against {self.against}: electricity alone costs as much or more"
        if self.hours == 0:
            return f"at once against {self.against}"
        tokens = f"{_count(self.tokens)} tokens, " if self.tokens is not None else ""
        if self.hours > MOST_YEARS * HOURS_A_YEAR:
            years = f"{_count(self.hours / HOURS_A_YEAR)} years day and night"
            return f"in practice never against {self.against}: after {tokens}{years}"
        return f"against {self.against} after {tokens}{_count(self.hours)} hours of work"


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def check_purchase(purchase_usd: float) -> None:
    """Raises InputError unless `purchase_usd` is 0 (the machine is there) or a sensible price."""
    bounded(purchase_usd, "purchase_usd", "USD", 0, 1e7)


def rented_usd(hours: float, offer: Offer, hours_a_month: float) -> float:
    """The bill for `hours` of work: by the hour exactly, by the month every month begun, and the set-up fee.

    A machine rented by the month is paid whether it works or not; `hours_a_month` (at most 730) is how long it works.
    """
    bounded(hours, "hours", "h", 1e-9, 1e6)
    bounded(hours_a_month, "hours_a_month", "h", 1, 730)
    units = hours if offer.per == "hour" else math.ceil(hours / hours_a_month)
    return offer.setup_usd + units * offer.price_usd


def against_rent(
    purchase_usd: float, usd_per_hour_here: float, offer: Offer, hours_a_month: float, hours_there: float = 1.0
) -> BreakEven:
    """Hours of work here after which `purchase_usd` and electricity stay below the rent of `offer`.

    The rented machine needs `hours_there` for an hour's work here. By the hour: purchase - set-up fee = hours x (rent x
    hours_there - electricity). By the month the bill rises in steps: from the beginning of the first month at whose end
    owning is cheaper.
    """
    check_purchase(purchase_usd)
    bounded(hours_a_month, "hours_a_month", "h", 1, 730)
    bounded(hours_there, "hours_there", "h an hour here", 1e-6, 1e6)
    hours_a_unit = (1.0 if offer.per == "hour" else hours_a_month) / hours_there
    saved = offer.price_usd - hours_a_unit * usd_per_hour_here
    basis = f"${purchase_usd:,.2f} to buy, ${usd_per_hour_here:.4f} of electricity an hour; {offer.basis}"
    basis += f"; {hours_a_month:g} hours of work a month" if offer.per == "month" else ""
    basis += f"; an hour's work here takes {hours_there:.3g} h there"
    if saved <= 0:
        return BreakEven(offer.name, None, None, basis)
    units = max(purchase_usd - offer.setup_usd, 0.0) / saved
    return BreakEven(offer.name, (units if offer.per == "hour" else math.floor(units)) * hours_a_unit, None, basis)


def against_api(
    purchase_usd: float, job_usd_here: float, job_usd_api: float, job_tokens: float, job_hours: float, provider: str
) -> BreakEven:
    """Tokens, at the job's own mix of in and out, after which owning is cheaper than `provider`; None where never."""
    check_purchase(purchase_usd)
    if job_tokens <= 0:
        raise InputError("tokens of the job are 0", fix="Give at least one token.")
    saved = job_usd_api - job_usd_here
    basis = f"${purchase_usd:,.2f} to buy; a million tokens of this mix ${job_usd_here / job_tokens * 1e6:.4f} of "
    basis += f"electricity here, ${job_usd_api / job_tokens * 1e6:.4f} at {provider}"
    if saved <= 0:
        return BreakEven(provider, None, None, basis)
    jobs = purchase_usd / saved
    return BreakEven(provider, jobs * job_hours, jobs * job_tokens, basis)
