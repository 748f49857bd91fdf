"""What the service counts, for Prometheus to read from BentoML's /metrics.

Metrics of prometheus_client write to the files whose sums over all workers BentoML's /metrics
shows. They count on every lane; on the fast lane they are the only ones of a prediction.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import mark_process_dead

from churn_assets.contract.release import Manifest
from churn_assets.contract.response import LogHealth

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
PROBABILITIES = tuple(step / 20 for step in range(1, 21))
OTHER = "other"

_LIVE_GAUGE = re.compile(r"gauge_live[a-z]+_(\d+)\.db\Z")


class Metrics:
    """The metrics of one worker. To be made in the worker itself: their files bear its pid."""

    def __init__(self, endpoints: frozenset[str]):
        _forget_dead_workers()
        # Of no use where several workers are summed up, but two services in one process, as tests
        # make them, must not meet in the default one.
        registry = CollectorRegistry()
        self._endpoints = endpoints
        self._requests = Counter(
            "churn_requests",
            "Answered requests",
            ("endpoint", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "churn_request_seconds",
            "Time from the arrival of a request to its answer",
            ("endpoint",),
            buckets=SECONDS,
            registry=registry,
        )
        self._probabilities = Histogram(
            "churn_probability",
            "Answered probabilities",
            ("model_version",),
            buckets=PROBABILITIES,
            registry=registry,
        )
        self._releases = Gauge(
            "churn_release_info",
            "Workers that serve the release",
            ("release_id", "model_version", "bento"),
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._release: Gauge | None = None
        # Looking a child up by its labels takes as long as counting.
        self._count: dict[tuple[str, int], Callable[[], None]] = {}
        self._observe_seconds: dict[str, Callable[[float], None]] = {}
        self._observe_probability: dict[str, Callable[[float], None]] = {}
        self.in_progress = Gauge(
            "churn_requests_in_progress",
            "Requests that wait for their answer, as of a moment ago",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._usable = Gauge(
            "churn_prediction_log_usable",
            "Whether the prediction log can be written",
            multiprocess_mode="livemin",
            registry=registry,
        )
        self._waiting = Gauge(
            "churn_prediction_log_rows_waiting",
            "Logged predictions that are not ingested: of the worker with most, of all on a server",
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._lag_seconds = Gauge(
            "churn_prediction_log_lag_seconds",
            "Age of the oldest logged prediction that is not ingested",
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._unlogged = Counter(
            "churn_unlogged_predictions",
            "Predictions answered without being logged",
            registry=registry,
        )
        self._unlogged_seen = 0

    def request(self, path: str, status: int, nanoseconds: int) -> None:
        """Count an answered request that took so long."""
        try:
            self._count[path, status]()
            self._observe_seconds[path](nanoseconds * 1e-9)
        except KeyError:
            endpoint = path if path in self._endpoints else OTHER
            count = self._requests.labels(endpoint, str(status)).inc
            observe = self._seconds.labels(endpoint).observe
            if endpoint != OTHER:
                # A name nobody here has chosen must not be kept: there is no end of them.
                self._count[path, status] = count
                self._observe_seconds[path] = observe
            count()
            observe(nanoseconds * 1e-9)

    def probability(self, model_version: str, probability: float) -> None:
        """Count an answered prediction of the model."""
        observe = self._observe_probability.get(model_version)
        if observe is None:
            observe = self._probabilities.labels(model_version).observe
            self._observe_probability[model_version] = observe
        observe(probability)

    def log(self, health: LogHealth) -> None:
        """The prediction log of this worker is like this now."""
        self._usable.set(health.usable)
        self._unlogged.inc(health.unlogged - self._unlogged_seen)
        self._unlogged_seen = health.unlogged
        if health.rows_waiting is not None:
            self._waiting.set(health.rows_waiting)
            oldest = health.oldest_waiting
            lag = (datetime.now(UTC) - oldest).total_seconds() if oldest else 0.0
            # Clocks jump.
            self._lag_seconds.set(max(lag, 0.0))

    def serves(self, manifest: Manifest, bento: str | None) -> None:
        """From now on this worker serves the release."""
        if self._release is not None:
            self._release.set(0)
        labels = (manifest.release_id, manifest.model_version, bento or "")
        self._release = self._releases.labels(*labels)
        self._release.set(1)


def _forget_dead_workers() -> None:
    """Take what killed workers left out of the sums: they are no longer in the middle of it."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return
    for path in Path(folder).glob("gauge_live*_*.db"):
        if match := _LIVE_GAUGE.match(path.name):
            try:
                os.kill(int(match[1]), 0)
            except ProcessLookupError:
                with contextlib.suppress(FileNotFoundError):
                    mark_process_dead(int(match[1]))
            except PermissionError:
                pass
