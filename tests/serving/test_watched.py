"""A served release, watched by the assets: real requests, a real scrape, the log in the lake."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec
import pytest
from serving_cases import SERVICE, VALID

from churn_assets.contract.clock import CLOCK_VARIABLE, set_clock
from churn_assets.contract.pointer import Current
from churn_assets.contract.release import Release
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.prediction_log import prediction_log
from churn_assets.defs.resources import Project, RecordIOManager
from churn_assets.defs.serving_health import serving_health
from churn_assets.home import Home
from churn_assets.lifecycle.deployment import announced
from churn_assets.lifecycle.pointer import point_at
from churn_assets.lifecycle.serving import PredictionLog, ask, serve
from churn_assets.monitoring.metric import Metric, read_metrics
from churn_assets.monitoring.service_samples import read_samples
from churn_assets.monitoring.serving_health import answered_rows, release_health

NOON = datetime(2025, 6, 2, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A home whose clock stands at NOON until it is turned."""
    monkeypatch.setenv(CLOCK_VARIABLE, str(tmp_path / "clock"))
    set_clock(tmp_path / "clock", NOON)
    return Project(Home(tmp_path), SETTINGS)


def turn(moment: datetime) -> None:
    set_clock(Path(os.environ[CLOCK_VARIABLE]), moment)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as instance:
        yield instance


def look(
    project: Project, instance: dg.DagsterInstance
) -> tuple[Mapping[str, Metric], Mapping[str, bool]]:
    """Ingest and look: the newest of each metric, and which checks passed."""
    resources = {"project": project, "io_manager": RecordIOManager(project.home.records)}
    assets = [prediction_log, serving_health]
    done = dg.materialize(assets, resources=resources, instance=instance)
    passed = {
        check.check_name: check.passed
        for check in done.get_asset_check_evaluations()
        if check.asset_key == serving_health.key
    }
    return {metric.name: metric for metric in read_metrics(project.home.metrics)}, passed


@pytest.fixture
def url(project: Project, release: Release) -> Iterator[str]:
    home = project.home
    point_at(home.current, Current("churn:x", release.manifest.release_id, "7", 1, NOON))
    environment = {CLOCK_VARIABLE: os.environ[CLOCK_VARIABLE]}
    log = PredictionLog(str(home.prediction_log))
    with (
        serve(SERVICE, release.directory, log=log, environment=environment) as url,
        announced(home, url),
    ):
        yield url


def test_the_service_is_watched(
    project: Project, release: Release, url: str, instance: dg.DagsterInstance
) -> None:
    metrics, passed = look(project, instance)
    assert metrics["error_rate"].verdict == "insufficient"
    assert "no two samples" in metrics["error_rate"].reason
    assert passed == {"latency": False, "errors": False, "volume": False, "up": True}

    turn(NOON + 30 * MINUTE)
    for _ in range(110):
        assert ask(url, VALID).status == 200
    refused = [ask(url, b"{}").status for _ in range(5)]
    rows: dict[str, Any] = {"rows": [VALID] * 3}
    assert ask(url, rows, path="/predict_batch").status == 200
    assert refused == [422] * 5

    turn(NOON + 60 * MINUTE)
    metrics, passed = look(project, instance)
    release_id = release.manifest.release_id
    assert (metrics["error_rate"].value, metrics["error_rate"].rows) == (0, 116)
    latency = metrics["p95_latency_ms"]
    assert (latency.rows, latency.release_id) == (113, release_id)
    assert latency.value is not None
    assert latency.value > 0
    assert (metrics["service_up"].value, metrics["service_up"].release_id) == (1, release_id)
    assert metrics["volume_ratio"].verdict == "insufficient"
    assert passed["errors"]
    page = project.home.metrics_page.read_text()
    assert 'churn_metric{name="error_rate"} 0.0\n' in page
    assert 'churn_metric_verdict{name="volume_ratio",verdict="insufficient"} 1.0\n' in page

    # A log that cannot be written refuses predictions, which is the service's fault.
    aside = project.home.prediction_log.with_name("aside")
    project.home.prediction_log.rename(aside)
    turn(NOON + 90 * MINUTE)
    assert [ask(url, VALID).status for _ in range(3)] == [503] * 3
    aside.rename(project.home.prediction_log)
    turn(NOON + 120 * MINUTE)
    metrics, passed = look(project, instance)
    assert (metrics["error_rate"].verdict, passed["errors"]) == ("alert", False)
    since = NOON + 30 * MINUTE
    _, errors = release_health(
        read_samples(project.home.service_samples, since),
        answered_rows(project.lake, since, project.now()),
        release_id,
        since,
        project.now(),
        SETTINGS.serving_health,
    )
    assert (errors.verdict, errors.value, errors.rows) == ("alert", pytest.approx(3 / 119), 119)


def test_who_should_serve_and_does_not_alerts(
    project: Project, release: Release, instance: dg.DagsterInstance
) -> None:
    point_at(project.home.current, Current("churn:x", release.manifest.release_id, "7", 1, NOON))
    with announced(project.home, "http://127.0.0.1:9"):
        metrics, passed = look(project, instance)
    assert (metrics["service_up"].verdict, passed["up"]) == ("alert", False)
    record = project.home.records / "serving_health" / "latest.json"
    assert json.loads(record.read_bytes())["verdict"] == "alert"
    assert msgspec.json.decode(record.read_bytes())["url"] == "http://127.0.0.1:9"
