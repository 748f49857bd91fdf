"""Operational time: the wall clock, or the one a drill turns.

Assets, schedules and the service ask the same clock, so that a simulated month is one for all of
them. CHURN_CLOCK names a file with the time in it; without it the clock is the machine's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

CLOCK_VARIABLE = "CHURN_CLOCK"


def clock(environ: Mapping[str, str]) -> Callable[[], int]:
    """The function that tells the time, in microseconds since the epoch.

    Where CHURN_CLOCK is set it reads the file each time, and raises ValueError when that holds no
    moment with a time zone (ISO 8601).
    """
    named = environ.get(CLOCK_VARIABLE)
    if not named:
        return lambda: time.time_ns() // 1000
    path = Path(named)
    return lambda: _read(path)


def is_turned(environ: Mapping[str, str]) -> bool:
    """Whether the clock is one that somebody turns."""
    return bool(environ.get(CLOCK_VARIABLE))


def now(environ: Mapping[str, str]) -> datetime:
    """The moment it is, UTC. Raises ValueError as `clock` says."""
    return datetime.fromtimestamp(clock(environ)() / 1e6, UTC)


def set_clock(path: Path, moment: datetime) -> None:
    """Turn the clock in the file `path` to the aware `moment`; a reader sees all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}-{os.getpid()}")
    written.write_text(moment.astimezone(UTC).isoformat(), encoding="utf-8")
    os.replace(written, path)


def _read(path: Path) -> int:
    try:
        moment = datetime.fromisoformat(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError) as error:
        raise ValueError(f"{CLOCK_VARIABLE}: {path} holds no time ({error})") from error
    if moment.tzinfo is None:
        raise ValueError(f"{CLOCK_VARIABLE}: {path} holds {moment}, which has no time zone")
    return round(moment.timestamp() * 1e6)
