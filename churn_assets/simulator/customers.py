"""The customers of the shop: who arrives when, how each behaves, and when each will leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date
from math import gamma

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.errors import UserError
from churn_assets.simulator.params import Offer, ShopParams
from churn_assets.simulator.randomness import bits, normal, sequences, uniform, uniform_pair
from churn_assets.simulator.scenarios import Effects
from churn_assets.simulator.seasons import Calendar

# Visits are laid out more densely than they happen, so that what remains after thinning is close to
# Poisson.
VISIT_CHANCE = 0.6
_FADING = 60.0  # the time beyond their last order for which leavers count as customers, roughly
_SUDDEN_DAYS = 3.0
_NEW_MARKET_GAP, _NEW_MARKET_LIFETIME = 24.0, 0.6
_SHORTEST_VISIT_GAP, _SHORTEST_RHYTHM, _LONGEST_RHYTHM = 0.1, 3.0, 45.0


@dataclass(frozen=True)
class Customers:
    """The latent state of every customer ever seen, one entry each, ordered by arrival.

    Days count from the start of the record and may be negative; times are days with fractions.

    number: int64, the customer's number, from which all its random sequences derive.
    arrival_day, arrival_fraction: when the customer arrives.
    leaves: when the customer buys for the last time, if no offer changes that.
    cooling: days of cooling off before that.
    grievance: bool, whether tickets rise while cooling off.
    order_gap, visit_gap, ticket_gap: days between *potential* events; each becomes an event with a
        chance that depends on the customer's state at that time.
    regularity: spread of potential orders about their due time, as a share of order_gap.
    follow_through: chance that a potential order of a customer in good standing is placed.
    log_basket: mean of the log order value (currency units).
    persuadable: chance that one offer puts off leaving.
    """

    number: np.ndarray
    arrival_day: np.ndarray
    arrival_fraction: np.ndarray
    leaves: np.ndarray
    cooling: np.ndarray
    grievance: np.ndarray
    order_gap: np.ndarray
    visit_gap: np.ndarray
    ticket_gap: np.ndarray
    regularity: np.ndarray
    follow_through: np.ndarray
    log_basket: np.ndarray
    persuadable: np.ndarray

    def __len__(self) -> int:
        return len(self.number)

    def ids(self, prefix: str = "c") -> pa.Array:
        """One readable identifier a customer, such as c-0012345."""
        return joined(pa.scalar(prefix), numbered(self.number, 7))


def numbered(numbers: np.ndarray, width: int) -> pa.Array:
    """Decimal strings, padded with zeros, so that they sort as the numbers do."""
    digits = pa.array(numbers).cast(pa.string())
    return pc.call_function("utf8_lpad", [digits], pc.PadOptions(width, "0"))


def joined(left: pa.Array | pa.Scalar, right: pa.Array) -> pa.Array:
    """Each pair of strings with a hyphen between them."""
    return pc.call_function("binary_join_element_wise", [left, right, "-"])


def draw_customers(params: ShopParams, days: Calendar, happens: Effects) -> Customers:
    """Everyone who is still a customer at the start or arrives within the calendar.

    A longer calendar adds customers and changes none.
    """
    number, arrival_day = _arrivals(params, days)

    def draw(purpose: str) -> np.ndarray:
        return bits(sequences(params.seed, purpose, number))

    arrival_fraction = 0.001 + 0.998 * uniform(draw("arrival"))
    rhythm_choice, regularity = uniform_pair(draw("rhythm"))
    edges = np.cumsum(params.rhythm_shares) / np.sum(params.rhythm_shares)
    rhythm = np.asarray(params.rhythms)[np.searchsorted(edges[:-1], rhythm_choice, side="right")]
    gap = rhythm * np.exp(params.rhythm_spread * normal(draw("rhythm spread")))
    gap = np.clip(gap, _SHORTEST_RHYTHM, _LONGEST_RHYTHM)
    newcomers = happens.newcomers(arrival_day, params.seed, number)
    gap = np.where(newcomers, _NEW_MARKET_GAP, gap)
    low, high = params.follow_through
    follow_choice, persuadable = uniform_pair(draw("character"))
    # People who buy less often buy more at a time, and look in less often in between.
    value = params.basket_spread * normal(draw("basket"))
    log_basket = np.log(params.basket_value) + 0.5 * np.log(gap / 10.0) + value
    visits = params.visits * (10.0 / gap) ** 0.3
    visits = visits * np.exp(params.visits_spread * normal(draw("visits")))
    tickets = params.tickets * np.exp(params.tickets_spread * normal(draw("tickets")))

    shape = params.lifetime_shape
    scale = params.mean_lifetime / gamma(1 + 1 / shape)
    loyalty = np.exp(params.loyalty_of_value * value)
    lifetime = scale * loyalty * (-np.log(uniform(draw("lifetime")))) ** (1 / shape)
    lifetime = np.where(newcomers, _NEW_MARKET_LIFETIME * lifetime, lifetime)
    planned = arrival_day + arrival_fraction + lifetime
    leaves = happens.leaving(arrival_day, planned, params.seed, number)
    lifetime = leaves - arrival_day - arrival_fraction
    sudden, grievance = uniform_pair(draw("leaving"))
    cooling = params.cooling_days * np.exp(params.cooling_spread * normal(draw("cooling")))
    cooling = np.where(sudden < params.sudden_share, _SUDDEN_DAYS, cooling)

    # Who leaves because of what happens cools off from then on.
    cooling = np.where(leaves < planned, np.minimum(cooling, leaves - happens.day), cooling)

    drawn = Customers(
        number=number,
        arrival_day=arrival_day,
        arrival_fraction=arrival_fraction,
        leaves=leaves,
        cooling=np.minimum(cooling, 0.8 * lifetime),
        grievance=grievance < params.grievance_share,
        order_gap=gap,
        visit_gap=np.maximum(VISIT_CHANCE / visits, _SHORTEST_VISIT_GAP),
        ticket_gap=1.0 / (params.grievance_factor * tickets),
        regularity=0.3 + 0.69 * regularity,
        follow_through=low + (high - low) * follow_choice,
        log_basket=log_basket,
        persuadable=params.persuasion * (1.0 - np.sqrt(persuadable)),
    )
    here = (drawn.arrival_day >= 0) | (drawn.leaves > 0)
    return Customers(**{name: values[here] for name, values in vars(drawn).items()})


def _arrivals(params: ShopParams, days: Calendar) -> tuple[np.ndarray, np.ndarray]:
    """Number and day of every arrival: a Poisson count a day, by its normal approximation."""
    expected = days.arrivals * params.customers / (params.mean_lifetime + _FADING)
    places = np.arange(len(expected)) + days.first
    state = sequences(params.seed, "arrivals", np.zeros(1, dtype=np.int64))
    noise = normal(bits(state, 2 * places))
    rounding = uniform(bits(state, 2 * places + 1))
    counts = np.floor(np.maximum(expected + np.sqrt(expected) * noise, 0.0) + rounding)
    arrival_day = np.repeat(places, counts.astype(np.int64))
    return np.arange(len(arrival_day)), arrival_day


class Fates:
    """When each customer leaves, as it stands on each day, given the offers served before that day.

    An offer served on day e counts from day e + 1. If it works it puts off leaving, and the
    cooling off before it, by some time; it works with the customer's persuadability, at most once
    a day, and not on those who have left already.
    """

    def __init__(
        self, params: ShopParams, start: date, customers: Customers, offers: Sequence[Offer]
    ) -> None:
        self._leaves = customers.leaves
        self._keys: np.ndarray | None = None
        self.last_leave = customers.leaves
        if offers:
            self._apply(params, customers, _served_days(start, customers, offers))

    def leaves(self, rows: np.ndarray, days: np.ndarray | int) -> np.ndarray:
        """When the customers at `rows` leave, as things stand at the beginning of `days`."""
        if self._keys is None:
            return self._leaves[rows]
        version = np.searchsorted(self._keys, _key(rows, days), side="right") - 1
        return self._leaves[version]

    def _apply(self, params: ShopParams, customers: Customers, served: np.ndarray) -> None:
        rows, days = served[:, 0], served[:, 1]
        states = sequences(params.seed, "offer", customers.number[rows])
        luck, lasting = uniform_pair(bits(states, days))
        extra = -params.offer_days * np.log(lasting)
        works = luck < customers.persuadable[rows]
        latest = customers.leaves.copy()
        changed: list[tuple[int, int, float]] = []
        for row, day, more in zip(rows[works], days[works], extra[works], strict=True):
            if latest[row] > day + 1:
                latest[row] += more
                changed.append((row, day + 1, latest[row]))
        if changed:
            who, since, leaves = (np.asarray(column) for column in zip(*changed, strict=True))
            keys = np.concatenate([_key(np.arange(len(customers)), _FOREVER), _key(who, since)])
            order = np.argsort(keys)
            self._keys = keys[order]
            self._leaves = np.concatenate([customers.leaves, leaves])[order]
            self.last_leave = latest


_FOREVER = -(2**19)  # days; before any day of any shop


def _key(rows: np.ndarray, days: np.ndarray | int) -> np.ndarray:
    return rows * 2**20 + (np.asarray(days, dtype=np.int64) - _FOREVER)


def _served_days(start: date, customers: Customers, offers: Sequence[Offer]) -> np.ndarray:
    """(row, day) of each offer, int64 of shape (n, 2), ordered, one a customer a day."""
    if any(offer.served_at.tzinfo is None for offer in offers):
        raise UserError("offer: served_at has no time zone; give it in UTC")
    rows = customer_rows(customers, [offer.customer_id for offer in offers])
    days = np.array([(o.served_at.astimezone(UTC).date() - start).days for o in offers])
    early = (days < 0) | (days < customers.arrival_day[rows])
    if early.any():
        offer = offers[int(np.argmax(early))]
        raise UserError(
            f"offer: {offer.customer_id} was not a customer yet on {offer.served_at.date()}; "
            "check the offer's customer and time"
        )
    return np.unique(np.stack([rows, days], axis=1), axis=0)


def customer_rows(customers: Customers, customer_ids: Sequence[str] | pa.Array) -> np.ndarray:
    """The places (int64) of `customer_ids` in `customers`.

    Raises UserError for an identifier the shop has not given out.
    """
    wanted = pa.array(customer_ids, type=pa.string())
    rows = pc.call_function("index_in", [wanted], pc.SetLookupOptions(customers.ids()))
    if rows.null_count:
        unknown = wanted.filter(rows.is_null())[0].as_py()
        raise UserError(
            f"the shop has no customer {unknown!r}; use the customer_id of its customers table"
        )
    return rows.to_numpy().astype(np.int64)
