"""What a shop is made of: its size and how its customers behave."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime

from churn_assets.errors import UserError


@dataclass(frozen=True)
class Offer:
    """A retention offer a customer was served. `served_at` is timezone-aware."""

    customer_id: str
    served_at: datetime


@dataclass(frozen=True)
class ShopParams:
    """A shop that sells what runs out: food, coffee, pet supplies.

    Rates are per day, times in days. The defaults are a shop with about 12,000 customers who bought
    in the last 90 days.

    seed: another seed is another shop of the same kind.
    customers: about how many customers have an order in the last 90 days when the record starts.
    growth_per_year: yearly growth of the arrivals.
    history_days: how long the shop had been open when the record starts.
    mean_lifetime, lifetime_shape: Weibull time from arrival to leaving; a shape below 1 means that
        many leave early and the loyal stay.
    loyalty_of_value: how much longer customers with large baskets stay (exponent).
    cooling_days, cooling_spread: lognormal median and sigma of the time over which a customer who
        is going to leave cools off.
    sudden_share: share of customers who leave within days, without cooling off.
    rhythms, rhythm_shares, rhythm_spread: how often people buy (days between orders), as a mixture
        of rhythms with a lognormal spread around each.
    follow_through: lowest and highest chance that a customer buys when it is due.
    basket_value, basket_spread, order_spread: lognormal order values: median in currency units of
        a customer who buys every ten days, sigma between customers and between orders of one.
    visits, visits_spread: lognormal median and sigma of visits without an order.
    tickets, tickets_spread: the same for support tickets.
    grievance_share, grievance_factor: share of leavers with a grievance, and how many times more
        tickets these write while they cool off.
    quiet_chance, quiet_days: chance that a quarter has a quiet spell (travel, illness, a full
        pantry), and the longest spell; customers come back from it.
    persuasion: scales the chance that an offer works on a customer (0: never).
    offer_days: by how many days on average an offer that works puts off leaving.
    """

    seed: int = 42
    customers: int = 12_000
    growth_per_year: float = 0.04
    history_days: int = 1460
    mean_lifetime: float = 400.0
    lifetime_shape: float = 0.9
    loyalty_of_value: float = 0.25
    cooling_days: float = 42.0
    cooling_spread: float = 0.4
    sudden_share: float = 0.06
    rhythms: tuple[float, ...] = (7.0, 14.0, 21.0)
    rhythm_shares: tuple[float, ...] = (0.6, 0.32, 0.08)
    rhythm_spread: float = 0.15
    follow_through: tuple[float, float] = (0.75, 0.97)
    basket_value: float = 42.0
    basket_spread: float = 0.45
    order_spread: float = 0.4
    visits: float = 0.3
    visits_spread: float = 0.45
    tickets: float = 0.005
    tickets_spread: float = 0.5
    grievance_share: float = 0.5
    grievance_factor: float = 12.0
    quiet_chance: float = 0.15
    quiet_days: float = 24.0
    persuasion: float = 1.0
    offer_days: float = 150.0

    def __post_init__(self) -> None:
        """Refuse what no shop can have. Raises UserError naming the parameter."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _AT_LEAST_ZERO and not value >= 0:
                raise UserError(f"shop: {field.name} is {value}; give a number of at least 0")
            if field.name in _ABOVE_ZERO and not value > 0:
                raise UserError(f"shop: {field.name} is {value}; give a number above 0")
            if field.name in _SHARES and not 0 <= value <= 1:
                raise UserError(f"shop: {field.name} is {value}; give a number from 0 to 1")
        if self.customers > _MOST_CUSTOMERS:
            raise UserError(f"shop: customers is {self.customers}; {_MOST_CUSTOMERS} at most")
        low, high = self.follow_through
        if not 0 < low <= high <= 1:
            raise UserError("shop: follow_through is (lowest, highest), both above 0, at most 1")
        if len(self.rhythms) != len(self.rhythm_shares) or not self.rhythms:
            raise UserError("shop: rhythms and rhythm_shares need one entry for each rhythm")
        if min(self.rhythms) < 2 or min(self.rhythm_shares) < 0 or not sum(self.rhythm_shares):
            raise UserError("shop: rhythms are at least 2 days, rhythm_shares at least 0")
        if self.grievance_factor < 1:
            raise UserError("shop: grievance_factor is below 1; give at least 1")


_MOST_CUSTOMERS = 2_000_000  # identifiers have seven digits
_ABOVE_ZERO = {
    "customers",
    "history_days",
    "mean_lifetime",
    "lifetime_shape",
    "cooling_days",
    "basket_value",
    "visits",
    "tickets",
    "quiet_days",
    "offer_days",
}
_AT_LEAST_ZERO = {
    "seed",
    "loyalty_of_value",
    "cooling_spread",
    "rhythm_spread",
    "basket_spread",
    "order_spread",
    "visits_spread",
    "tickets_spread",
}
_SHARES = {"sudden_share", "grievance_share", "quiet_chance", "persuasion"}
