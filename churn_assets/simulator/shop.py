"""The built-in shop: its raw tables by day, and what its latent state says of the days to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cached_property

import numpy as np
import pyarrow as pa

from churn_assets.data.tables import RAW_TABLES, TIMESTAMP
from churn_assets.errors import UserError
from churn_assets.simulator.behaviour import Behaviour, Moments
from churn_assets.simulator.customers import Fates, customer_rows, draw_customers, joined, numbered
from churn_assets.simulator.params import Offer, ShopParams
from churn_assets.simulator.randomness import bits, normal, sequences, uniform
from churn_assets.simulator.scenarios import Scenario, effects
from churn_assets.simulator.seasons import calendar

_SECONDS_PER_DAY = 86_400
_DAYS_AT_A_TIME, _CUSTOMER_DAYS_AT_A_TIME = 56, 700_000  # arrays of some megabytes each
_YEAR = 365


class Shop:
    """A simulated shop, a pure function of its parameters, its start and the offers it served.

    Customers arrive, buy in a rhythm of their own, visit without buying, write tickets, have quiet
    spells from which they come back, cool off, and leave. Day d follows from the parameters, d and
    the offers served before d; it is the same whether asked for alone or as part of a range.
    """

    tables = ("customers", "orders", "support_tickets", "logins")

    def __init__(
        self,
        params: ShopParams,
        start: date,
        offers: Sequence[Offer] = (),
        scenario: Scenario | None = None,
    ) -> None:
        """A shop whose record starts on `start`, to which `scenario` happens.

        Raises UserError when an offer has no time zone or went to nobody who was a customer then,
        or the scenario happens before the start.
        """
        self.params = params
        self.start = start
        self._effects = effects(scenario or Scenario(), start)
        self.offers = tuple(offers)
        self._books: _Books | None = None
        if self.offers:
            self._until(start)

    def events(self, table: str, first: date, last: date) -> pa.Table:
        """The events of `table` on the days `first` to `last`, both included.

        Schema of data/tables.py, ordered by (occurred_at, key). Customers who were there before
        the record starts are in the customers table of its first day. Every event is ingested
        within seconds, on its own day.

        Raises UserError for an unknown table, an empty range or days before the start.
        """
        if table not in self.tables:
            raise UserError(f"the shop has no table {table!r}; it has {', '.join(self.tables)}")
        if last < first:
            raise UserError(f"no day lies between {first} and {last}; give the earlier one first")
        if first < self.start:
            raise UserError(f"the shop's record starts on {self.start}; ask for no day before it")
        books = self._until(last)
        begin, end = self._day(first), self._day(last)
        step = _CUSTOMER_DAYS_AT_A_TIME // self.params.customers
        step = min(max(step, 1), _DAYS_AT_A_TIME)
        parts = [
            books.events(table, day, min(day + step - 1, end))
            for day in range(begin, end + 1, step)
        ]
        return pa.concat_tables(parts).combine_chunks()

    def churn_probability(
        self, customer_ids: Sequence[str], cutoff: datetime, horizon_days: int
    ) -> np.ndarray:
        """P(no order in [cutoff, cutoff + horizon)), float64, one for each of `customer_ids`.

        From the latent state each outcome is drawn from: when the customer's next purchases are
        due (its rhythm) and with what chance each is made (standing, cooling off, quiet spells, the
        time of leaving), given the offers served before the cutoff. Each due purchase is then made
        or not by one independent draw, and this is the product of the chances that it is not. What
        happened before the cutoff adds nothing to it, so nobody who sees events only can be
        expected to rank better: its AUC is the oracle AUC.

        Raises UserError for an unknown customer, one who arrives after the cutoff, an empty
        horizon, or a cutoff that is not a UTC midnight after the start.
        """
        if cutoff.tzinfo is None or cutoff.astimezone(UTC).time() != time.min:
            raise UserError(f"cutoff {cutoff} is not midnight UTC; a cutoff is where a day begins")
        if horizon_days < 1:
            raise UserError(f"a horizon of {horizon_days} days is empty; give at least 1")
        day = self._day(cutoff.astimezone(UTC).date())
        if day < 1:
            raise UserError(f"the shop's record starts on {self.start}; {cutoff} has no day before")
        behaviour = self._until(self.start + timedelta(days=day + horizon_days)).behaviour
        rows = customer_rows(behaviour.customers, customer_ids)
        late = behaviour.customers.arrival_day[rows] >= day
        if late.any():
            who = customer_ids[int(np.argmax(late))]
            raise UserError(f"{who} arrives after {cutoff}; ask for customers known by then")
        return behaviour.no_order_probability(rows, day, horizon_days)

    def _day(self, day: date) -> int:
        return (day - self.start).days

    def _until(self, last: date) -> _Books:
        """The books with everyone up to at least `last` and the last offer.

        Opened for a year more at a time, so that a shop that ticks is not redrawn every day.
        """
        served = (o.served_at.astimezone(UTC).date() for o in self.offers if o.served_at.tzinfo)
        needed = max([self._day(last), *map(self._day, served)])
        if self._books is None or self._books.last < needed:
            end = (needed // _YEAR + 1) * _YEAR
            params = self.params
            ordinary = calendar(self.start, -params.history_days, end, params.growth_per_year)
            days = self._effects.on_days(ordinary)
            customers = draw_customers(params, days, self._effects)
            fates = Fates(params, self.start, customers, self.offers)
            behaviour = Behaviour(params, days, customers, fates, self._effects)
            self._books = _Books(self.start, end, behaviour)
        return self._books


@dataclass(frozen=True)
class _Books:
    """The shop's record: the behaviour of everyone up to day `last` (from `start`), as tables."""

    start: date
    last: int
    behaviour: Behaviour

    def events(self, table: str, first: int, last: int) -> pa.Table:
        """The events of `table` on days `first` to `last`, ordered by (occurred_at, key)."""
        if table == "customers":
            return self._customers(first, last)
        if table == "orders":
            return self._orders(first, last)
        moments = (
            self.behaviour.tickets(first, last)
            if table == "support_tickets"
            else _all_logins(self.behaviour.visits(first, last), self.behaviour.orders(first, last))
        )
        recorded = self.behaviour.effects.recorded(table, moments.days)
        moments = moments if recorded is None else moments.take(recorded)
        seconds = _second_of_day(moments.fractions)
        order = _time_order(moments, seconds, first)
        return self._table(table, moments.take(order), seconds[order])

    def _customers(self, first: int, last: int) -> pa.Table:
        customers = self.behaviour.customers
        arrival = customers.arrival_day
        begin = 0 if first == 0 else np.searchsorted(arrival, first)
        rows = np.arange(begin, np.searchsorted(arrival, last, side="right"))
        there = arrival[rows] < 0
        moments = Moments(
            rows,
            np.zeros_like(rows),
            np.where(there, 0, arrival[rows]),
            np.where(there, 0.0, customers.arrival_fraction[rows]),
        )
        seconds = np.where(there, 0, _second_of_day(moments.fractions))
        order = _time_order(moments, seconds, first)
        return self._table("customers", moments.take(order), seconds[order])

    def _orders(self, first: int, last: int) -> pa.Table:
        behaviour = self.behaviour
        orders = behaviour.orders(first, last)
        states = self._order_sequences[orders.rows]
        # The customer logs in, and orders some minutes later, still on that day.
        minutes = uniform(bits(states, 2 * orders.places + 1))
        seconds = _second_of_day(orders.fractions) + 60 + (840 * minutes).astype(np.int64)
        seconds = np.minimum(seconds, _SECONDS_PER_DAY - 1)
        spread = behaviour.params.order_spread * normal(bits(states, 2 * orders.places))
        value = np.exp(behaviour.customers.log_basket[orders.rows] + spread)
        value *= behaviour.calendar.order_value[orders.days - behaviour.calendar.first]
        amount = np.maximum(np.rint(100.0 * value), 1.0).astype(np.int64)
        order = _time_order(orders, seconds, first)
        return self._table("orders", orders.take(order), seconds[order], amount[order])

    def _table(
        self, name: str, moments: Moments, seconds: np.ndarray, amount: np.ndarray | None = None
    ) -> pa.Table:
        """The raw table `name`: `moments` with their seconds of the day, already in order."""
        customer_id = self._ids["c"].take(pa.array(moments.rows))
        ids = [customer_id]
        if name != "customers":
            of_customer = self._ids[name[0]].take(pa.array(moments.rows))
            place = numbered(np.arange(moments.places.max(initial=0) + 1), 5)
            of_place = place.take(pa.array(moments.places))
            ids.insert(0, joined(of_customer, of_place))
        delay = bits(self._delay_sequences[moments.rows], moments.places) % np.uint64(30)
        known = np.minimum(seconds + 1 + delay.astype(np.int64), _SECONDS_PER_DAY - 1)
        midnight = (moments.days + (self.start - date(1970, 1, 1)).days) * _SECONDS_PER_DAY
        times = [
            pa.array((midnight + second) * 1_000_000, type=pa.int64()).view(TIMESTAMP)
            for second in (seconds, known)
        ]
        amounts = [] if amount is None else [pa.array(amount)]
        return pa.Table.from_arrays([*ids, *times, *amounts], schema=RAW_TABLES[name].schema)

    @cached_property
    def _ids(self) -> dict[str, pa.Array]:
        return {prefix: self.behaviour.customers.ids(prefix) for prefix in "cosl"}

    @cached_property
    def _order_sequences(self) -> np.ndarray:
        behaviour = self.behaviour
        return sequences(behaviour.params.seed, "order values", behaviour.customers.number)

    @cached_property
    def _delay_sequences(self) -> np.ndarray:
        behaviour = self.behaviour
        return sequences(behaviour.params.seed, "ingestion", behaviour.customers.number)


