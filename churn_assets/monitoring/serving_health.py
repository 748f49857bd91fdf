"""How the service does: how fast, how often it fails, and whether as much is asked as usual."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from churn_assets.data.lake import Lake
from churn_assets.data.windows import days_between, partition_of
from churn_assets.errors import UserError
from churn_assets.monitoring.metric import Metric, Verdict
from churn_assets.monitoring.outcomes import PREDICTION_LOG, UTC_MOMENT
from churn_assets.monitoring.service_samples import Counted, Sample, counted, quantile_of

P95 = 0.95

_HOUR, _WEEK = timedelta(hours=1), timedelta(weeks=1)
_COLUMNS = ("at", "release_id", "latency_us")
EMPTY_ANSWERED = pd.DataFrame(
    {
        "at": pd.Series(dtype=UTC_MOMENT),
        "release_id": pd.Series(dtype="str"),
        "latency_us": pd.Series(dtype="int64"),
    }
)


@dataclass(frozen=True)
class ServingHealthPolicy:
    """What is asked of the service.

    max_p95_latency_ms: of predictions. max_error_rate: share of requests answered with 5xx.
    min_volume_ratio: logged predictions against the median of the same hours of past weeks.
    window_hours: of operational time, that one look is about. min_requests: fewer say nothing of
    latency and errors. baseline_weeks: how many past weeks; min_baseline_weeks: so many of them
    must have a log. min_baseline_rows: predictions of a usual window, below which chance alone
    halves it. url: of the service, where it is not one of this home. Raises UserError for a value
    that says nothing.
    """

    max_p95_latency_ms: float = 100.0
    max_error_rate: float = 0.01
    min_volume_ratio: float = 0.5
    window_hours: int = 1
    min_requests: int = 100
    baseline_weeks: int = 4
    min_baseline_weeks: int = 2
    min_baseline_rows: int = 50
    url: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_p95_latency_ms) and self.max_p95_latency_ms > 0):
            raise UserError(
                f"serving_health.max_p95_latency_ms is {self.max_p95_latency_ms}; "
                "set milliseconds above 0"
            )
        for name in ("max_error_rate", "min_volume_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(
                    f"serving_health.{name} is {getattr(self, name)}; set a share between 0 and 1"
                )
        for name in ("window_hours", "min_requests", "min_baseline_weeks", "min_baseline_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"serving_health.{name} is {getattr(self, name)}; set at least 1")
        if self.window_hours > 168:
            raise UserError(
                f"serving_health.window_hours is {self.window_hours}; set at most the 168 of a week"
            )
        if not self.min_baseline_weeks <= self.baseline_weeks <= 52:
            raise UserError(
                f"serving_health.baseline_weeks is {self.baseline_weeks}; set a number from "
                f"serving_health.min_baseline_weeks ({self.min_baseline_weeks}) to 52"
            )
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise UserError(f"serving_health.url is {self.url!r}; give http://host:port or nothing")

    @property
    def window(self) -> timedelta:
        """What one look is about."""
        return self.window_hours * _HOUR


@dataclass(frozen=True)
class Volume:
    """Logged predictions of the window of whole hours up to `until`, and of past weeks'.

    weeks: by how many weeks ago; a week whose log
    lacks a day of the window is not there.
    """

    until: datetime
    rows: int
    weeks: dict[int, int]

    @property
    def baseline(self) -> float | None:
        """The median of the past weeks."""
        return float(np.median(list(self.weeks.values()))) if self.weeks else None


class ReleaseHealth(msgspec.Struct, frozen=True):
    """What one release answered within the window."""

    release_id: str
    predictions: int
    p95_latency_ms: float | None


class ServingHealthRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How the service does. verdict: the worst of the metrics.

    since, until: the window, operational time. release_id: what the service said it serves, None
    where none answered. logged, requests, errors: predictions in the log, and requests and 5xx the
    service counted. p95_logged_ms is exact, of the log; p95_counted_ms of the service's histogram.
    baseline: of volume; weeks: the past ones it is the median of, by how many weeks ago.
    """

    verdict: Verdict
    reason: str
    since: datetime
    until: datetime
    url: str | None
    release_id: str | None
    logged: int
    requests: int
    errors: int
    p95_logged_ms: float | None
    p95_counted_ms: float | None
    volume: int
    baseline: float | None
    weeks: dict[str, int]
    releases: tuple[ReleaseHealth, ...]
    metrics: tuple[Metric, ...]
    at: datetime

    def metric(self, name: str) -> Metric:
        """One of the metrics. Raises KeyError for another name."""
        return {metric.name: metric for metric in self.metrics}[name]


@dataclass(frozen=True)
class Service:
    """The service as it was found. url: where it should answer, None where none is known.

    sample: what it said, None when it did not answer. expected: whether a version is in Production,
    so that something should be served.
    """

    url: str | None
    sample: Sample | None
    expected: bool

    @property
    def silent(self) -> str | None:
        """Why there is no figure of the service; None when it answered."""
        if self.sample is not None:
            return None
        if self.url is None:
            return "no service of this home is running"
        return f"the service at {self.url} does not answer"


