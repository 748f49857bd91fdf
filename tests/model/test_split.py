from __future__ import annotations

from datetime import date, timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from churn_assets.data.windows import cutoff_of, label_window, partition_of_cutoff
from churn_assets.errors import UserError
from churn_assets.modeling.split import Split, recent_split, rolling_origins, temporal_split

FIRST = date(2024, 1, 1)


def consecutive(count: int) -> list[date]:
    return [FIRST + timedelta(days=i) for i in range(count)]


def test_a_long_history_gives_six_training_cutoffs_a_horizon_apart() -> None:
    days = consecutive(400)
    split = temporal_split(days, 30)
    test = days[-1]
    assert split.test == test
    assert split.calibration == test - timedelta(days=30)
    assert split.train == tuple(test - timedelta(days=30 * k) for k in (7, 6, 5, 4, 3, 2))


def test_one_retail_year_is_enough() -> None:
    # 374 days, less a 90-day activity window and a 30-day horizon.
    split = temporal_split(consecutive(374 - 90 - 30), 30)
    assert len(split.train) == 6


def test_the_shortest_history_that_works_is_two_horizons_and_a_day() -> None:
    split = temporal_split(consecutive(61), 30)
    assert split.train == (FIRST,)
    with pytest.raises(UserError, match=r"span 60 days .* it takes 61 .* at least 1 more day"):
        temporal_split(consecutive(60), 30)


def test_no_labelled_day_at_all_says_how_many_it_takes() -> None:
    with pytest.raises(UserError, match=r"no feature day has matured labels.*it takes 61"):
        temporal_split([], 30)


def test_a_gap_that_breaks_the_embargo_is_refused() -> None:
    days = [FIRST, FIRST + timedelta(days=99), FIRST + timedelta(days=100)]
    with pytest.raises(UserError, match="fill the missing days"):
        temporal_split(days, 30)


def test_a_missing_day_is_replaced_by_an_earlier_one() -> None:
    days = consecutive(100)
    days.remove(FIRST + timedelta(days=69))
    split = temporal_split(days, 30)
    assert split.calibration == FIRST + timedelta(days=68)
    assert split.train[-1] == FIRST + timedelta(days=38)


