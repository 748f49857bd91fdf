"""The report on the version in Production: what it says of outcomes, and what it refuses to say."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from churn_assets.data.lake import Lake
from churn_assets.data.prediction_log import PREDICTION_LOG, SCHEMA
from churn_assets.data.tables import TIMESTAMP
from churn_assets.errors import UserError
from churn_assets.modeling.bootstrap import Interval, Resampling
from churn_assets.modeling.metrics import auc, score
from churn_assets.monitoring import performance
from churn_assets.monitoring.outcomes import EMPTY_LABELS
from churn_assets.monitoring.performance import (
    EMPTY_LOGGED,
    InProduction,
    Judging,
    PerformancePolicy,
    PerformanceRecord,
    Window,
    confidence_of,
    decay_of,
    judge_performance,
    performance_of,
    scored_by,
)

HORIZON = 30
DAY = timedelta(days=1)
NOW = datetime(2026, 3, 1, 4, 45, tzinfo=UTC)
POLICY = PerformancePolicy()
JUDGING = Judging(POLICY, HORIZON, 0.5, Resampling(100), seed=1)
WINDOW = Window(NOW, timedelta(), POLICY, HORIZON)
# Labels of the cutoffs in between matured in the 28 days to the midnight before NOW.
FIRST, LAST = datetime(2026, 1, 3, tzinfo=UTC), datetime(2026, 1, 30, tzinfo=UTC)
OF = InProduction("7", "v7-abc", Interval(0.9, 0.89, 0.91))


def world(
    rows: int = 2000,
    *,
    seed: int = 0,
    strength: float = 3.0,
    decayed: bool = False,
    first: datetime = FIRST,
    last: datetime = LAST,
    stretch: float = 1.0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Logged predictions and labels of a model that knows each customer's chance, or once did.

    stretch: of the logit, so that above 1 the model is surer than it may be.
    """
    rng = np.random.default_rng(seed)
    logit = rng.normal(-1, strength, rows)
    chance = 1 / (1 + np.exp(-logit))
    churned = rng.random(rows) < (rng.permutation(chance) if decayed else chance)
    days = (last - first) // DAY + 1
    cutoffs = pd.Series([first + int(n) * DAY for n in rng.integers(0, days, rows)])
    logged = pd.DataFrame(
        {
            "request_id": [f"r{n}" for n in range(rows)],
            "at": cutoffs + pd.to_timedelta(rng.integers(0, 86_000, rows), unit="s"),
            "customer_id": [f"c{n}" for n in range(rows)],
            "cutoff": cutoffs,
            "release_id": "v7-abc",
            "p": 1 / (1 + np.exp(-stretch * logit)),
            "holdout": False,
        }
    )
    logged["answered"] = logged["p"]
    times = {"at": EMPTY_LOGGED["at"].dtype, "cutoff": EMPTY_LOGGED["cutoff"].dtype}
    logged = logged.astype(times)
    return logged, logged[["customer_id", "cutoff"]].assign(churned=churned)


def judged(
    logged: pd.DataFrame,
    labels: pd.DataFrame,
    *,
    of: InProduction = OF,
    window: Window = WINDOW,
    matured_until: datetime = LAST,
    newest_labels: date | None = date(2026, 2, 28),
    first_logged: date | None = date(2025, 12, 1),
    **policy: Any,
) -> PerformanceRecord:
    judging = replace(JUDGING, policy=replace(POLICY, **policy))
    window = replace(window, policy=judging.policy)
    matured = [c for c in logged["cutoff"].unique() if c <= matured_until]
    return performance_of(
        logged,
        labels,
        matured,
        of,
        judging,
        window,
        newest_labels=newest_labels,
        first_logged=first_logged,
    )


