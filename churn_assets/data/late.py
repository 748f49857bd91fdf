"""Late and corrected events: which partitions no longer say what they should, and why.

Two questions, each answered from what is stored. Does a raw partition still say what the source
says of its day? And which features and labels were made of a partition that has changed since? For
the second, whoever replaces a partition by another content first notes so in the lake, for every
table made of it, and the note goes when what it touches has been recomputed: a refresh that is
killed half way is finished by the next, and nothing is recomputed twice.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.data.contents import content_hash
from churn_assets.data.features import look_back_days
from churn_assets.data.lake import Lake
from churn_assets.data.sources import Source
from churn_assets.data.tables import RAW_TABLES
from churn_assets.data.validation import validate_events
from churn_assets.data.versions import as_known
from churn_assets.data.windows import Windows, days_between, label_partition

FEATURES_TABLE = "customer_features"
LABELS_TABLE = "churn_labels"
_FOLDER = "changes"
_MADE_OF = {
    FEATURES_TABLE: ("orders", "support_tickets", "logins"),
    LABELS_TABLE: ("orders", FEATURES_TABLE),
}


class LatePolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far back a refresh looks for late and corrected events.

    reread_days: newest days of the source whose content is compared with the lake. Older days are
    looked at where the source records ingestion time.
    """

    reread_days: int = 7

    def __post_init__(self) -> None:
        if self.reread_days < 0:
            raise ValueError("reread_days is negative; 0 compares no day, 7 the last week")


class Change(msgspec.Struct, frozen=True):
    """Partitions of `table` that were replaced by another content."""

    table: str
    days: tuple[date, ...]


@dataclass(frozen=True)
class Outdated:
    """A raw partition that differs from the source, and by how many events.

    content: the hash of what it would say.
    """

    table: str
    day: date
    late: int
    corrected: int
    gone: int
    content: str

    @property
    def reason(self) -> str:
        """The difference in words."""
        kinds = (("late", self.late), ("corrected", self.corrected), ("gone", self.gone))
        told = ", ".join(f"{count} {kind}" for kind, count in kinds if count)
        return f"{self.table} of {self.day}: {told}"


