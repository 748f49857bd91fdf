"""How the shop's customers leave, what the shop knows of it, and what offers change."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from churn_assets.errors import UserError
from churn_assets.simulator import Offer, Shop, ShopParams

START = date(2024, 1, 1)
PARAMS = ShopParams(customers=2_000)
DAYS = 420
HORIZON = 30
CUTOFF = DAYS - HORIZON
FEATURES = ["orders_30d", "value", "recency", "tickets_90d", "logins_7d"]


def day(number: int) -> date:
    return START + timedelta(days=number)


def midnight(number: int) -> datetime:
    return datetime.combine(day(number), time.min, tzinfo=UTC)


@pytest.fixture(scope="module")
def events() -> dict[str, pd.DataFrame]:
    shop = Shop(PARAMS, START)
    tables = {
        name: shop.events(name, START, day(DAYS - 1)).to_pandas()
        for name in ("orders", "support_tickets", "logins")
    }
    origin = pd.Timestamp(midnight(0))
    return {
        name: table.assign(when=(table["occurred_at"] - origin) / pd.Timedelta(days=1))
        for name, table in tables.items()
    }


def look_back(events: pd.DataFrame, cutoff: int, days: int):
    inside = (events["when"] >= cutoff - days) & (events["when"] < cutoff)
    return events[inside].groupby("customer_id")


def at(events: dict[str, pd.DataFrame], cutoff: int) -> pd.DataFrame:
    """Features and label of everyone who ordered in the 90 days before the cutoff."""
    orders = events["orders"]
    frame = pd.DataFrame({"recency": cutoff - look_back(orders, cutoff, 90)["when"].max()})
    frame["recency"] = np.floor(frame["recency"])
    frame["orders_30d"] = look_back(orders, cutoff, 30).size()
    frame["value"] = look_back(orders, cutoff, 365)["amount_minor"].mean() / 100
    frame["tickets_90d"] = look_back(events["support_tickets"], cutoff, 90).size()
    frame["logins_7d"] = look_back(events["logins"], cutoff, 7).size() / 7
    frame = frame.fillna(0.0)
    back = look_back(orders, cutoff + HORIZON, HORIZON).size()
    frame["churned"] = ~frame.index.isin(back.index)
    return frame


@pytest.fixture(scope="module")
def judged(events) -> pd.DataFrame:
    frame = at(events, CUTOFF)
    probability = Shop(PARAMS, START).churn_probability(
        list(frame.index), midnight(CUTOFF), HORIZON
    )
    return frame.assign(probability=probability)


def test_outcomes_come_with_the_probability_the_shop_gives(judged):
    p, churned = judged["probability"].to_numpy(), judged["churned"].to_numpy()
    assert ((p >= 0) & (p <= 1)).all()
    assert not churned[p < 1e-9].any()
    assert churned[p == 1.0].all()
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.0), (0.0, 1.01)):
        inside = (p >= low) & (p < high)
        assert inside.sum() > 10
        error = np.sqrt((p[inside] * (1 - p[inside])).sum()) / inside.sum()
        assert abs(churned[inside].mean() - p[inside].mean()) < 4 * error + 1e-9


def test_leaving_shows_before_it_happens(judged):
    recent = judged[judged["recency"] < 14]  # in these the gap itself does not show yet
    churned, stayed = recent[recent["churned"]], recent[~recent["churned"]]

    assert len(churned) > 30
    assert churned["orders_30d"].mean() < 0.8 * stayed["orders_30d"].mean()
    assert churned["logins_7d"].mean() < 0.8 * stayed["logins_7d"].mean()
    assert churned["tickets_90d"].mean() > 1.5 * stayed["tickets_90d"].mean()


def test_an_honest_model_is_good_and_the_latent_state_better(events, judged):
    train = pd.concat([at(events, CUTOFF - HORIZON * back) for back in range(1, 7)])
    model = HistGradientBoostingClassifier(
        max_iter=100, learning_rate=0.06, max_leaf_nodes=15, min_samples_leaf=40, random_state=0
    ).fit(train[FEATURES], train["churned"])
    predicted = model.predict_proba(judged[FEATURES])[:, 1]
    churned = judged["churned"]

    auc = roc_auc_score(churned, predicted)
    recency = roc_auc_score(churned, judged["recency"])
    oracle = roc_auc_score(churned, judged["probability"])
    assert 0.15 < churned.mean() < 0.30
    assert ((predicted > 0.5) == churned).mean() >= 0.87
    assert auc >= 0.91
    assert auc >= recency + 0.02
    assert oracle >= auc + 0.01


def leavers(judged: pd.DataFrame) -> list[str]:
    """Customers who are cooling off, by what the shop knows."""
    return list(judged.index[judged["probability"].between(0.2, 0.95)])


def offers_on(customer_ids: list[str], number: int, hour: int = 12) -> list[Offer]:
    served_at = midnight(number) + timedelta(hours=hour)
    return [Offer(customer_id, served_at) for customer_id in customer_ids]


def test_no_day_sees_the_offers_of_that_day_or_later(judged):
    plain = Shop(PARAMS, START)
    late = offers_on(leavers(judged), CUTOFF, hour=0) + offers_on(leavers(judged), CUTOFF + 20)
    offering = Shop(PARAMS, START, late)
    first = day(CUTOFF - 60)
    for table in Shop.tables:
        until = plain.events(table, first, day(CUTOFF))
        assert offering.events(table, first, day(CUTOFF)).equals(until)
    ids = list(judged.index)
    np.testing.assert_array_equal(
        offering.churn_probability(ids, midnight(CUTOFF), HORIZON), judged["probability"]
    )


def test_offers_keep_some_of_those_who_would_have_left_and_touch_nobody_else(judged):
    offered = leavers(judged)
    plain = Shop(PARAMS, START)
    offering = Shop(PARAMS, START, offers_on(offered, CUTOFF - 1, hour=23))
    first, last = day(CUTOFF), day(CUTOFF + HORIZON - 1)
    before = plain.events("orders", first, last).to_pandas()
    after = offering.events("orders", first, last).to_pandas()

    pd.testing.assert_frame_equal(
        before[~before["customer_id"].isin(offered)].reset_index(drop=True),
        after[~after["customer_id"].isin(offered)].reset_index(drop=True),
    )
    assert set(before["order_id"]) < set(after["order_id"])
    changed = offering.churn_probability(list(judged.index), midnight(CUTOFF), HORIZON)
    fell = changed < judged["probability"] - 1e-9
    assert set(judged.index[fell]) <= set(offered)
    assert 0.15 * len(offered) < fell.sum() < 0.6 * len(offered)
    assert not (changed > judged["probability"] + 1e-9).any()
    kept = judged.index.isin(after["customer_id"])
    error = np.sqrt((changed * (1 - changed)).sum())
    assert abs(kept.sum() - (1 - changed).sum()) < 4 * error


def test_who_was_kept_is_still_there_months_later(judged):
    offered = leavers(judged)
    offering = Shop(PARAMS, START, offers_on(offered, CUTOFF - 1))
    first, last = day(CUTOFF + 130), day(CUTOFF + 160)

    def still_ordering(shop: Shop) -> set[str]:
        return set(shop.events("orders", first, last)["customer_id"].to_pylist()) & set(offered)

    before, after = still_ordering(Shop(PARAMS, START)), still_ordering(offering)
    assert before < after
    assert len(after - before) > 0.05 * len(offered)


def test_people_come_back_from_quiet_spells():
    # Potential events are the same, so the shop without quiet spells has all orders and more.
    lively = Shop(replace(PARAMS, quiet_chance=0.0), START)
    all_orders = lively.events("orders", day(30), day(180)).to_pandas()
    orders = Shop(PARAMS, START).events("orders", day(30), day(180)).to_pandas()

    missed = all_orders[~all_orders["order_id"].isin(orders["order_id"])]
    assert set(orders["order_id"]) < set(all_orders["order_id"])
    assert 0.01 < len(missed) / len(all_orders) < 0.05
    early = missed[missed["occurred_at"] < pd.Timestamp(midnight(120))]
    later = orders[orders["occurred_at"] > pd.Timestamp(midnight(120))]
    assert early["customer_id"].isin(later["customer_id"]).mean() > 0.8
    # A spell hides what is due in a row, not one order here and there.
    assert missed.groupby("customer_id").size().mean() > 1.4


def test_offers_count_once_a_day_in_any_order_and_day_by_day(judged):
    known = Shop(PARAMS, START).events("customers", START, day(CUTOFF - 10))["customer_id"]
    offered = sorted(set(leavers(judged)) & set(known.to_pylist()))
    early, late = offers_on(offered, CUTOFF - 9), offers_on(offered, CUTOFF - 2)
    once = Shop(PARAMS, START, early + late)
    again = Shop(PARAMS, START, late[::-1] + offers_on(offered, CUTOFF - 9, hour=1) + early)
    first, last = day(CUTOFF - 10), day(CUTOFF + 5)
    expected = once.events("logins", first, last)

    assert again.events("logins", first, last).equals(expected)
    for number in (CUTOFF - 9, CUTOFF - 8, CUTOFF - 1, CUTOFF + 3):
        served = [o for o in early + late if o.served_at < midnight(number)]
        alone = Shop(PARAMS, START, served).events("logins", day(number), day(number))
        assert alone.equals(once.events("logins", day(number), day(number)))


def test_a_shop_of_the_unpersuadable(judged):
    params = replace(PARAMS, persuasion=0.0)
    offers = offers_on(leavers(judged), CUTOFF - 1)
    first, last = day(CUTOFF), day(CUTOFF + 9)

    expected = Shop(params, START).events("orders", first, last)
    assert Shop(params, START, offers).events("orders", first, last).equals(expected)


def test_a_gone_customer_is_not_won_back(judged):
    gone = list(judged.index[(judged["probability"] == 1.0) & (judged["recency"] > 70)])
    assert len(gone) > 20
    offering = Shop(PARAMS, START, offers_on(gone, CUTOFF - 1))

    assert (offering.churn_probability(gone, midnight(CUTOFF), HORIZON) == 1.0).mean() > 0.9


@pytest.mark.parametrize(
    ("offer", "message"),
    [
        (Offer("c-9999999", midnight(5)), "no customer 'c-9999999'"),
        (Offer("CUST", midnight(5)), "no customer 'CUST'"),
        (Offer("", datetime(2024, 2, 1)), "no time zone"),
    ],
)
def test_offers_that_cannot_have_been_served(offer, message):
    with pytest.raises(UserError, match=message):
        Shop(PARAMS, START, [offer])


def test_an_offer_before_the_customer_appeared():
    shop = Shop(PARAMS, START)
    newcomer = shop.events("customers", day(50), day(50))["customer_id"][0].as_py()

    Shop(PARAMS, START, [Offer(newcomer, midnight(50))])
    with pytest.raises(UserError, match="not a customer yet"):
        Shop(PARAMS, START, [Offer(newcomer, midnight(49))])
    with pytest.raises(UserError, match="arrives after"):
        shop.churn_probability([newcomer], midnight(50), HORIZON)
    assert shop.churn_probability([newcomer], midnight(51), HORIZON).shape == (1,)


@pytest.mark.parametrize(
    ("cutoff", "horizon", "message"),
    [
        (midnight(10) + timedelta(hours=1), 30, "not midnight"),
        (midnight(10).replace(tzinfo=None), 30, "not midnight"),
        (midnight(0), 30, "starts on"),
        (midnight(10), 0, "empty"),
    ],
)
def test_probabilities_that_cannot_be_asked(cutoff, horizon, message):
    with pytest.raises(UserError, match=message):
        Shop(PARAMS, START).churn_probability([], cutoff, horizon)


def test_nobody_asked_nobody_answered_and_repeats_are_answered(judged):
    shop = Shop(PARAMS, START)
    someone = judged.index[0]

    assert shop.churn_probability([], midnight(CUTOFF), HORIZON).shape == (0,)
    twice = shop.churn_probability([someone, someone], midnight(CUTOFF), HORIZON)
    assert twice.tolist() == [judged.loc[someone, "probability"]] * 2
