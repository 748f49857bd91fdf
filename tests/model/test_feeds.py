"""A feed that broke, told from customers who do less, by the daily counts alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pytest

from churn_assets.errors import UserError
from churn_assets.monitoring.feeds import (
    Fault,
    FeedPolicy,
    contaminated,
    feed_metric,
    find_faults,
)

# A Monday.
FIRST = date(2024, 1, 1)
# Of the mean, Monday to Sunday.
WEEK = (1.2, 1.1, 1.0, 1.0, 1.1, 0.7, 0.9)
NOW = datetime(2024, 9, 1, tzinfo=UTC)


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


def counts(
    days: int, mean: float, *, seed: int = 0, share: Callable[[int], float] = lambda number: 1.0
) -> dict[date, int]:
    """Poisson arrivals by day; `share` says what part of them comes in on a day."""
    rng = np.random.default_rng(seed)
    means = [mean * WEEK[number % 7] * share(number) for number in range(days)]
    return {day(number): int(rng.poisson(usual)) for number, usual in enumerate(means)}


def broken(*faults: tuple[int, int], to: float = 0.0) -> Callable[[int], float]:
    return lambda number: to if any(a <= number <= b for a, b in faults) else 1.0


def found(of: Mapping[date, int], policy: FeedPolicy | None = None) -> list[tuple[int, int, bool]]:
    """The faults as (first, last, open), days by number."""
    return [
        ((fault.first - FIRST).days, (fault.last - FIRST).days, fault.open)
        for fault in find_faults("logins", of, policy)
    ]


def test_a_dense_feed_tells_on_the_day_it_breaks() -> None:
    for length in (101, 102, 110):
        feed = counts(length, 800, share=broken((100, 200)))
        assert found(feed) == [(100, length - 1, True)]
    (fault,) = find_faults("logins", counts(101, 800, share=broken((100, 200), to=0.3)))
    assert fault.ratio == pytest.approx(0.3, abs=0.05)
    assert fault.line().startswith("logins since 2024-04-10, still: ")
    assert found(counts(101, 800, share=broken((100, 200), to=0.6))) == []


def test_a_sparse_feed_tells_within_the_week_from_where_it_broke() -> None:
    feed = counts(140, 6, share=broken((100, 200)))
    told = [n for n in range(100, 140) if found({d: c for d, c in feed.items() if d <= day(n)})]
    assert told == list(range(told[0], 140))
    assert 101 < told[0] <= 106
    ((first, last, still),) = found(feed)
    # A day on which nothing came by chance may lead up to it.
    assert (98 <= first <= 100, last, still) == (True, 139, True)


def weekdays_only(length: int, *faults: tuple[int, int]) -> dict[date, int]:
    """A feed without events on Saturdays and Sundays."""
    out = broken(*faults)
    return counts(length, 500, share=lambda n: 0.0 if n % 7 in (5, 6) else out(n))


def test_days_on_which_nothing_ever_comes_are_no_fault() -> None:
    assert found(weekdays_only(200)) == []


def test_a_fault_spans_days_on_which_nothing_ever_comes() -> None:
    # From a Thursday to a Wednesday; as of the Saturday between it goes on.
    ((first, last, _),) = found(weekdays_only(200, (101, 107)))
    assert (first, last) == (101, 107)
    assert found(weekdays_only(104, (101, 107))) == [(101, 102, True)]
    # One that shows only on Monday began on Friday.
    friday = {**weekdays_only(200, (102, 106)), day(102): 240}
    assert found(friday, FeedPolicy(chance=1e-60)) == [(102, 106, False)]


def test_a_holiday_dip_not_below_half_is_none() -> None:
    assert found(counts(200, 800, share=broken((100, 113), to=0.6))) == []


@pytest.mark.parametrize("rate", [0.985, 1.02])
def test_gradual_growth_and_decline_are_none(rate: float) -> None:
    """By a factor of 20 in 200 days, either way."""
    assert found(counts(200, 2000, share=lambda number: rate**number)) == []


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 8, 20])
def test_a_fault_that_ends_is_found_once(length: int) -> None:
    feed = counts(150, 800, share=broken((100, 99 + length)))
    assert found(feed) == [(100, 99 + length, False)]
    # Nor on any day since, whatever has been seen of the days after.
    for seen in range(100 + length, 112 + length):
        until = {d: count for d, count in feed.items() if d <= day(seen)}
        assert found(until) == [(100, 99 + length, False)]


def test_two_faults_are_two() -> None:
    feed = counts(200, 800, share=broken((60, 64), (66, 70), (120, 125)))
    assert found(feed) == [(60, 64, False), (66, 70, False), (120, 125, False)]


@pytest.mark.parametrize("accept", [7, 21, 60])
def test_a_fault_that_lasts_is_the_new_usual(accept: int) -> None:
    policy = FeedPolicy(accept_after_days=accept)
    feed = counts(300, 800, share=broken((100, 400), to=0.3))
    for length, still in [(100 + accept, True), (101 + accept, False), (130 + accept, False)]:
        seen = {d: count for d, count in feed.items() if d < day(length)}
        assert found(seen, policy) == ([(100, length - 1, True)] if still else [])
    assert found(feed, policy) == []
    # Far less than that is a fault of its own.
    again = counts(204, 800, share=lambda n: 1.0 if n < 100 else 0.3 if n < 200 else 0.05)
    assert found(again, policy) == [(200, 203, True)]
    # And what it was before is no fault.
    mended = counts(300, 800, share=broken((100, 100 + accept + 30), to=0.3))
    assert found(mended, policy) == []


def test_missing_days_are_neither_fault_nor_repair() -> None:
    feed = counts(150, 800, share=broken((100, 110)))
    gaps = {d: c for d, c in feed.items() if d not in {day(70), day(71), day(104), day(111)}}
    assert found(gaps) == [(100, 110, False)]
    # The whole week before the fault is missing.
    assert found({d: c for d, c in feed.items() if not day(93) <= d < day(100)})[0][:2] == (
        100,
        110,
    )


def test_a_low_day_without_a_usual_count_does_not_become_the_usual() -> None:
    """Tuesdays were missing so long that three of them are not known."""
    feed = counts(160, 800, share=broken((100, 130)))
    kept = {d: c for d, c in feed.items() if d.weekday() != 1 or d >= day(85)}
    assert found(kept) == [(100, 130, False)]


def test_with_little_history_nothing_is_said() -> None:
    feed = counts(21, 800, share=broken((10, 30)))
    assert found(feed) == []
    assert find_faults("logins", {}) == ()
    metric = feed_metric("logins", feed, (), day(20), FeedPolicy(), now=NOW)
    assert (metric.verdict, metric.value) == ("insufficient", None)


def test_the_metric_of_a_feed() -> None:
    policy = FeedPolicy()

    def of(feed: dict[date, int]) -> tuple[str, float | None]:
        metric = feed_metric(
            "logins", feed, find_faults("logins", feed), max(feed), policy, now=NOW
        )
        assert (metric.name, metric.limit, metric.at) == ("feed/logins", 0.5, NOW)
        assert metric.until == datetime.combine(max(feed) + timedelta(days=1), NOW.timetz())
        return metric.verdict, metric.value

    assert of(counts(100, 800)) == ("ok", pytest.approx(1, abs=0.05))
    assert of(counts(103, 800, share=broken((100, 110)))) == ("alert", 0)
    # The week's sum leaves the fault out.
    assert of(counts(103, 800, share=broken((98, 101)))) == ("ok", pytest.approx(1, abs=0.1))
    assert of(counts(100, 800, share=lambda n: 0.0)) == ("insufficient", None)


def test_false_alarms_are_rare() -> None:
    """Feeds of half a year, from an event a day to a thousand."""
    means = (1, 3, 8, 20, 60, 1000)
    alarms = {
        (mean, seed): found(counts(180, mean, seed=seed)) for mean in means for seed in range(5)
    }
    assert [key for key, faults in alarms.items() if faults] == []


def test_a_looser_policy_does_raise_alarms() -> None:
    """So the ones above are not missing for want of chance."""
    loose = FeedPolicy(min_ratio=0.9, chance=0.009)
    assert all(found(counts(180, mean), loose) for mean in (3, 8, 20))


def fault(table: str, first: int, last: int, *, still: bool = False) -> Fault:
    return Fault(table, day(first), day(last), 0.0, still)


@pytest.mark.parametrize(("table", "window"), [("logins", 7), ("support_tickets", 90)])
def test_the_days_at_which_a_feature_sees_a_fault(table: str, window: int) -> None:
    days = [day(number) for number in range(200)]
    touched = contaminated([fault(table, 50, 55)], days)
    # Features of a day see that day, and so many before it.
    assert touched == set(days[50 : 55 + window])
    assert fault(table, 50, 55).sound_from == days[55 + window]
    assert contaminated([fault(table, 50, 55, still=True)], days) == set(days[50:])
    assert contaminated([fault(table, 50, 55)], days, horizon_days=30) == touched
    two = [fault("logins", 50, 55), fault("logins", 80, 80)]
    assert contaminated(two, days) == {*days[50:62], *days[80:87]}
    assert contaminated([], days) == set()


def test_a_fault_of_orders_spoils_the_labels_before_it() -> None:
    """Who ordered on a day that did not come in counts as churned."""
    days = [day(number) for number in range(200)]
    orders = [fault("orders", 50, 55)]
    assert contaminated(orders, days) == set(days[50:145])
    # The labels of day 20 look at the 30 days from day 21 on, which are 21 to 50.
    assert contaminated(orders, days, horizon_days=30) == set(days[20:145])


def test_the_features_of_a_table() -> None:
    assert fault("logins", 1, 2).features == ("login_frequency_7d",)
    assert len(fault("orders", 1, 2).features) == 3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"min_ratio": 1.0}, "min_ratio"),
        ({"chance": 0.5}, "chance"),
        ({"accept_after_days": 6}, "accept_after_days"),
    ],
)
def test_nonsense_is_refused(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=rf"feeds\.{named}"):
        FeedPolicy(**wrong)  # ty: ignore[invalid-argument-type]