@dataclass(frozen=True)
class Plan:
    """What has to be computed again, table by table: the first and last day, and the reasons."""

    raw: tuple[Outdated, ...]
    features: tuple[date, date] | None
    labels: tuple[date, date] | None

    @property
    def key(self) -> str:
        """The same for the same plan: 16 hexadecimal digits."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    @property
    def raw_tables(self) -> tuple[str, ...]:
        """The raw tables with an outdated partition."""
        return tuple(dict.fromkeys(found.table for found in self.raw))

    @property
    def raw_days(self) -> tuple[date, date] | None:
        """The stretch that holds every outdated raw partition."""
        return spanning(found.day for found in self.raw)


def find_outdated(
    lake: Lake, source: Source, table: str, policy: LatePolicy, *, now: datetime
) -> tuple[Outdated, ...]:
    """The partitions of a raw table in the lake that would say something else if read today.

    The newest `reread_days` are compared as a whole. Of a source that hands over its whole table
    anyway and records ingestion time, every older day with more events, or with one ingested later
    than any the lake has, is compared too. An older day with fewer events is left alone: sources
    forget.

    Raises UserError when the source cannot be read.
    """
    scope = getattr(source, "rereads", "window")
    present = lake.days(table)
    if scope == "never" or not present:
        return ()
    newest = present[-1]
    window = {day for day in present if (newest - day).days < policy.reread_days}
    if scope != "whole" and not window:
        return ()
    first = present[0] if scope == "whole" else min(window)
    read = source.read(table, first, newest)
    events = validate_events(RAW_TABLES[table], read.events, first, newest, now).valid
    days = pc.cast(events["occurred_at"], pa.date32())
    suspects = set(window)
    if scope == "whole" and events["ingested_at"].null_count < events.num_rows:
        older = [day for day in present if day not in window]
        suspects |= _with_arrivals(lake, table, older, events["ingested_at"], days)
    found = (
        _difference(lake, table, day, events.filter(pc.equal(days, pa.scalar(day))))
        for day in sorted(suspects)
    )
    return tuple(difference for difference in found if difference is not None)


def _with_arrivals(
    lake: Lake, table: str, days: Sequence[date], ingested: pa.ChunkedArray, day: pa.ChunkedArray
) -> set[date]:
    """Which of `days` have more events, or a later ingestion, than their partition."""
    if not days:
        return set()
    groups = pa.table({"day": day, "ingested": ingested}).group_by("day")
    grouped = groups.aggregate([([], "count_all"), ("ingested", "max")]).to_pydict()
    counts = dict(zip(grouped["day"], grouped["count_all"], strict=True))
    newest = dict(zip(grouped["day"], grouped["ingested_max"], strict=True))
    stored = lake.row_counts(table, min(days), max(days))
    stored_newest = lake.newest_values(table, "ingested_at", days)

    def arrived(day: date) -> bool:
        more = counts.get(day, 0) - stored[day]
        latest, known = newest.get(day), stored_newest[day]
        return more > 0 or (more == 0 and latest is not None and (not known or latest > known))

    return {day for day in days if arrived(day)}


def _difference(lake: Lake, table: str, day: date, events: pa.Table) -> Outdated | None:
    old = lake.read(table, day, day)
    rows = as_known(table, old, events).rows
    content = content_hash(rows)
    if content == content_hash(old):
        return None
    key = RAW_TABLES[table].key
    there = pc.is_in(rows[key], value_set=old[key].combine_chunks())
    kept = np.asarray(there.combine_chunks().to_numpy(zero_copy_only=False))
    before = {tuple(row.values()) for row in old.select(rows.column_names).to_pylist()}
    after = (tuple(row.values()) for row in rows.filter(pa.array(kept)).to_pylist())
    return Outdated(
        table,
        day,
        late=int(len(kept) - kept.sum()),
        corrected=sum(row not in before for row in after),
        gone=int(old.num_rows - kept.sum()),
        content=content,
    )


def note_change(lake: Lake, table: str, days: Sequence[date]) -> None:
    """Note, for every table made of it, that partitions of `table` are about to be replaced."""
    change = msgspec.json.encode(Change(table, tuple(days)))
    for made, tables in _MADE_OF.items():
        if table in tables:
            lake.put(f"{_FOLDER}/{made}", f"{uuid.uuid4().hex}.json", change)


def noted_changes(lake: Lake, made: str) -> dict[str, Change]:
    """The changes the table `made` (features or labels) has not followed yet, by their notes."""
    changes = {}
    for name in lake.names(f"{_FOLDER}/{made}"):
        try:
            stored = lake.get_bytes(f"{_FOLDER}/{made}", name)
        except FileNotFoundError:  # another refresh has just settled it
            continue
        changes[name] = msgspec.json.decode(stored, type=Change)
    return changes


def settle(
    lake: Lake,
    made: str,
    notes: Mapping[str, Change],
    first: date,
    last: date,
    windows: Windows,
) -> None:
    """Remove those of `notes` that touch no partition of `made` outside of [first, last].

    `notes` are those there were before the partitions first..last were computed.
    """
    present = set(lake.days(made))
    for name, change in notes.items():
        touched = touched_days(made, [change], windows) & present
        if all(first <= day <= last for day in touched):
            lake.remove(f"{_FOLDER}/{made}", name)


def touched_days(made: str, changes: Iterable[Change], windows: Windows) -> set[date]:
    """The partitions of features or labels that a change of what they are made of can reach."""
    touched: set[date] = set()
    for change in changes:
        for day in change.days:
            if made == LABELS_TABLE and change.table == FEATURES_TABLE:
                touched.add(label_partition(day, windows.horizon_days))
                continue
            reach = windows.horizon_days
            if made == FEATURES_TABLE:
                reach = look_back_days(change.table, windows)
            touched |= set(days_between(day, day + timedelta(days=reach - 1)))
    return touched


def to_follow(
    lake: Lake, made: str, windows: Windows, expected: Iterable[Change] = ()
) -> tuple[date, date] | None:
    """The stretch of existing partitions of `made` to compute again; None when none is.

    For the changes noted, and those `expected` to come.
    """
    changes = [*noted_changes(lake, made).values(), *expected]
    changes = [change for change in changes if change.table in _MADE_OF[made]]
    if not changes:
        return None
    return spanning(touched_days(made, changes, windows) & set(lake.days(made)))


def plan_refresh(
    lake: Lake,
    source: Source,
    tables: Sequence[str],
    windows: Windows,
    policy: LatePolicy,
    *,
    now: datetime,
) -> Plan:
    """What the partitions there are need: raw ones that differ, and all that follows from them.

    Raises UserError when the source cannot be read.
    """
    outdated = [
        found for table in tables for found in find_outdated(lake, source, table, policy, now=now)
    ]
    expected = [Change(found.table, (found.day,)) for found in outdated]
    features = to_follow(lake, FEATURES_TABLE, windows, expected)
    if features:
        expected.append(Change(FEATURES_TABLE, tuple(days_between(*features))))
    labels = to_follow(lake, LABELS_TABLE, windows, expected)
    return Plan(tuple(outdated), features, labels)


def spanning(days: Iterable[date]) -> tuple[date, date] | None:
    """The first and the last of `days`; None when there are none."""
    ordered = sorted(days)
    return (ordered[0], ordered[-1]) if ordered else None
