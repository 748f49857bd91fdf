"""Sending a message to one URL through Apprise, without its secrets ever showing."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from churn_assets.monitoring.alerts import AlertUrl, Message, Severity, rank

# Of these the part after :// is a host; elsewhere it may be a token, such as Slack's.
_WITH_HOST = re.compile(r"(json|xml|form|http|mailto|mmost|gotify|rocket|matrix)s?\Z")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SHORTEST_SECRET = 4


@dataclass(frozen=True)
class Channel:
    """One place alerts go to. `id` stays the same when a variable of the URL changes.

    `label` names it without a secret. The URL is only filled in when something is sent.
    """

    id: str
    label: str
    place: AlertUrl

    def takes(self, severity: Severity) -> bool:
        """Whether this is severe enough for it."""
        return rank(severity) >= rank(self.place.min_severity)


def channels_of(places: Sequence[AlertUrl], environ: Mapping[str, str]) -> list[Channel]:
    """The places as channels, in their order."""
    return [
        Channel(
            hashlib.sha256(place.url.encode()).hexdigest()[:16],
            place.name or label_of(place.url, environ),
            place,
        )
        for place in places
    ]


def label_of(url: str, environ: Mapping[str, str]) -> str:
    """A URL as it may be shown: its scheme, its host where that is one, and the variables in it."""
    names = ", ".join(f"${{{name}}}" for name in _VARIABLE.findall(url))
    filled = _VARIABLE.sub(lambda found: environ.get(found[1], ""), url)
    scheme, separator, rest = filled.partition("://")
    shown = ""
    if separator:
        host = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
        shown = f"{scheme}://{host if _WITH_HOST.match(scheme.lower()) and host else '***'}"
    if not shown:
        return names or "a URL without a scheme"
    return f"{shown} ({names})" if names else shown


class AppriseSender:
    """Sends through Apprise; what went wrong comes back as a sentence without secrets."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def __call__(self, channel: Channel, message: Message) -> str | None:
        """Send `message` once. None when it arrived, or else why not; seconds at most."""
        url = channel.place.url
        missing = [name for name in _VARIABLE.findall(url) if not self._environ.get(name)]
        if missing:
            return f"the environment variable {missing[0]} is not set"
        filled = _VARIABLE.sub(lambda found: self._environ[found[1]], url)
        filled = one_incident(filled, message.alert.key)
        import apprise

        kinds = {
            "info": apprise.NotifyType.INFO,
            "warning": apprise.NotifyType.WARNING,
            "critical": apprise.NotifyType.FAILURE,
        }
        over = message.kind in ("resolved", "passed")
        kind = apprise.NotifyType.SUCCESS if over else kinds[message.alert.severity]
        asset = apprise.AppriseAsset(
            app_id="churn_assets", storage_mode=apprise.PersistentStoreMode.MEMORY
        )
        with _quiet() as said:
            service = apprise.Apprise(asset=asset)
            try:
                if not service.add(filled):
                    return "Apprise does not know what to do with this URL; see docs/alerts.md"
                arrived = service.notify(
                    body=message.body,
                    title=message.title,
                    notify_type=kind,
                    body_format=apprise.NotifyFormat.TEXT,
                )
            # A plug-in's own fault is one more reason why it did not arrive.
            except Exception as error:
                return without_secrets(f"{type(error).__name__}: {error}", filled)
        if arrived:
            return None
        return without_secrets(" ".join(said) or "it was not accepted", filled)


def one_incident(url: str, key: str) -> str:
    """`url`, where PagerDuty is told which messages are about the same incident.

    By itself Apprise opens another one with every message, also with that of the resolution.
    """
    parts = urlsplit(url)
    if parts.scheme.lower() != "pagerduty" or "action" in parse_qs(parts.query):
        return url
    same = f"action=map&dedup={hashlib.sha256(key.encode()).hexdigest()[:32]}"
    return f"{url}{'&' if parts.query else '?'}{same}"


def without_secrets(text: str, url: str) -> str:
    """`text` on one line without any part of `url` that may be one."""
    scheme, _, rest = url.partition("://")
    authority, _, _ = rest.partition("/")
    host = authority.rpartition("@")[2] if _WITH_HOST.match(scheme.lower()) else ""
    parts = [rest, *re.split(r"[/:@?&=#,+]", rest)]
    keep = {host, host.partition(":")[0]}
    for part in sorted(set(parts) - keep, key=len, reverse=True):
        if len(part) >= _SHORTEST_SECRET:
            text = text.replace(part, "***")
    return " ".join(text.split())[:300]


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _quiet() -> Generator[list[str]]:
    """What Apprise says goes into this list, and neither it nor the requests it makes to a log.

    At level DEBUG both write whole URLs.
    """
    ours, below = logging.getLogger("apprise"), logging.getLogger("urllib3")
    handler = _Kept()
    before = ours.propagate, ours.level, below.level
    ours.addHandler(handler)
    ours.propagate = False
    ours.setLevel(logging.WARNING)
    below.setLevel(logging.ERROR)
    try:
        yield handler.lines
    finally:
        ours.removeHandler(handler)
        ours.propagate = before[0]
        ours.setLevel(before[1])
        below.setLevel(before[2])