def answered_rows(lake: Lake, since: datetime, until: datetime) -> pd.DataFrame:
    """Logged predictions answered in (since, until]: at, release_id, latency_us."""
    days = days_between(partition_of(since), partition_of(until))
    there = set(lake.days(PREDICTION_LOG))
    wanted = [day for day in days if day in there]
    if not wanted:
        return EMPTY_ANSWERED
    rows = lake.read(PREDICTION_LOG, days=wanted, columns=list(_COLUMNS)).to_pandas()
    return rows[(rows["at"] > since) & (rows["at"] <= until)].reset_index(drop=True)


def volume_of(lake: Lake, policy: ServingHealthPolicy, now: datetime) -> Volume:
    """Logged predictions of the last whole hours, and of the same hours of past weeks.

    The hour that has begun is left out: what was answered in it is not all in the lake. A week
    counts when the log of all its days is there. With none of today's there, today has none.
    """
    until = now.replace(minute=0, second=0, microsecond=0)
    there = set(lake.days(PREDICTION_LOG))
    weeks = {}
    for ago in range(1, policy.baseline_weeks + 1):
        end = until - ago * _WEEK
        if _days_of(end - policy.window, end) <= there:
            weeks[ago] = _rows_between(lake, end - policy.window, end)
    return Volume(until, _rows_between(lake, until - policy.window, until), weeks)


def serving_health(
    service: Service,
    samples: Sequence[Sample],
    log: pd.DataFrame,
    volume: Volume,
    policy: ServingHealthPolicy,
    *,
    now: datetime,
) -> ServingHealthRecord:
    """How the service did in the window that ends `now`.

    samples: in the order they were taken in, from the last before the window to this look's. log:
    as of `answered_rows`, of the window.
    """
    since = now - policy.window
    done = counted(samples, since, now)
    release = service.sample.release_id if service.sample else None
    latencies = log["latency_us"].to_numpy(dtype=np.float64) / 1000
    exact, told = _p95(latencies), _p95_counted(done)
    metrics = (
        _latency(latencies, done, policy, now, now, release),
        _errors(done, policy, now, release, service.silent),
        _volume(volume, done, policy, now),
        _service_up(service, now),
    )
    verdict, reason = _verdict(metrics)
    return ServingHealthRecord(
        verdict=verdict,
        reason=reason,
        since=since,
        until=now,
        url=service.url,
        release_id=release,
        logged=len(log),
        requests=done.total,
        errors=done.errors,
        p95_logged_ms=exact,
        p95_counted_ms=told,
        volume=volume.rows,
        baseline=volume.baseline,
        weeks={str(ago): rows for ago, rows in volume.weeks.items()},
        releases=tuple(
            ReleaseHealth(
                str(name),
                len(rows),
                _p95(rows["latency_us"].to_numpy(dtype=np.float64) / 1000),
            )
            for name, rows in log.groupby("release_id")
        ),
        metrics=metrics,
        at=now,
    )


def release_health(
    samples: Sequence[Sample],
    log_rows: pd.DataFrame,
    release_id: str,
    since: datetime,
    now: datetime,
    policy: ServingHealthPolicy,
) -> list[Metric]:
    """`p95_latency_ms` and `error_rate` of one release from when it began to serve, `since`.

    samples: in the order they were taken in; requests between two of them count where the service
    served the release at both. log_rows: as of `answered_rows`; those of other releases are left
    out. Too few requests are `insufficient`.
    """
    rows = log_rows[
        (log_rows["release_id"] == release_id) & (log_rows["at"] > since) & (log_rows["at"] <= now)
    ]
    done = counted(samples, since, now, release_id)
    latencies = rows["latency_us"].to_numpy(dtype=np.float64) / 1000
    return [
        _latency(latencies, done, policy, now, now, release_id),
        _errors(done, policy, now, release_id, None),
    ]


def _latency(
    latencies: NDArray[np.float64],
    done: Counted,
    policy: ServingHealthPolicy,
    now: datetime,
    until: datetime,
    release: str | None,
) -> Metric:
    """The log's p95 is exact; the service's histogram also knows the wait for the log itself."""
    limit = policy.max_p95_latency_ms
    exact, told = _p95(latencies), _p95_counted(done)
    enough_logged = len(latencies) >= policy.min_requests
    timed = round(max(done.buckets.values(), default=0))
    enough_timed = timed >= policy.min_requests
    value, said, rows, verdict = None, "", len(latencies), "insufficient"
    if enough_logged and exact is not None:
        value = exact
        said = f"95 % of {rows:,} logged predictions took at most {exact:.2f} ms"
    if enough_timed and told is not None and (value is None or value <= limit < told):
        value, rows = told, timed
        said = f"95 % of {rows:,} requests took at most about {told:.2f} ms, as the service timed"
    if value is None:
        most = max(rows, timed)
        said = f"{most:,} predictions since the last look, {policy.min_requests:,} are needed"
        rows = most
    else:
        said = f"{said}; at most {limit:g} ms is wanted"
        verdict = "ok" if value <= limit else "alert"
    return Metric("p95_latency_ms", verdict, value, limit, said, now, until, rows, release)