def test_a_model_that_holds_is_ok_with_the_figures_of_the_evaluation() -> None:
    logged, labels = world()
    true_auc = auc(labels["churned"], logged["p"])
    report = judged(logged, labels, of=replace(OF, promised_auc=Interval(true_auc, None, None)))
    scores = score(labels["churned"], logged["p"])
    assert report.verdict == "ok"
    assert report.rows == 2000
    for name in ("accuracy", "auc", "log_loss", "brier", "calibration_error"):
        found = report.figures[name]
        assert found.value == pytest.approx(getattr(scores, name))
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.high
    accuracy = report.metric("accuracy")
    assert (accuracy.verdict, accuracy.limit, accuracy.rows) == ("ok", 0.8, 2000)
    assert (accuracy.at, accuracy.until) == (NOW, datetime(2026, 3, 1, tzinfo=UTC))
    assert accuracy.release_id == "v7-abc"
    assert report.metric("matured_log_loss").verdict == "ok"
    assert report.metric("days_without_labels").value == 0
    assert [line.release_id for line in report.releases] == ["v7-abc"]


@pytest.mark.parametrize(("wrong", "verdict"), [(400, "ok"), (401, "alert")])
def test_accuracy_below_the_limit_alerts(wrong: int, verdict: str) -> None:
    logged, labels = world()
    logged["p"] = np.where(labels["churned"], 0.9, 0.1)
    labels.loc[: wrong - 1, "churned"] = ~labels.loc[: wrong - 1, "churned"]
    metric = judged(logged, labels).metric("accuracy")
    assert metric.verdict == verdict
    assert metric.value == pytest.approx(1 - wrong / 2000)


def test_decay_alerts_and_says_how_sure_it_is() -> None:
    report = judged(*world(decayed=True))
    metric = report.metric("matured_auc")
    assert (report.verdict, metric.verdict) == ("alert", "alert")
    assert metric.limit == pytest.approx(0.87)
    assert "surely more than 0.03" in metric.reason
    assert report.decay is not None
    assert report.decay.low is not None
    assert report.decay.low > 0.03
    assert report.metric("matured_log_loss").verdict == "alert"


def test_chance_alone_is_no_decay() -> None:
    """At the fewest rows that are judged: none of twenty honest models is called decayed."""
    alarms = 0
    for seed in range(20):
        logged, labels = world(300, seed=seed, strength=2.5)
        # What the model is worth on ever so many customers.
        metric = judged(
            logged, labels, of=replace(OF, promised_auc=Interval(0.8976, None, None))
        ).metric("matured_auc")
        alarms += metric.verdict == "alert"
    assert alarms == 0


def test_a_small_loss_is_decay_only_when_the_whole_interval_is_beyond() -> None:
    logged, labels = world(400, seed=2, strength=1.5)
    value = auc(labels["churned"], logged["p"])
    assert value is not None
    near = judged(logged, labels, of=replace(OF, promised_auc=Interval(value + 0.04, None, None)))
    assert near.metric("matured_auc").verdict == "ok"
    assert "not surely more" in near.metric("matured_auc").reason
    far = judged(logged, labels, of=replace(OF, promised_auc=Interval(value + 0.1, None, None)))
    assert far.metric("matured_auc").verdict == "alert"


def test_the_interval_of_the_loss_has_both_uncertainties() -> None:
    lost = decay_of(Interval(0.95, 0.94, 0.96), Interval(0.90, 0.88, 0.915))
    assert lost is not None
    assert lost.value == pytest.approx(0.05)
    assert lost.low == pytest.approx(0.05 - np.hypot(0.01, 0.015))
    assert lost.high == pytest.approx(0.05 + np.hypot(0.01, 0.02))
    exact = decay_of(Interval(0.95, None, None), Interval(0.90, 0.88, 0.92))
    assert exact is not None
    assert exact.low == pytest.approx(0.03)
    assert decay_of(Interval(0.95, None, None), Interval(0.9, None, None)) is None


def test_too_few_outcomes_are_insufficient_never_ok() -> None:
    logged, labels = world(299)
    report = judged(logged, labels)
    assert report.verdict == "insufficient"
    for name in ("accuracy", "matured_auc", "matured_log_loss", "expected_accuracy_error"):
        metric = report.metric(name)
        assert (metric.verdict, metric.value) == ("insufficient", None)
        assert "299 outcomes of version 7" in metric.reason
        assert "300 are needed" in metric.reason


