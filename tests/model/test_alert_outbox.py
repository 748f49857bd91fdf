"""The outbox: nothing lost, nothing told twice, each URL by itself, and no secret anywhere."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from webhook import Webhook, webhook

from churn_assets.errors import UserError
from churn_assets.monitoring import alert_sources as sources
from churn_assets.monitoring.alert_delivery import (
    AppriseSender,
    Channel,
    channels_of,
    label_of,
    one_incident,
    without_secrets,
)
from churn_assets.monitoring.alert_outbox import Outbox
from churn_assets.monitoring.alerts import (
    Alert,
    AlertPolicy,
    AlertUrl,
    Condition,
    Message,
    Severity,
    due,
    retry_delay,
)
from churn_assets.settings import load_settings
from churn_assets.up import free_port

ROOT = Path(__file__).resolve().parents[2]
NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
POLICY = AlertPolicy(repeat_hours=24, min_minutes=30)


def alert(
    key: str = "check/orders.nulls", *, at: datetime = NOON, severity: Severity = "warning"
) -> Alert:
    return Alert(
        id=f"{key}-{at:%d%H%M}",
        key=key,
        severity=severity,
        title=f"{key} did not pass",
        what="nulls above 5 %",
        doing="the run stopped",
        raised_at=at,
        evidence=("nulls: 0.07",),
        link="http://127.0.0.1:3000/assets/orders",
    )


def minutes(count: float) -> datetime:
    return NOON + timedelta(minutes=count)


class Post:
    """Stands for a URL: keeps what it takes, and says what it is told to."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, str]] = []
        self.broken: set[str] = set()

    def __call__(self, channel: Channel, message: Message) -> str | None:
        if channel.label in self.broken:
            return "error 500"
        self.taken.append((channel.label, message.title))
        return None

    def titles(self, label: str = "a") -> list[str]:
        return [title for to, title in self.taken if to == label]


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "alerts" / "outbox.db", POLICY)


@pytest.fixture
def post() -> Post:
    return Post()


def to(*labels: str, **floors: Severity) -> list[Channel]:
    places = [AlertUrl(f"json://{label}/x", name=label) for label in labels]
    places += [AlertUrl(f"json://{n}/x", min_severity=s, name=n) for n, s in floors.items()]
    return channels_of(places, {})


def tick(outbox: Outbox, post: Post, now: datetime, channels: list[Channel] | None = None) -> None:
    channels = to("a") if channels is None else channels
    outbox.make_messages(now, anybody=bool(channels))
    outbox.deliver(channels, now, post)


RAISED = "[WARNING] check/orders.nulls did not pass"
STILL = "[STILL WARNING] check/orders.nulls did not pass"
RESOLVED = "[RESOLVED] check/orders.nulls did not pass"
PASSED = "[PASSED] check/orders.nulls did not pass"


def test_an_open_alert_is_told_once_then_once_a_day_and_resolved_once(outbox, post) -> None:
    for minute in (0, 10, 31, 600, 1430, 1440, 1450, 1475):
        outbox.raise_alert(alert(at=minutes(minute)))
        tick(outbox, post, minutes(minute))
    assert post.titles() == [RAISED, STILL]
    for minute in (1480, 1490, 1510):
        outbox.clear("check/orders.nulls", now=minutes(minute), why="no nulls")
        tick(outbox, post, minutes(minute))
    assert post.titles() == [RAISED, STILL, RESOLVED]
    outbox.raise_alert(alert(at=minutes(3000)))
    tick(outbox, post, minutes(3000))
    assert post.titles()[3:] == [RAISED]


def unjudged(at: datetime = NOON) -> Alert:
    return msgspec.structs.replace(alert(at=at, severity="info"), patient=True)


