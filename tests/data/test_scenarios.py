"""What scenarios do to the shop, and that they do nothing before their day."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pytest

from churn_assets.errors import UserError
from churn_assets.settings import load_settings
from churn_assets.simulator import Scenario, Shop, ShopParams
from churn_assets.simulator.scenarios import BROKEN_DAYS, NAMES, STORM_DAYS

START = date(2024, 1, 1)
DAY = START + timedelta(days=60)
LAST = DAY + timedelta(days=49)
PARAMS = ShopParams(customers=500)


def shop(name: str) -> Shop:
    return Shop(PARAMS, START, scenario=Scenario(name, DAY))  # ty: ignore[invalid-argument-type]


@pytest.fixture(scope="module")
def ordinary() -> dict[str, pa.Table]:
    stable = Shop(PARAMS, START)
    return {table: stable.events(table, START, LAST) for table in stable.tables}


def by_day(events: pa.Table) -> np.ndarray:
    """Events by day, from START to LAST."""
    days = events["occurred_at"].cast(pa.date32()).cast(pa.int32()).to_numpy()
    first = (START - date(1970, 1, 1)).days
    return np.bincount(days - first, minlength=(LAST - START).days + 1)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_happens_before_its_day(name: str, ordinary: dict[str, pa.Table]) -> None:
    happens = shop(name)
    for table in happens.tables:
        before = happens.events(table, START, DAY - timedelta(days=1))
        known = ordinary[table].filter(
            pa.array(
                [d < DAY for d in ordinary[table]["occurred_at"].cast(pa.date32()).to_pylist()]
            )
        )
        assert before.equals(known), table


@pytest.mark.parametrize("name", ["holiday_season", "gradual_shift", "new_market", "price_rise"])
def test_a_day_alone_is_the_day_in_a_range(name: str) -> None:
    day = DAY + timedelta(days=20)
    for table in Shop.tables:
        alone = shop(name).events(table, day, day)
        days = shop(name).events(table, day - timedelta(days=2), day + timedelta(days=2))
        of_day = [d == day for d in days["occurred_at"].cast(pa.date32()).to_pylist()]
        assert alone.equals(days.filter(pa.array(of_day)).combine_chunks())


def ratio(name: str, table: str, ordinary: dict[str, pa.Table], first: int, last: int) -> float:
    """Events of the days DAY + first to DAY + last, of those of the ordinary shop."""
    begin = (DAY - START).days
    happened = by_day(shop(name).events(table, START, LAST))[begin + first : begin + last + 1]
    usual = by_day(ordinary[table])[begin + first : begin + last + 1]
    return happened.sum() / usual.sum()


def test_a_ticket_storm_comes_and_goes(ordinary: dict[str, pa.Table]) -> None:
    assert ratio("ticket_storm", "support_tickets", ordinary, 0, STORM_DAYS - 1) > 5
    assert ratio("ticket_storm", "support_tickets", ordinary, STORM_DAYS, 49) < 1.5
    assert ratio("ticket_storm", "orders", ordinary, 0, 49) == 1


def test_broken_login_tracking_loses_logins_and_nothing_else(
    ordinary: dict[str, pa.Table],
) -> None:
    assert ratio("login_tracking_broken", "logins", ordinary, 0, BROKEN_DAYS - 1) == 0
    assert ratio("login_tracking_broken", "logins", ordinary, BROKEN_DAYS, 49) == 1
    assert ratio("login_tracking_broken", "orders", ordinary, 0, 49) == 1


def test_holidays_rise_and_pass(ordinary: dict[str, pa.Table]) -> None:
    assert ratio("holiday_season", "orders", ordinary, 12, 22) > 1.3
    assert 0.7 < ratio("holiday_season", "orders", ordinary, 38, 49) < 1.3


def test_a_new_market_brings_customers(ordinary: dict[str, pa.Table]) -> None:
    assert ratio("new_market", "customers", ordinary, 0, 39) > 2
    assert ratio("new_market", "customers", ordinary, 42, 49) < 1.6


def test_prices_rise_and_some_leave(ordinary: dict[str, pa.Table]) -> None:
    risen = shop("price_rise").events("orders", DAY, LAST)["amount_minor"].to_numpy().mean()
    usual = ordinary["orders"]["amount_minor"].to_numpy().mean()
    assert 1.2 < risen / usual < 1.45
    assert ratio("price_rise", "orders", ordinary, 40, 49) < 0.95


def test_after_a_shift_the_loyal_write_tickets_and_log_in_less(
    ordinary: dict[str, pa.Table],
) -> None:
    assert ratio("sudden_shift", "support_tickets", ordinary, 0, 49) > 1.5
    assert ratio("sudden_shift", "logins", ordinary, 0, 49) < 0.9
    assert ratio("sudden_shift", "orders", ordinary, 0, 49) == 1
    gradual = ratio("gradual_shift", "logins", ordinary, 0, 9)
    assert ratio("sudden_shift", "logins", ordinary, 0, 9) < gradual <= 1


def test_visits_flap(ordinary: dict[str, pa.Table]) -> None:
    assert ratio("flapping", "logins", ordinary, 0, 7) > 1.15
    assert ratio("flapping", "logins", ordinary, 8, 15) < 1.15


def test_bad_scenarios_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="choose from stable, holiday_season"):
        Scenario("meteor", DAY)  # ty: ignore[invalid-argument-type]
    with pytest.raises(UserError, match=r"source\.scenario\.day is 2023-12-31"):
        Shop(PARAMS, START, scenario=Scenario("flapping", date(2023, 12, 31)))
    path = tmp_path / "shop.yaml"
    path.write_text(
        "source: {kind: shop, scenario: {name: meteor}}\ncalendar: {start: 2024-01-01}\n"
    )
    with pytest.raises(UserError, match="scenario"):
        load_settings(path)


def test_a_home_of_the_stable_shop_is_what_it_was(tmp_path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text("source: {kind: shop}\ncalendar: {start: 2024-01-01}\n")
    assert "scenario" not in load_settings(path).identity()
    path.write_text(
        "source: {kind: shop, scenario: {name: flapping, day: 2024-03-01}}\n"
        "calendar: {start: 2024-01-01}\n"
    )
    assert "flapping" in load_settings(path).identity()
