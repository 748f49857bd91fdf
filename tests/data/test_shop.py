"""The built-in shop's record: the same whoever asks, well formed, and of a useful size."""

from __future__ import annotations

from datetime import date, timedelta

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from churn_assets.data.tables import RAW_TABLES
from churn_assets.errors import UserError
from churn_assets.simulator import Shop, ShopParams
from churn_assets.simulator.customers import draw_customers
from churn_assets.simulator.randomness import bits, normal, sequences, uniform, uniform_pair
from churn_assets.simulator.scenarios import Effects
from churn_assets.simulator.seasons import Clock, calendar

START = date(2024, 1, 1)
SMALL = ShopParams(customers=300)
NOTHING = Effects("stable", 0)
DAYS = 150
LAST = START + timedelta(days=DAYS - 1)


def day(number: int) -> date:
    return START + timedelta(days=number)


@pytest.fixture(scope="module")
def record() -> dict[str, pa.Table]:
    shop = Shop(SMALL, START)
    return {table: shop.events(table, START, LAST) for table in shop.tables}


def on(events: pa.Table, first: date, last: date) -> pa.Table:
    days = events["occurred_at"].cast(pa.date32()).to_pylist()
    return events.filter(pa.array([first <= d <= last for d in days]))


@pytest.mark.parametrize("table", Shop.tables)
@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, DAYS - 1), length=st.integers(1, 70))
def test_days_are_the_same_alone_and_in_a_range(record, table, first, length):
    last = min(first + length - 1, DAYS - 1)

    alone = Shop(SMALL, START).events(table, day(first), day(last))

    assert alone.equals(on(record[table], day(first), day(last)))


@pytest.mark.parametrize("table", Shop.tables)
def test_a_day_does_not_depend_on_what_was_asked_before(table):
    shop = Shop(SMALL, START)
    before = shop.events(table, day(20), day(20))
    shop.events(table, day(1400), day(1400))

    assert shop.events(table, day(20), day(20)).equals(before)


@pytest.mark.parametrize("table", Shop.tables)
def test_tables_are_well_formed(record, table):
    events, key = record[table], RAW_TABLES[table].key
    assert events.num_rows > 0
    assert events.schema.equals(RAW_TABLES[table].schema)
    assert not any(column.null_count for column in events.columns)
    assert events.equals(events.sort_by([("occurred_at", "ascending"), (key, "ascending")]))
    frame = events.to_pandas()
    assert frame[key].is_unique
    occurred, ingested = frame["occurred_at"], frame["ingested_at"]
    assert occurred.min() >= pd.Timestamp(START, tz="UTC")
    assert (ingested >= occurred).all()
    assert ((ingested - occurred) < pd.Timedelta(minutes=1)).all()
    assert (ingested.dt.date == occurred.dt.date).all()


@pytest.mark.parametrize("table", ["orders", "support_tickets", "logins"])
def test_every_event_is_of_a_customer_who_has_appeared(record, table):
    appeared = record["customers"].to_pandas().set_index("customer_id")["occurred_at"]
    events = record[table].to_pandas()

    since = events["occurred_at"] - events["customer_id"].map(appeared)
    assert since.notna().all()
    assert (since >= pd.Timedelta(0)).all()


def test_who_appears_orders_that_day(record):
    appeared = on(record["customers"], day(1), LAST).to_pandas().set_index("customer_id")
    first_order = record["orders"].to_pandas().groupby("customer_id")["occurred_at"].min()

    ordered = first_order.reindex(appeared.index)
    assert len(ordered) > 50
    assert (ordered.dt.date == appeared["occurred_at"].dt.date).all()


def test_every_order_follows_a_login_of_that_day(record):
    logins, orders = record["logins"].to_pandas(), record["orders"].to_pandas()
    for events in (logins, orders):
        events["day"] = events["occurred_at"].dt.date
    first_login = logins.groupby(["customer_id", "day"])["occurred_at"].min().rename("login")

    both = orders.join(first_login, on=["customer_id", "day"])
    assert (both["login"] <= both["occurred_at"]).all()


def test_another_seed_is_another_shop(record):
    other = Shop(ShopParams(customers=300, seed=43), START).events("orders", START, LAST)

    assert not other.equals(record["orders"])
    assert other.num_rows == pytest.approx(record["orders"].num_rows, rel=0.15)


