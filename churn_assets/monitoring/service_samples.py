"""What a running service counted, asked now and then, so that counters become rates.

Prometheus does this where there is one; a home without it keeps its own samples. Counters only
rise until the service is started anew, so what happened between two samples is their difference,
or all of the later one after a new start.
"""

from __future__ import annotations

import http.client
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.bento import code_of
from churn_assets.lifecycle.deployment import running_service
from churn_assets.lifecycle.serving import ask_health

# The endpoints that predict; probes and unknown paths are not what callers wait for.
ENDPOINTS = ("/predict", "/predict_batch")
TIMEOUT_S = 10.0
INFINITY = "+Inf"

_REQUESTS, _BUCKETS = "churn_requests_total", "churn_request_seconds_bucket"
_LONGEST_LINE = 1 << 16


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of a service at one moment, of the endpoints that predict.

    at: operational time. service: which start of which service, as far as that can be told from
    outside. release_id: as /health told just then. requests: by status. buckets: `/predict` alone,
    requests that took at most so many seconds, by that bound.
    """

    at: datetime
    url: str
    service: str
    release_id: str
    bento: str | None
    requests: dict[str, float]
    buckets: dict[str, float]


@dataclass(frozen=True)
class Counted:
    """What happened between samples. since, until: of the first and last of them.

    requests by status, and buckets as of Sample but of that stretch alone.
    """

    requests: dict[str, float]
    buckets: dict[str, float]
    since: datetime | None = None
    until: datetime | None = None

    @property
    def total(self) -> int:
        """Answered requests."""
        return round(sum(self.requests.values()))

    @property
    def errors(self) -> int:
        """Requests the service failed: 5xx. A 4xx is its caller's."""
        return round(sum(n for status, n in self.requests.items() if status.startswith("5")))

    @property
    def answered(self) -> int:
        """Requests that got what they asked for: 2xx."""
        return round(sum(n for status, n in self.requests.items() if status.startswith("2")))


def parse_counters(text: str) -> tuple[dict[str, float], dict[str, float]]:
    """Requests by status, and buckets of `/predict` by bound, of a page of the service's /metrics.

    Raises ValueError for what is no such page.
    """
    from prometheus_client.parser import text_string_to_metric_families

    requests: dict[str, float] = {}
    buckets: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            endpoint = sample.labels.get("endpoint")
            if sample.name == _REQUESTS and endpoint in ENDPOINTS:
                _add(requests, {sample.labels["status"]: sample.value})
            elif sample.name == _BUCKETS and endpoint == ENDPOINTS[0]:
                _add(buckets, {sample.labels["le"]: sample.value})
    return requests, buckets


def ask_service(url: str, *, started: str, now: datetime) -> Sample | None:
    """A sample of the service at `url`; None when nobody answers there as the churn service.

    started: what tells this start of the service from another one at the same address.
    """
    health = ask_health(url)
    if health is None or "release_id" not in health:
        return None
    page = _page(url)
    if page is None:
        return None
    try:
        requests, buckets = parse_counters(page)
    except ValueError:
        return None
    bento = health.get("bento")
    return Sample(
        at=now,
        url=url,
        # Workers tell different starts of their own, so these are no sign of a new one; a bento of
        # other code always is.
        service=f"{url} {started} {code_of(bento) if bento else ''}".strip(),
        release_id=str(health["release_id"]),
        bento=bento,
        requests=requests,
        buckets=buckets,
    )


def _page(url: str) -> str | None:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", f"{parts.path.rstrip('/')}/metrics")
        response = connection.getresponse()
        body = response.read()
        return body.decode() if response.status == 200 else None
    except (OSError, http.client.HTTPException, UnicodeDecodeError):
        return None
    finally:
        connection.close()


def take_sample(
    home: Home, now: datetime, url: str | None = None
) -> tuple[str | None, Sample | None]:
    """Ask the service at `url`, or the one of `home` that runs, and keep what it said.

    Returns where it should answer, None when none is running, and the sample, None when it did not.
    """
    started = ""
    if url is None:
        running = running_service(home)
        if running is None:
            return None, None
        url, started = running.url, f"{running.pid} {running.started:.2f}"
    sample = ask_service(url, started=started, now=now)
    if sample is not None:
        keep_sample(home.service_samples, sample)
    return url, sample


def keep_sample(path: Path, sample: Sample) -> None:
    """Append to the series in the file `path`, a JSON line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        # A line that a crash cut short must not spoil this one.
        begin = b"" if _ends_a_line(path) else b"\n"
        file.write(begin + msgspec.json.encode(sample) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_samples(path: Path, since: datetime | None = None) -> list[Sample]:
    """The series in the order it was taken in, from the last sample before `since` on.

    A line that a crash cut short is left out. Raises UserError when the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); see who may") from error
    found: list[Sample] = []
    for line in reversed(lines):
        try:
            sample = msgspec.json.decode(line, type=Sample)
        except msgspec.DecodeError:
            continue
        found.append(sample)
        if since is not None and sample.at <= since:
            break
    return found[::-1]


def counted(
    samples: Sequence[Sample], since: datetime, until: datetime, release_id: str | None = None
) -> Counted:
    """What the service counted in (since, until], by `samples` in the order they were taken in.

    The stretch begins at the last sample before `since`: what happened between two samples is not
    told apart further. release_id: only of stretches at both ends of which the service served it,
    or that begin with a new start of the service.
    """
    requests: dict[str, float] = {}
    buckets: dict[str, float] = {}
    first = last = None
    for before, after in itertools.pairwise(samples):
        if not since < after.at <= until:
            continue
        anew = _started_anew(before, after)
        of_release = (after.release_id, before.release_id if not anew else after.release_id)
        if release_id is not None and of_release != (release_id, release_id):
            continue
        _add(requests, _rise({} if anew else before.requests, after.requests))
        _add(buckets, _rise({} if anew else before.buckets, after.buckets))
        first, last = first or before.at, after.at
    return Counted(requests, buckets, first, last)


def quantile_of(buckets: dict[str, float], quantile: float) -> float | None:
    """A quantile in seconds from cumulative `buckets`; None without any request.

    Linear within the bucket, as Prometheus's histogram_quantile; in the last one, without an upper
    end, its lower end.
    """
    bounds = sorted(buckets, key=float)
    total = buckets[bounds[-1]] if bounds else 0
    if not total:
        return None
    rank, low, below = quantile * total, 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank and buckets[bound] > below:
            if float(bound) == float(INFINITY):
                return low
            share = (rank - below) / (buckets[bound] - below)
            return low + (float(bound) - low) * share
        low, below = float(bound), buckets[bound]
    return low


def _started_anew(before: Sample, after: Sample) -> bool:
    """Whether the service was started between two samples, so that its counters began at 0."""
    fell = any(after.requests.get(name, 0) < n for name, n in before.requests.items())
    return fell or before.service != after.service


def _add(to: dict[str, float], more: Mapping[str, float]) -> None:
    for name, n in more.items():
        to[name] = to.get(name, 0) + n


def _rise(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: n - before.get(name, 0) for name, n in after.items()}


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
