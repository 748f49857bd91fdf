"""Latency, errors and volume of the service: rates from counters, and usual hours from the log."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from churn_assets.data.lake import Lake
from churn_assets.data.prediction_log import PREDICTION_LOG, SCHEMA
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.deployment import announced
from churn_assets.monitoring.metric import Metric
from churn_assets.monitoring.service_samples import (
    Sample,
    ask_service,
    counted,
    keep_sample,
    parse_counters,
    quantile_of,
    read_samples,
    take_sample,
)
from churn_assets.monitoring.serving_health import (
    EMPTY_ANSWERED,
    Service,
    ServingHealthPolicy,
    ServingHealthRecord,
    Volume,
    answered_rows,
    release_health,
    serving_health,
    volume_of,
)

NOW = datetime(2026, 3, 2, 10, 12, tzinfo=UTC)
HOUR, WEEK = timedelta(hours=1), timedelta(weeks=1)
POLICY = ServingHealthPolicy()
USUAL = Volume(NOW, 1000, {1: 1000, 2: 1100, 3: 900})
PAGE = """\
# HELP churn_requests_total Answered requests
# TYPE churn_requests_total counter
churn_requests_total{endpoint="/predict",status="200"} 90.0
churn_requests_total{endpoint="/predict_batch",status="200"} 10.0
churn_requests_total{endpoint="/predict",status="500"} 3.0
churn_requests_total{endpoint="/predict",status="422"} 7.0
churn_requests_total{endpoint="/health",status="200"} 5000.0
churn_requests_total{endpoint="other",status="404"} 12.0
# HELP churn_request_seconds Time
# TYPE churn_request_seconds histogram
churn_request_seconds_bucket{endpoint="/predict",le="0.01"} 80.0
churn_request_seconds_bucket{endpoint="/predict",le="0.1"} 100.0
churn_request_seconds_bucket{endpoint="/predict",le="+Inf"} 100.0
churn_request_seconds_bucket{endpoint="/health",le="+Inf"} 5000.0
churn_request_seconds_count{endpoint="/predict"} 100.0
churn_request_seconds_sum{endpoint="/predict"} 1.0
"""


def sample(hours: float, ok: int, failed: int = 0, **changes: Any) -> Sample:
    """What a service had counted so many hours before NOW."""
    given: dict[str, Any] = {
        "at": NOW - hours * HOUR,
        "url": "http://127.0.0.1:3001",
        "service": "one",
        "release_id": "v1",
        "bento": None,
        "requests": {"200": float(ok), "500": float(failed)},
        "buckets": {"0.01": float(ok), "0.1": float(ok), "0.25": float(ok), "+Inf": float(ok)},
    }
    return Sample(**(given | changes))


def logged(rows: int, *, ms: float = 5.0, release: str = "v1", end: datetime = NOW) -> pd.DataFrame:
    at = pd.Series(pd.date_range(end - HOUR, end, rows + 1)[1:]).astype(EMPTY_ANSWERED["at"].dtype)
    latency = np.full(rows, ms * 1000).astype("int64")
    return pd.DataFrame({"at": at, "release_id": release, "latency_us": latency})


def judged(
    samples: list[Sample],
    log: pd.DataFrame = EMPTY_ANSWERED,
    volume: Volume = USUAL,
    *,
    service: Service | None = None,
    **policy: Any,
) -> ServingHealthRecord:
    service = service or Service("http://127.0.0.1:3001", samples[-1] if samples else None, True)
    return serving_health(service, samples, log, volume, ServingHealthPolicy(**policy), now=NOW)


def test_a_healthy_hour_is_ok() -> None:
    report = judged([sample(1, 5000, 40), sample(0, 6000, 45)], logged(1000))
    assert report.verdict == "ok"
    assert (report.requests, report.errors, report.logged) == (1005, 5, 1000)
    error = report.metric("error_rate")
    assert (error.value, error.limit, error.release_id) == (pytest.approx(5 / 1005), 0.01, "v1")
    latency = report.metric("p95_latency_ms")
    assert (latency.value, latency.rows) == (pytest.approx(5.0), 1000)
    assert report.metric("volume_ratio").value == 1
    assert report.metric("service_up").value == 1
    assert {metric.at for metric in report.metrics} == {NOW}


@pytest.mark.parametrize(("failed", "verdict"), [(10, "ok"), (11, "alert")])
def test_more_than_one_in_a_hundred_failed_alerts(failed: int, verdict: str) -> None:
    report = judged([sample(1, 0), sample(0, 1000 - failed, failed)])
    assert report.metric("error_rate").verdict == verdict
    assert report.metric("error_rate").value == failed / 1000


def test_errors_of_callers_are_not_the_services() -> None:
    after = sample(0, 500, requests={"200": 500.0, "422": 400.0, "401": 100.0})
    assert judged([sample(1, 0), after]).metric("error_rate").value == 0


def test_few_requests_are_insufficient_unless_surely_too_many_failed() -> None:
    few = judged([sample(1, 0), sample(0, 49, 1)]).metric("error_rate")
    assert (few.verdict, few.value) == ("insufficient", None)
    assert "50 requests were counted, 100 are needed" in few.reason
    # Even if the next 70 were answered, 2 of 100 failed.
    surely = judged([sample(1, 0), sample(0, 28, 2)]).metric("error_rate")
    assert (surely.verdict, surely.value) == ("alert", pytest.approx(2 / 30))
    first = judged([sample(0, 5000)]).metric("error_rate")
    assert first.verdict == "insufficient"
    assert "no two samples" in first.reason


def test_a_service_started_anew_counts_from_nothing() -> None:
    fell = counted([sample(1, 5000, 40), sample(0, 200, 1)], NOW - HOUR, NOW)
    assert (fell.total, fell.errors) == (201, 1)
    # Another process has counted more than the one before it ever did.
    other = counted([sample(1, 100), sample(0, 300, service="two")], NOW - HOUR, NOW)
    assert other.total == 300
    assert counted([sample(1, 100), sample(0, 300)], NOW - HOUR, NOW).total == 200


def test_only_what_was_counted_in_the_window_counts() -> None:
    samples = [sample(h, 100 * (5 - h)) for h in (4, 3, 2, 1, 0)]
    assert counted(samples, NOW - HOUR, NOW).total == 100
    day = counted(samples, NOW - 24 * HOUR, NOW)
    assert (day.total, day.since, day.until) == (400, NOW - 4 * HOUR, NOW)
    assert counted(samples, NOW, NOW + HOUR).since is None


@pytest.mark.parametrize(("ms", "verdict"), [(100.0, "ok"), (100.1, "alert")])
def test_a_slow_service_alerts(ms: float, verdict: str) -> None:
    log = pd.concat([logged(900, ms=3), logged(100, ms=ms)], ignore_index=True)
    metric = judged([sample(1, 0), sample(0, 0)], log).metric("p95_latency_ms")
    assert (metric.verdict, metric.value) == (verdict, pytest.approx(ms))


def test_what_the_log_cannot_see_of_the_wait_counts_too() -> None:
    slow = {"0.01": 0.0, "0.1": 900.0, "0.25": 1000.0, "+Inf": 1000.0}
    samples = [sample(1, 0), sample(0, 1000, buckets=slow)]
    metric = judged(samples, logged(1000)).metric("p95_latency_ms")
    assert (metric.verdict, metric.value) == ("alert", pytest.approx(175.0))
    assert "as the service timed" in metric.reason
    # Without enough of the log, the histogram alone.
    fast = judged([sample(1, 0), sample(0, 1000)], logged(5)).metric("p95_latency_ms")
    assert (fast.verdict, fast.value) == ("ok", pytest.approx(9.5))
    few = judged([sample(1, 0), sample(0, 60)], logged(50)).metric("p95_latency_ms")
    assert (few.verdict, few.value) == ("insufficient", None)
    assert "60 predictions since the last look, 100 are needed" in few.reason


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        ({}, None),
        ({"0.1": 0.0, "+Inf": 0.0}, None),
        ({"0.1": 100.0, "+Inf": 100.0}, 0.095),
        ({"0.1": 90.0, "0.2": 100.0, "+Inf": 100.0}, 0.15),
        ({"0.1": 90.0, "0.2": 90.0, "+Inf": 100.0}, 0.2),
        ({"0.1": 0.0, "0.2": 100.0, "+Inf": 100.0}, 0.195),
    ],
)
def test_a_quantile_of_buckets(buckets: dict[str, float], expected: float | None) -> None:
    found = quantile_of(buckets, 0.95)
    assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(("rows", "verdict"), [(500, "ok"), (499, "alert"), (0, "alert")])
def test_half_of_what_is_usual_alerts(rows: int, verdict: str) -> None:
    metric = judged([], volume=Volume(NOW, rows, {1: 1000, 2: 5000, 3: 10})).metric("volume_ratio")
    assert (metric.verdict, metric.value) == (verdict, rows / 1000)
    assert f"{rows:,} predictions were logged, 1,000 are usual by 3 past weeks" in metric.reason


def test_too_little_past_is_no_baseline() -> None:
    one = judged([], volume=Volume(NOW, 0, {1: 1000})).metric("volume_ratio")
    assert (one.verdict, one.value) == ("insufficient", None)
    assert "1 of the past 4 weeks" in one.reason
    quiet = judged([], volume=Volume(NOW, 3, {1: 49, 2: 49})).metric("volume_ratio")
    assert quiet.verdict == "insufficient"
    assert "vary too much by chance" in quiet.reason


def test_a_log_that_is_behind_is_not_taken_for_a_quiet_hour() -> None:
    samples = [sample(1, 0), sample(0, 800)]
    behind = judged(samples, volume=Volume(NOW, 0, {1: 1000, 2: 1000})).metric("volume_ratio")
    assert behind.verdict == "insufficient"
    assert "counted 800 answers, so the log is behind" in behind.reason
    # 800 in ten hours are not what is usual in one.
    old = [sample(10, 0), sample(0, 800)]
    quiet = judged(old, volume=Volume(NOW, 0, {1: 1000, 2: 1000})).metric("volume_ratio")
    assert quiet.verdict == "alert"


def test_who_should_answer_and_does_not_is_an_alert() -> None:
    def up(url: str | None, expected: bool) -> Metric:
        return judged([], service=Service(url, None, expected)).metric("service_up")

    down = up("http://127.0.0.1:3001", True)
    assert (down.verdict, down.value) == ("alert", 0)
    assert "does not answer" in down.reason
    assert up("http://127.0.0.1:3001", False).verdict == "insufficient"
    stopped = up(None, True)
    assert (stopped.verdict, stopped.reason) == (
        "insufficient",
        "no service of this home is running",
    )


def test_a_release_is_judged_by_what_it_served_alone() -> None:
    samples = [
        sample(5, 1000),
        sample(4, 1500, 300, release_id="v2"),
        sample(3, 1900, 320, release_id="v2"),
        sample(2, 2000, 321, release_id="v3"),
        sample(1, 2100, 321, release_id="v2"),
        sample(0, 2400, 321, release_id="v2"),
    ]
    log = pd.concat(
        [logged(400, ms=150, release="v2"), logged(600, ms=2), logged(9, ms=900, end=NOW - WEEK)],
        ignore_index=True,
    )
    latency, errors = release_health(samples, log, "v2", NOW - 6 * HOUR, NOW, POLICY)
    assert (latency.name, latency.verdict, latency.value) == ("p95_latency_ms", "alert", 150)
    assert (latency.release_id, latency.rows) == ("v2", 400)
    # From 4 to 3 hours ago, and in the last hour.
    assert (errors.name, errors.rows) == ("error_rate", 420 + 300)
    assert (errors.verdict, errors.value) == ("alert", pytest.approx(20 / 720))
    later = release_health(samples, log, "v2", NOW - HOUR, NOW, POLICY)[1]
    assert (later.verdict, later.value) == ("ok", 0)
    nothing = release_health(samples, log, "v9", NOW - 6 * HOUR, NOW, POLICY)
    assert [metric.verdict for metric in nothing] == ["insufficient", "insufficient"]


def write_log(lake: Lake, hour: datetime, rows: int) -> None:
    """Predictions in the hour from `hour` on, which are all of their day."""
    count = np.arange(rows)
    at = pd.Series(hour + pd.to_timedelta(count * (3600 / max(rows, 1)), unit="s"))
    frame = pd.DataFrame(
        {"key": count.astype(str), "at": at, "release_id": "v1", "latency_us": 500}
    ).reindex(columns=SCHEMA.names)
    for name in ("request_id", "customer_id", "arm", "model_version"):
        frame[name] = "x"
    frame["probability"] = 0.5
    frame["at"] = frame["at"].astype(EMPTY_ANSWERED["at"].dtype)
    frame["cutoff"] = frame["at"].dt.floor("D")
    table = pa.Table.from_pandas(frame, SCHEMA, preserve_index=False)
    lake.write(PREDICTION_LOG, hour.date(), hour.date(), table, day_of="at")


def test_volume_is_that_of_the_same_hour_of_past_weeks(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    nine = NOW.replace(hour=9, minute=0)
    for ago, rows in ((0, 40), (1, 100), (3, 300), (4, 200)):
        write_log(lake, nine - ago * WEEK, rows)
    # Six days ago is another weekday, and two weeks ago the log has a hole.
    write_log(lake, nine - timedelta(days=6), 900)
    volume = volume_of(lake, POLICY, NOW)
    assert volume.until == NOW.replace(minute=0)
    assert (volume.rows, volume.weeks, volume.baseline) == (40, {1: 100, 3: 300, 4: 200}, 200)
    # A day with a log, but nothing at that hour, is a quiet one.
    write_log(lake, nine - 2 * WEEK + 3 * HOUR, 500)
    assert volume_of(lake, POLICY, NOW).weeks[2] == 0
    a_day = volume_of(lake, ServingHealthPolicy(window_hours=24), NOW)
    assert (a_day.rows, a_day.weeks) == (40, {})
    assert len(answered_rows(lake, NOW - 2 * HOUR, NOW)) == 40
    assert len(answered_rows(lake, NOW - HOUR, NOW)) == 31
    assert answered_rows(lake, NOW - 90 * WEEK, NOW - 80 * WEEK).empty


def test_counters_are_those_of_the_endpoints_that_predict() -> None:
    requests, buckets = parse_counters(PAGE)
    assert requests == {"200": 100, "500": 3, "422": 7}
    assert buckets == {"0.01": 80, "0.1": 100, "+Inf": 100}
    assert parse_counters("") == ({}, {})


@contextmanager
def answering(**pages: bytes) -> Generator[str]:
    """A server with these pages, and 404 for the rest."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path.strip("/"))
            self.send_response(404 if page is None else 200)
            self.end_headers()
            self.wfile.write(page or b"")

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


