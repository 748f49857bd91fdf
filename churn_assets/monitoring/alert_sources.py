"""What becomes an alert: checks, runs, decisions, ticks and assets, each as a pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from churn_assets.monitoring.alerts import SEVERITIES, Alert, Severity

CHECK, RUN, DECISION, TICK, LATE, SOURCE = (
    "check/",
    "run/",
    "decision/",
    "tick/",
    "late/",
    "source/",
)
DAEMON = "daemon"
STORAGE = "storage"

_EVIDENCE_LINES = 12
_LONGEST_VALUE = 200
_NOT_SERVED = "The run stopped before what depends on it; what serves goes on unchanged."
_SHOWN = "Nothing is stopped; it is judged again by the next run."
_REFUSED = "The version is not registered for promotion; the one in Production goes on serving."
_DATA = (
    "The run stopped: no feature, label or model is made of these rows; the last good ones stay."
)


@dataclass(frozen=True)
class Response:
    """What the system does when a check fails, and how severe that is, where it is not the rule."""

    doing: str
    severity: Severity | None = None


# By asset.check, or by the asset for all its checks. The rule: WARN is a warning, ERROR critical.
RESPONSES: Mapping[str, Response] = {
    "drift_report.no_drift": Response(
        "The retraining decision weighs it; the model in Production goes on serving."
    ),
    "drift_report": Response("The retraining decision weighs it; what serves goes on."),
    "performance_report": Response(
        "The retraining and the rollback decision weigh it; what serves goes on until they say."
    ),
    "serving_health": Response(
        "The rollback decision weighs it within the release's watch window."
    ),
    "customer_features": Response(_DATA),
    "churn_labels": Response(_DATA),
    "training_set": Response(f"No model is trained on it. {_NOT_SERVED}"),
    "trained_model": Response(f"The model is not registered. {_NOT_SERVED}"),
    "evaluation_report": Response(_REFUSED, "warning"),
    "churn_bento": Response("It is not deployed; what serves goes on unchanged."),
    "online_features": Response(
        "The rows that were there stay; the service refuses or marks them once they are too old."
    ),
    "trial_report.no_harm": Response(
        "The trial is ended by a run; the champion answers everybody."
    ),
    "prediction_log": Response(
        "The services' log keeps what is not in the lake; the next hour tries again."
    ),
    "alerts.delivered": Response(
        "Every message is kept and tried again, at least once an hour; other URLs are not affected."
    ),
}


def check_alert(
    asset: str,
    check: str,
    *,
    id: str,
    at: datetime,
    error: bool,
    blocking: bool,
    description: str | None,
    figures: Mapping[str, Any],
    link: str,
) -> Alert:
    """A check that did not pass. error: of severity ERROR, not WARN."""
    name = f"{asset}.{check}"
    rule = Response(_NOT_SERVED if error and blocking else _SHOWN)
    response = RESPONSES.get(name) or RESPONSES.get(asset) or rule
    severity = response.severity or ("critical" if error else "warning")
    # Nothing was found to be wrong: there was too little to look at.
    insufficient = not error and figures.get("verdict") == "insufficient"
    return Alert(
        id=id,
        key=f"{CHECK}{name}",
        severity="info" if insufficient else severity,
        title=f"{name} did not pass",
        what=description or f"The check {check} of {asset} did not pass.",
        doing=response.doing,
        raised_at=at,
        evidence=evidence_lines(figures),
        link=link,
        patient=insufficient,
    )


def run_key(job: str, assets: Sequence[str]) -> str:
    """The key of a job's failed runs; assets somebody picked are a job of their own."""
    return f"{RUN}{job}" if not job.startswith("__") else f"{RUN}{','.join(sorted(assets)) or job}"


def run_alert(
    job: str,
    assets: Sequence[str],
    *,
    run_id: str,
    at: datetime,
    step: str | None,
    error: str,
    link: str,
) -> Alert:
    """A run that failed, and will not be tried again by Dagster itself."""
    key = run_key(job, assets)
    name = key.removeprefix(RUN)
    return Alert(
        id=run_id,
        key=key,
        severity="critical",
        title=f"{name} failed",
        what=error,
        doing=(
            "What was there before stays in use. A scheduled job is tried again at its next time; "
            "one that a decision or a person asked for is not."
        ),
        raised_at=at,
        evidence=(f"job: {job}", f"step: {step or 'none was reached'}", f"run: {run_id}"),
        link=link,
    )


