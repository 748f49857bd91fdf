"""The daily look at drift: what is compared with what, and what faults of log and data lead to."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from churn_assets.data.lake import Lake
from churn_assets.data.prediction_log import PREDICTION_LOG, SCHEMA
from churn_assets.data.windows import cutoff_of
from churn_assets.drill.sabotage import spoiled
from churn_assets.errors import UserError
from churn_assets.monitoring.drift import DriftPolicy
from churn_assets.monitoring.drift_watch import DriftRecord, logged_window, watch
from churn_assets.monitoring.metric import append_metrics, read_metrics
from churn_assets.monitoring.reference import Reference

NOW = datetime(2024, 9, 8, 4, tzinfo=UTC)
DAY = timedelta(days=1)
FEATURES = ("total_orders_30d", "avg_order_value", "days_since_last_order")
POLICY = DriftPolicy()
TRAIN = (date(2024, 5, 1), date(2024, 5, 31), date(2024, 6, 30))


def graph() -> bytes:
    """P(churn) = 1 / (1 + exp(-(days_since_last_order - 20) / 5)), as the released model."""
    from sklearn.linear_model import LogisticRegression

    from churn_assets.modeling.onnx_export import export_onnx

    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    model = LogisticRegression().fit(rows, rows[:, 2] > 0)
    model.coef_, model.intercept_ = np.array([[0, 0, 0.2]]), np.array([-4.0])
    return export_onnx(model, 3)


ONNX = graph()


def customers(seed: int, count: int = 700, *, orders: float = 2.0, days: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "customer_id": [f"c-{n}" for n in range(count)],
            "total_orders_30d": rng.poisson(orders, count),
            "avg_order_value": rng.lognormal(4, 0.8, count).round(2),
            "days_since_last_order": rng.integers(0, days, count),
        }
    )


def reference(*, last_orders: float = 2.0, onnx: bytes | None = ONNX) -> Reference:
    rows = [
        customers(n, orders=last_orders if n == 2 else 2.0).assign(
            cutoff=pd.Timestamp(cutoff_of(day)), churned=False
        )
        for n, day in enumerate(TRAIN)
    ]
    return Reference(
        version="3",
        release_id="v3-abc",
        data_hash="f" * 64,
        features=FEATURES,
        train=TRAIN,
        rows=pd.concat(rows, ignore_index=True),
        onnx=onnx,
        problem=None if onnx else "version 3 cannot be loaded: gone",
    )


def log(lake: Lake, day: date, rows: pd.DataFrame, *, by: str = "3", at_hour: int = 12) -> None:
    """The requests of a day: those customers', answered by version `by`."""
    count = len(rows)
    scores = rows.get("probability", 1 / (1 + np.exp(-(rows["days_since_last_order"] - 20) / 5)))
    given: dict[str, object] = {
        "key": [f"{day}-{by}-{n}" for n in range(count)],
        "request_id": [str(n) for n in range(count)],
        "at": [datetime(day.year, day.month, day.day, at_hour, tzinfo=UTC)] * count,
        "probability": scores.to_numpy(),
        "arm": ["champion"] * count,
        "model_version": [by] * count,
        "release_id": [f"v{by}-abc"] * count,
        "latency_us": [500] * count,
        **{name: rows[name].to_list() for name in ("customer_id", *FEATURES)},
    }
    table = pa.table({f.name: pa.array(given.get(f.name, [None] * count), f.type) for f in SCHEMA})
    lake.write(PREDICTION_LOG, day, day, table, day_of="at")


def week(lake: Lake, *, skip: tuple[int, ...] = (), **of: object) -> None:
    """Requests of the seven days before NOW; each customer comes on several."""
    for back in range(1, 8):
        if back not in skip:
            rows = customers(9, 300, **of)  # ty: ignore[invalid-argument-type]
            log(lake, NOW.date() - back * DAY, rows.sample(150, random_state=back))


def features_of(lake: Lake, rows: pd.DataFrame, day: date = date(2024, 9, 1)) -> None:
    for back in range(7):
        table = pa.Table.from_pandas(
            rows.assign(day=day - back * DAY, cutoff=pd.Timestamp(cutoff_of(day - back * DAY))),
            preserve_index=False,
        )
        lake.write("customer_features", day - back * DAY, day - back * DAY, table, day_of="day")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    made = Lake(str(tmp_path / "lake"))
    features_of(made, customers(20))
    return made


def seen(lake: Lake, of: Reference | None = None, now: datetime = NOW) -> DriftRecord:
    record = watch(lake, of or reference(), POLICY, now).record
    # What decisions read has been through a file.
    return msgspec.json.decode(msgspec.json.encode(record), type=DriftRecord)


