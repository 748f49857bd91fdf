from __future__ import annotations

import json
import math
import socket
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from churn_assets.errors import UserError
from churn_assets.monitoring import evidently_report as evidently_module
from churn_assets.monitoring.drift import (
    DriftPolicy,
    drift_report,
    ks_statistic,
    severity_of,
)
from churn_assets.monitoring.evidently_report import Shelf, evidently_report

NAMES = ("total_orders_30d", "avg_order_value", "login_frequency_7d")


def shop(rows: int, seed: int, *, orders: float = 2.0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "total_orders_30d": rng.poisson(orders, rows),
            "avg_order_value": rng.lognormal(4.0, 0.8, rows),
            "login_frequency_7d": rng.poisson(3.0, rows) / 7.0,
        }
    )


REFERENCE = shop(8000, 1)
STABLE = shop(6000, 2)
SHIFTED = shop(6000, 3, orders=2.8)


def test_a_shifted_feature_is_found_and_only_that_one() -> None:
    report = drift_report(REFERENCE, SHIFTED, NAMES)
    assert report.verdict == "drift"
    assert report.drifted == ("total_orders_30d",)
    found = report.features[0]
    assert found.alert
    assert found.statistic is not None
    assert found.statistic > 0.15
    assert found.severity == "major"
    assert "total_orders_30d" in report.reason
    assert found.current_mean is not None
    assert found.reference_mean is not None
    assert found.current_mean > found.reference_mean + 0.5


def test_noise_is_not_drift() -> None:
    report = drift_report(REFERENCE, STABLE, NAMES)
    assert report.verdict == "ok"
    assert report.drifted == ()
    assert {feature.severity for feature in report.features} == {"none"}


def test_a_significant_but_small_difference_is_not_drift() -> None:
    rng = np.random.default_rng(4)
    before = {"x": rng.normal(0.0, 1.0, 60_000)}
    after = {"x": rng.normal(0.1, 1.0, 60_000)}
    report = drift_report(before, after, ["x"])
    found = report.features[0]
    assert found.p_value is not None
    assert found.p_value < 1e-6
    assert report.verdict == "ok"


def test_a_statistic_that_chance_may_have_lifted_is_neither_drift_nor_ok() -> None:
    before, after = {"x": np.arange(20.0)}, {"x": np.arange(20.0) + 4}
    report = drift_report(before, after, ["x"], DriftPolicy(min_rows=20, min_customers=20))
    found = report.features[0]
    assert found.p_value is not None
    assert found.p_value > 0.05
    assert found.statistic == pytest.approx(0.2)
    assert (report.verdict, found.alert, found.severity) == ("insufficient", False, "major")
    assert "chance is not ruled out" in report.reason


@pytest.mark.parametrize(
    ("statistic", "severity"),
    [
        (0.0, "none"),
        (0.0999, "none"),
        (0.1, "minor"),
        (0.1999, "minor"),
        (0.2, "major"),
        (1, "major"),
    ],
)
def test_severity_by_statistic(statistic: float, severity: str) -> None:
    assert severity_of(statistic, DriftPolicy()) == severity


def test_the_alert_limit_itself_does_not_alert() -> None:
    before = {"x": np.arange(1000.0)}
    for step, alert in ((150, False), (151, True)):
        found = drift_report(before, {"x": np.arange(1000.0) + step}, ["x"])
        assert found.features[0].statistic == pytest.approx(step / 1000)
        assert found.features[0].alert is alert


@pytest.mark.parametrize("short", ["reference", "current"])
def test_too_few_rows_are_insufficient_never_ok(short: str) -> None:
    few = REFERENCE.head(499)
    sides = {"reference": (few, STABLE), "current": (REFERENCE, few)}
    report = drift_report(*sides[short], NAMES)
    assert report.verdict == "insufficient"
    assert report.insufficient == NAMES
    assert f"499 {short} values, at least 500" in report.reason
    assert all(f.statistic is None and f.severity is None for f in report.features)
    assert drift_report(REFERENCE, REFERENCE.head(500), NAMES).verdict == "ok"


def test_no_rows_and_no_features_are_insufficient() -> None:
    assert drift_report(REFERENCE, REFERENCE.head(0), NAMES).verdict == "insufficient"
    assert drift_report(REFERENCE, STABLE, ()).verdict == "insufficient"


@pytest.mark.parametrize("gone", [np.nan, np.inf, None])
def test_a_feature_of_nulls_is_insufficient(gone: float | None) -> None:
    empty = STABLE.assign(avg_order_value=pd.Series([gone] * len(STABLE), dtype=object))
    report = drift_report(REFERENCE, empty, NAMES)
    assert report.verdict == "insufficient"
    assert report.insufficient == ("avg_order_value",)
    assert report.features[1].current_missing == len(STABLE)


def test_a_feature_that_one_side_lacks_is_insufficient() -> None:
    report = drift_report(REFERENCE, STABLE.drop(columns="login_frequency_7d"), NAMES)
    assert report.verdict == "insufficient"
    assert "the current rows do not have it" in report.reason


def test_drift_of_one_feature_outweighs_another_that_cannot_be_judged() -> None:
    report = drift_report(REFERENCE, SHIFTED.assign(avg_order_value=np.nan), NAMES)
    assert report.verdict == "drift"
    assert report.insufficient == ("avg_order_value",)


def test_missing_values_are_left_out_and_counted() -> None:
    holes = STABLE.assign(avg_order_value=STABLE["avg_order_value"].where(STABLE.index % 2 == 0))
    found = drift_report(REFERENCE, holes, NAMES).features[1]
    assert found.current_missing == 3000
    assert found.current_rows == 3000
    expected = ks_statistic(REFERENCE["avg_order_value"], STABLE["avg_order_value"][::2])[0]
    assert found.statistic == expected