def test_training_cutoffs_can_lie_closer_than_a_horizon() -> None:
    split = temporal_split(consecutive(100), 30, spacing_days=10, max_train_cutoffs=3)
    last = split.calibration - timedelta(days=30)
    assert split.train == tuple(last - timedelta(days=d) for d in (20, 10, 0))


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [({"max_train_cutoffs": 0}, "max_train_cutoffs"), ({"spacing_days": 0}, "spacing_days")],
)
def test_nonsense_is_refused(kwargs: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        temporal_split(consecutive(100), 30, **kwargs)
    with pytest.raises(UserError, match="horizon"):
        temporal_split(consecutive(100), 0)


@settings(max_examples=60, deadline=None)
@given(
    offsets=st.lists(st.integers(0, 300), min_size=0, max_size=120),
    horizon=st.integers(1, 60),
    most=st.integers(1, 8),
)
def test_labels_of_a_part_never_reach_into_the_next(
    offsets: list[int], horizon: int, most: int
) -> None:
    days = [FIRST + timedelta(days=offset) for offset in offsets]
    try:
        split = temporal_split(days, horizon, max_train_cutoffs=most)
    except UserError:
        return
    assert split.test == max(days)
    assert 1 <= len(split.train) <= most
    assert set(split.days) <= set(days)
    ordered = [cutoff_of(day) for day in split.days]
    for cutoff, following in pairwise(ordered):
        assert label_window(cutoff, horizon).end <= following


def test_the_record_names_every_day() -> None:
    split = Split((FIRST,), FIRST + timedelta(days=30), FIRST + timedelta(days=60), 30)
    assert split.to_dict() == {
        "train": ["2024-01-01"],
        "calibration": "2024-01-31",
        "test": "2024-03-01",
        "horizon_days": 30,
        "by_customers": False,
    }
    assert partition_of_cutoff(cutoff_of(split.test)) == split.test


def test_every_fold_repeats_the_whole_procedure_before_its_origin() -> None:
    split = temporal_split(consecutive(400), 30)
    folds = rolling_origins(split, 3)
    assert [fold.judged for fold in folds] == list(reversed(split.train[-3:]))
    for fold in folds:
        place = split.train.index(fold.judged)
        assert fold.calibration == split.train[place - 1]
        assert fold.train == split.train[: place - 1]
    assert len(rolling_origins(split, 10)) == 4


def test_a_short_history_has_fewer_folds_and_says_what_they_lack() -> None:
    two = temporal_split(consecutive(100), 30)
    (fold,) = rolling_origins(two, 3)
    assert (fold.train, fold.calibration, fold.judged) == (two.train[:1], None, two.train[1])
    one = temporal_split(consecutive(61), 30)
    (fold,) = rolling_origins(one, 3)
    assert (fold.train, fold.calibration, fold.judged) == (one.train, None, one.calibration)


@settings(max_examples=60, deadline=None)
@given(
    offsets=st.lists(st.integers(0, 400), min_size=3, max_size=150),
    horizon=st.integers(1, 40),
    spacing=st.integers(1, 40),
)
def test_no_fold_looks_beyond_its_origin_or_at_the_test_cutoff(
    offsets: list[int], horizon: int, spacing: int
) -> None:
    days = [FIRST + timedelta(days=offset) for offset in offsets]
    try:
        split = temporal_split(days, horizon, spacing_days=spacing)
    except UserError:
        return
    folds = rolling_origins(split, 3)
    assert folds
    for fold in folds:
        assert split.test not in (*fold.train, fold.calibration, fold.judged)
        last = [fold.train[-1], *([fold.calibration] if fold.calibration else []), fold.judged]
        for day, following in pairwise(last):
            assert label_window(cutoff_of(day), horizon).end <= cutoff_of(following)


CUSTOMERS = [f"c-{number}" for number in range(4000)]


def test_a_recent_split_takes_the_newest_labels() -> None:
    days = consecutive(100)
    split = recent_split(days, 30)
    assert (split.test, split.calibration) == (days[-1], days[-2])
    assert split.train == tuple(days[-3 - 7 * place] for place in reversed(range(6)))
    assert split.by_customers
    assert split.to_dict()["by_customers"] is True
    few = recent_split(days, 30, max_train_cutoffs=2, spacing_days=10)
    assert few.train == (days[-13], days[-3])


def test_a_recent_split_takes_what_there_is_around_a_gap() -> None:
    days = [day for day in consecutive(60) if day not in consecutive(55)[45:]]
    split = recent_split(days, 30, max_train_cutoffs=3)
    assert split.train == tuple(FIRST + timedelta(days=number) for number in (37, 44, 57))
    assert recent_split(days[:3], 30).days == tuple(days[:3])


def test_a_recent_split_of_two_days_is_refused() -> None:
    with pytest.raises(UserError, match=r"2 sound feature days .* takes 3 .* plan `history`"):
        recent_split(consecutive(2), 30)


def test_no_customer_of_a_recent_split_is_in_two_parts() -> None:
    split = recent_split(consecutive(100), 30)
    masks = {day: split.takes(day, CUSTOMERS) for day in split.days}
    train, calibration, test = (masks[d] for d in (split.train[0], split.calibration, split.test))
    assert (train.astype(int) + calibration + test == 1).all()
    assert all((masks[day] == train).all() for day in split.train)
    assert train.mean() == pytest.approx(0.5, abs=0.03)
    assert calibration.mean() == pytest.approx(0.2, abs=0.03)
    assert test.mean() == pytest.approx(0.3, abs=0.03)


def test_a_customer_stays_in_its_part() -> None:
    """Whoever else is there, and from one training to the next."""
    split, later = recent_split(consecutive(100), 30), recent_split(consecutive(130), 30)
    assert (split.takes(split.test, CUSTOMERS) == later.takes(later.test, CUSTOMERS)).all()
    alone = [bool(split.takes(split.test, [customer])[0]) for customer in CUSTOMERS[:50]]
    assert alone == split.takes(split.test, CUSTOMERS)[:50].tolist()
    assert split.takes(split.test, []).shape == (0,)


def test_a_split_in_time_takes_everybody() -> None:
    split = temporal_split(consecutive(100), 30)
    assert all(split.takes(day, CUSTOMERS).all() for day in split.days)


@pytest.mark.parametrize("count", [3, 20, 100])
def test_candidates_for_recent_labels_are_compared_on_customers_of_their_own(count: int) -> None:
    split = recent_split(consecutive(count), 30)
    (fold,) = rolling_origins(split, 3)
    assert (fold.train, fold.calibration, fold.judged) == (split.train, None, split.calibration)