def test_enough_requests_are_what_is_compared(lake: Lake) -> None:
    week(lake)
    record = seen(lake)
    assert (record.source, record.verdict, record.steady) == ("requests", "ok", True)
    assert (record.version, record.release_id) == ("3", "v3-abc")
    assert (record.first, record.last) == (date(2024, 9, 1), date(2024, 9, 7))
    assert record.until == datetime(2024, 9, 8, tzinfo=UTC)
    assert (record.rows, record.customers) == (7 * 150, record.features[0].current_customers)
    assert 200 < record.customers <= 300
    assert record.prediction.verdict == "ok"
    assert record.prediction.rows == 7 * 150
    assert not record.reference_drift
    assert (record.days_missing, record.future_rows) == ((), 0)


def test_drifted_requests_alert_with_what_decisions_need(lake: Lake, tmp_path: Path) -> None:
    week(lake, orders=4.0, days=80)
    record = seen(lake)
    assert record.verdict == "drift"
    assert record.drifted == ("total_orders_30d", "days_since_last_order")
    assert {f.feature: f.severity for f in record.features if f.alert} == dict.fromkeys(
        record.drifted, "major"
    )
    assert (record.prediction.verdict, record.prediction.alert) == ("drift", True)
    assert record.prediction.shift is not None
    assert record.prediction.shift > 0.1
    append_metrics(tmp_path / "metrics.jsonl", record.metrics())
    metrics = {metric.name: metric for metric in read_metrics(tmp_path / "metrics.jsonl")}
    assert set(metrics) == {"prediction_shift", *(f"ks/{name}" for name in FEATURES)}
    assert metrics["ks/total_orders_30d"].verdict == "alert"
    assert metrics["ks/avg_order_value"].verdict == "ok"
    assert metrics["ks/total_orders_30d"].value == record.statistics["total_orders_30d"]
    assert metrics["prediction_shift"].value == record.prediction.shift
    assert {metric.limit for metric in metrics.values()} == {0.15, 0.1}
    assert {metric.release_id for metric in metrics.values()} == {"v3-abc"}
    assert {metric.until for metric in metrics.values()} == {record.until}


def test_too_few_requests_leave_it_to_the_customers_and_say_so(lake: Lake) -> None:
    log(lake, date(2024, 9, 7), customers(9, 3, orders=50.0))
    record = seen(lake)
    assert (record.source, record.verdict) == ("customers", "ok")
    assert record.requests.startswith("requests insufficient: 3 of 3 customers")
    assert record.requests in record.reason
    assert (record.first, record.last) == (date(2024, 8, 26), date(2024, 9, 1))
    assert record.until == cutoff_of(record.last)
    assert record.prediction.verdict == "ok"
    assert all(metric.release_id is None for metric in record.metrics())
    assert all("no requests" in metric.reason for metric in record.metrics())


def test_many_requests_of_few_customers_are_too_few(lake: Lake) -> None:
    for back in range(1, 8):
        rows = customers(9, 100)
        log(lake, NOW.date() - back * DAY, pd.concat([rows, rows], ignore_index=True))
    record = seen(lake)
    assert record.source == "customers"
    assert "1,400 of 100 customers" in record.requests


def test_the_shift_is_of_the_answers_of_the_version_in_production(lake: Lake) -> None:
    week(lake)
    extra = customers(30, 400).assign(probability=0.99)
    log(lake, NOW.date() - 3 * DAY, extra, by="2")
    record = seen(lake)
    assert record.rows == 6 * 150 + 400
    assert record.prediction.rows == 6 * 150
    assert record.prediction.verdict == "ok"


def test_without_answers_of_that_version_the_shift_is_insufficient(lake: Lake) -> None:
    for back in range(1, 8):
        log(lake, NOW.date() - back * DAY, customers(40, 300), by="2")
    record = seen(lake)
    assert record.verdict == "ok"
    assert (record.prediction.verdict, record.prediction.shift) == ("insufficient", None)
    shift = record.metrics()[-1]
    assert (shift.name, shift.verdict, shift.value) == ("prediction_shift", "insufficient", None)


def test_a_model_that_fails_on_its_own_training_rows_costs_the_shift_alone(lake: Lake) -> None:
    values = reference().rows[FEATURES[0]]
    assert values.max() > 1
    shifted = reference()
    shifted.rows[FEATURES[0]] += 10_000
    failing = replace(shifted, onnx=spoiled(ONNX, "failing", 0))
    record = seen(lake, failing)
    assert record.prediction.verdict == "insufficient"
    assert "version 3: the model fails on one of" in record.prediction.reason
    assert record.features


