"""The shop's calendar: what busy and quiet days do to the rates of everybody.

Rates that vary from day to day are had by running each kind of event on a clock of its own, which
goes faster on busy days (the time change that makes a process of constant rate inhomogeneous).
A day's length on that clock depends on that day only, so no event moves when later days change.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import numpy as np

_WEEKDAY = {  # Monday first
    "arrivals": (0.98, 0.97, 0.98, 1.00, 1.02, 1.06, 0.99),
    "orders": (0.97, 0.94, 0.95, 1.00, 1.08, 1.10, 0.96),
    "visits": (1.02, 1.00, 0.98, 0.97, 0.96, 1.00, 1.07),
    "tickets": (1.25, 1.12, 1.06, 1.03, 1.00, 0.82, 0.72),
}
_YEARLY = {"arrivals": 0.10, "orders": 0.05, "visits": 0.06, "tickets": 0.05}
_YEAR = 365.25
_PEAK = 345  # day of the year, early December


@dataclass(frozen=True)
class Calendar:
    """Multipliers by day, each of shape (days,); entry 0 is day `first` (counted from the start).

    Everything the shop does at a time of its own goes through here: a scenario (a holiday season,
    a ticket storm, a price rise) is another calendar.
    """

    first: int
    arrivals: np.ndarray
    orders: np.ndarray
    visits: np.ndarray
    tickets: np.ndarray
    order_value: np.ndarray


def calendar(start: date, first: int, last: int, growth_per_year: float) -> Calendar:
    """The ordinary calendar of days `first` to `last`, both counted from `start` and included."""
    days = np.arange(first, last + 1)
    weekday = (start.weekday() + days) % 7
    season = np.cos(2 * np.pi * (start.timetuple().tm_yday + days - _PEAK) / _YEAR)
    rates = {
        name: np.asarray(week)[weekday] * (1.0 + _YEARLY[name] * season)
        for name, week in _WEEKDAY.items()
    }
    rates["arrivals"] = rates["arrivals"] * (1.0 + growth_per_year) ** (days / _YEAR)
    return Calendar(first=first, order_value=np.ones(len(days)), **rates)


class Clock:
    """A clock that runs at `rates[i]` on day `first + i`; its reading is cumulative."""

    def __init__(self, first: int, rates: np.ndarray) -> None:
        self._first = first
        self._edges = np.concatenate([[0.0], np.cumsum(rates)])

    def reading(self, days: np.ndarray | int, fractions: np.ndarray | float = 0.0) -> np.ndarray:
        """What the clock shows when `fractions` of `days` have passed."""
        at = np.asarray(days) - self._first
        begin = self._edges[at]
        return begin + fractions * (self._edges[at + 1] - begin) if np.any(fractions) else begin

    def day(self, readings: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The day (int64) and the fraction of it passed, for readings from `first` to `last`."""
        edges = self._edges[first - self._first : last - self._first + 2]
        at = np.searchsorted(edges, readings, side="right") - 1
        fraction = (readings - edges[at]) / np.diff(edges)[at]
        return at + first, np.minimum(fraction, 1.0 - 1e-9)