def test_outcomes_that_all_end_alike_have_no_auc() -> None:
    logged, labels = world()
    metric = judged(logged, labels.assign(churned=False)).metric("matured_auc")
    assert (metric.verdict, metric.value) == ("insufficient", None)


def test_what_is_not_known_of_the_model_is_insufficient() -> None:
    unpromised = judged(*world(), of=InProduction("7")).metric("matured_auc")
    assert unpromised.verdict == "insufficient"
    assert "promised is not known" in unpromised.reason
    nothing = judged(EMPTY_LOGGED, EMPTY_LABELS, of=InProduction(None), first_logged=None)
    assert nothing.verdict == "insufficient"
    assert nothing.metric("accuracy").reason == "nothing is in Production"


def test_no_labels_ever_say_since_when() -> None:
    logged, _ = world()
    late: dict[str, Any] = {"newest_labels": None, "matured_until": FIRST - DAY}
    report = judged(logged, EMPTY_LABELS, first_logged=date(2026, 1, 2), **late)
    days = report.metric("days_without_labels")
    assert (days.verdict, days.value) == ("alert", 27)
    assert days.reason == "no label has ever come; the first were due on 2026-02-02"
    accuracy = report.metric("accuracy")
    assert accuracy.verdict == "insufficient"
    assert "2,000 predictions are overdue, none has come since 2026-02-02" in accuracy.reason
    # What is expected can be told all the same.
    assert report.metric("expected_accuracy").rows == 2000
    early = judged(logged, EMPTY_LABELS, first_logged=date(2026, 2, 20), **late)
    assert early.metric("days_without_labels").verdict == "insufficient"
    assert "first are due on 2026-03-23" in early.metric("days_without_labels").reason


def test_labels_that_stopped_coming_alert_and_old_ones_are_no_evidence() -> None:
    logged, labels = world(last=FIRST + DAY)
    stopped = judged(logged, labels, newest_labels=date(2026, 2, 2), matured_until=FIRST + DAY)
    days = stopped.metric("days_without_labels")
    assert (days.verdict, days.value, days.limit) == ("alert", 26, 3)
    later = Window(NOW + 60 * DAY, timedelta(), POLICY, HORIZON)
    old = judged(logged, labels, window=later, newest_labels=date(2026, 2, 2))
    assert old.verdict == "insufficient"
    assert old.rows == 0


def test_only_outcomes_that_matured_in_the_window_count() -> None:
    # 28 label days: 2026-02-01 to 2026-02-28.
    assert (WINDOW.first_cutoff, WINDOW.last_cutoff) == (FIRST, LAST)
    for cutoff, rows in ((FIRST - DAY, 0), (FIRST, 500), (LAST, 500), (LAST + DAY, 0)):
        logged, labels = world(500, first=cutoff, last=cutoff)
        assert judged(logged, labels, matured_until=LAST + DAY).rows == rows, cutoff


def test_a_shop_in_the_past_is_judged_in_its_own_time() -> None:
    past = Window(NOW + 400 * DAY, 400 * DAY, POLICY, HORIZON)
    assert (past.until, past.first_cutoff) == (WINDOW.until, WINDOW.first_cutoff)


def test_one_prediction_of_a_customer_counts_in_a_horizon() -> None:
    logged, labels = world(600)
    again = logged.assign(at=logged["at"] + timedelta(seconds=1), p=0.99, request_id="again")
    report = judged(pd.concat([logged, again], ignore_index=True), labels)
    assert (report.rows, report.counts["repeated"]) == (600, 600)
    assert report.figures["accuracy"] == judged(logged, labels).figures["accuracy"]


def test_expected_accuracy_is_that_of_predictions_without_labels() -> None:
    assert confidence_of(np.array([0.9, 0.2, 0.5]), 0.5) == pytest.approx([0.9, 0.8, 0.5])
    assert confidence_of(np.array([0.4, 0.2]), 0.3) == pytest.approx([0.4, 0.8])
    logged, _ = world(1000, first=LAST + DAY, last=LAST + 20 * DAY)
    metric = judged(logged, EMPTY_LABELS).metric("expected_accuracy")
    assert metric.value == pytest.approx(np.maximum(logged["p"], 1 - logged["p"]).mean())
    assert (metric.verdict, metric.rows) == ("ok", 1000)
    assert judged(logged.head(299), EMPTY_LABELS).metric("expected_accuracy").value is None


