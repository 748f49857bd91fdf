"""The page of metrics that Prometheus reads, and its server."""

from __future__ import annotations

import threading
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from churn_assets.monitoring.exposition import exposition, newest, write_exposition
from churn_assets.monitoring.metric import Metric
from churn_assets.reports import serve_reports

NOW = datetime(2026, 3, 2, 10, 12, tzinfo=UTC)


def metric(name: str, value: float | None, **changes: Any) -> Metric:
    given: dict[str, Any] = {"verdict": "ok", "limit": 0.8, "reason": "so", "at": NOW, "until": NOW}
    return Metric(name=name, value=value, **(given | changes))


def samples(page: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_the_newest_of_each_metric_is_on_the_page() -> None:
    found = samples(
        exposition(
            [
                metric("accuracy", 0.7, verdict="alert", at=NOW - timedelta(days=1)),
                metric("accuracy", 0.9),
                metric("ks/avg_order_value", None, verdict="insufficient"),
                metric('odd "\\\n', 1e-9),
            ]
        )
    )
    assert found["churn_metric", "accuracy"] == 0.9
    assert found["churn_metric_limit", "accuracy"] == 0.8
    assert found["churn_metric_verdict", "accuracy", "ok"] == 1
    assert found["churn_metric_verdict", "accuracy", "alert"] == 0
    assert found["churn_metric_timestamp_seconds", "accuracy"] == NOW.timestamp()
    # Too little to measure has no value, and says so.
    assert ("churn_metric", "ks/avg_order_value") not in found
    assert found["churn_metric_verdict", "ks/avg_order_value", "insufficient"] == 1
    assert found["churn_metric", 'odd "\\\n'] == 1e-9
    assert exposition([]) == ""


def test_the_last_measured_is_the_newest_at_the_same_moment() -> None:
    found = newest([metric("a", 1.0), metric("a", 2.0)])
    assert found["a"].value == 2.0


def test_the_page_is_served_as_what_prometheus_takes(tmp_path: Path) -> None:
    write_exposition([metric("accuracy", 0.9)], tmp_path / "reports" / "metrics.prom")
    with serve_reports("127.0.0.1", 0, str(tmp_path / "reports")) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(f"{url}/metrics.prom", timeout=20) as response:
            kind, page = response.headers["Content-Type"], response.read().decode()
        server.shutdown()
        thread.join()
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert samples(page)["churn_metric", "accuracy"] == 0.9
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["metrics.prom"]
