"""A metric somebody watches: its value, its limit and what follows; and how it has gone so far."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import IO, Literal

import msgspec

from churn_assets.errors import UserError

Verdict = Literal["ok", "alert", "insufficient"]

_LONGEST_LINE = 1 << 16


class Metric(msgspec.Struct, frozen=True):
    """One metric as it was measured.

    name: `p95_latency_ms`, `error_rate`, `volume_ratio`, `ks/<feature>`, `prediction_shift`,
    `accuracy`, `expected_accuracy` and the like. value: None when there was too little to measure;
    the verdict is `insufficient` then, never `ok`. limit: what the value is held against. at:
    operational time. until: data or service time up to which it looked, the end of its window.
    release_id: what was served, where the metric is of the service.
    """

    name: str
    verdict: Verdict
    value: float | None
    limit: float
    reason: str
    at: datetime
    until: datetime
    rows: int = 0
    release_id: str | None = None


def append_metrics(path: Path, metrics: Iterable[Metric]) -> None:
    """Append to the series in the file `path`, a JSON line each, on disk before this returns."""
    lines = b"".join(msgspec.json.encode(metric) + b"\n" for metric in metrics)
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _drop_unfinished_line(file)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _drop_unfinished_line(file: IO[bytes]) -> None:
    """What a crash left of a line would spoil the next one."""
    end = file.seek(0, os.SEEK_END)
    start = max(0, end - _LONGEST_LINE)
    file.seek(start)
    file.truncate(start + file.read().rfind(b"\n") + 1 if end else 0)


def read_metrics(path: Path, *, since: datetime | None = None) -> list[Metric]:
    """The series in the order it was measured in; of one name and window the last one counts.

    since: only metrics whose window ends then or later. A line that was cut short by a crash is
    the last one, and is left out. Raises UserError naming any other line that cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found: dict[tuple[str, datetime], Metric] = {}
    for number, line in enumerate(lines, 1):
        try:
            metric = msgspec.json.decode(line, type=Metric)
        except msgspec.MsgspecError as error:
            if number == len(lines):
                break
            raise UserError(
                f"line {number} of {path} cannot be read ({error}); put it right from a backup, or "
                "remove it"
            ) from error
        if since is None or metric.until >= since:
            found.pop((metric.name, metric.until), None)
            found[metric.name, metric.until] = metric
    return list(found.values())
