"""Where unusable rows are kept, each with its reason, until somebody mends their source."""

from __future__ import annotations

from datetime import date

import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.data.lake import DAY, Lake
from churn_assets.data.validation import QUARANTINE_SCHEMA

UNDATED = date(1970, 1, 1)
"""The partition of rows whose day cannot be told, or lies outside of what was asked for."""


def quarantine_table(table: str) -> str:
    """The lake's name for the quarantine of `table`."""
    return f"quarantine/{table}"


def store_quarantine(lake: Lake, table: str, first: date, last: date, rows: pa.Table) -> None:
    """Replace the quarantine of the partitions [first, last] by `rows` (QUARANTINE_SCHEMA).

    Days without such rows lose theirs. Rows without a day, or of another day, replace those of the
    partition UNDATED, since a source is read as a whole to find them.
    """
    name = quarantine_table(table)
    day = pc.fill_null(rows[DAY], UNDATED)
    inside = pc.and_(pc.greater_equal(day, pa.scalar(first)), pc.less_equal(day, pa.scalar(last)))
    day = pc.if_else(inside, day, pa.scalar(UNDATED, pa.date32()))
    placed = rows.set_column(rows.schema.get_field_index(DAY), DAY, day)
    undated = pc.equal(placed[DAY], pa.scalar(UNDATED))
    dated = placed.filter(pc.invert(undated))
    present = {d for d in lake.days(name) if first <= d <= last}
    present |= set(pc.unique(dated[DAY]).to_pylist())
    if present:
        begin, end = min(present), max(present)
        lake.write(name, begin, end, dated, day_of=DAY)
    if pc.any(undated).as_py() or UNDATED in lake.days(name):
        lake.write(name, UNDATED, UNDATED, placed.filter(undated), day_of=DAY)


def read_quarantine(lake: Lake, table: str) -> pa.Table:
    """Every row of `table` in quarantine, QUARANTINE_SCHEMA without `day`; empty when none is."""
    name = quarantine_table(table)
    if not lake.days(name):
        schema = QUARANTINE_SCHEMA
        return schema.remove(schema.get_field_index(DAY)).empty_table()
    return lake.read(name, strict=False)