def test_arrow_tables_and_frames_give_the_same_report() -> None:
    frames = drift_report(REFERENCE, SHIFTED, NAMES)
    tables = drift_report(pa.Table.from_pandas(REFERENCE), pa.Table.from_pandas(SHIFTED), NAMES)
    assert frames == tables
    with_null = pa.table({"x": pa.array([1, None, *range(600)])})
    assert drift_report(with_null, with_null, ["x"]).features[0].current_missing == 1


def test_the_record_is_json() -> None:
    for current in (SHIFTED, STABLE.head(3)):
        told = json.loads(json.dumps(drift_report(REFERENCE, current, NAMES).to_dict()))
        assert told["policy"]["alert_above"] == 0.15
        assert len(told["features"]) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alert_above", 0.0),
        ("alert_above", 1.5),
        ("alert_above", math.nan),
        ("minor_from", 0.3),
        ("major_from", -0.2),
        ("min_rows", 0),
        ("report_rows", 1),
        ("min_customers", 1),
        ("prediction_shift", 0),
        ("false_alarm_rate", 1),
        ("false_alarm_days", 0),
        ("window_days", 0),
        ("workspace_runs", 0),
    ],
)
def test_a_nonsense_policy_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"drift.{name}"):
        DriftPolicy(**{name: value})  # ty: ignore
    assert msgspec.convert({"alert_above": 0.2}, DriftPolicy).alert_above == 0.2


@settings(max_examples=60, deadline=None)
@given(
    before=st.lists(st.integers(-5, 5), min_size=2, max_size=30),
    after=st.lists(st.integers(-5, 5), min_size=2, max_size=30),
)
def test_the_statistic_is_the_largest_gap_between_the_distributions(
    before: list[int], after: list[int]
) -> None:
    def below(values: list[int], x: int) -> float:
        return sum(value <= x for value in values) / len(values)

    gap = max(abs(below(before, x) - below(after, x)) for x in range(-5, 6))
    statistic, p_value = ks_statistic(before, after)
    assert statistic == pytest.approx(gap)
    assert 0 <= p_value <= 1


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the report went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("current", [STABLE, SHIFTED], ids=["stable", "shifted"])
def test_evidently_announces_what_was_judged(current: pd.DataFrame, tmp_path: Path) -> None:
    report = drift_report(REFERENCE, current, NAMES, DriftPolicy(report_rows=1500))
    page = evidently_report(report, REFERENCE, current, tmp_path / "pages" / "drift.html")
    assert page.drifted == report.drifted
    assert page.scores == {f.feature: f.statistic for f in report.features}
    assert page.reference_rows == page.current_rows == 1500
    text = page.path.read_text(encoding="utf-8")
    assert "K-S statistic" in text
    assert "K-S p_value" not in text
    assert '<script src="http' not in text
    for name in NAMES:
        assert name in text
    assert [p.name for p in page.path.parent.iterdir()] == ["drift.html"]
    # The page as a whole must not call drift of one feature in three "not detected".
    assert ("Dataset Drift is detected" in text) == (report.verdict == "drift")
    assert ("Dataset Drift is NOT detected" in text) == (report.verdict == "ok")


@pytest.mark.usefixtures("offline")
def test_the_workspace_has_one_run_a_page_and_the_newest_of_them(tmp_path: Path) -> None:
    policy = DriftPolicy(report_rows=100, workspace_runs=2)
    report = drift_report(REFERENCE, STABLE, NAMES, policy)
    for day in (1, 3, 3, 2, 4):
        at = datetime(2024, 6, day, tzinfo=UTC)
        page = tmp_path / f"2024-06-0{day}.html"
        shelf = Shelf(tmp_path / "evidently", at)
        evidently_report(report, REFERENCE, STABLE, page, shelf=shelf)
    stored = [
        json.loads(path.read_text()) for path in (tmp_path / "evidently").glob("*/snapshots/*.json")
    ]
    assert sorted(run["name"] for run in stored) == ["2024-06-03", "2024-06-04"]
    assert sorted(run["timestamp"][:10] for run in stored) == ["2024-06-03", "2024-06-04"]
    assert len(list((tmp_path / "evidently").glob("*/metadata.json"))) == 1


@pytest.mark.usefixtures("offline")
def test_evidently_draws_only_what_could_be_judged(tmp_path: Path) -> None:
    current = STABLE.assign(avg_order_value=np.nan)
    report = drift_report(REFERENCE, current, NAMES)
    page = evidently_report(report, REFERENCE, current, tmp_path / "drift.html")
    assert set(page.scores) == {"total_orders_30d", "login_frequency_7d"}
    assert "avg_order_value" not in page.path.read_text(encoding="utf-8")


def test_a_page_of_insufficient_rows_says_so(tmp_path: Path) -> None:
    current = STABLE.head(10)
    report = drift_report(REFERENCE, current, NAMES)
    page = evidently_report(report, REFERENCE, current, tmp_path / "drift.html")
    text = page.path.read_text(encoding="utf-8")
    assert "insufficient" in text
    assert "10 current values, at least 500 are needed" in text
    assert "detected" not in text
    assert page.drifted == ()


def test_a_page_cut_short_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        def save_html(self, filename: str) -> None:
            Path(filename).write_text("<html>half a pa")
            raise OSError("no space left on device")

    path = tmp_path / "drift.html"
    path.write_text("the former page")
    monkeypatch.setattr(evidently_module, "_run", lambda *args: FullDisk())
    with pytest.raises(OSError, match="no space"):
        evidently_report(drift_report(REFERENCE, STABLE, NAMES), REFERENCE, STABLE, path)
    assert [p.name for p in tmp_path.iterdir()] == ["drift.html"]
    assert path.read_text() == "the former page"
