"""What customers do: when each potential order, visit and ticket lies, and whether it happens.

Potential events are laid out once for each customer: the customer's time, on the clock of that
kind of event, is cut into cells of the customer's own length, with one potential event at a random
place in each. An event happens with a chance that follows from the customer's state at that time.
So any day can be had without the days before it, and what changes the fate of one customer moves
no event of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from churn_assets.simulator.customers import VISIT_CHANCE, Customers, Fates
from churn_assets.simulator.params import ShopParams
from churn_assets.simulator.randomness import bits, sequences, uniform_pair
from churn_assets.simulator.scenarios import Effects
from churn_assets.simulator.seasons import Calendar, Clock

_AFTERLIFE = 60.0  # days for which customers who left still look in now and then
_AFTERLIFE_VISITS = 0.04
_QUARTER = 91.0
_QUIET_ORDERS, _QUIET_VISITS = 0.05, 0.3
# After a shift: visits of those in good standing, and the chance of their potential tickets.
_LOYAL_VISITS, _LOYAL_TICKETS = 0.25, 0.35
_WHOLE_WIDTH = 0.999  # potential events stay clear of the edges of their cells


@dataclass(frozen=True)
class Moments:
    """Events, one entry each: the customer's row, the event's place in the customer's sequence,
    the day (from the start) and the fraction of it that has passed."""

    rows: np.ndarray
    places: np.ndarray
    days: np.ndarray
    fractions: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def when(self) -> np.ndarray:
        """Days since the start, with fractions."""
        return self.days + self.fractions

    def take(self, chosen: np.ndarray) -> Moments:
        """The events a mask or an index chooses."""
        return Moments(*(values[chosen] for values in vars(self).values()))


@dataclass(frozen=True)
class _Layout:
    """Where the potential events of each customer lie.

    clock: time, faster on busy days. origin: reading at which the customer's cell 0 begins.
    gap: length of the cells. width: share of a cell, about its middle, in which the event may lie.
    arrival: reading at which potential event 0 lies, where that is not left to chance.
    """

    clock: Clock
    origin: np.ndarray
    gap: np.ndarray
    width: np.ndarray
    states: np.ndarray
    arrival: np.ndarray | None = None


@dataclass(frozen=True)
class Behaviour:
    """The behaviour of everyone in the shop, as it follows from their latent state."""

    params: ShopParams
    calendar: Calendar
    customers: Customers
    fates: Fates
    effects: Effects

    def orders(self, first: int, last: int) -> Moments:
        """The orders of days `first` to `last`, by customer and place."""
        moments, luck = self._potential(self._present(first, last), self._due, first, last)
        leaves = self.fates.leaves(moments.rows, moments.days)
        return moments.take(luck < self._order_chance(moments, leaves))

    def visits(self, first: int, last: int) -> Moments:
        """The visits of days `first` to `last` that lead to no order, by customer and place."""
        at_most = VISIT_CHANCE if self._shifts is None else 1.0
        moments, luck = self._potential(
            self._present(first, last), self._browsing, first, last, at_most=at_most
        )
        leaves = self.fates.leaves(moments.rows, moments.days)
        when = moments.when
        # Interest goes before the orders do, and a little curiosity outlives them.
        standing = self._standing(moments.rows, when, leaves)
        interest = np.maximum(standing * standing, _AFTERLIFE_VISITS * (when < leaves + _AFTERLIFE))
        new = self._shifted(moments.rows, when)
        looking = np.where(standing < 1.0, 1.0 / VISIT_CHANCE, _LOYAL_VISITS) * (standing > 0)
        interest = np.where(new, looking, interest)
        interest *= np.where(self._quiet(moments.rows, when), _QUIET_VISITS, 1.0)
        return moments.take(luck < VISIT_CHANCE * interest)

    def tickets(self, first: int, last: int) -> Moments:
        """The support tickets of days `first` to `last`, by customer and place."""
        moments, luck = self._potential(self._present(first, last), self._trouble, first, last)
        leaves = self.fates.leaves(moments.rows, moments.days)
        standing = self._standing(moments.rows, moments.when, leaves)
        aggrieved = self.customers.grievance[moments.rows] & (standing < 1.0) & (standing > 0.0)
        usual = standing / self.params.grievance_factor
        chance = np.where(aggrieved, 1.0, usual)
        new = self._shifted(moments.rows, moments.when)
        chance = np.where(new, np.where(standing < 1.0, 0.0, _LOYAL_TICKETS), chance)
        return moments.take(luck < chance)

    def no_order_probability(self, rows: np.ndarray, day: int, horizon_days: int) -> np.ndarray:
        """P(no order on the `horizon_days` days from `day` on), float64, shape of `rows`.

        Each due purchase in that time is made or not by one independent draw, so this is the
        product of the chances that they are not, given the offers served before `day`.
        """
        customers, index = np.unique(rows, return_inverse=True)
        due, _ = self._potential(customers, self._due, day, day + horizon_days - 1)
        chance = self._order_chance(due, self.fates.leaves(due.rows, day))
        log_none = np.log1p(-np.minimum(chance, 1.0 - 1e-12))
        at = np.searchsorted(customers, due.rows)
        return np.exp(np.bincount(at, weights=log_none, minlength=len(customers)))[index]

    @cached_property
    def _shifts(self) -> np.ndarray | None:
        return self.effects.shifts(self.params.seed, self.customers.number)

    def _shifted(self, rows: np.ndarray, when: np.ndarray) -> np.ndarray:
        """Who behaves in the new way by then."""
        if self._shifts is None:
            return np.zeros(len(rows), dtype=bool)
        return when >= self._shifts[rows]

    @cached_property
    def _due(self) -> _Layout:
        # The first purchase is the arrival itself: cell 0 is centred on it.
        clock, gap = Clock(self.calendar.first, self.calendar.orders), self.customers.order_gap
        arrival = self._arrival(clock)
        states = self._sequences("orders")
        return _Layout(
            clock, arrival - gap / 2, gap, self.customers.regularity, states, arrival=arrival
        )

    @cached_property
    def _browsing(self) -> _Layout:
        clock = Clock(self.calendar.first, self.calendar.visits)
        return self._anywhere("visits", clock, self.customers.visit_gap)

    @cached_property
    def _trouble(self) -> _Layout:
        clock = Clock(self.calendar.first, self.calendar.tickets)
        return self._anywhere("tickets", clock, self.customers.ticket_gap)

    @cached_property
    def _quiet_sequences(self) -> np.ndarray:
        return self._sequences("quiet spells")

    def _anywhere(self, purpose: str, clock: Clock, gap: np.ndarray) -> _Layout:
        width = np.full(len(gap), _WHOLE_WIDTH)
        return _Layout(clock, self._arrival(clock), gap, width, self._sequences(purpose))

    def _arrival(self, clock: Clock) -> np.ndarray:
        return clock.reading(self.customers.arrival_day, self.customers.arrival_fraction)

    def _sequences(self, purpose: str) -> np.ndarray:
        return sequences(self.params.seed, purpose, self.customers.number)

    def _present(self, first: int, last: int) -> np.ndarray:
        """Rows of the customers who may do something on days `first` to `last`."""
        arrived = np.searchsorted(self.customers.arrival_day, last, side="right")
        return np.flatnonzero(self.fates.last_leave[:arrived] > first - _AFTERLIFE)

    @staticmethod
    def _potential(
        rows: np.ndarray, layout: _Layout, first: int, last: int, at_most: float = 1.0
    ) -> tuple[Moments, np.ndarray]:
        """Potential events of the customers at `rows` on days `first` to `last`.

        Each comes with a uniform, independent of its time, that decides whether it happens: it does
        below its chance. Those at or above `at_most` are left out.
        """
        begin, end = layout.clock.reading(first), layout.clock.reading(last + 1)
        origin, gap = layout.origin[rows], layout.gap[rows]
        lowest = np.maximum(np.floor((begin - origin) / gap).astype(np.int64), 0)
        count = np.maximum(np.floor((end - origin) / gap).astype(np.int64) - lowest + 1, 0)
        at = np.repeat(np.arange(len(rows)), count)
        places = np.arange(len(at)) + np.repeat(lowest - np.cumsum(count) + count, count)
        where, luck = uniform_pair(bits(layout.states[rows][at], places))
        offset = 0.5 + layout.width[rows][at] * (where - 0.5)
        readings = origin[at] + (places + offset) * gap[at]
        if layout.arrival is not None:
            readings = np.where(places == 0, layout.arrival[rows][at], readings)
        kept = np.flatnonzero((readings >= begin) & (readings < end) & (luck < at_most))
        days, fractions = layout.clock.day(readings[kept], first, last)
        return Moments(rows[at[kept]], places[kept], days, fractions), luck[kept]

    def _standing(self, rows: np.ndarray, when: np.ndarray, leaves: np.ndarray) -> np.ndarray:
        """1 for a customer in good standing, falling to 0 over the cooling off, 0 after leaving."""
        return np.clip((leaves - when) / self.customers.cooling[rows], 0.0, 1.0)

    def _quiet(self, rows: np.ndarray, when: np.ndarray) -> np.ndarray:
        """Whether a quiet spell lies over `when`; a customer has at most one a quarter."""
        shifted = when + _QUARTER * self.customers.arrival_fraction[rows]
        quarter = np.floor(shifted / _QUARTER)
        luck, length = uniform_pair(bits(self._quiet_sequences[rows], quarter))
        length = self.params.quiet_days * (0.3 + 0.7 * length)
        begin = luck / max(self.params.quiet_chance, 1e-9) * np.maximum(_QUARTER - length, 0.0)
        into = shifted - quarter * _QUARTER
        return (luck < self.params.quiet_chance) & (into >= begin) & (into < begin + length)

    def _order_chance(self, due: Moments, leaves: np.ndarray) -> np.ndarray:
        when = due.when
        chance = self.customers.follow_through[due.rows] * self._standing(due.rows, when, leaves)
        chance *= np.where(self._quiet(due.rows, when), _QUIET_ORDERS, 1.0)
        return np.where(due.places == 0, 1.0, chance)
