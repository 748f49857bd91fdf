"""The outbox: which conditions are open, what is to be said of them, and to whom it was said.

One SQLite file. A message is in it before it is sent, and each URL's answer is written before the
next message goes: killed at any point, nothing is lost. What was accepted in the very moment of the
kill is sent once more, with the same id; no sender can tell that it arrived.
"""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from churn_assets.monitoring.alert_delivery import Channel
from churn_assets.monitoring.alerts import (
    Alert,
    AlertPolicy,
    Condition,
    Message,
    after,
    due,
    note_of,
    rank,
    retry_delay,
    severity_of_message,
)

Send = Callable[[Channel, Message], str | None]

_LONGEST_DELAY = timedelta(hours=1)
_KEPT = timedelta(days=90)
# A URL that fails so often in one pass is left for the next one: a dead one takes seconds.
_FAILURES_A_PASS = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS conditions (key TEXT PRIMARY KEY, condition BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    message BLOB NOT NULL,
    made_at TEXT NOT NULL,
    done INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS deliveries (
    message INTEGER NOT NULL,
    channel TEXT NOT NULL,
    label TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    next_at TEXT,
    sent_at TEXT,
    error TEXT,
    PRIMARY KEY (message, channel)
);
CREATE TABLE IF NOT EXISTS said (what TEXT PRIMARY KEY);
"""


class Delivery(msgspec.Struct, frozen=True):
    """How it went with one message and one URL. `error` is the last one, without secrets."""

    label: str
    attempts: int
    next_at: datetime | None
    sent_at: datetime | None
    error: str | None


class Waiting(msgspec.Struct, frozen=True):
    """A message that has not been accepted by every URL it is for."""

    message: Message
    deliveries: tuple[Delivery, ...]

    @property
    def failing(self) -> tuple[Delivery, ...]:
        """Those that were tried in vain."""
        return tuple(d for d in self.deliveries if d.sent_at is None and d.attempts)

    def lines(self) -> list[str]:
        """For a person."""
        said = [f"{self.message.title} ({self.message.made_at:%Y-%m-%d %H:%M} UTC)"]
        said += [
            f"  {d.label}: {d.attempts} attempts, {d.error}; next at {d.next_at:%H:%M} UTC"
            for d in self.failing
            if d.next_at is not None
        ]
        return said if len(said) > 1 else [*said, "  not sent yet"]


class Delivered(msgspec.Struct, frozen=True):
    """What one pass did: messages accepted by a URL, and attempts in vain."""

    sent: int = 0
    failed: int = 0


class Outbox:
    """Opens, clears and tells of conditions. Any number of processes may hold one on a file."""

    def __init__(self, path: Path, policy: AlertPolicy) -> None:
        self._path = path
        self._policy = policy

    def raise_alert(self, alert: Alert, *, position: int | None = None) -> bool:
        """Keep `alert`: on disk when this returns. Says whether its key was not open before.

        position: of the event in the log it was read from; what lies before the newest position
        of the key was read before, and changes nothing.
        """
        with self._transaction() as con:
            before = _condition(con, alert.key)
            if before is None:
                _keep(con, Condition(alert, True, alert.raised_at, position=position))
                return True
            if _known(before, position):
                return False
            opens = not before.is_open
            now_open = msgspec.structs.replace(
                before,
                alert=alert,
                is_open=True,
                since=alert.raised_at if opens else before.since,
                opened=before.opened + opens,
                position=before.position if position is None else position,
                why_cleared="",
            )
            _keep(con, now_open)
            return opens

    def clear(self, key: str, *, now: datetime, why: str = "", position: int | None = None) -> bool:
        """The condition `key` is over. Says whether it was open."""
        with self._transaction() as con:
            before = _condition(con, key)
            if before is None or _known(before, position):
                return False
            closed = msgspec.structs.replace(
                before,
                is_open=False,
                since=now if before.is_open else before.since,
                position=before.position if position is None else position,
                why_cleared=why if before.is_open else before.why_cleared,
            )
            _keep(con, closed)
            return before.is_open

    def forget_positions(self, prefix: str) -> None:
        """The log behind the keys with `prefix` is read from its beginning again."""
        with self._transaction() as con:
            for condition in _conditions(con):
                if condition.key.startswith(prefix) and condition.position is not None:
                    _keep(con, msgspec.structs.replace(condition, position=None))

    def conditions(self) -> list[Condition]:
        """Every key there ever was, the ones that changed last at the end."""
        with self._transaction() as con:
            return sorted(_conditions(con), key=lambda condition: condition.since)

    def open(self, prefix: str = "") -> list[Condition]:
        """The conditions that are open, the oldest first."""
        return [c for c in self.conditions() if c.is_open and c.key.startswith(prefix)]

    def waiting(self) -> list[Waiting]:
        """The messages that some URL has not accepted, the oldest first."""
        with self._transaction() as con:
            return [Waiting(m, tuple(_deliveries(con, m.id).values())) for m in _pending(con)]

    def say_once(self, what: str, *, holds: bool) -> bool:
        """Whether `what` holds and has not been said since it last did not."""
        with self._transaction() as con:
            if not holds:
                con.execute("DELETE FROM said WHERE what = ?", (what,))
                return False
            return con.execute("INSERT OR IGNORE INTO said VALUES (?)", (what,)).rowcount == 1

    def make_messages(self, now: datetime, *, anybody: bool) -> list[Message]:
        """The messages that are due, kept before this returns.

        anybody: whether there is a URL at all. Without one, alerts are kept and none is said, and
        what clears meanwhile will not be.
        """
        made = []
        with self._transaction() as con:
            for condition in sorted(_conditions(con), key=lambda c: c.alert.raised_at):
                if not anybody:
                    if not condition.is_open and condition.opened:
                        _keep(con, msgspec.structs.replace(condition, opened=0))
                    continue
                kind = due(condition, now, self._policy)
                if kind is None:
                    continue
                message = Message(
                    0,
                    kind,
                    condition.alert,
                    severity_of_message(condition, kind),
                    now,
                    note_of(condition, kind),
                )
                made.append(_add(con, message))
                _keep(con, after(condition, kind, now))
            old = (now - _KEPT).isoformat()
            con.execute("DELETE FROM messages WHERE done = 1 AND made_at < ?", (old,))
            con.execute("DELETE FROM deliveries WHERE message NOT IN (SELECT id FROM messages)")
        return made

    def deliver(self, channels: Sequence[Channel], now: datetime, send: Send) -> Delivered:
        """Send what waits and is due, once to each URL that has not accepted it.

        Messages about one key go in their order. One pass at a time: a second one does nothing.
        """
        with self._alone() as alone:
            if not alone or not channels:
                return Delivered()
            done = [self._deliver_to(channel, now, send) for channel in channels]
            self._close(channels)
        return Delivered(sum(d.sent for d in done), sum(d.failed for d in done))

    def _deliver_to(self, channel: Channel, now: datetime, send: Send) -> Delivered:
        with self._transaction() as con:
            pending = _pending(con)
            states = {m.id: _deliveries(con, m.id).get(channel.id) for m in pending}
        replaced, held = _replaced(pending), set()
        sent = failed = 0
        for message in pending:
            state, key = states[message.id], message.alert.key
            if (
                message.id in replaced
                or not channel.takes(message.severity)
                or (state is not None and state.sent_at is not None)
            ):
                continue
            if key in held or failed >= _FAILURES_A_PASS or not _is_due(state, now):
                held.add(key)
                continue
            error = send(channel, message)
            self._record(message, channel, now, error)
            if error is None:
                sent += 1
            else:
                failed += 1
                held.add(key)
        return Delivered(sent, failed)

    def _record(self, message: Message, channel: Channel, now: datetime, error: str | None) -> None:
        at = now.isoformat()
        with self._transaction() as con:
            con.execute(
                "INSERT OR IGNORE INTO deliveries (message, channel, label) VALUES (?, ?, ?)",
                (message.id, channel.id, channel.label),
            )
            one = "WHERE message = ? AND channel = ?"
            if error is None:
                con.execute(
                    "UPDATE deliveries SET attempts = attempts + 1, sent_at = ?, error = NULL "
                    f"{one}",
                    (at, message.id, channel.id),
                )
                # It works again: what waits for its turn there need not.
                con.execute(
                    "UPDATE deliveries SET next_at = ? WHERE channel = ? AND sent_at IS NULL",
                    (at, channel.id),
                )
                return
            tried = con.execute(f"SELECT attempts FROM deliveries {one}", (message.id, channel.id))
            attempts = tried.fetchone()[0] + 1
            con.execute(
                f"UPDATE deliveries SET attempts = ?, next_at = ?, error = ? {one}",
                (
                    attempts,
                    (now + retry_delay(attempts)).isoformat(),
                    error,
                    message.id,
                    channel.id,
                ),
            )

    def _close(self, channels: Sequence[Channel]) -> None:
        """Messages that every URL has, or need not have, wait no longer."""
        with self._transaction() as con:
            pending = _pending(con)
            replaced = _replaced(pending)
            for message in pending:
                states = _deliveries(con, message.id)
                has = {channel for channel, state in states.items() if state.sent_at is not None}
                wanted = {c.id for c in channels if c.takes(message.severity)}
                if message.id in replaced or wanted <= has:
                    con.execute("UPDATE messages SET done = 1 WHERE id = ?", (message.id,))

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as con:
            con.executescript(_SCHEMA)
            con.execute("BEGIN IMMEDIATE")
            try:
                yield con
            except BaseException:
                con.execute("ROLLBACK")
                raise
            con.execute("COMMIT")

    @contextmanager
    def _alone(self) -> Generator[bool]:
        """Whether no other process delivers; the lock goes with the process, however it ends."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def _known(condition: Condition, position: int | None) -> bool:
    newest = condition.position
    return position is not None and newest is not None and position <= newest


def _condition(con: sqlite3.Connection, key: str) -> Condition | None:
    row = con.execute("SELECT condition FROM conditions WHERE key = ?", (key,)).fetchone()
    return None if row is None else msgspec.json.decode(row[0], type=Condition)


def _conditions(con: sqlite3.Connection) -> list[Condition]:
    rows = con.execute("SELECT condition FROM conditions").fetchall()
    return [msgspec.json.decode(row[0], type=Condition) for row in rows]


def _keep(con: sqlite3.Connection, condition: Condition) -> None:
    content = msgspec.json.encode(condition)
    con.execute("INSERT OR REPLACE INTO conditions VALUES (?, ?)", (condition.key, content))


def _add(con: sqlite3.Connection, message: Message) -> Message:
    added = con.execute(
        "INSERT INTO messages (message, made_at) VALUES (?, ?)",
        (msgspec.json.encode(message), message.made_at.isoformat()),
    )
    return msgspec.structs.replace(message, id=added.lastrowid or 0)


def _pending(con: sqlite3.Connection) -> list[Message]:
    rows = con.execute("SELECT id, message FROM messages WHERE done = 0 ORDER BY id").fetchall()
    return [
        msgspec.structs.replace(msgspec.json.decode(content, type=Message), id=number)
        for number, content in rows
    ]


def _deliveries(con: sqlite3.Connection, message: int) -> dict[str, Delivery]:
    rows = con.execute(
        "SELECT channel, label, attempts, next_at, sent_at, error FROM deliveries "
        "WHERE message = ? ORDER BY channel",
        (message,),
    ).fetchall()
    return {
        row[0]: Delivery(row[1], row[2], _moment(row[3]), _moment(row[4]), row[5]) for row in rows
    }


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text).astimezone(UTC)


def _is_due(delivery: Delivery | None, now: datetime) -> bool:
    if delivery is None or delivery.next_at is None:
        return True
    # Farther away than any delay: the clock was set back.
    return delivery.next_at <= now or delivery.next_at - now > _LONGEST_DELAY


def _replaced(pending: Sequence[Message]) -> set[int]:
    """Messages that say what a later one about the same says again."""
    replaced: set[int] = set()
    open_ones: dict[str, list[Message]] = {}
    for message in pending:
        earlier = open_ones.setdefault(message.alert.key, [])
        if message.kind == "again":
            replaced |= {m.id for m in earlier if rank(m.severity) <= rank(message.severity)}
        if message.kind in ("raised", "again"):
            earlier.append(message)
        else:
            earlier.clear()
    return replaced