HEALTH = msgspec.json.encode({"release_id": "v1", "bento": "churn:v1-c0de"})


def test_a_service_is_asked_and_what_it_said_is_kept(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert take_sample(home, NOW) == (None, None)
    with answering(health=HEALTH, metrics=PAGE.encode()) as url, announced(home, url):
        asked, taken = take_sample(home, NOW)
        again = take_sample(home, NOW + HOUR)[1]
    assert asked == url
    assert taken is not None
    assert again is not None
    assert (taken.release_id, taken.requests["500"]) == ("v1", 3)
    assert taken.service == again.service
    assert taken.service.endswith("c0de")
    assert read_samples(home.service_samples) == [taken, again]
    # Whoever does not answer has said nothing.
    assert take_sample(home, NOW, url) == (url, None)
    assert len(read_samples(home.service_samples)) == 2


@pytest.mark.parametrize(
    "pages",
    [
        {"metrics": PAGE.encode()},
        {"health": HEALTH},
        {"health": HEALTH, "metrics": b"<html>{ not metrics"},
        {"health": HEALTH, "metrics": b"\xff\xfe"},
        {"health": b"{}", "metrics": PAGE.encode()},
    ],
)
def test_who_answers_otherwise_is_not_the_service(pages: dict[str, bytes]) -> None:
    with answering(**pages) as url:
        assert ask_service(url, started="", now=NOW) is None


def test_the_series_survives_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "monitoring" / "samples.jsonl"
    assert read_samples(path) == []
    keep_sample(path, sample(2, 1))
    with path.open("ab") as file:
        file.write(b'{"at": "2026-')
    keep_sample(path, sample(1, 2))
    keep_sample(path, sample(0, 3))
    assert read_samples(path) == [sample(2, 1), sample(1, 2), sample(0, 3)]
    assert read_samples(path, NOW - 0.5 * HOUR) == [sample(1, 2), sample(0, 3)]


def test_a_clock_set_back_changes_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    for one in (sample(1, 100), sample(0.2, 200), sample(0.5, 350)):
        keep_sample(path, one)
    assert counted(read_samples(path), NOW - HOUR, NOW).total == 250


def test_the_record_is_json() -> None:
    report = judged([sample(1, 5000, 40), sample(0, 6000, 45)], logged(1000))
    told = msgspec.json.decode(msgspec.json.encode(report), type=ServingHealthRecord)
    assert told == report


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_p95_latency_ms", 0),
        ("max_error_rate", 1.0),
        ("min_volume_ratio", 0.0),
        ("window_hours", 0),
        ("window_hours", 169),
        ("min_requests", 0),
        ("min_baseline_weeks", 0),
        ("min_baseline_rows", 0),
        ("baseline_weeks", 1),
        ("baseline_weeks", 53),
        ("url", "localhost:3001"),
    ],
)
def test_a_nonsense_policy_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"serving_health.{name} is "):
        ServingHealthPolicy(**{name: value})