def _errors(
    done: Counted,
    policy: ServingHealthPolicy,
    now: datetime,
    release: str | None,
    silent: str | None,
) -> Metric:
    name, limit = "error_rate", policy.max_error_rate
    # So many would be too many even if all others up to the number that is needed were answered.
    surely = done.errors > limit * policy.min_requests
    if done.total < policy.min_requests and not surely:
        few = f"{done.total:,} requests were counted, {policy.min_requests:,} are needed"
        if done.since is None:
            few = f"no two samples of the service to compare; {few}"
        said = f"{silent}; {few}" if silent else few
        return Metric(name, "insufficient", None, limit, said, now, now, done.total, release)
    rate = done.errors / done.total
    said = (
        f"{done.errors:,} of {done.total:,} requests from {done.since:%Y-%m-%d %H:%M} to "
        f"{done.until:%H:%M} failed (5xx); at most {limit:.1%} is allowed"
    )
    verdict: Verdict = "ok" if rate <= limit else "alert"
    return Metric(name, verdict, rate, limit, said, now, now, done.total, release)


def _volume(volume: Volume, done: Counted, policy: ServingHealthPolicy, now: datetime) -> Metric:
    name, limit, rows = "volume_ratio", policy.min_volume_ratio, volume.rows
    weeks, baseline = len(volume.weeks), volume.baseline

    def metric(verdict: Verdict, value: float | None, said: str) -> Metric:
        return Metric(name, verdict, value, limit, said, now, volume.until, rows)

    if baseline is None or weeks < policy.min_baseline_weeks:
        said = (
            f"the log has {weeks} of the past {policy.baseline_weeks} weeks at this hour, "
            f"{policy.min_baseline_weeks} are needed"
        )
        return metric("insufficient", None, said)
    if baseline < policy.min_baseline_rows:
        said = (
            f"{baseline:g} predictions are usual at this hour; fewer than "
            f"{policy.min_baseline_rows} vary too much by chance"
        )
        return metric("insufficient", None, said)
    ratio = rows / baseline
    said = f"{rows:,} predictions were logged, {baseline:,.0f} are usual by {weeks} past weeks"
    if ratio >= limit:
        return metric("ok", ratio, said)
    if _by_counters(done, policy) / baseline >= limit:
        said = f"{said}; the service counted {done.answered:,} answers, so the log is behind"
        return metric("insufficient", None, said)
    return metric("alert", ratio, f"{said}; at least {limit:.0%} is expected")


def _by_counters(done: Counted, policy: ServingHealthPolicy) -> float:
    """What the service answered in a window's time, by its counters."""
    if done.since is None or done.until is None:
        return 0.0
    return done.answered * min(1.0, policy.window / (done.until - done.since))


def _service_up(service: Service, now: datetime) -> Metric:
    """Only what should serve and does not is an alert."""
    name, limit = "service_up", 1.0
    if service.sample is not None:
        said = f"{service.url} serves {service.sample.release_id}"
        return Metric(name, "ok", 1.0, limit, said, now, now, 1, service.sample.release_id)
    said = service.silent or ""
    if service.url is None:
        return Metric(name, "insufficient", None, limit, said, now, now)
    if not service.expected:
        return Metric(
            name, "insufficient", None, limit, f"{said}; nothing is in Production", now, now
        )
    return Metric(name, "alert", 0.0, limit, said, now, now)


def _verdict(metrics: Sequence[Metric]) -> tuple[Verdict, str]:
    for verdict in ("alert", "insufficient"):
        if told := [f"{m.name}: {m.reason}" for m in metrics if m.verdict == verdict]:
            return verdict, "; ".join(told)
    return "ok", "; ".join(f"{m.name}: {m.reason}" for m in metrics)


def _p95(latencies: NDArray[np.float64]) -> float | None:
    return float(np.quantile(latencies, P95)) if len(latencies) else None


def _p95_counted(done: Counted) -> float | None:
    seconds = quantile_of(done.buckets, P95)
    return None if seconds is None else seconds * 1000


def _days_of(since: datetime, until: datetime) -> set[date]:
    """The partitions that hold what was answered in [since, until)."""
    last = partition_of(until - timedelta(microseconds=1))
    return set(days_between(partition_of(since), last))


def _rows_between(lake: Lake, since: datetime, until: datetime) -> int:
    """Logged predictions answered in [since, until)."""
    days = sorted(_days_of(since, until) & set(lake.days(PREDICTION_LOG)))
    if not days:
        return 0
    at = lake.read(PREDICTION_LOG, days=days, columns=["at"]).to_pandas()["at"]
    return int(((at >= since) & (at < until)).sum())
