"""An alert: what happened, on what evidence, and what is being done; and when to tell of it."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Literal

import msgspec

Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
# raised: for the first time, or more severe than what was told. again: still open. passed: raised
# and cleared before it could be told.
Kind = Literal["raised", "again", "passed", "resolved"]
NO_URL = (
    "no URL is configured: alerts are kept and shown by `churn alerts`, and sent to nobody; "
    "set alerts.urls (docs/alerts.md)"
)

_LONGEST_BODY = 4000


class Alert(msgspec.Struct, frozen=True):
    """One thing that somebody should know.

    id: the same for the same event, however often that is read. key: what it is about; alerts of
    one key are one condition, told once while it lasts. evidence: a line each. doing: what the
    system does about it. raised_at: operational time. patient: nothing was found to be wrong, and
    it is told only once it has lasted.
    """

    id: str
    key: str
    severity: Severity
    title: str
    what: str
    doing: str
    raised_at: datetime
    evidence: tuple[str, ...] = ()
    link: str | None = None
    patient: bool = False


class AlertUrl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One place alerts go to, as an Apprise URL; ${NAME} is that environment variable.

    min_severity: what is less severe does not go there. name: what it is called in place of the
    URL, which holds secrets.
    """

    url: str
    min_severity: Severity = "info"
    name: str | None = None


class AlertPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where alerts go, and how often.

    urls: Apprise URLs, or AlertUrl where one has a floor or a name. repeat_hours: what is still
    open is told again. min_minutes: the least time between two messages about the same thing.
    insufficient_hours: what could not be judged is told once it has been so for as long.
    dagster_url: where links lead; without one, Dagster's UI on this machine.
    """

    urls: tuple[str | AlertUrl, ...] = ()
    repeat_hours: float = 24.0
    min_minutes: float = 30.0
    insufficient_hours: float = 72.0
    dagster_url: str | None = None

    def __post_init__(self) -> None:
        for place in self.places:
            if "${" not in place.url and "://" not in place.url:
                raise ValueError(
                    "alerts.urls has an entry that is no URL; give one that Apprise knows, such as "
                    "json://host/path, or ${NAME} for an environment variable"
                )
        urls = [place.url for place in self.places]
        if len(set(urls)) < len(urls):
            raise ValueError("alerts.urls has the same URL twice; keep one of them")
        if not (math.isfinite(self.repeat_hours) and self.repeat_hours > 0):
            raise ValueError(f"alerts.repeat_hours is {self.repeat_hours}; give hours above 0")
        if not (math.isfinite(self.min_minutes) and self.min_minutes >= 0):
            raise ValueError(f"alerts.min_minutes is {self.min_minutes}; give minutes from 0 on")
        if not (math.isfinite(self.insufficient_hours) and self.insufficient_hours >= 0):
            raise ValueError(
                f"alerts.insufficient_hours is {self.insufficient_hours}; give hours from 0 on"
            )
        if self.min_minutes > self.repeat_hours * 60:
            raise ValueError(
                f"alerts.min_minutes ({self.min_minutes:g}) is longer than repeat_hours "
                f"({self.repeat_hours:g}); set it to less"
            )

    @property
    def places(self) -> tuple[AlertUrl, ...]:
        """The URLs, each with its floor."""
        return tuple(AlertUrl(url) if isinstance(url, str) else url for url in self.urls)


class Condition(msgspec.Struct, frozen=True):
    """Where a key stands: its newest alert, and what has been told of it.

    opened: how often it was raised since something was last told. told: what the last message
    said, None before the first one. told_severity: the highest that was told since it was last
    resolved. position: of the newest event that was read about it, where it comes from a log.
    """

    alert: Alert
    is_open: bool
    since: datetime
    opened: int = 1
    told: Literal["open", "resolved"] | None = None
    told_at: datetime | None = None
    told_severity: Severity | None = None
    position: int | None = None
    why_cleared: str = ""

    @property
    def key(self) -> str:
        """What it is about."""
        return self.alert.key


class Message(msgspec.Struct, frozen=True):
    """What is sent about an alert. `note` says what the alert itself does not.

    severity: what a floor is compared with; a resolved message goes where the alert went.
    """

    id: int
    kind: Kind
    alert: Alert
    severity: Severity
    made_at: datetime
    note: str = ""

    @property
    def title(self) -> str:
        """One line."""
        word = {
            "raised": self.alert.severity.upper(),
            "again": f"STILL {self.alert.severity.upper()}",
            "passed": "PASSED",
            "resolved": "RESOLVED",
        }[self.kind]
        return f"[{word}] {self.alert.title}"

    @property
    def body(self) -> str:
        """A few lines; a resolved one is short."""
        alert = self.alert
        if self.kind == "resolved":
            lines = [self.note or "The condition has cleared.", *self._footer()]
        else:
            lines = [
                alert.what,
                *([self.note] if self.note else []),
                *(f"- {line}" for line in alert.evidence),
                f"What is being done: {alert.doing}",
                *self._footer(),
            ]
        text = "\n".join(lines)
        return text if len(text) <= _LONGEST_BODY else f"{text[: _LONGEST_BODY - 4]} ..."

    def _footer(self) -> list[str]:
        link = [self.alert.link] if self.alert.link else []
        return [
            *link,
            f"{self.alert.key}, {self.alert.raised_at:%Y-%m-%d %H:%M} UTC, {self.alert.id}",
        ]


def rank(severity: Severity) -> int:
    """How severe: 0 for info, 2 for critical."""
    return SEVERITIES.index(severity)


def due(condition: Condition, now: datetime, policy: AlertPolicy) -> Kind | None:
    """The message to send about `condition` at `now`, if any.

    Between two messages lie `min_minutes` at least, so a condition that comes and goes is told of
    that often at most; only one that became more severe is told of at once. A patient one waits
    until it has lasted, and nobody hears of one that has not. A clock that was set back holds
    nothing up.
    """
    told_at = condition.told_at
    waited = None if told_at is None or told_at > now else now - told_at
    rested = waited is None or waited >= timedelta(minutes=policy.min_minutes)
    if not condition.is_open:
        if not rested:
            return None
        if condition.told == "open":
            return "resolved"
        return "passed" if condition.opened and not condition.alert.patient else None
    if condition.told != "open":
        until = waits_until(condition, policy)
        if until is not None and condition.since <= now < until:
            return None
        return "raised" if rested else None
    if rank(condition.alert.severity) > rank(condition.told_severity or "info"):
        return "raised"
    repeated = waited is None or waited >= timedelta(hours=policy.repeat_hours)
    return "again" if repeated else None


def waits_until(condition: Condition, policy: AlertPolicy) -> datetime | None:
    """When a patient condition that is open is told, if it lasts; None for any other."""
    if not (condition.is_open and condition.alert.patient) or condition.told == "open":
        return None
    return condition.since + timedelta(hours=policy.insufficient_hours)


def after(condition: Condition, kind: Kind, now: datetime) -> Condition:
    """The condition once a message of this kind has been made of it."""
    alert, told = condition.alert, condition.told_severity
    # A condition that came back has its severity counted anew.
    worst = alert.severity if condition.told != "open" or told is None else told
    if rank(alert.severity) > rank(worst):
        worst = alert.severity
    return msgspec.structs.replace(
        condition,
        told="open" if kind in ("raised", "again") else "resolved",
        told_at=now,
        told_severity=worst,
        opened=0,
    )


def note_of(condition: Condition, kind: Kind) -> str:
    """What a message of this kind adds to the alert."""
    if kind == "again":
        return f"It has been so since {condition.since:%Y-%m-%d %H:%M} UTC."
    if kind == "raised":
        times = condition.opened
        return f"It came and went, and was raised {times} times." if times > 1 else ""
    cleared = f"It has cleared: {condition.why_cleared}" if condition.why_cleared else ""
    if kind == "passed":
        return cleared or "It has cleared since."
    # Raised again while the message waited for its time.
    again = f"It had come back {condition.opened} times." if condition.opened else ""
    return " ".join(part for part in (cleared or "It has cleared.", again) if part)


def severity_of_message(condition: Condition, kind: Kind) -> Severity:
    """What a floor is compared with."""
    if kind == "resolved" and condition.told_severity is not None:
        return condition.told_severity
    return condition.alert.severity


def retry_delay(attempts: int) -> timedelta:
    """How long to wait after so many failed attempts: 1, 2, 4 ... minutes, an hour at most."""
    return timedelta(minutes=min(60, 2 ** min(attempts - 1, 6)))


def test_message(now: datetime, link: str) -> Message:
    """A message that says it is a test; it goes everywhere, whatever the floors."""
    alert = Alert(
        id=f"test-{now:%Y%m%dT%H%M%S}",
        key="test",
        severity="info",
        title="A test of churn_assets",
        what="Somebody ran `churn alerts test`.",
        doing="Nothing: this is a test.",
        raised_at=now,
        link=link,
    )
    return Message(0, "raised", alert, "critical", now)