def test_what_could_not_be_judged_is_told_once_it_has_lasted(outbox, post) -> None:
    for hour in (0, 24, 48, 71):
        outbox.raise_alert(unjudged(minutes(60 * hour)))
        tick(outbox, post, minutes(60 * hour))
    assert post.titles() == []
    assert [condition.is_open for condition in outbox.open()] == [True]
    tick(outbox, post, minutes(60 * 72))
    assert post.titles() == [RAISED.replace("WARNING", "INFO")]
    outbox.clear("check/orders.nulls", now=minutes(60 * 80))
    tick(outbox, post, minutes(60 * 80))
    assert post.titles()[1:] == [RESOLVED]


def test_nobody_hears_of_what_could_be_judged_soon_enough(outbox, post) -> None:
    outbox.raise_alert(unjudged())
    tick(outbox, post, NOON)
    outbox.clear("check/orders.nulls", now=minutes(600))
    tick(outbox, post, minutes(600))
    assert post.titles() == []


def test_what_then_turns_out_to_be_wrong_is_told_at_once(outbox, post) -> None:
    outbox.raise_alert(unjudged())
    tick(outbox, post, NOON)
    outbox.raise_alert(alert(at=minutes(5)))
    tick(outbox, post, minutes(5))
    assert post.titles() == [RAISED]


def test_a_message_says_what_happened_the_evidence_and_what_is_done(outbox, post) -> None:
    outbox.raise_alert(alert())
    (message,) = outbox.make_messages(NOON, anybody=True)
    for part in (
        "nulls above 5 %",
        "- nulls: 0.07",
        "being done: the run stopped",
        "/assets/orders",
    ):
        assert part in message.body
    outbox.clear("check/orders.nulls", now=minutes(60), why="0 nulls")
    (over,) = outbox.make_messages(minutes(60), anybody=True)
    assert over.kind == "resolved"
    assert "It has cleared: 0 nulls" in over.body
    assert "being done" not in over.body


def test_flapping_is_told_of_twice_an_hour_at_most(outbox, post) -> None:
    for minute in range(0, 120, 5):
        if minute % 2:
            outbox.clear("check/orders.nulls", now=minutes(minute))
        else:
            outbox.raise_alert(alert(at=minutes(minute)))
        tick(outbox, post, minutes(minute))
    assert len(post.titles()) <= 4
    assert post.titles()[0] == RAISED
    assert set(post.titles()[1:]) <= {RESOLVED, RAISED, PASSED}
    assert len(post.titles()) > 1


def test_what_was_raised_and_cleared_between_two_ticks_is_told(outbox, post) -> None:
    outbox.raise_alert(alert(), position=5)
    outbox.clear("check/orders.nulls", now=NOON, position=7)
    tick(outbox, post, NOON)
    tick(outbox, post, minutes(60))
    assert post.titles() == [PASSED]


def test_more_severe_is_told_at_once(outbox, post) -> None:
    outbox.raise_alert(alert())
    tick(outbox, post, NOON)
    outbox.raise_alert(alert(severity="critical"))
    tick(outbox, post, minutes(1))
    tick(outbox, post, minutes(2))
    assert post.titles() == [RAISED, "[CRITICAL] check/orders.nulls did not pass"]


def test_a_floor_holds_and_what_was_told_is_resolved_where_it_was_told(outbox, post) -> None:
    channels = to("a", pager="critical")
    outbox.raise_alert(alert())
    outbox.raise_alert(alert("run/training", severity="critical"))
    tick(outbox, post, NOON, channels)
    for key in ("check/orders.nulls", "run/training"):
        outbox.clear(key, now=minutes(60))
    tick(outbox, post, minutes(60), channels)
    assert len(post.titles("a")) == 4
    critical = ["[CRITICAL] run/training did not pass", "[RESOLVED] run/training did not pass"]
    assert post.titles("pager") == critical
    assert not outbox.waiting()


