"""Is a feed broken? Days on which far fewer events of a table came in than on such days before.

A feed that breaks looks like customers who stopped doing something, and a model that learns from it
learns the fault. So days of a fault are found from the counts alone, and neither trained on nor
taken for drift of the customers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from statistics import median

import msgspec

from churn_assets.contract.features import FEATURES
from churn_assets.data.windows import cutoff_of
from churn_assets.errors import UserError
from churn_assets.monitoring.metric import Metric

# The table whose events say who has churned.
LABELLED_BY = "orders"

_DAY = timedelta(days=1)
_WEEKS, _FEWEST_WEEKS = 6, 3
# Sums over so many days are looked at: a dense feed tells in one, a sparse one takes a week.
_STRETCHES = (1, 2, 3, 7)


@dataclass(frozen=True)
class FeedPolicy:
    """When a feed counts as broken.

    min_ratio: of the events usual on such days (the median of the same weekday in the six sound
    weeks before). chance: a count that Poisson arrivals at the usual rate would produce more often
    than this is no fault. accept_after_days: a fault that lasts as long is the new usual, and what
    came before it no longer counts.
    """

    min_ratio: float = 0.5
    chance: float = 1e-9
    accept_after_days: int = 60

    def __post_init__(self) -> None:
        if not 0 < self.min_ratio < 1:
            raise UserError(f"feeds.min_ratio is {self.min_ratio}; set a number between 0 and 1")
        if not 0 < self.chance < 0.01:
            raise UserError(f"feeds.chance is {self.chance}; set a probability below 0.01")
        if self.accept_after_days < 7:
            raise UserError(f"feeds.accept_after_days is {self.accept_after_days}; set at least 7")


class Fault(msgspec.Struct, frozen=True):
    """A table whose events stayed away on the days [first, last].

    ratio: events that came, of those usual. open: it goes on, as far as there are days.
    """

    table: str
    first: date
    last: date
    ratio: float
    open: bool

    @property
    def features(self) -> tuple[str, ...]:
        """The features computed from the table."""
        return tuple(feature.name for feature in FEATURES if self.table in feature.tables)

    @property
    def sound_from(self) -> date:
        """The first feature day no feature of which sees the fault, once the feed is repaired.

        Averages that look back longer than a quarter of a year are not waited for.
        """
        windows = [f.window_days for f in FEATURES if self.table in f.tables]
        return self.last + timedelta(days=min(max(windows, default=1), 90))

    def line(self) -> str:
        """The fault in a line, for a person."""
        until = "still" if self.open else f"until {self.last}"
        return f"{self.table} since {self.first}, {until}: {self.ratio:.0%} of the usual events"


def find_faults(
    table: str, counts: Mapping[date, int], policy: FeedPolicy | None = None
) -> tuple[Fault, ...]:
    """The faults of a feed, oldest first, from its events by day.

    counts: of every complete partition; a day without one is left out, one without events has zero.
    The usual count of a day is the median of its weekday in the last six weeks outside of faults;
    with fewer than three such weeks nothing can be said of it.
    """
    policy = policy or FeedPolicy()
    sound: list[date] = []
    # Of the days since the last fault: a sum that reached into it would find it once more.
    usual: dict[date, float] = {}
    found: list[Fault] = []
    for day in sorted(counts):
        expected = _usual(counts, sound, day)
        going_on = found[-1] if found and found[-1].open else None
        if going_on and not expected:
            # On a day on which nothing ever comes, a feed shows neither fault nor repair.
            continue
        if expected is None:
            sound.append(day)
            continue
        usual[day] = expected
        broken = _is_broken(counts, usual, day, policy, goes_on=going_on is not None)
        if broken and going_on:
            found[-1] = _fault(table, counts, usual, going_on.first, day)
            if (day - going_on.first).days >= policy.accept_after_days:
                found.pop()
                sound = [d for d in sorted(counts) if going_on.first <= d <= day]
                usual = {}
        elif broken:
            first = _first_broken(counts, usual, day, policy)
            found.append(_fault(table, counts, usual, first, day))
            sound = [d for d in sound if d < found[-1].first]
        else:
            if going_on:
                found[-1] = msgspec.structs.replace(going_on, open=False)
                usual = {day: expected}
            sound.append(day)
    return tuple(found)


def feed_metric(
    table: str,
    counts: Mapping[date, int],
    faults: Sequence[Fault],
    day: date,
    policy: FeedPolicy,
    *,
    now: datetime,
) -> Metric:
    """The metric `feed/<table>` as of the partition `day`: events that came, of those usual.

    counts, faults: of the table, as find_faults has them. The value is that of the fault that is
    going on, or else of the last week outside of faults; with no usual count of any of its days it
    is `insufficient`.
    """
    broken = next((fault for fault in faults if fault.open), None)
    ratio = broken.ratio if broken else _recent_ratio(counts, faults, day)
    if ratio is None:
        verdict, reason = "insufficient", f"no usual count is known before {_FEWEST_WEEKS} weeks"
    elif broken:
        verdict, reason = "alert", broken.line()
    else:
        verdict, reason = "ok", f"{ratio:.0%} of the usual events in the last week"
    return Metric(
        name=f"feed/{table}",
        verdict=verdict,
        value=ratio,
        limit=policy.min_ratio,
        reason=reason,
        at=now,
        until=cutoff_of(day),
    )


def contaminated(
    faults: Sequence[Fault], days: Sequence[date], *, horizon_days: int = 0
) -> set[date]:
    """The feature days of `days` at which a feature sees one of the faults.

    horizon_days: of the labels that are used too; one whose window sees a fault of the orders says
    of customers who ordered that they churned.
    """
    touched = set()
    for fault in faults:
        ahead = horizon_days if fault.table == LABELLED_BY else 0
        first = fault.first - timedelta(days=ahead)
        end = date.max if fault.open else fault.sound_from
        touched |= {day for day in days if first <= day < end}
    return touched


def _recent_ratio(counts: Mapping[date, int], faults: Sequence[Fault], day: date) -> float | None:
    sound = [d for d in sorted(counts) if not any(f.first <= d <= f.last for f in faults)]
    came = expected = 0.0
    for recent in (d for d in sound if day - 7 * _DAY < d <= day):
        usual = _usual(counts, [d for d in sound if d < recent], recent)
        came, expected = came + counts[recent] * (usual is not None), expected + (usual or 0.0)
    return came / expected if expected else None


def _usual(counts: Mapping[date, int], sound: Sequence[date], day: date) -> float | None:
    alike = [d for d in sound if d.weekday() == day.weekday()][-_WEEKS:]
    if len(alike) < _FEWEST_WEEKS:
        return None
    return float(median(counts[d] for d in alike))


def _is_broken(
    counts: Mapping[date, int],
    usual: Mapping[date, float],
    day: date,
    policy: FeedPolicy,
    *,
    goes_on: bool,
) -> bool:
    """Whether a fault shows on `day`; one that goes on ends with the first day that is not low."""
    for stretch in (1,) if goes_on else _STRETCHES:
        days = [day - place * _DAY for place in range(stretch)]
        if not all(d in usual for d in days):
            break
        came, expected = sum(counts[d] for d in days), sum(usual[d] for d in days)
        if came < policy.min_ratio * expected and (
            goes_on or _poisson_at_most(came, expected) < policy.chance
        ):
            return True
    return False


def _first_broken(
    counts: Mapping[date, int], usual: Mapping[date, float], day: date, policy: FeedPolicy
) -> date:
    """Where the fault that shows on `day` began: the first of the low days that lead up to it."""
    first = before = day
    while (before := before - _DAY) in usual:
        if counts[before] < policy.min_ratio * usual[before]:
            first = before
        elif usual[before] > 0:
            break
    return first


def _fault(
    table: str, counts: Mapping[date, int], usual: Mapping[date, float], first: date, last: date
) -> Fault:
    days = [d for d in counts if first <= d <= last]
    expected = sum(usual.get(d, 0.0) for d in days)
    return Fault(table, first, last, sum(counts[d] for d in days) / max(expected, 1.0), True)


def _poisson_at_most(count: int, mean: float) -> float:
    """P(X <= count) for a Poisson X of that mean."""
    from scipy.special import pdtr

    return float(pdtr(count, mean))
