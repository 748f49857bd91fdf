"""What was known when of an event that was corrected.

A source that records ingestion time hands over an event as it is now, under the time it learned of
that. A model may only be trained on what was known by a cutoff, so the lake keeps, beside the
partition of a corrected event, what the event said before: in `superseded/<table>`, with the
columns of the table and `superseded_at`, the time from which the correction was known. An event
that merely was touched (all it says is the same) stays known since it was first known.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.data.lake import DAY, Lake
from churn_assets.data.tables import RAW_ORDER, RAW_TABLES, TIMESTAMP

if TYPE_CHECKING:
    from ibis.backends import BaseBackend

SUPERSEDED_AT = "superseded_at"
_IDENTITY = ("customer_id", "occurred_at")


@dataclass(frozen=True)
class Known:
    """Events with the time each was first known as it is, and what some of them said before."""

    rows: pa.Table
    superseded: pa.Table


def superseded_table(table: str) -> str:
    """The lake's name for the former versions of `table`'s events."""
    return f"superseded/{table}"


def as_known(table: str, old: pa.Table, new: pa.Table) -> Known:
    """The events `new` of the source, given that the lake held `old` for the same days.

    An event of the same key, customer and moment that the source learned of later was touched or
    corrected. Any other difference, and every difference without ingestion times, is a plain
    replacement: an event that is gone or moved is taken as never having been there.
    """
    key = RAW_TABLES[table].key
    schema = new.schema.append(pa.field(SUPERSEDED_AT, TIMESTAMP))
    place = pc.index_in(new[key], value_set=old[key].combine_chunks())
    before = old.take(place.combine_chunks())
    later = pc.greater(new["ingested_at"], before["ingested_at"])
    for name in _IDENTITY:
        later = pc.and_(later, pc.equal(new[name], before[name]))
    later = pc.fill_null(later, False)
    same = pc.equal(new[key], new[key])
    for name in new.column_names:
        if name not in (key, "ingested_at", *_IDENTITY):
            equal = pc.fill_null(pc.equal(new[name], before[name]), False)
            both_null = pc.and_(pc.is_null(new[name]), pc.is_null(before[name]))
            same = pc.and_(same, pc.or_(equal, both_null))
    touched, corrected = pc.and_(later, same), pc.and_(later, pc.invert(same))
    since = pc.if_else(touched, before["ingested_at"], new["ingested_at"])
    index = new.schema.get_field_index("ingested_at")
    rows = new.set_column(index, new.schema.field(index), since)
    former = before.select(new.column_names).append_column(SUPERSEDED_AT, new["ingested_at"])
    return Known(rows, former.cast(schema).filter(corrected))


def store_superseded(lake: Lake, table: str, rows: pa.Table) -> None:
    """Add former versions to those the lake has; one that is there already stays as it is."""
    if not rows.num_rows:
        return
    name, key = superseded_table(table), RAW_TABLES[table].key
    present = set(lake.days(name))
    days = pc.cast(rows["occurred_at"], pa.date32())
    for day in pc.unique(days).to_pylist():
        versions = rows.filter(pc.equal(days, pa.scalar(day)))
        if day in present:
            kept = lake.read(name, day, day).cast(rows.schema)
            known = set(zip(kept[key].to_pylist(), kept["ingested_at"].to_pylist(), strict=True))
            pairs = zip(versions[key].to_pylist(), versions["ingested_at"].to_pylist(), strict=True)
            new = pa.array([pair not in known for pair in pairs], pa.bool_())
            versions = pa.concat_tables([kept, versions.filter(new)])
        lake.write(name, day, day, versions, day_of="occurred_at", order_by=RAW_ORDER)


def with_superseded(
    lake: Lake, con: BaseBackend, table: str, events: ir.Table, first: date, last: date
) -> ir.Table:
    """`events` of the partitions first..last with the former versions of those that have some.

    Then there is a column superseded_at, null for what is still true.
    """
    name = superseded_table(table)
    days = [day for day in lake.days(name) if first <= day <= last]
    if not days:
        return events
    former = lake.scan(con, name, days=days)
    columns = [*RAW_TABLES[table].schema.names, SUPERSEDED_AT, DAY]
    current = events.mutate(**{SUPERSEDED_AT: ibis.null(former[SUPERSEDED_AT].type())})
    return ibis.union(current.select(columns), former.select(columns))


def read_events_known(
    lake: Lake,
    table: str,
    first: date,
    last: date,
    cutoff: datetime,
    customers: Collection[str] | None = None,
) -> pa.Table:
    """The events of the partitions first..last that are there, as they were known at `cutoff`.

    For an event corrected since, both versions; only the former was ingested before the cutoff.
    With `customers`, only theirs.
    """
    rows = lake.read(table, first, last, customers=customers, strict=False)
    name = superseded_table(table)
    days = [day for day in lake.days(name) if first <= day <= last]
    if not days:
        return rows
    former = lake.read(name, days=days, customers=customers)
    # A version ends with the cutoff that first sees the next one.
    former = former.filter(pc.greater_equal(former[SUPERSEDED_AT], pa.scalar(cutoff, TIMESTAMP)))
    return pa.concat_tables([rows, former.select(rows.column_names).cast(rows.schema)])