def test_a_url_that_works_gets_nothing_twice_because_another_fails(outbox, post) -> None:
    channels = to("a", "b")
    post.broken = {"b"}
    outbox.raise_alert(alert())
    tried = (0, 1, 3, 7, 15, 31, 63, 123, 183)
    for minute in sorted({*tried, *(m - 1 for m in tried[1:]), 199}):
        tick(outbox, post, minutes(minute), channels)
    assert post.titles("a") == [RAISED]
    (waiting,) = outbox.waiting()
    assert [d.label for d in waiting.failing] == ["b"]
    assert waiting.failing[0].attempts == len(tried)
    post.broken = set()
    for minute in (242, 243, 244):
        tick(outbox, post, minutes(minute), channels)
    assert (post.titles("a"), post.titles("b")) == ([RAISED], [RAISED])
    assert not outbox.waiting()


def test_messages_that_waited_for_a_url_all_come_in_their_order_once_it_works(outbox, post) -> None:
    post.broken = {"a"}
    outbox.raise_alert(alert())
    tick(outbox, post, NOON)
    outbox.raise_alert(alert("run/training", at=minutes(1)))
    tick(outbox, post, minutes(1))
    outbox.clear("check/orders.nulls", now=minutes(45))
    tick(outbox, post, minutes(45))
    assert len(outbox.waiting()) == 3
    post.broken = set()
    for minute in range(46, 48):
        tick(outbox, post, minutes(minute))
    told = post.titles()
    assert sorted(told) == sorted([RAISED, "[WARNING] run/training did not pass", RESOLVED])
    assert told.index(RAISED) < told.index(RESOLVED)


def test_a_message_no_url_will_take_holds_up_no_other(outbox) -> None:
    taken = []

    def send(channel: Channel, message: Message) -> str | None:
        if message.alert.key == "run/poison":
            return "error 400"
        taken.append(message.alert.key)
        return None

    for minute in range(5):
        outbox.raise_alert(alert("run/poison" if minute == 0 else f"run/{minute}"))
        outbox.make_messages(minutes(minute), anybody=True)
        outbox.deliver(to("a"), minutes(minute), send)
    outbox.deliver(to("a"), minutes(6), send)
    assert taken == ["run/1", "run/2", "run/3", "run/4"]
    assert [w.message.alert.key for w in outbox.waiting()] == ["run/poison"]


def test_what_repeats_while_nobody_can_be_reached_is_one_message(outbox, post) -> None:
    post.broken = {"a"}
    outbox.raise_alert(alert())
    for hour in range(0, 24 * 5, 8):
        tick(outbox, post, minutes(60 * hour))
    post.broken = set()
    tick(outbox, post, minutes(60 * 24 * 5))
    assert post.titles() == [STILL]
    assert not outbox.waiting()


def test_without_a_url_alerts_are_kept_and_the_open_ones_told_once_there_is_one(
    outbox, post
) -> None:
    outbox.raise_alert(alert())
    outbox.raise_alert(alert("run/training"))
    tick(outbox, post, NOON, [])
    outbox.clear("run/training", now=minutes(5))
    tick(outbox, post, minutes(5), [])
    assert [c.key for c in outbox.open()] == ["check/orders.nulls"]
    assert outbox.say_once("no URL", holds=True)
    assert not outbox.say_once("no URL", holds=True)
    tick(outbox, post, minutes(60))
    assert post.titles() == [RAISED]
    assert not outbox.say_once("no URL", holds=False)
    assert outbox.say_once("no URL", holds=True)


def test_events_that_are_read_again_change_nothing(outbox, post) -> None:
    def read() -> None:
        outbox.raise_alert(alert(), position=5)
        outbox.clear("check/orders.nulls", now=NOON, position=7)
        outbox.raise_alert(alert(at=minutes(1)), position=9)

    for _ in range(3):
        read()
        assert [c.opened for c in outbox.open()] == [2]
    outbox.forget_positions("check/")
    outbox.raise_alert(alert(at=minutes(1)), position=2)
    assert [(c.position, c.opened) for c in outbox.open()] == [(2, 2)]


def test_a_clock_that_is_set_back_holds_nothing_up(outbox, post) -> None:
    post.broken = {"a"}
    outbox.raise_alert(alert())
    tick(outbox, post, NOON)
    post.broken = set()
    tick(outbox, post, NOON - timedelta(days=300))
    assert post.titles() == [RAISED] or post.titles() == [STILL]
    outbox.clear("check/orders.nulls", now=NOON - timedelta(days=299))
    tick(outbox, post, NOON - timedelta(days=299))
    assert post.titles()[-1] == RESOLVED


