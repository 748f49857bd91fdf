"""Where days, cutoffs and windows begin and end. Nothing else in the project does this arithmetic.

Every interval is half open, [start, end), in UTC. Partition d holds the events of
[d 00:00, d+1 00:00); its cutoff is d+1 00:00, the first instant its features do not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from churn_assets.errors import UserError


@dataclass(frozen=True)
class Interval:
    """A half-open stretch of time, [start, end), both timezone-aware UTC."""

    start: datetime
    end: datetime

    def __contains__(self, moment: datetime) -> bool:
        return self.start <= moment < self.end


@dataclass(frozen=True)
class Windows:
    """The two windows that define the problem. Fixed before training; another one is another task.

    activity_days: a customer is in the population of a cutoff with an order in the days before it.
    horizon_days: a customer of the population has churned with no order in the days after it.
    Raises UserError for a window of no days.
    """

    activity_days: int = 90
    horizon_days: int = 30

    def __post_init__(self) -> None:
        for name in ("activity_days", "horizon_days"):
            if getattr(self, name) < 1:
                raise UserError(f"windows.{name} is {getattr(self, name)}; set at least 1")


def midnight(day: date) -> datetime:
    """The first instant of `day`, UTC."""
    return datetime.combine(day, time.min, tzinfo=UTC)


def partition_of(moment: datetime) -> date:
    """The daily partition that holds an event at `moment` (timezone-aware)."""
    return moment.astimezone(UTC).date()


def partition_interval(day: date) -> Interval:
    """The events partition `day` holds."""
    return Interval(midnight(day), midnight(day + timedelta(days=1)))


def cutoff_of(day: date) -> datetime:
    """The cutoff of partition `day`: features of that partition see only what came before it."""
    return midnight(day + timedelta(days=1))


def partition_of_cutoff(cutoff: datetime) -> date:
    """The partition whose cutoff is `cutoff` (a UTC midnight)."""
    return cutoff.date() - timedelta(days=1)


def look_back(cutoff: datetime, days: int) -> Interval:
    """The `days` before `cutoff`: what a feature with that window sees."""
    return Interval(cutoff - timedelta(days=days), cutoff)


def label_window(cutoff: datetime, horizon_days: int) -> Interval:
    """Where an order keeps a customer of `cutoff` from having churned."""
    return Interval(cutoff, cutoff + timedelta(days=horizon_days))


def labelled_partition(label_day: date, horizon_days: int) -> date:
    """The feature partition whose labels mature with, and are kept in, partition `label_day`.

    Label partition d holds the labels of cutoff d+1-horizon, which is the cutoff of
    feature partition d-horizon.
    """
    return label_day - timedelta(days=horizon_days)


def label_partition(feature_day: date, horizon_days: int) -> date:
    """The label partition in which the labels of feature partition `feature_day` mature."""
    return feature_day + timedelta(days=horizon_days)


def days_between(first: date, last: date) -> list[date]:
    """Every day from `first` to `last`, both included."""
    return [first + timedelta(days=offset) for offset in range((last - first).days + 1)]
