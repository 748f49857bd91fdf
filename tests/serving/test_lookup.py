"""Which rows of an online store may be predicted from, without a server."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from online_cases import CUTOFF, HOUR, STORED, content, write
from serving_cases import THREE

from churn_assets.contract.features import FEATURES, features_named
from churn_assets.contract.lookup import CLOCK_TOLERANCE, AgePolicy, Found, Lookup
from churn_assets.contract.online import OnlineReader, open_reader
from churn_assets.contract.request import Refusal

TICK = timedelta(microseconds=1)


class Clock:
    """Both clocks of a lookup, moved by hand."""

    def __init__(self, now: datetime = CUTOFF):
        self.now, self.seconds = now, 0.0

    def pass_by(self, span: timedelta) -> None:
        self.now += span
        self.seconds += span.total_seconds()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "online.db"


Make = Callable[..., Lookup]


@pytest.fixture
def make(path: Path, clock: Clock):
    """Lookups in the store at `path`; what they opened is closed at the end."""
    opened: list[OnlineReader] = []

    def open_it() -> OnlineReader:
        opened.append(open_reader(str(path)))
        return opened[-1]

    def made(policy: AgePolicy | None = None, features=FEATURES) -> Lookup:
        return Lookup(
            open_it, features, policy or AgePolicy(),
            wall_clock=lambda: clock.now, monotonic=lambda: clock.seconds,
        )  # fmt: skip

    yield made
    for reader in opened:
        reader.close()


def refusal_of(lookup: Lookup, customer_id: str = "c-1") -> Refusal:
    try:
        (found,) = lookup.find([customer_id])
    except Refusal as refusal:
        return refusal
    assert isinstance(found, Refusal)
    return found


def found_by(lookup: Lookup, customer_id: str = "c-1") -> Found:
    (found,) = lookup.find([customer_id])
    assert isinstance(found, Found), found
    return found


def test_finds_the_rows_in_the_order_asked_with_their_cutoff(make: Make, path: Path) -> None:
    write(path, *content())
    rows = make().find(["c-3", "nobody", "c-1", "c-3"])
    assert isinstance(rows[1], Refusal)
    assert (rows[1].status, rows[1].field, rows[1].retry_after) == (404, "customer_id", None)
    for customer_id, row in zip(["c-3", "c-1", "c-3"], [rows[0], *rows[2:]], strict=True):
        assert row == Found(list(STORED[customer_id].values()), CUTOFF, stale=False)


@pytest.mark.parametrize("data_time", [CUTOFF, None], ids=["data clock", "wall clock"])
@given(hours=st.integers(1, 100), behind=st.integers(-200, 200), tick=st.sampled_from([-1, 0, 1]))
@settings(max_examples=40, deadline=None)
def test_a_row_is_stale_once_it_is_older_than_the_limit(
    tmp_path_factory, data_time: datetime | None, hours: int, behind: int, tick: int
) -> None:
    path = tmp_path_factory.mktemp("store") / "online.db"
    age = behind * HOUR + tick * TICK
    write(path, *content(cutoffs={"c-1": CUTOFF - age}, data_time=data_time))
    for when_stale in ("refuse", "flag"):
        lookup = Lookup(
            lambda: open_reader(str(path)), FEATURES, AgePolicy(hours * HOUR, when_stale),
            wall_clock=lambda: CUTOFF,
        )  # fmt: skip
        (row,) = lookup.find(["c-1"])
        lookup._reader.close()  # ty: ignore
        if -CLOCK_TOLERANCE <= age <= hours * HOUR:
            assert isinstance(row, Found)
            assert not row.stale
        elif age > hours * HOUR and when_stale == "flag":
            assert isinstance(row, Found)
            assert row.stale
            assert row.cutoff == CUTOFF - age
        else:
            assert isinstance(row, Refusal)
            assert row.status == 409
            assert ("ahead of data time" in row.message) == (age < timedelta(0))


def test_a_stale_answer_says_how_old_how_old_it_may_be_and_what_to_do(
    make: Make, path: Path
) -> None:
    write(path, *content(cutoffs={"c-1": CUTOFF - 60 * HOUR}))
    assert refusal_of(make()).message == (
        "has features of 2025-02-26 12:00 UTC, 60.0 h before data time (2025-03-01 00:00 UTC) "
        "where 36 h are allowed; refresh the online features or send every feature"
    )


def test_a_shop_whose_days_lie_in_the_past_does_not_age_and_a_live_one_does(
    make: Make, path: Path, clock: Clock
) -> None:
    shop, live = make(), make()
    write(path, *content())
    assert not found_by(shop).stale
    clock.pass_by(400 * 24 * HOUR)
    assert not found_by(shop).stale
    clock.now = CUTOFF
    write(path, *content(data_time=None))
    assert not found_by(live).stale
    clock.pass_by(36 * HOUR)
    assert not found_by(live).stale
    clock.pass_by(HOUR)
    assert "37.0 h before data time" in refusal_of(live).message
    health = live.health()
    assert (health.reachable, health.usable) == (True, False)
    assert health.data_time == clock.now
    write(path, *content(newest=CUTOFF + 24 * HOUR, data_time=None))
    clock.pass_by(TICK)
    assert found_by(live).cutoff == CUTOFF + 24 * HOUR
    assert live.health().usable


def test_a_store_that_is_not_there_is_left_alone_for_a_second_then_found(
    make: Make, path: Path, clock: Clock
) -> None:
    lookup = make()
    down = refusal_of(lookup)
    assert (down.status, down.field, down.retry_after) == (503, "online_store", 1)
    assert not path.exists(), "a reader must not make the store"
    health = lookup.health()
    assert (health.reachable, health.usable, health.newest_cutoff) == (False, False, None)
    assert "No such file" in str(health.reason)
    write(path, *content())
    clock.pass_by(timedelta(seconds=0.9))
    assert refusal_of(lookup).status == 503
    clock.pass_by(timedelta(seconds=0.1))
    assert found_by(lookup).cutoff == CUTOFF
    assert lookup.health().reason is None
    path.unlink()
    assert refusal_of(lookup).status == 503


def test_a_file_that_is_no_store_is_a_store_that_is_down(make: Make, path: Path) -> None:
    path.write_bytes(b"not a database" * 100)
    assert refusal_of(make()).retry_after == 1
    assert "not a database" in str(make().health().reason)


def test_a_store_of_other_features_is_refused_with_what_is_missing(
    make: Make, path: Path, clock: Clock
) -> None:
    lookup = make()
    write(path, *content(features=features_named(THREE)))
    other = refusal_of(lookup)
    assert (other.status, other.field, other.retry_after) == (503, "online_store", 60)
    assert "needs support_tickets_90d, login_frequency_7d too" in other.message
    health = lookup.health()
    assert (health.reachable, health.usable) == (True, False)
    assert "support_tickets_90d" in str(health.reason)
    write(path, *content())
    assert found_by(lookup).values == list(STORED["c-1"].values())


def test_a_feature_set_that_changes_under_a_running_service_is_noticed_at_once(
    make: Make, path: Path
) -> None:
    lookup = make(features=features_named(THREE))
    write(path, *content())
    assert found_by(lookup).values == list(STORED["c-1"].values())[:3]
    # No time passes, so what the store said of itself is still believed. Its old rows are gone.
    other = {"c-1": {name: 2 * value for name, value in STORED["c-1"].items()}}
    write(path, *content(other, features=features_named(THREE)))
    assert found_by(lookup).values == list(other["c-1"].values())[:3]


def test_a_store_that_comes_back_with_other_features_is_not_called_down(
    make: Make, path: Path, clock: Clock
) -> None:
    lookup = make()
    assert refusal_of(lookup).retry_after == 1
    orders, *others = FEATURES
    for features in (FEATURES[:3], [msgspec.structs.replace(orders, window_days=60), *others]):
        write(path, *content(features=features))
        clock.pass_by(timedelta(seconds=1))
        assert refusal_of(lookup).retry_after == 60
        assert lookup.health().reachable
        path.unlink()
        assert not lookup.health().reachable


def test_rows_of_the_next_day_are_those_of_the_next_day_at_once(make: Make, path: Path) -> None:
    lookup = make()
    write(path, *content())
    assert found_by(lookup).cutoff == CUTOFF
    # No time passes: what the store said of itself a moment ago must not make these early.
    write(path, *content(newest=CUTOFF + 24 * HOUR, data_time=CUTOFF + 24 * HOUR))
    assert found_by(lookup).cutoff == CUTOFF + 24 * HOUR


def test_features_that_are_defined_differently_are_not_those_of_the_model(
    make: Make, path: Path
) -> None:
    orders, *others = FEATURES
    wider = [msgspec.structs.replace(orders, window_days=60), *others]
    write(path, *content(features=wider))
    refusal = refusal_of(make())
    assert (refusal.status, refusal.field, refusal.retry_after) == (503, "online_store", 60)


@pytest.mark.parametrize("value", [10_001, -1])
def test_a_value_the_contract_does_not_allow_is_not_predicted_from(
    make: Make, path: Path, value: int
) -> None:
    rows = STORED | {"c-1": STORED["c-1"] | {"total_orders_30d": value}}
    write(path, *content(rows))
    refusal = refusal_of(make())
    assert (refusal.status, refusal.field) == (503, "online_store")
    assert f"holds {value} as total_orders_30d" in refusal.message
    assert found_by(make(), "c-2")


def test_a_damaged_row_costs_no_other(make: Make, path: Path) -> None:
    state, rows = content()
    write(path, state, rows | {"c-1": rows["c-1"][:-1], "c-2": b""})
    found = make().find(["c-0", "c-1", "c-2", "nobody", "c-3"])
    statuses = [row.status if isinstance(row, Refusal) else 200 for row in found]
    assert statuses == [200, 503, 503, 404, 200]


@pytest.mark.parametrize(
    ("environment", "policy"),
    [
        ({}, AgePolicy(36 * HOUR, "refuse")),
        ({"CHURN_MAX_AGE_HOURS": "", "CHURN_WHEN_STALE": ""}, AgePolicy(36 * HOUR, "refuse")),
        ({"CHURN_MAX_AGE_HOURS": "0.5", "CHURN_WHEN_STALE": "flag"}, AgePolicy(HOUR / 2, "flag")),
    ],
)
def test_the_policy_is_read_from_the_environment(environment: dict, policy: AgePolicy) -> None:
    assert AgePolicy.from_environment(environment) == policy


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "a day", "1e9"])
def test_a_limit_that_is_none_is_named(hours: str) -> None:
    with pytest.raises(ValueError, match=r"CHURN_MAX_AGE_HOURS is .* give hours above 0"):
        AgePolicy.from_environment({"CHURN_MAX_AGE_HOURS": hours})
    with pytest.raises(ValueError, match="CHURN_WHEN_STALE is 'serve'; give refuse or flag"):
        AgePolicy.from_environment({"CHURN_WHEN_STALE": "serve"})