def test_a_released_model_that_cannot_be_had_costs_the_shift_alone(lake: Lake) -> None:
    record = seen(lake, reference(onnx=None))
    assert record.verdict == "ok"
    assert record.prediction.verdict == "insufficient"
    assert "cannot be loaded" in record.prediction.reason


def test_a_day_missing_from_the_log_is_told(lake: Lake) -> None:
    log(lake, NOW.date() - 20 * DAY, customers(9, 10))
    week(lake, skip=(3,))
    record = seen(lake)
    assert (record.source, record.verdict) == ("requests", "ok")
    assert record.days_missing == (date(2024, 9, 5),)
    assert "no request was logged on 2024-09-05" in record.reason


def test_days_before_the_first_request_are_not_missing(lake: Lake) -> None:
    week(lake, skip=(5, 6, 7))
    assert seen(lake).days_missing == ()


def test_after_a_clock_was_set_back_later_requests_are_left_out_and_counted(lake: Lake) -> None:
    week(lake)
    log(lake, NOW.date(), customers(9, 30, orders=50.0), at_hour=3)
    log(lake, NOW.date() + 5 * DAY, customers(9, 400, orders=50.0))
    record = seen(lake)
    assert (record.verdict, record.rows, record.future_rows) == ("ok", 7 * 150, 400)
    assert "400 requests logged later than now" in record.reason
    assert seen(lake, now=NOW - 2 * timedelta(hours=1)).future_rows == 430


def test_a_constant_feature_is_a_finding_of_its_own(lake: Lake) -> None:
    features_of(lake, customers(20).assign(total_orders_30d=2))
    record = seen(lake)
    assert record.constant == ("total_orders_30d",)
    assert not record.steady
    assert "all 4,900 values are 2: a fault of the data" in record.features[0].reason
    # Where most of them always were the same, all of them may be by chance.
    same = reference()
    same.rows["total_orders_30d"] = (np.arange(len(same.rows)) % 1000 == 0).astype(int)
    features_of(lake, customers(20).assign(total_orders_30d=0))
    assert seen(lake, same).constant == ()


def test_a_feature_without_a_value_is_a_finding_of_its_own(lake: Lake) -> None:
    features_of(lake, customers(20).assign(avg_order_value=np.nan))
    record = seen(lake)
    assert record.all_missing == ("avg_order_value",)
    assert (record.verdict, record.steady) == ("insufficient", False)
    assert record.features[1].current_missing == 4900
    assert "all 4,900 values are missing" in record.reason
    assert record.prediction.verdict == "insufficient"
    assert record.metrics()[1].verdict == "insufficient"


def test_a_feature_that_is_not_in_the_table_is_insufficient(lake: Lake) -> None:
    features_of(lake, customers(20).drop(columns="avg_order_value"))
    record = seen(lake)
    assert record.verdict == "insufficient"
    assert record.prediction.verdict == "insufficient"


def test_training_rows_that_drift_among_themselves_are_told(lake: Lake) -> None:
    record = seen(lake, reference(last_orders=4.0))
    assert list(record.reference_drift) == ["total_orders_30d"]
    assert record.reference_drift["total_orders_30d"] > 0.15
    assert "the training rows drift themselves: total_orders_30d" in record.reason
    single = replace(reference(), train=TRAIN[:1])
    assert seen(lake, single).reference_reason == "the model was trained on one cutoff"


def test_nothing_in_production_is_insufficient_and_no_error(tmp_path: Path) -> None:
    watched = watch(Lake(str(tmp_path / "empty")), None, POLICY, NOW)
    record = watched.record
    assert (record.verdict, record.source, record.version) == ("insufficient", "none", None)
    assert record.prediction.verdict == "insufficient"
    assert not record.steady
    assert record.metrics() == []
    assert "no version is in Production" in record.reason


def test_neither_requests_nor_features_ask_for_features(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no partition of customer_features"):
        watch(Lake(str(tmp_path / "empty")), reference(), POLICY, NOW)


def test_a_log_from_before_the_contract_had_a_feature(lake: Lake) -> None:
    day = NOW.date() - DAY
    log(lake, day, customers(9, 5))
    stored = lake.read(PREDICTION_LOG, days=[day]).drop(["avg_order_value"])
    lake.write(PREDICTION_LOG, day, day, stored, day_of="at")
    window = logged_window(lake, FEATURES, 7, NOW)
    assert len(window.rows) == 5
    assert window.rows["avg_order_value"].isna().all()