def _all_logins(visits: Moments, orders: Moments) -> Moments:
    """Visits and the logins that lead to orders, in one sequence for each customer."""
    return Moments(
        np.concatenate([visits.rows, orders.rows]),
        np.concatenate([2 * visits.places, 2 * orders.places + 1]),
        np.concatenate([visits.days, orders.days]),
        np.concatenate([visits.fractions, orders.fractions]),
    )


def _second_of_day(fractions: np.ndarray) -> np.ndarray:
    """The second of the day (int64): even time becomes busy middays and quiet nights."""
    of_day = fractions + 0.12 * np.sin(2.0 * np.pi * fractions)
    return np.minimum((of_day * _SECONDS_PER_DAY).astype(np.int64), _SECONDS_PER_DAY - 1)


def _time_order(moments: Moments, seconds: np.ndarray, first: int) -> np.ndarray:
    """The order by second, then customer, then place, which is that of the identifiers.

    The three in one unsigned number: 23 bits of seconds (97 days), 23 of rows, 18 of places.
    """
    since = ((moments.days - first) * _SECONDS_PER_DAY + seconds).astype(np.uint64)
    key = (since << np.uint64(41)) | (moments.rows.astype(np.uint64) << np.uint64(18))
    return np.argsort(key | moments.places.astype(np.uint64))
