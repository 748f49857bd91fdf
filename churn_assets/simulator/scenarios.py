"""Scenarios: what may happen to the shop, from a day on.

Each changes days, customers or behaviour from its day on and nothing before it, so that the record
up to that day is the ordinary shop's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from typing import Literal, get_args

import numpy as np

from churn_assets.errors import UserError
from churn_assets.simulator.randomness import bits, sequences, uniform, uniform_pair
from churn_assets.simulator.seasons import Calendar

ScenarioName = Literal[
    "stable",
    "holiday_season",
    "price_rise",
    "ticket_storm",
    "login_tracking_broken",
    "new_market",
    "gradual_shift",
    "sudden_shift",
    "label_delay",
    "flapping",
]
NAMES: tuple[ScenarioName, ...] = get_args(ScenarioName)

HOLIDAY_DAYS = 35
STORM_DAYS = 14
BROKEN_DAYS = 18
NEW_MARKET_DAYS = 40
GRADUAL_DAYS = 56
FLAPPING_DAYS = 8
_SHIFTS = ("gradual_shift", "sudden_shift", "label_delay")
_LEAVING_AFTER_A_RISE = 0.12


@dataclass(frozen=True)
class Scenario:
    """What happens, and the first day (UTC) on which it does.

    stable: nothing. holiday_season: for five weeks more orders, visits and arrivals, and larger
    baskets. price_rise: dearer baskets, fewer orders, and some leave. ticket_storm: for two weeks
    everybody writes eight times the tickets. login_tracking_broken: for eighteen days no login is
    recorded; a fault of the data, not of the customers. new_market: for forty days many arrive who
    buy rarely, in large baskets, and leave sooner. sudden_shift: the loyal write tickets and hardly
    log in any more, those about to leave look around a lot and complain no longer. gradual_shift:
    the same, customer by customer, over eight weeks. label_delay: as sudden_shift. flapping: visits
    swing up and back every eight days.
    """

    name: ScenarioName = "stable"
    day: date = date(9999, 1, 1)

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(
                f"source.scenario.name is {self.name!r}; choose from {', '.join(NAMES)}"
            )


@dataclass(frozen=True)
class Effects:
    """A scenario as the shop applies it; `day` counts from the start of the record."""

    name: ScenarioName
    day: int

    def on_days(self, ordinary: Calendar) -> Calendar:
        """The calendar with what the scenario does to its days."""
        since = np.arange(ordinary.first, ordinary.first + len(ordinary.orders)) - self.day
        if self.name == "holiday_season":
            peak = _hump(since, HOLIDAY_DAYS)
            return replace(
                ordinary,
                arrivals=ordinary.arrivals * (1 + 0.8 * peak),
                orders=ordinary.orders * (1 + 0.7 * peak),
                visits=ordinary.visits * (1 + 1.2 * peak),
                order_value=ordinary.order_value * (1 + 0.25 * peak),
            )
        if self.name == "price_rise":
            risen = since >= 0
            return replace(
                ordinary,
                orders=ordinary.orders * np.where(risen, 0.93, 1.0),
                order_value=ordinary.order_value * np.where(risen, 1.3, 1.0),
            )
        if self.name == "ticket_storm":
            storm = (since >= 0) & (since < STORM_DAYS)
            return replace(ordinary, tickets=ordinary.tickets * np.where(storm, 8.0, 1.0))
        if self.name == "new_market":
            opened = (since >= 0) & (since < NEW_MARKET_DAYS)
            return replace(ordinary, arrivals=ordinary.arrivals * np.where(opened, 3.0, 1.0))
        if self.name == "flapping":
            up = (since >= 0) & ((since // FLAPPING_DAYS) % 2 == 0)
            return replace(ordinary, visits=ordinary.visits * np.where(up, 1.6, 1.0))
        return ordinary

    def newcomers(self, arrival_day: np.ndarray, seed: int, number: np.ndarray) -> np.ndarray:
        """Which customers come from the new market, bool, shape of `number`."""
        if self.name != "new_market":
            return np.zeros(len(number), dtype=bool)
        luck = uniform(bits(sequences(seed, "new market", number)))
        opened = (arrival_day >= self.day) & (arrival_day < self.day + NEW_MARKET_DAYS)
        return opened & (luck < 2 / 3)

    def leaving(
        self, arrival_day: np.ndarray, leaves: np.ndarray, seed: int, number: np.ndarray
    ) -> np.ndarray:
        """When customers leave, given that prices rise."""
        if self.name != "price_rise":
            return leaves
        luck, delay = uniform_pair(bits(sequences(seed, "price rise", number)))
        put_off = (luck < _LEAVING_AFTER_A_RISE) & (leaves > self.day + 40)
        put_off &= arrival_day < self.day
        return np.where(put_off, self.day + 10.0 + 30.0 * delay, leaves)

    def shifts(self, seed: int, number: np.ndarray) -> np.ndarray | None:
        """From when on each customer behaves in the new way, or None when nobody ever does."""
        if self.name not in _SHIFTS:
            return None
        since = np.full(len(number), float(self.day))
        if self.name == "gradual_shift":
            since += GRADUAL_DAYS * uniform(bits(sequences(seed, "gradual shift", number)))
        return since

    def recorded(self, table: str, days: np.ndarray) -> np.ndarray | None:
        """Which events of a table on `days` are recorded, or None for all of them."""
        if self.name != "login_tracking_broken" or table != "logins":
            return None
        return (days < self.day) | (days >= self.day + BROKEN_DAYS)


def effects(scenario: Scenario, start: date) -> Effects:
    """`scenario` as seen from the start of the record. Raises UserError for a day before it."""
    if scenario.name != "stable" and scenario.day < start:
        raise UserError(
            f"source.scenario.day is {scenario.day}, before the record starts ({start}); set a "
            "later day"
        )
    return Effects(scenario.name, (scenario.day - start).days)


def _hump(since: np.ndarray, days: int) -> np.ndarray:
    """Rises from 0 to 1 and falls back to 0 over `days`."""
    inside = (since >= 0) & (since < days)
    return np.where(inside, np.sin(np.pi * (since + 0.5) / days), 0.0)