# Verdicts that somebody should hear of, where the decision itself does not say.
_TOLD: Mapping[str, Severity] = {
    "retrain": "info",
    "investigate": "warning",
    "suppress": "warning",
    "rollback": "critical",
    "wait": "info",
    "refuse": "warning",
}
# In these two, `wait` means that nothing is to be done.
_QUIET_WAIT = ("retraining_decision", "rollback_decision")
_DOING: Mapping[str, str] = {
    "retrain": "A training run is started; its model goes through the gates before it serves.",
    "investigate": "Nothing is changed: a person is asked to look.",
    "suppress": "No model is trained on these data until the feed is repaired.",
    "rollback": "A run puts the last known good version back.",
    "wait": "The version stays in Staging until a person approves it: churn approve.",
    "refuse": "The version in Production goes on serving.",
}


def decision_key(asset: str, record: Mapping[str, Any]) -> str:
    """The key of a decision: its verdict, with its trigger and version where it has them."""
    parts = [asset, *(record.get(name) for name in ("verdict", "trigger", "version"))]
    return DECISION + "/".join(str(part) for part in parts if part not in (None, ""))


def decision_alert(
    asset: str, record: Mapping[str, Any], *, at: datetime, link: str
) -> Alert | None:
    """A decision that somebody should hear of; None for any other.

    record: with `id`, `verdict` and `reasons`; `alert` says whether it is told, `severity` how
    severe it is, `action` what is being done. Raises ValueError when it has no verdict.
    """
    verdict = record.get("verdict")
    if not isinstance(verdict, str):
        raise ValueError(f"the record of {asset} has no verdict")
    told = record.get("alert")
    if told is None:
        told = verdict in _TOLD and not (verdict == "wait" and asset in _QUIET_WAIT)
    if not told:
        return None
    severity = record.get("severity")
    if severity not in SEVERITIES:
        severity = _TOLD.get(verdict, "info")
    version = record.get("version")
    subject = f" (version {version})" if version else ""
    reasons = record.get("reasons") or ()
    lines = [reasons] if isinstance(reasons, str) else [str(reason) for reason in reasons]
    return Alert(
        id=str(record.get("id") or f"{asset}-{at:%Y%m%dT%H%M%S}"),
        key=decision_key(asset, record),
        severity=severity,
        title=f"{asset.replace('_', ' ')}: {verdict}{subject}",
        what=lines[0] if lines else f"The verdict is {verdict}.",
        doing=str(record.get("action") or _DOING.get(verdict, _SHOWN)),
        raised_at=at,
        evidence=tuple(lines[1:_EVIDENCE_LINES]),
        link=link,
    )


@dataclass(frozen=True)
class Ticks:
    """How a sensor or schedule has been doing. Times are the daemon's, in seconds.

    last: of its newest tick; None when it never had one. missed_since: since when it should have
    ticked and has not; None when it is in time.
    """

    name: str
    kind: str
    last: float | None
    error: str | None
    missed_since: float | None


def sensor_missed_since(
    last: float, interval: float, now: float, alive_since: float, patience: float = 5
) -> float | None:
    """Since when a sensor has been silent for `patience` intervals; None when it is in time.

    alive_since: since when the daemon is known to have been at work; silence before says nothing.
    """
    from_ = max(last, alive_since)
    return from_ if now - from_ > patience * max(interval, 30.0) else None


def tick_alert(ticks: Ticks, *, at: datetime, link: str) -> Alert | None:
    """A sensor or schedule that fails or has fallen silent; None for one that does neither."""
    if ticks.error is None and ticks.missed_since is None:
        return None
    silent = ticks.error is None
    return Alert(
        id=f"{ticks.kind}-{ticks.name}-{ticks.last or 0:.0f}",
        key=f"{TICK}{ticks.name}",
        severity="critical",
        title=f"{ticks.kind} {ticks.name} {'is silent' if silent else 'fails'}",
        what=(
            f"It is switched on and has not been evaluated since {_clock(ticks.missed_since)}."
            if silent
            else f"Its last evaluation failed: {ticks.error}"
        ),
        doing=(
            "Dagster's daemon evaluates it again at its next time; until it succeeds, what it "
            "starts is not started."
        ),
        raised_at=at,
        evidence=(f"last evaluation: {_clock(ticks.last)}",),
        link=link,
    )