def test_the_default_shop_has_ten_thousand_customers_to_judge():
    shop = Shop(ShopParams(), START)
    sizes = []
    for cutoff in (90, 400, 700):
        orders = shop.events("orders", day(cutoff - 90), day(cutoff - 1))
        sizes.append(len(orders["customer_id"].unique()))

    assert min(sizes) >= 11_000
    assert max(sizes) <= 13_000


def test_busy_days_are_busy_and_orders_have_a_heavy_tail():
    shop = Shop(ShopParams(customers=3_000), START)
    orders = shop.events("orders", START, day(363))
    weekday = np.bincount(orders["occurred_at"].to_pandas().dt.weekday, minlength=7)
    amount = np.log(orders["amount_minor"].to_numpy())

    assert weekday[5] > 1.1 * weekday[1]
    assert weekday.max() < 1.3 * weekday.min()
    standard = (amount - amount.mean()) / amount.std()
    assert abs((standard**3).mean()) < 0.2
    assert np.exp(amount).mean() > 1.15 * np.exp(np.median(amount))


def test_a_longer_calendar_adds_customers_and_changes_none():
    short = draw_customers(SMALL, calendar(START, -1460, 100, 0.04), NOTHING)
    long = draw_customers(SMALL, calendar(START, -1460, 900, 0.04), NOTHING)

    assert len(long) > len(short)
    for name, values in vars(short).items():
        np.testing.assert_array_equal(values, getattr(long, name)[: len(short)], err_msg=name)


def test_bits_are_those_of_splitmix64():
    # First outputs of SplitMix64 from state 1234567, as published with Vigna's C code.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]

    assert bits(np.array([1234567], dtype=np.uint64), np.arange(3)).tolist() == expected


def test_draws_have_the_distribution_they_say():
    states = sequences(7, "test", np.arange(40_000))
    random = bits(states, 3)
    high, low = uniform_pair(random)

    for sample in (uniform(random), high, low, uniform(bits(states[:1], np.arange(40_000)))):
        assert 0 < sample.min() < sample.max() < 1
        counts, _ = np.histogram(sample, bins=20, range=(0, 1))
        assert ((counts - 2000) ** 2 / 2000).sum() < 50  # chi-squared, 19 degrees of freedom
    assert abs(np.corrcoef(high, low)[0, 1]) < 0.02
    sample = normal(random)
    assert abs(sample.mean()) < 0.02
    assert sample.std() == pytest.approx(1, abs=0.02)


def test_a_clock_gives_back_the_time_it_was_read():
    clock = Clock(-5, np.array([1.0, 0.5, 2.0, 1.5, 0.25, 1.0, 3.0, 1.0]))
    days, fractions = np.arange(-4, 2), np.linspace(0, 0.99, 6)

    found, passed = clock.day(clock.reading(days, fractions), -4, 1)

    np.testing.assert_array_equal(found, days)
    np.testing.assert_allclose(passed, fractions, atol=1e-12)


@pytest.mark.parametrize(
    ("table", "first", "last", "message"),
    [
        ("returns", START, START, "no table 'returns'"),
        ("orders", day(2), day(1), "earlier one first"),
        ("orders", date(2023, 12, 31), START, "starts on 2024-01-01"),
    ],
)
def test_what_cannot_be_asked(table, first, last, message):
    with pytest.raises(UserError, match=message):
        Shop(SMALL, START).events(table, first, last)


@pytest.mark.parametrize(
    "wrong",
    [
        {"customers": 0},
        {"customers": 3_000_000},
        {"mean_lifetime": float("nan")},
        {"quiet_chance": 1.5},
        {"cooling_spread": -1.0},
        {"follow_through": (0.9, 0.5)},
        {"rhythms": (7.0,)},
        {"rhythms": (1.0, 7.0, 14.0)},
        {"grievance_factor": 0.5},
    ],
)
def test_no_shop_has_such_parameters(wrong):
    with pytest.raises(UserError, match=rf"^shop: .*{next(iter(wrong))}"):
        ShopParams(**wrong)


def test_parameters_can_come_from_a_configuration_file():
    params = msgspec.convert({"customers": 50, "rhythms": [7, 14, 28]}, ShopParams)

    assert params.rhythms == (7, 14, 28)
    assert params.seed == ShopParams().seed
