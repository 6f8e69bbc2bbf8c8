"""What hosted APIs ask for Gemma 3: the data that the library genai-prices carries, read offline."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time

from gemwright.errors import InputError
from gemwright.plan.price_files import Prices, TokenPrice, bounded
from gemwright.spec import SPECS

# gemma-3-27b-it, google.gemma-3-4b-it, databricks-gemma-3-12b; not Gemma 3n, and no one's fine-tune.
_MODEL = re.compile(r"(?:google/|google\.|databricks-|@cf/google/)?gemma-3-(\d+b)(?:-it)?")
MOST_TOKENS = 1e15


@dataclass(frozen=True)
class HostedCost:
    """What `provider` asks for the job's tokens."""

    provider: str
    price_usd: float
    usd_per_million_tokens_in: float
    usd_per_million_tokens_out: float
    basis: str


def check_tokens(tokens_in: float, tokens_out: float) -> None:
    """Raises InputError unless both counts are sensible and there is at least one token."""
    bounded(tokens_in, "tokens_in", "tokens", 0, MOST_TOKENS)
    bounded(tokens_out, "tokens_out", "tokens", 0, MOST_TOKENS)
    if not tokens_in + tokens_out:
        raise InputError("tokens_in and tokens_out are both 0 tokens", fix="Give at least one token.")


def check_size(size: str) -> str:
    """`size` if it is one of the five. Raises InputError."""
    if size not in SPECS:
        raise InputError(f"size {size!r:.60} is unknown", fix=f"Known: {', '.join(SPECS)}.")
    return size


def hosted(tokens_in: float, tokens_out: float, size: str, prices: Prices, on: date) -> list[HostedCost]:
    """What each provider asks for so many tokens on the day `on`, cheapest first; empty where no one sells the size.

    The user's own offers count beside the library's and replace those of the same provider; the figures shipped with
    this program count only where there is neither. Raises InputError.
    """
    check_tokens(tokens_in, tokens_out)
    offers = token_prices(size, prices, on)
    costs = [_cost(tokens_in, tokens_out, offer) for offer in offers]
    return sorted(costs, key=lambda cost: (cost.price_usd, cost.provider))


def _cost(tokens_in: float, tokens_out: float, offer: TokenPrice) -> HostedCost:
    each_in, each_out = offer.usd_per_million_tokens_in, offer.usd_per_million_tokens_out
    usd = (tokens_in * each_in + tokens_out * each_out) / 1e6
    return HostedCost(offer.provider, usd, each_in, each_out, offer.basis)


def token_prices(size: str, prices: Prices, on: date) -> list[TokenPrice]:
    """Every offer for `size` that counts on the day `on`, in no order."""
    check_size(size)
    own = [offer for offer in prices.hosted if offer.size == size]
    named = {offer.provider for offer in own}
    offers = own + [offer for offer in library_prices(size, on) if offer.provider not in named]
    return offers or [offer for offer in prices.hosted_fallback if offer.size == size]


def library_prices(size: str, on: date) -> list[TokenPrice]:
    """The offers of genai-prices: the data inside the installed package, never its updater, so nothing is fetched.

    Offers without a price (free tiers with limits of their own) are left out. The library is imported here, as it takes
    some 0.2 s.
    """
    from genai_prices import Usage, __version__, data_snapshot

    offers = []
    asked = datetime.combine(on, time(12), UTC)
    # A small request: some providers ask more for each token of a very long one.
    usage = Usage(input_tokens=1000, output_tokens=1000)
    for provider in data_snapshot.get_snapshot().providers:
        for model in provider.models:
            found = _MODEL.fullmatch(model.id.lower())
            if found is None or found[1] != size or not model.prices:
                continue
            price = model.calc_price(usage, provider, genai_request_timestamp=asked)
            each_in, each_out = float(price.input_price * 1000), float(price.output_price * 1000)
            if each_in > 0 and each_out > 0:
                basis = f"genai-prices {__version__}, in force on {on}, {model.id} at {provider.name}"
                offers.append(TokenPrice(provider.id, size, each_in, each_out, basis))
    return offers