def test_its_error_is_told_once_the_labels_arrive() -> None:
    logged, labels = world(3000, strength=1.5)
    honest = judged(logged, labels)
    error = honest.expected_accuracy_error
    assert error is not None
    assert error.low is not None
    assert error.high is not None
    assert error.low < 0 < error.high
    assert honest.metric("expected_accuracy_error").verdict == "ok"
    sure = judged(*world(3000, strength=1.5, stretch=4))
    metric = sure.metric("expected_accuracy_error")
    assert metric.verdict == "alert"
    assert metric.value is not None
    right = sure.figures["accuracy"].value
    logged, _ = world(3000, strength=1.5, stretch=4)
    expected = np.maximum(logged["p"], 1 - logged["p"]).mean()
    assert metric.value == pytest.approx(expected - right)


def test_customers_held_out_are_judged_where_there_are_enough() -> None:
    """Offers keep customers who would have left: whoever gets one makes the model look wrong."""
    logged, labels = world(4000)
    logged["holdout"] = np.arange(4000) % 10 == 0
    kept = (~logged["holdout"] & (logged["p"] > 0.5)).to_numpy()
    labels.loc[kept, "churned"] = False
    report = judged(logged, labels)
    assert (report.population, report.rows, report.verdict) == ("held out", 400, "ok")
    accuracy = report.metric("accuracy")
    assert "400 outcomes of customers held out from retention" in accuracy.reason
    seen, true = report.everyone["accuracy"].value, report.figures["accuracy"].value
    assert seen is not None
    assert true is not None
    assert seen < 0.75 < true
    few = judged(logged, labels, min_rows=500)
    assert (few.population, few.rows) == ("everyone", 4000)
    assert "of whom 400 held out are too few" in few.metric("accuracy").reason
    assert few.holdout["accuracy"] == report.figures["accuracy"]


def row(arm: str, release: str, version: str, champion: Any, challenger: Any) -> dict[str, Any]:
    given = {"arm": arm, "release_id": release, "model_version": version}
    return given | {"champion": champion, "challenger": challenger, "probability": 0.55}


def test_a_version_scores_as_champion_and_while_on_trial_as_challenger() -> None:
    log = pd.DataFrame(
        [
            row("champion", "v1", "1", 0.11, None),
            row("champion", "v1-2", "1", 0.12, 0.22),
            row("challenger", "v1-2", "2", 0.13, 0.23),
            row("challenger", "v1-2", "2", None, 0.24),
            row("champion", "v2", "2", 0.25, None),
            row("champion", "v2", "2", None, None),
        ]
    )
    nan = float("nan")
    one = [0.11, 0.12, 0.13, nan, nan, nan]
    two = [nan, 0.22, 0.23, 0.24, 0.25, 0.55]
    np.testing.assert_array_equal(scored_by(log, "1"), one)
    np.testing.assert_array_equal(scored_by(log, "2"), two)
    assert np.isnan(scored_by(log, None)).all()


def write_log(lake: Lake, logged: pd.DataFrame, *, holdout: bool, version: str = "7") -> None:
    """The log as services leave it, by the day of `at`; every tenth customer held out."""
    for day in sorted(set(logged["at"].dt.date)):
        rows = logged[logged["at"].dt.date == day]
        columns: dict[str, Any] = {
            "key": rows["request_id"],
            "request_id": rows["request_id"],
            "at": rows["at"],
            "customer_id": rows["customer_id"],
            "probability": rows["p"].round(4),
            "champion": rows["p"],
            "arm": "champion",
            "model_version": version,
            "release_id": f"v{version}-abc",
            "cutoff": rows["cutoff"],
            "latency_us": 500,
        }
        frame = pd.DataFrame(columns).reindex(columns=SCHEMA.names)
        if holdout:
            frame["holdout"] = rows["customer_id"].str.endswith("0").to_numpy()
        table = pa.Table.from_pandas(frame, SCHEMA, preserve_index=False)
        lake.write(PREDICTION_LOG, day, day, table, day_of="at")


