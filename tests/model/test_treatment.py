"""What offers change, by the customers nobody treats; and when that cannot be said."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.holdout import Holdout
from churn_assets.contract.logged import LoggedPrediction
from churn_assets.data.lake import Lake
from churn_assets.data.offers import OFFERS
from churn_assets.data.prediction_log import PREDICTION_LOG, log_table
from churn_assets.data.tables import TIMESTAMP
from churn_assets.errors import UserError
from churn_assets.modeling.costs import CostPolicy
from churn_assets.monitoring.treatment import (
    Group,
    TreatmentPolicy,
    TreatmentReport,
    assess,
    difference_interval,
    entries_of,
    intactness,
    judge_treatment,
    marked_predictions,
)
from churn_assets.simulator import Offer, Shop, ShopParams

DAY = timedelta(days=1)
HORIZON = 30
CUTOFF = datetime(2026, 1, 2, tzinfo=UTC)
HALF = Holdout(0.5)
POLICY = TreatmentPolicy(min_rows=50)
COSTS = CostPolicy()
NOW = CUTOFF + 40 * DAY
HELD = HALF.membership()


def logged(customer: str, at: Any = CUTOFF, p: float = 0.5, **changes: Any) -> dict[str, Any]:
    given = {"customer_id": customer, "at": at, "request_id": f"{customer}-{at}", "cutoff": at}
    return given | {"probability": p, "holdout": HELD(customer)} | changes


def rows_of(*rows: dict[str, Any], **how: Any) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    for column in ("at", "cutoff"):
        frame[column] = frame[column].astype("datetime64[us, UTC]")
    return marked_predictions(frame, **how)


@dataclass(frozen=True)
class World:
    """Customers with a chance to churn, asked about once; offers work on a share of them."""

    rows: pd.DataFrame
    labels: pd.DataFrame

    def judged(self, **changes: Any) -> TreatmentReport:
        given: dict[str, Any] = {
            "rows": self.rows,
            "labels": self.labels,
            "offers": None,
            "matured": [CUTOFF],
            "before": (),
            "holdout": HALF,
            "policy": POLICY,
            "costs": COSTS,
            "decision_threshold": 0.5,
            "horizon_days": HORIZON,
            "until": CUTOFF + HORIZON * DAY,
            "now": NOW,
        }
        return assess(**(given | changes))


def world(customers: int = 1500, success: float = 0.4, seed: int = 0, **marks: Any) -> World:
    rng = np.random.default_rng(seed)
    p = rng.beta(1, 2, customers)
    ids = [f"c-{number}" for number in range(customers)]
    log = pd.DataFrame(
        {
            "customer_id": ids,
            "at": pd.Series([CUTOFF] * customers, dtype="datetime64[us, UTC]"),
            "request_id": ids,
            "cutoff": pd.Series([CUTOFF] * customers, dtype="datetime64[us, UTC]"),
            "probability": p.round(4),
            "holdout": [HELD(i) for i in ids],
        }
    )
    rows = marked_predictions(log.assign(**marks))
    treated = np.array([x > COSTS.threshold and not HELD(i) for i, x in zip(ids, p, strict=True)])
    kept = treated & (rng.random(customers) < success)
    churned = (rng.random(customers) < p) & ~kept
    labels = pd.DataFrame({"customer_id": ids, "cutoff": CUTOFF, "churned": churned})
    return World(rows, labels.astype({"cutoff": "datetime64[us, UTC]"}))


# The interval.


def test_newcombes_interval_is_that_of_his_paper() -> None:
    """Statistics in Medicine 17 (1998), table II, method 10."""
    for first, second, low, high in (
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 10), 0.6075, 1.0),
        ((0, 10), (0, 10), -0.2775, 0.2775),
    ):
        assert difference_interval(first, second, 0.95) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held, others = rng.binomial(120, 0.6, 1000), rng.binomial(900, 0.45, 1000)
    found = [
        difference_interval((int(a), 120), (int(b), 900), 0.95)
        for a, b in zip(held, others, strict=True)
    ]
    assert 0.93 < np.mean([low < 0.15 < high for low, high in found]) < 0.97


# Who counts.


def test_a_customer_counts_when_first_above_the_threshold() -> None:
    """Whom an offer has kept below it later would be missing on one side only."""
    rows = rows_of(
        logged("a", CUTOFF + 40 * DAY, 0.9),
        logged("a", CUTOFF, 0.1),
        logged("a", CUTOFF + DAY, 0.4),
        logged("b", CUTOFF, COSTS.threshold),
        logged("c", CUTOFF, 0.9),
    )
    found = entries_of(rows, COSTS.threshold, {"c"})
    assert list(zip(found["customer_id"], found["probability"], strict=True)) == [("a", 0.4)]


def test_a_request_with_its_features_has_the_label_of_the_next_midnight() -> None:
    rows = rows_of(
        logged("a", CUTOFF + timedelta(hours=9), cutoff=None), behind=timedelta(days=365)
    )
    assert list(rows["cutoff"]) == [CUTOFF + DAY - 365 * DAY]


def test_who_was_treated_before_there_was_a_hold_out_does_not_count() -> None:
    before = world(20, holdout=None).rows
    later = before.assign(at=before["at"] + DAY, holdout=before["customer_id"].map(HELD))
    found = world(20)
    report = found.judged(rows=pd.concat([before, later], ignore_index=True).astype(before.dtypes))
    above = int((before["probability"] > COSTS.threshold).sum())
    assert report.counts["entered_unmarked"] == above > 0
    assert (report.held_out.entered, report.others.entered) == (0, 0)
    assert report.verdict == report.intact.verdict == "insufficient"
    assert report.effect is None


# What follows.


def test_offers_that_work_are_seen_to() -> None:
    report = world().judged()
    assert report.verdict == "offers keep customers"
    assert report.lower is not None
    assert report.upper is not None
    assert 0 < report.lower < 0.4 * report.figures["churn_rate_held_out"] < report.upper
    assert report.figures["success_rate"] == pytest.approx(0.4, abs=0.15)
    gain = report.figures["effect_of_an_offer"] * 120 - 10
    assert report.figures["gain_of_an_offer"] == pytest.approx(gain)
    assert report.intact.verdict == "ok"
    effect, balance = report.metrics()
    assert (effect.name, effect.verdict, effect.value) == ("offer_effect", "ok", report.effect)
    assert (balance.name, balance.verdict) == ("holdout_balance", "ok")
    assert balance.value is not None
    assert balance.value < balance.limit


def test_offers_that_do_nothing_are_not_seen_to_work() -> None:
    report = world(success=0.0).judged()
    assert report.verdict == "no effect seen"
    assert report.metrics()[0].verdict == "ok"


def test_offers_that_remind_customers_to_leave_raise_an_alert() -> None:
    told = world(success=0.0)
    outside = told.labels["customer_id"].map(lambda customer: not HELD(customer))
    report = told.judged(labels=told.labels.assign(churned=told.labels["churned"] | outside))
    assert report.verdict == "offers drive customers away"
    assert report.metrics()[0].verdict == "alert"


def test_too_few_outcomes_are_insufficient_whatever_they_say() -> None:
    report = world(150, success=1.0).judged()
    assert report.verdict == "insufficient"
    assert "50 of each are needed" in report.reason
    effect, _ = report.metrics()
    assert (effect.verdict, effect.value) == ("insufficient", None)
    waiting = world().judged(matured=[])
    assert (waiting.verdict, waiting.held_out.rows) == ("insufficient", 0)
    assert waiting.counts["waiting"] == waiting.counts["entered"] > 0
    assert waiting.scores == {"held_out": {"rows": 0.0}, "others": {"rows": 0.0}}


def test_offers_that_are_recorded_say_what_one_of_them_does() -> None:
    """Half of those meant to get one did, so one of them does twice as much."""
    found = world(3000)
    treated = found.rows[
        found.rows["probability"].gt(COSTS.threshold) & ~found.rows["holdout"].astype(bool)
    ]
    offers = treated[["customer_id"]].iloc[::2].assign(served_at=CUTOFF + timedelta(hours=3))
    late = treated[["customer_id"]].iloc[1::2].assign(served_at=CUTOFF + HORIZON * DAY)
    report = found.judged(offers=pd.concat([offers, late]))
    assert report.others.offered == len(offers)
    assert report.held_out.offered == 0
    assert report.effect is not None
    assert report.figures["more_offered"] == pytest.approx(0.5, abs=0.001)
    assert report.figures["effect_of_an_offer"] == pytest.approx(2 * report.effect, rel=0.01)
    none = found.judged(offers=offers.iloc[:0])
    assert "effect_of_an_offer" not in none.figures
    assert none.effect == report.effect


def test_the_model_is_judged_by_the_newest_outcome_of_each_customer() -> None:
    found = world(400)
    month = HORIZON * DAY
    late = found.rows.assign(
        at=found.rows["at"] + month, cutoff=found.rows["cutoff"] + month, probability=0.9
    )
    rows = pd.concat([found.rows, late], ignore_index=True).astype(late.dtypes)
    after = found.labels.assign(cutoff=found.labels["cutoff"] + month, churned=True)
    labels = pd.concat([found.labels, after]).astype(after.dtypes)
    waiting = found.judged(rows=rows, labels=labels)
    assert waiting.scores == found.judged().scores
    both = found.judged(rows=rows, labels=labels, matured=[CUTOFF, CUTOFF + month])
    for group in ("held_out", "others"):
        assert both.scores[group]["rows"] == waiting.scores[group]["rows"]
        assert (both.scores[group]["accuracy"], both.scores[group]["churn_rate"]) == (1.0, 1.0)


# Whether the hold-out is one.


def test_offers_to_the_hold_out_are_told() -> None:
    found = world()
    offers = found.rows[["customer_id"]].assign(served_at=CUTOFF)
    report = found.judged(offers=offers)
    assert report.intact.verdict == "alert"
    assert f"{report.held_out.offered:,} customers of the hold-out got an offer" in (
        report.intact.reason
    )


def test_a_service_that_marks_otherwise_is_told() -> None:
    report = world().judged(holdout=Holdout(0.4))
    assert report.intact.verdict == "alert"
    assert "are marked otherwise than `holdout` in the settings says" in report.intact.reason
    assert "share_z" not in report.intact.figures


def test_a_share_that_has_grown_since_is_no_fault() -> None:
    small = Holdout(0.25)
    before = world(holdout=False).rows
    before = before.assign(holdout=before["customer_id"].map(small.membership()))
    after = world().rows.assign(at=before["at"] + DAY, cutoff=before["cutoff"] + DAY)
    rows = pd.concat([before, after], ignore_index=True).astype(after.dtypes)
    report = world().judged(rows=rows)
    assert report.intact.verdict == "ok"
    assert report.intact.figures["marked_otherwise"] == 0
    assert "share_z" not in report.intact.figures
    # Who has come in since was above the threshold, and treated, before.
    assert report.held_out.entered < 0.3 * (report.held_out.entered + report.others.entered)


def test_a_hold_out_nobody_asks_about_any_more_is_told() -> None:
    found = world()
    dropped = found.rows["holdout"].astype(bool) & (found.rows.index % 2 == 0)
    report = found.judged(rows=found.rows[~dropped].reset_index(drop=True))
    assert report.intact.verdict == "alert"
    assert "are all asked about?" in report.intact.reason
    one = found.rows[found.rows["holdout"].astype(bool)].head(1)
    assert found.judged(rows=one.reset_index(drop=True)).intact.verdict == "insufficient"


def test_groups_that_are_unlike_before_treatment_are_told() -> None:
    found = world()
    higher = found.rows["probability"].where(
        ~found.rows["holdout"].astype(bool), np.sqrt(found.rows["probability"])
    )
    report = found.judged(rows=found.rows.assign(probability=higher))
    assert report.intact.verdict == "alert"
    assert "before anybody was treated" in report.intact.reason
    assert report.metrics()[1].verdict == "alert"


def test_chance_alone_seldom_makes_them_unlike() -> None:
    policy, rng, rows = replace(POLICY, alpha=0.05), np.random.default_rng(0), world(400).rows
    alerts = 0
    for _ in range(100):
        asked = rows.assign(probability=rng.uniform(0.3, 1.0, len(rows)))
        groups = [
            Group(len(of), 0, 0, float(of["probability"].mean()), None)
            for of in (asked[asked["holdout"].eq(held)] for held in (True, False))
        ]
        found = intactness(asked, asked, HALF, policy, (groups[0], groups[1]))
        alerts += found.verdict == "alert"
    assert alerts <= 8


def test_without_a_hold_out_nothing_can_be_said() -> None:
    report = world(holdout=False).judged(holdout=Holdout(0.0))
    assert report.verdict == report.intact.verdict == "insufficient"
    assert report.intact.reason == "there is no hold-out: holdout.share is 0"


@pytest.mark.parametrize(
    "given", [{"window_days": 0}, {"min_rows": 0}, {"confidence": 1.0}, {"alpha": 0.0}]
)
def test_a_policy_that_makes_no_sense_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"treatment.{next(iter(given))} is"):
        TreatmentPolicy(**given)


# The shop.

START = date(2024, 1, 1)
PARAMS = ShopParams(customers=20_000)
AT = 150


def day(number: int) -> date:
    return START + timedelta(days=number)


def midnight(number: int) -> datetime:
    return datetime.combine(day(number), time.min, tzinfo=UTC)


def ordered(shop: Shop, first: int, last: int) -> set[str]:
    return set(shop.events("orders", day(first), day(last))["customer_id"].to_pylist())


def prediction(customer: str, p: float, at: datetime) -> LoggedPrediction:
    return LoggedPrediction(
        request_id=customer,
        at=round(at.timestamp() * 1e6),
        customer_id=customer,
        features=FEATURE_NAMES,
        values=(1, 2.5, 3, 4, 5.5),
        probability=round(p, 4),
        champion=p,
        challenger=None,
        arm="champion",
        model_version="1",
        release_id="v1",
        bento=None,
        cutoff=None,
        stale=None,
        latency_us=100,
        holdout=HELD(customer),
    )


def test_whoever_was_above_before_the_window_does_not_count(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    for number, customers in ((0, ("a", "b")), (9, ("a", "c"))):
        p = {"a": 0.9, "b": 0.1, "c": 0.9}
        rows = [prediction(customer, p[customer], midnight(number)) for customer in customers]
        table = log_table([f"w{number}-{row.request_id}" for row in rows], rows)
        lake.write(PREDICTION_LOG, day(number), day(number), table, day_of="at")

    def entered(window_days: int) -> tuple[int, int]:
        report = judge_treatment(
            lake,
            HALF,
            TreatmentPolicy(window_days=window_days),
            COSTS,
            decision_threshold=0.5,
            horizon_days=HORIZON,
            behind=timedelta(),
            until=midnight(10),
            now=midnight(10),
        )
        return report.counts["entered"], report.counts["entered_before"]

    assert entered(10) == (2, 0)
    assert entered(9) == (1, 1)


def test_offers_of_the_shop_are_measured_as_they_are(tmp_path: Path) -> None:
    """The shop knows what its offers changed, and what each customer would have done without one.

    The model is as good as one can be: it has the true probabilities. All the same it looks worse
    where its predictions were acted on.
    """
    plain = Shop(PARAMS, START)
    ids = sorted(ordered(plain, AT - 90, AT - 1))
    p = plain.churn_probability(ids, midnight(AT), HORIZON)
    treated = [i for i, x in zip(ids, p, strict=True) if x > COSTS.threshold and not HELD(i)]
    served_at = midnight(AT) - timedelta(hours=9)
    offering = Shop(PARAMS, START, [Offer(i, served_at) for i in treated])
    back, without = (ordered(s, AT, AT + HORIZON - 1) for s in (offering, plain))

    lake = Lake(str(tmp_path / "lake"))
    asked_at = midnight(AT) - timedelta(hours=10)
    log = [prediction(i, x, asked_at) for i, x in zip(ids, p, strict=True)]
    table = log_table([f"w-{number}" for number in range(len(log))], log)
    lake.write(PREDICTION_LOG, day(AT - 1), day(AT - 1), table, day_of="at")
    matures, count = day(AT - 1 + HORIZON), len(ids)
    labels = {
        "customer_id": pa.array(ids),
        "cutoff": pa.array([midnight(AT)] * count, TIMESTAMP),
        "churned": pa.array([i not in back for i in ids]),
        "day": pa.array([matures] * count),
    }
    lake.write("churn_labels", matures, matures, pa.table(labels), day_of="day")
    offers = {
        "customer_id": pa.array(treated),
        "served_at": pa.array([served_at] * len(treated), TIMESTAMP),
    }

    def judged() -> TreatmentReport:
        return judge_treatment(
            lake,
            HALF,
            TreatmentPolicy(),
            COSTS,
            decision_threshold=0.5,
            horizon_days=HORIZON,
            behind=timedelta(),
            until=midnight(AT + HORIZON),
            now=midnight(AT + HORIZON),
        )

    report = judged()
    changed = offering.churn_probability(treated, midnight(AT), HORIZON)
    before = plain.churn_probability(treated, midnight(AT), HORIZON)
    truth = float((before - changed).mean())
    print(
        "TRUTH",
        truth,
        report.effect,
        report.lower,
        report.upper,
        report.held_out,
        report.others,
        report.scores,
        report.intact,
    )
    assert truth > 0.03
    assert report.verdict == "offers keep customers"
    assert report.lower is not None
    assert report.upper is not None
    assert 0 < report.lower < truth < report.upper
    assert report.intact.verdict == "ok"
    assert (report.held_out.offered, report.others.entered) == (None, len(treated))

    lake.write(OFFERS, day(AT - 1), day(AT - 1), pa.table(offers), day_of="served_at")
    recorded = judged()
    assert (recorded.held_out.offered, recorded.others.offered) == (0, len(treated))
    assert recorded.figures["effect_of_an_offer"] == report.effect

    correct = np.array([(x > 0.5) == (i not in without) for i, x in zip(ids, p, strict=True)])
    true = float(correct.mean())
    error = np.sqrt(true * (1 - true) / report.scores["held_out"]["rows"])
    assert abs(report.scores["held_out"]["accuracy"] - true) < 2 * error
    assert report.scores["others"]["accuracy"] < true - 2 * error
    gaps = {
        group: scores["mean_prediction"] - scores["churn_rate"]
        for group, scores in report.scores.items()
    }
    assert abs(gaps["held_out"]) < 0.01 < gaps["others"]
    assert report.scores["others"]["auc"] < report.scores["held_out"]["auc"]
