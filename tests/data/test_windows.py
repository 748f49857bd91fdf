from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from brute_force import DAY, TICK
from hypothesis import given
from hypothesis import strategies as st

from churn_assets.data.windows import (
    cutoff_of,
    days_between,
    label_partition,
    label_window,
    labelled_partition,
    look_back,
    midnight,
    partition_interval,
    partition_of,
    partition_of_cutoff,
)

DAYS = st.dates(date(2000, 1, 1), date(2100, 1, 1))
MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
SPANS = st.integers(1, 400)


@given(MOMENTS)
def test_an_event_lies_in_its_partition_and_in_no_other(moment: datetime) -> None:
    day = partition_of(moment)
    assert moment in partition_interval(day)
    assert moment not in partition_interval(day - DAY)
    assert moment not in partition_interval(day + DAY)


@given(DAYS)
def test_midnight_belongs_to_the_day_it_begins(day: date) -> None:
    assert partition_of(midnight(day)) == day
    assert partition_of(midnight(day) - TICK) == day - DAY
    assert partition_interval(day).end == partition_interval(day + DAY).start


@given(DAYS)
def test_a_cutoff_is_the_first_instant_its_partition_does_not_hold(day: date) -> None:
    cutoff = cutoff_of(day)
    assert cutoff not in partition_interval(day)
    assert cutoff - TICK in partition_interval(day)
    assert partition_of_cutoff(cutoff) == day


@given(DAYS, SPANS)
def test_a_look_back_holds_its_start_and_not_its_cutoff(day: date, span: int) -> None:
    window = look_back(cutoff_of(day), span)
    assert window.start in window
    assert window.start - TICK not in window
    assert window.end - TICK in window
    assert window.end not in window
    assert window.start == midnight(day - timedelta(days=span - 1))


@given(DAYS, SPANS)
def test_look_back_and_label_window_meet_without_overlap(day: date, span: int) -> None:
    cutoff = cutoff_of(day)
    before, after = look_back(cutoff, span), label_window(cutoff, span)
    assert before.end == after.start == cutoff
    assert cutoff in after
    assert cutoff - TICK not in after
    assert after.end not in after


@given(DAYS, SPANS)
def test_labels_mature_with_the_last_day_of_their_window(day: date, horizon: int) -> None:
    matures = label_partition(day, horizon)
    assert labelled_partition(matures, horizon) == day
    window = label_window(cutoff_of(day), horizon)
    assert window.end - TICK in partition_interval(matures)
    assert window.end == partition_interval(matures).end
    assert cutoff_of(day) == midnight(matures + DAY) - timedelta(days=horizon)


def test_partition_of_a_moment_elsewhere_is_its_utc_day() -> None:
    moment = datetime.fromisoformat("2024-05-01T01:30:00+02:00")
    assert partition_of(moment) == date(2024, 4, 30)


@pytest.mark.parametrize(("last", "count"), [(1, 1), (3, 3), (0, 0)])
def test_days_between_holds_both_ends(last: int, count: int) -> None:
    days = days_between(date(2024, 5, 1), date(2024, 5, 1) + (last - 1) * DAY)
    assert len(days) == count