def late_alert(
    asset: str, seen_at: datetime, interval: timedelta, *, at: datetime, link: str
) -> Alert | None:
    """An asset not materialized for twice the interval of its schedule; None when it is in time.

    seen_at: operational time at which its newest materialization was seen, or since when it could
    have been there.
    """
    if at - seen_at <= 2 * interval:
        return None
    return Alert(
        id=f"{asset}-{seen_at:%Y%m%dT%H%M}",
        key=f"{LATE}{asset}",
        severity="warning",
        title=f"{asset} is late",
        what=f"{asset} has not been materialized since {seen_at:%Y-%m-%d %H:%M} UTC.",
        doing="Its schedule tries again at its next time; what is there stays in use.",
        raised_at=at,
        evidence=(f"its schedule materializes it every {_hours(interval)}",),
        link=link,
    )


def late_data_alert(newest: date, expected: date, *, at: datetime, link: str) -> Alert | None:
    """A live source whose newest day is older than its last refresh should have left it."""
    if newest >= expected:
        return None
    days = (expected - newest).days
    return Alert(
        id=f"data-{newest}-{expected}",
        key=f"{LATE}data",
        severity="warning",
        title=f"the data are {days} {'day' if days == 1 else 'days'} behind",
        what=f"The newest day is {newest}; the daily refresh should have brought in {expected}.",
        doing=(
            "The next daily refresh catches up with every missing day; the service refuses or "
            "marks features once they are too old."
        ),
        raised_at=at,
        link=link,
    )


def source_alert(source: str, error: Exception, *, at: datetime, link: str) -> Alert:
    """Something alerts are made of that could not be read."""
    return Alert(
        id=f"{source}-{at:%Y%m%dT%H%M%S}",
        key=f"{SOURCE}{source}",
        severity="warning",
        title=f"alert_sensor cannot read its {source}",
        what=first_line(f"{type(error).__name__}: {error}"),
        doing="The other sources are read all the same; this one is tried again by the next tick.",
        raised_at=at,
        link=link,
    )


def daemon_alert(unhealthy: Sequence[str], *, at: datetime, link: str) -> Alert | None:
    """Daemons of Dagster without a heartbeat; None when each has one."""
    if not unhealthy:
        return None
    return Alert(
        id=f"daemon-{at:%Y%m%dT%H%M%S}",
        key=DAEMON,
        severity="critical",
        title="Dagster's daemon is not running",
        what="Nothing is started by a schedule, a sensor or the queue until it runs again.",
        doing="What serves goes on. Nothing starts the daemon by itself: `make up` does.",
        raised_at=at,
        evidence=tuple(f"no heartbeat: {name}" for name in unhealthy),
        link=link,
    )


def storage_alert(reason: str, *, at: datetime, link: str) -> Alert:
    """Dagster's storage cannot be had, so that nothing of Dagster runs, nor tells of it."""
    return Alert(
        id=f"storage-{at:%Y%m%dT%H%M%S}",
        key=STORAGE,
        severity="critical",
        title="Dagster's storage cannot be had",
        what="No run, schedule or sensor works until its database answers again.",
        doing="What serves goes on. Nothing starts the database by itself.",
        raised_at=at,
        evidence=(first_line(reason, _LONGEST_VALUE),),
        link=link,
    )


def evidence_lines(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """Figures as lines: numbers, words and small lists; tables and plots are behind the link."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, bool | int | float | str):
            shown = _figure(value)
        elif isinstance(value, Mapping):
            shown = ", ".join(f"{key} {_figure(each)}" for key, each in value.items())
        elif isinstance(value, list | tuple):
            shown = ", ".join(_figure(each) for each in value)
        else:
            continue
        lines.append(f"{name}: {first_line(shown, _LONGEST_VALUE)}")
    return tuple(lines[:_EVIDENCE_LINES])


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def first_line(text: str, longest: int = 300) -> str:
    """The first line of `text` that says something, cut to `longest` characters."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason is given")
    return line if len(line) <= longest else f"{line[: longest - 4]} ..."


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _hours(interval: timedelta) -> str:
    hours = interval / timedelta(hours=1)
    return f"{hours / 24:g} days" if hours >= 48 else f"{hours:g} hours"
