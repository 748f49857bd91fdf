from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest

from churn_assets.contract.features import FEATURES
from churn_assets.data.lake import Lake
from churn_assets.data.windows import days_between
from churn_assets.modeling.training import TrainedModel, TrainingPolicy, fit
from churn_assets.simulator.shop import Shop
from tests.bench import __main__ as command
from tests.bench import drift, engines, events, features, model, online, serving, validation
from tests.bench.events import FIRST_CUTOFF_DAY, LAST_CUTOFF_DAY, Size


def test_a_small_bench_from_the_command_to_its_result(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CHURN_HOME", str(tmp_path))
    monkeypatch.setitem(events.SIZES, "XS", Size("XS", 300, 20_000))
    monkeypatch.setitem(command.BENCHES, "features", lambda data: features.run(data, ("XS",), 500))
    assert command.main(["features"]) == 0
    result = json.loads((tmp_path / "bench" / "features.json").read_text())
    assert {"machine", "versions", "rows"} <= set(result)
    cases = {(line["case"], line["metric"], line["peer"]) for line in result["rows"]}
    assert {
        ("features/XS", "seconds", "pandas"),
        ("features/XS", "peak_mb", "scan_write"),
        ("features/daily-XS", "seconds", "scan_write"),
        ("features/historical-500", "seconds", "feast"),
        ("features/historical-500", "seconds", "asof"),
    } <= cases
    for line in result["rows"]:
        assert line["ratio"] == pytest.approx(line["ours"] / line["theirs"], rel=0.05, abs=1e-3)
    assert "features/XS" in capsys.readouterr().out
    same_as_pandas(Lake(str(tmp_path / "bench" / "data" / "XS")))


def same_as_pandas(lake: Lake) -> None:
    """What is measured side by side must be the same work."""
    for day in days_between(FIRST_CUTOFF_DAY, LAST_CUTOFF_DAY)[:: events.STEP_DAYS]:
        ours = lake.read("customer_features", day, day).drop(["cutoff"]).to_pandas()
        theirs = pd.read_parquet(Path(lake.root, "pandas", f"{day}.parquet")).reset_index()
        assert len(ours) > 50
        pd.testing.assert_frame_equal(ours, theirs.sort_values("customer_id", ignore_index=True))


def test_drift_is_measured_against_the_exact_statistic(tmp_path: Path) -> None:
    lines = drift.run(tmp_path, 60_000)
    found = {(line["case"], line["metric"]): line for line in lines}
    assert found["drift/ks-60000", "seconds"]["peer"] == "scipy"
    assert found["drift/ks-60000", "max_abs_error"]["ours"] <= 5e-4
    assert found["drift/ks-60000-whole", "error_bound"]["ours"] == 0


def test_online_loads_are_measured_against_feast(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(online.shutil, "which", lambda name: None)
    lines = online.run(tmp_path, 2_000)
    assert "nothing measured with Redis" in capsys.readouterr().out
    assert {line["metric"] for line in lines} == {"seconds", "peak_mb"}
    assert "feast sqlite" in {line["peer"] for line in lines}
    table = Lake(str(tmp_path / "online-2000")).read("customer_features")
    assert table.num_rows == 2_000
    assert set(table.column_names) == {"customer_id", "cutoff", *(f.name for f in FEATURES)}


@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java; install Java 17")
def test_engines_are_measured_on_the_same_work(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(events.SIZES, "XS", Size("XS", 100, 3_000))
    monkeypatch.setattr(engines, "DAILY_TOO", False)
    lines = engines.run(tmp_path, ("XS",), "local[1]")
    assert [(line["case"], line["metric"], line["peer"]) for line in lines] == [
        ("engines/XS", "seconds", "spark"),
        ("engines/XS", "cpu_seconds", "spark"),
        ("engines/XS", "peak_mb", "spark"),
        ("engines/XS", "start_seconds", "spark"),
    ]
    lake = Lake(str(tmp_path / "XS"))
    changed = lake.read("features_by_spark", LAST_CUTOFF_DAY).slice(1)
    changed = changed.append_column(
        "day", pa.array([LAST_CUTOFF_DAY] * changed.num_rows, pa.date32())
    )
    lake.write("features_by_spark", LAST_CUTOFF_DAY, LAST_CUTOFF_DAY, changed, day_of="day")
    with pytest.raises(RuntimeError, match="are not the same"):
        engines.require_same(lake, daily=False)


def test_validation_is_measured_on_the_same_verdicts(tmp_path: Path) -> None:
    lines = validation.run(tmp_path, 20_000)
    assert {(line["case"], line["peer"]) for line in lines} == {
        ("validation/20000-clean", "in memory"),
        ("validation/20000-clean", "pandera"),
        ("validation/20000-faulty", "in memory"),
    }


def test_the_model_is_measured_against_one_that_sees_far_more(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("CHURN_ONLINE_RETAIL", raising=False)
    lines = model.run(tmp_path, customers=300, days=250)
    assert [(line["case"], line["metric"], line["peer"]) for line in lines] == [
        ("model/shop", "auc", "reference"),
        ("model/shop", "auc", "oracle"),
        ("model/shop", "auc", "recency"),
    ]
    against, oracle, recency = (line["theirs"] for line in lines)
    assert recency < against < oracle
    for line in lines:
        assert line["ratio"] == pytest.approx(line["ours"] / line["theirs"], abs=1e-3)


def test_the_reference_has_the_five_features_and_fifty_more(tmp_path: Path) -> None:
    settings, params = model._shop(200)
    start = settings.calendar.start
    shop, day = Shop(params, start), start + timedelta(days=150)
    last = day + timedelta(days=30)
    tables = {name: shop.events(name, start, last) for name in model._COUNTED}
    rich = model._rich(tables, day, settings).set_index("customer_id")
    assert len(rich.columns) == 5 + 50 + 1
    lake = model._with_events(Lake(str(tmp_path)), settings, last)
    plain = model._frame(lake, settings, [day]).set_index("customer_id")
    assert set(rich.index) == set(plain.index)
    rich = rich.loc[plain.index]
    assert (rich["churned"] == plain["churned"]).all()
    for theirs, ours in (
        ("orders_30", "total_orders_30d"),
        ("support_tickets_90", "support_tickets_90d"),
        ("whole_days", "days_since_last_order"),
    ):
        assert (rich[theirs].fillna(0) == plain[ours]).all(), ours
    assert np.allclose(rich["mean_amount"] / 100, plain["avg_order_value"])
    assert np.allclose(rich["login_frequency"].fillna(0), plain["login_frequency_7d"])


def fit_quickly(*data: Any, seed: int, policy: TrainingPolicy) -> TrainedModel:
    quick = replace(policy, families=("hist_gradient_boosting",), trials=1, folds=1)
    return fit(*data, seed=seed, policy=quick)


@pytest.mark.skipif(shutil.which("wrk") is None, reason="there is no wrk; install it")
def test_servers_with_the_same_model_are_measured_on_the_same_customers(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(serving, "fit", fit_quickly)
    # That the peers answer as ours do is looked at before anything is measured.
    lines = serving.run(
        tmp_path, 300, 250, rounds=1, seconds=1, connections=(2,), peers=("seed", "bare")
    )
    assert [(line["case"], line["metric"], line["peer"]) for line in lines] == [
        *(("serving/c2", metric, peer) for metric in serving.METRICS for peer in ("seed", "bare")),
        *(("serving/c2-forest", metric, "seed") for metric in serving.METRICS),
    ]
    for line in lines:
        assert min(line["ours"], line["theirs"]) > 0
        assert line["ratio"] == pytest.approx(line["ours"] / line["theirs"], abs=1e-3)
    ours = {line["metric"]: line["ours"] for line in lines if line["case"] == "serving/c2"}
    assert ours["p50_ms"] <= ours["p95_ms"] <= ours["p99_ms"]


def test_servers_that_answer_otherwise_are_not_compared(monkeypatch) -> None:
    answers = {"ours": 0.25, "ours-forest": 0.5, "seed": 0.5, "bare": 0.25}
    monkeypatch.setattr(serving.Server, "probability", lambda self, customer: answers[self.url])
    servers = {name: serving.Server(name, psutil.Process()) for name in answers}
    serving.require_same_answers(servers, [{}])
    answers["seed"] = 0.5002
    with pytest.raises(RuntimeError, match="seed and ours-forest differ"):
        serving.require_same_answers(servers, [{}])


def test_without_wrk_it_says_what_to_install(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(serving.shutil, "which", lambda name: None)
    assert serving.run(tmp_path) == []
    assert "apt-get install wrk" in capsys.readouterr().out


def test_a_bench_that_is_not_there(capsys) -> None:
    assert command.main(["speed"]) == 2
    assert "there is no bench speed; there are features" in capsys.readouterr().err


def test_events_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    lakes = [Lake(str(tmp_path / name)) for name in "ab"]
    for lake in lakes:
        events.generate(lake, Size("XS", 50, 2_000))
    one, other = (pa.concat_tables([lake.read("logins")]) for lake in lakes)
    assert one.equals(other)
    assert one.num_rows > 1_000