@pytest.mark.parametrize("holdout", [False, True])
def test_it_is_judged_from_the_lake(tmp_path: Path, holdout: bool) -> None:
    lake = Lake(str(tmp_path))
    logged, labels = world(4000, first=LAST - 4 * DAY)
    gone = logged["at"].dt.date == date(2026, 1, 28)
    write_log(lake, logged[~gone], holdout=holdout)
    types = pa.schema([("customer_id", "str"), ("cutoff", TIMESTAMP), ("churned", "bool")])
    for cutoff in labels["cutoff"].unique():
        rows = labels[labels["cutoff"] == cutoff]
        day = (cutoff + (HORIZON - 1) * DAY).date()
        table = pa.Table.from_pandas(rows, types, preserve_index=False)
        lake.write(
            "churn_labels",
            day,
            day,
            table.append_column("day", pa.array([day] * len(rows))),
            day_of="day",
        )
    report = judge_performance(lake, OF, JUDGING, behind=timedelta(), now=NOW)
    there = int((~gone).sum())
    assert report.counts["outcomes"] == there < 4000
    assert report.counts["days_not_logged"] == 1
    assert report.population == ("held out" if holdout else "everyone")
    assert report.rows == pytest.approx(there / (10 if holdout else 1), rel=0.1)
    assert report.metric("accuracy").verdict == "ok"
    assert report.newest_labels == date(2026, 2, 28)
    other = judge_performance(lake, InProduction("8"), JUDGING, behind=timedelta(), now=NOW)
    assert other.verdict == "insufficient"
    assert other.counts["scored_by_another_version"] == there
    assert other.releases[0].figures["accuracy"].value == report.everyone["accuracy"].value


def test_days_read_together_say_what_each_says_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older partitions have no column that says who is held out."""
    lake = Lake(str(tmp_path))
    logged, _ = world(4000, first=LAST - 4 * DAY)
    write_log(lake, logged, holdout=True)
    days = lake.days(PREDICTION_LOG)
    former = lake.read(PREDICTION_LOG, days=days[:2]).drop(["holdout"])
    lake.write(PREDICTION_LOG, days[0], days[1], former, day_of="at")
    reads = []
    read = Lake.read

    def counted(*arguments: Any, **more: Any) -> pa.Table:
        reads.append(more["days"])
        return read(*arguments, **more)

    monkeypatch.setattr(Lake, "read", counted)
    together = performance.logged_predictions(lake, days, "7", timedelta())
    assert reads == [days]
    assert together["holdout"].sum() == logged[
        logged["customer_id"].str.endswith("0") & (logged["at"].dt.date >= days[2])
    ].pipe(len)
    reads.clear()
    monkeypatch.setattr(performance, "ROWS_AT_A_TIME", 1)
    alone = performance.logged_predictions(lake, days, "7", timedelta())
    assert reads == [[day] for day in days]
    pd.testing.assert_frame_equal(together, alone)


def test_an_empty_lake_is_insufficient(tmp_path: Path) -> None:
    report = judge_performance(Lake(str(tmp_path)), OF, JUDGING, behind=timedelta(), now=NOW)
    assert report.verdict == "insufficient"
    assert {metric.verdict for metric in report.metrics} == {"insufficient"}
    reason = report.metric("days_without_labels").reason
    assert reason == "nothing was logged and no label has come"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_accuracy", 0.0),
        ("max_auc_loss", 0.5),
        ("max_auc_loss", -0.1),
        ("max_expected_accuracy_error", 1.0),
        ("window_days", 0),
        ("min_rows", 49),
        ("max_days_without_labels", 0),
    ],
)
def test_a_nonsense_policy_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"performance.{name} is {value}"):
        PerformancePolicy(**{name: value})  # ty: ignore