@pytest.mark.parametrize(
    ("told", "ago", "is_open", "opened", "kind"),
    [
        (None, None, True, 1, "raised"),
        ("open", 29, True, 0, None),
        ("open", 24 * 60 - 1, True, 0, None),
        ("open", 24 * 60, True, 0, "again"),
        ("open", 29, False, 0, None),
        ("open", 30, False, 0, "resolved"),
        ("resolved", 29, True, 1, None),
        ("resolved", 30, True, 1, "raised"),
        ("resolved", 29, False, 1, None),
        ("resolved", 30, False, 1, "passed"),
        ("resolved", 3000, False, 0, None),
        ("resolved", -5, True, 1, "raised"),
    ],
)
def test_what_is_due(told, ago, is_open, opened, kind) -> None:
    at = None if ago is None else NOON - timedelta(minutes=ago)
    condition = Condition(alert(), is_open, NOON, opened, told, at, "warning" if told else None)
    assert due(condition, NOON, POLICY) == kind


def test_the_waits_double_up_to_an_hour() -> None:
    waits = [retry_delay(n) / timedelta(minutes=1) for n in (1, 2, 3, 4, 5, 6, 7, 8, 99)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


KEEP_AND_DIE = """
import os, signal, sys
from datetime import datetime
from pathlib import Path
from churn_assets.monitoring.alert_delivery import AppriseSender, channels_of
from churn_assets.monitoring.alert_outbox import Outbox
from churn_assets.monitoring.alerts import Alert, AlertPolicy, AlertUrl

path, url, moment, now = sys.argv[1:]
path, now = Path(path), datetime.fromisoformat(now)
outbox = Outbox(path, AlertPolicy())
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
outbox.raise_alert(Alert("1", "run/training", "critical", "training failed", "no", "nothing", now))
if moment == "kept":
    kill()
outbox.make_messages(now, anybody=True)
if moment == "made":
    kill()
send = AppriseSender(os.environ)
def then_die(channel, message):
    answer = send(channel, message)
    kill()
    return answer
outbox.deliver(channels_of([AlertUrl(url)], os.environ), now, then_die)
"""


@pytest.fixture
def hook() -> Generator[Webhook]:
    with webhook() as hook:
        yield hook


@pytest.mark.parametrize(
    ("moment", "before", "after"), [("kept", 0, 1), ("made", 0, 1), ("sent", 1, 2)]
)
def test_a_kill_loses_nothing(hook: Webhook, tmp_path: Path, moment, before, after) -> None:
    """Between acceptance and its record a message comes again, with the id it had."""
    path, url = tmp_path / "outbox.db", hook.url()
    command = [sys.executable, "-c", KEEP_AND_DIE, str(path), url, moment, NOON.isoformat()]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(hook.accepted) == before
    outbox = Outbox(path, AlertPolicy())
    for minute in (1, 2):
        outbox.make_messages(minutes(minute), anybody=True)
        outbox.deliver(channels_of([AlertUrl(url)], {}), minutes(minute), AppriseSender({}))
    assert len(hook.accepted) == after
    assert len({message["message"] for message in hook.accepted}) == 1
    assert not outbox.waiting()


def test_a_webhook_that_fails_and_recovers_gets_everything_once(
    hook: Webhook, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    down = free_port()
    environ = {"HOOK": hook.url("a-secret-word"), "DOWN": f"json://127.0.0.1:{down}/hidden-word"}
    channels = channels_of([AlertUrl("${HOOK}"), AlertUrl("${DOWN}")], environ)
    send = AppriseSender(environ)

    def again(minute: int) -> Outbox:
        outbox = Outbox(tmp_path / "outbox.db", POLICY)
        outbox.make_messages(minutes(minute), anybody=True)
        outbox.deliver(channels, minutes(minute), send)
        return outbox

    hook.status = 500
    Outbox(tmp_path / "outbox.db", POLICY).raise_alert(alert())
    (waiting,) = again(0).waiting()
    errors = {d.label: d.error or "" for d in waiting.failing}
    assert "500" in errors[f"json://127.0.0.1:{hook.port} (${{HOOK}})"]
    assert "127.0.0.1" in errors[f"json://127.0.0.1:{down} (${{DOWN}})"]
    hook.status = 200
    assert again(1).waiting()
    assert hook.titles == [RAISED]
    with webhook(down) as other:
        again(3)
        assert other.titles == [RAISED]
    assert not again(4).waiting()
    assert (hook.titles, hook.refused) == ([RAISED], 1)
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    for secret in ("a-secret-word", "hidden-word"):
        assert secret not in caplog.text
        assert secret.encode() not in kept


@pytest.mark.parametrize(
    ("url", "environ", "label"),
    [
        ("json://me:word@host:80/path?a=b", {}, "json://host:80"),
        ("slack://tokenA/tokenB/tokenC", {}, "slack://***"),
        ("pagerduty://key@integration/", {}, "pagerduty://***"),
        ("mailtos://me:word@example.com", {}, "mailtos://example.com"),
        ("https://hooks.example.com/services/T/B/C", {}, "https://hooks.example.com"),
        ("${SLACK}", {"SLACK": "slack://tokenA/tokenB/tokenC"}, "slack://*** (${SLACK})"),
        ("${SLACK}", {}, "${SLACK}"),
        ("json://host/${WORD}", {"WORD": "secret"}, "json://host (${WORD})"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, environ: Mapping[str, str], label) -> None:
    assert label_of(url, environ) == label


def test_an_error_is_shown_without_the_secrets_of_its_url() -> None:
    said = "cannot reach tokenA at /services/tokenB\n for user"
    assert (
        without_secrets(said, "slack://tokenA/tokenB")
        == "cannot reach *** at /services/*** for user"
    )
    assert "host" in without_secrets("no answer of host", "json://host/secret")


def test_pagerduty_has_one_incident_a_key() -> None:
    import apprise

    def told(key: str, url: str = "pagerduty://integration@api/host") -> tuple[str, str | None]:
        service = apprise.Apprise()
        assert service.add(one_incident(url, key))
        plugin: Any = service[0]
        return plugin.action, plugin.dedup

    assert told("run/training") == told("run/training")
    assert told("run/training")[0] == "map"
    assert told("run/training") != told("run/drift")
    assert told("run/training", "pagerduty://a@b?action=trigger") == ("trigger", None)
    assert one_incident("json://host/x", "run/training") == "json://host/x"


@pytest.mark.parametrize(
    ("url", "environ", "says"),
    [
        ("${UNSET_URL}", {}, "UNSET_URL is not set"),
        ("nonsense://host/secret-word", {}, "Apprise does not know"),
    ],
)
def test_a_url_that_cannot_be_used_is_said(url, environ, says, caplog) -> None:
    (channel,) = channels_of([AlertUrl(url)], environ)
    message = Message(1, "raised", alert(), "warning", NOON)
    assert says in (AppriseSender(environ)(channel, message) or "")
    assert "secret-word" not in caplog.text


def test_settings_of_alerts(tmp_path: Path) -> None:
    config = tmp_path / "churn.yaml"
    config.write_text(
        "source: {kind: shop}\ncalendar: {start: 2024-01-01}\n"
        "alerts: {urls: ['${A}', {url: 'json://b/c', min_severity: critical}], repeat_hours: 6}\n"
    )
    policy = load_settings(config).alerts
    assert [(p.url, p.min_severity) for p in policy.places] == [
        ("${A}", "info"),
        ("json://b/c", "critical"),
    ]
    assert (policy.repeat_hours, policy.min_minutes) == (6, 30)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("urls: [somewhere-secret]", "an entry that is no URL"),
        ("urls: ['json://a', 'json://a']", "same URL twice"),
        ("repeat_hours: 0", r"alerts\.repeat_hours is 0"),
        ("min_minutes: -1", r"alerts\.min_minutes is -1"),
        ("insufficient_hours: -1", r"alerts\.insufficient_hours is -1"),
        ("repeat_hours: 1, min_minutes: 61", "longer than repeat_hours"),
        ("urls: [{url: 'json://a', min_severity: loud}]", "loud"),
        ("url: json://a", "unknown field `url`"),
    ],
)
def test_a_setting_of_alerts_that_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    config = tmp_path / "churn.yaml"
    config.write_text(
        f"source: {{kind: shop}}\ncalendar: {{start: 2024-01-01}}\nalerts: {{{text}}}\n"
    )
    with pytest.raises(UserError, match=says) as told:
        load_settings(config)
    assert "secret" not in str(told.value)


def decision(verdict: str, asset: str = "retraining_decision", **more: object) -> Alert | None:
    record = {"id": "d-1", "verdict": verdict, "reasons": ["KS 0.3 for 3 days", "no label"], **more}
    return sources.decision_alert(asset, record, at=NOON, link="x")


def test_a_decision_says_itself_whether_it_is_told() -> None:
    told = decision("wait", alert=True, action="waits for 200 labels", severity="critical")
    assert told is not None
    assert (told.id, told.severity, told.doing) == ("d-1", "critical", "waits for 200 labels")
    assert (told.what, told.evidence) == ("KS 0.3 for 3 days", ("no label",))
    assert decision("retrain", alert=False) is None


def test_a_decision_that_does_not_say_is_told_by_its_verdict() -> None:
    assert decision("wait") is None
    assert decision("wait", "promotion_decision", version="3") is not None
    assert decision("promote", "promotion_decision") is None
    rollback = decision("rollback", "rollback_decision", version="4")
    assert rollback is not None
    assert (rollback.severity, rollback.key) == (
        "critical",
        "decision/rollback_decision/rollback/4",
    )
    with pytest.raises(ValueError, match="no verdict"):
        sources.decision_alert("retraining_decision", {"id": "d"}, at=NOON, link="x")


def test_an_alert_survives_its_json() -> None:
    told = decision("rollback")
    assert msgspec.json.decode(msgspec.json.encode(told), type=Alert) == told


@pytest.mark.parametrize(
    ("last", "now", "alive_since", "missed"),
    [
        (0, 150, 0, None),
        (0, 151, 0, 0),
        # The daemon was away: silence counts from its return.
        (0, 10_000, 9_900, None),
        (0, 10_000, 9_800, 9_800),
        (9_990, 10_000, 0, None),
    ],
)
def test_a_silent_sensor(last, now, alive_since, missed) -> None:
    assert sources.sensor_missed_since(last, 30, now, alive_since) == missed


def test_an_asset_is_late_after_twice_its_interval() -> None:
    day = timedelta(days=1)
    assert sources.late_alert("drift_report", NOON, day, at=NOON + 2 * day, link="x") is None
    late = sources.late_alert("drift_report", NOON, day, at=NOON + 2.1 * day, link="x")
    assert late is not None
    assert late.key == "late/drift_report"
    assert "2026-03-02 12:00" in late.what


def check(**figures: object) -> Alert:
    return sources.check_alert(
        "drift_report",
        "no_drift",
        id="1",
        at=NOON,
        error=False,
        blocking=False,
        description=None,
        figures=figures,
        link="x",
    )


def test_too_little_to_judge_is_told_mildly() -> None:
    mild, drift = check(verdict="insufficient"), check(verdict="drift")
    assert (mild.severity, mild.patient) == ("info", True)
    assert (drift.severity, drift.patient) == ("warning", False)


def test_figures_become_lines_and_tables_do_not() -> None:
    lines = sources.evidence_lines({"ks": 0.312345, "by": {"a": 0.5}, "table": object(), "n": 3})
    assert lines == ("ks: 0.3123", "by: a 0.5", "n: 3")
