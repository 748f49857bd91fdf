"""Ranges of customers, each few enough to be computed in memory.

No row of the features looks at two customers, so a large computation is done range by range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.data.day_files import DAY
from churn_assets.data.features import look_back_days
from churn_assets.data.lake import Lake
from churn_assets.data.windows import Windows

ROWS_AT_ONCE = 6_000_000
"""Events read and rows made for one range; some 100 bytes of memory each."""

_ALONE = 1.5
"""So many times ROWS_AT_ONCE are one range: another would read every file once more."""

_SAMPLED_DAYS = 5


@dataclass(frozen=True)
class CustomerRange:
    """The customers from `first` (of all, when None) up to but not with `end`, by their ids."""

    first: str | None = None
    end: str | None = None

    def of(self, rows: ir.Table) -> ir.Table:
        """The rows of these customers, of a table with a customer_id."""
        if self.first is not None:
            rows = rows.filter(rows.customer_id >= self.first)
        if self.end is not None:
            rows = rows.filter(rows.customer_id < self.end)
        return rows


def customer_ranges(
    lake: Lake,
    events: Mapping[str, ir.Table],
    first: date,
    last: date,
    windows: Windows,
    *,
    step_days: int = 1,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[CustomerRange]:
    """Ranges of customers, in order, whose features cost about `rows_at_once` each to compute.

    `events` is what the features of the partitions first, first + step_days, ... up to last are
    computed from. Where ranges end is told by the events of a few days, so that they are alike in
    cost but not the same.
    """
    population = events["orders"].filter(
        events["orders"][DAY] > last - timedelta(days=windows.activity_days)
    )
    read = sum(int(table.count().to_pyarrow().as_py()) for table in events.values())
    cutoffs = (last - first).days // step_days + 1
    made = cutoffs * int(population.customer_id.approx_nunique().to_pyarrow().as_py())
    if read + made <= _ALONE * rows_at_once:
        return [CustomerRange()]
    ranges = -(-(read + made) // rows_at_once)
    seen = pa.chunked_array(
        [
            chunk
            for table in events
            for chunk in _customers(lake, table, first, last, windows).chunks
        ],
        pa.string(),
    )
    ordered = seen.take(pc.sort_indices(seen))
    places = [len(ordered) * number // ranges for number in range(1, ranges)]
    ends = ordered.take(pa.array(places)).unique().to_pylist() if len(ordered) else []
    return [CustomerRange(*ends) for ends in pairwise([None, *ends, None])]


def _customers(
    lake: Lake, table: str, first: date, last: date, windows: Windows
) -> pa.ChunkedArray:
    """Whose events those of a few days are, spread over the look-back, one value an event."""
    start = first - timedelta(days=look_back_days(table, windows) - 1)
    days = [day for day in lake.days(table) if start <= day <= last]
    sampled = days[:: -(-len(days) // _SAMPLED_DAYS) or 1]
    column = lake.read(table, days=sampled, columns=["customer_id"])["customer_id"]
    return column.cast(pa.string())
