"""Bringing partitions up to date: read, validate, put the unusable aside, replace the partition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.contract.features import Feature
from churn_assets.data.features import customer_features, require_look_back, scan_look_back
from churn_assets.data.labels import churn_labels
from churn_assets.data.lake import DAY, Lake
from churn_assets.data.quarantine import store_quarantine
from churn_assets.data.sources import Source
from churn_assets.data.tables import RAW_TABLES
from churn_assets.data.validation import validate_events, validate_features
from churn_assets.data.windows import Windows, labelled_partition

if TYPE_CHECKING:
    from ibis.backends import BaseBackend

# A year of features of a mid-sized shop is some hundred megabytes in memory.
CHUNK_DAYS = 366


@dataclass(frozen=True)
class Refreshed:
    """What a refresh of some partitions did.

    rows: rows per day now in the lake. rows_read: rows of the source looked at. filtered: rows not
    wanted. quarantined: unusable rows by reason. sample: a few rows of the last day.
    """

    rows: dict[date, int]
    rows_read: int
    filtered: int
    quarantined: Mapping[str, int]
    sample: pa.Table


def refresh_raw(
    lake: Lake, source: Source, table: str, first: date, last: date, *, now: datetime
) -> Refreshed:
    """Replace the partitions [first, last] of a raw table by what the source has for them.

    Raises UserError for what is wrong with the source as a whole; rows that are wrong go to
    quarantine.
    """
    read = source.read(table, first, last)
    checked = validate_events(RAW_TABLES[table], read.events, first, last, now)
    refused = pa.concat_tables([read.quarantined, checked.quarantined])
    store_quarantine(lake, table, first, last, refused)
    rows = lake.write(
        table, first, last, checked.valid, day_of="occurred_at", order_by=["occurred_at"]
    )
    return Refreshed(
        rows, read.rows_read, read.filtered, count_reasons(refused), _newest(checked.valid)
    )


def refresh_features(
    lake: Lake,
    con: BaseBackend,
    features: Sequence[Feature],
    tables: Sequence[str],
    first: date,
    last: date,
    windows: Windows,
    *,
    data_start: date,
) -> Refreshed:
    """Compute the feature partitions [first, last] from the raw tables in the lake.

    Raises UserError when a raw partition is missing or a look-back would be cut short.
    """
    require_look_back(first, data_start, windows, features)
    names = [feature.name for feature in features]
    rows: dict[date, int] = {}
    reasons: Counter[str] = Counter()
    read, sample = 0, None
    for start, end in chunks(first, last, CHUNK_DAYS):
        scans = scan_look_back(lake, con, tables, start, end, windows, data_start=data_start)
        computed = customer_features(scans, start, end, windows).to_pyarrow()
        checked = validate_features(computed, names)
        store_quarantine(lake, "customer_features", start, end, checked.quarantined)
        rows |= lake.write(
            "customer_features", start, end, checked.valid, day_of=DAY, order_by=["customer_id"]
        )
        read += computed.num_rows
        reasons.update(count_reasons(checked.quarantined))
        sample = _newest(checked.valid)
    assert sample is not None, "a range has at least one day"
    return Refreshed(rows, read, 0, dict(reasons), sample)


def refresh_labels(
    lake: Lake, con: BaseBackend, first: date, last: date, windows: Windows
) -> Refreshed:
    """Compute the labels that mature with the days [first, last].

    Raises UserError when a feature partition or a day of a label window is missing.
    """
    horizon = windows.horizon_days
    population_first = labelled_partition(first, horizon)
    population_last = labelled_partition(last, horizon)
    population = lake.scan(con, "customer_features", population_first, population_last)
    orders = lake.scan(con, "orders", population_first + timedelta(days=1), last)
    labels = churn_labels(orders, population, first, last, windows)
    rows = lake.write("churn_labels", first, last, labels, day_of=DAY, order_by=["customer_id"])
    return Refreshed(rows, sum(rows.values()), 0, {}, lake.read("churn_labels", last, last))


def chunks(first: date, last: date, days: int) -> list[tuple[date, date]]:
    """[first, last] in stretches of at most `days` days."""
    starts = range(0, (last - first).days + 1, days)
    return [
        (first + timedelta(days=s), min(last, first + timedelta(days=s + days - 1))) for s in starts
    ]


def count_reasons(quarantined: pa.Table) -> dict[str, int]:
    """Rows in quarantine by reason."""
    counted = pc.value_counts(quarantined["reason"].combine_chunks())
    return {entry["values"]: entry["counts"] for entry in counted.to_pylist()}


def _newest(rows: pa.Table) -> pa.Table:
    return rows.slice(max(0, rows.num_rows - 5))
