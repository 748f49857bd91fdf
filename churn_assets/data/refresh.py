"""Bringing partitions up to date: read, validate, put the unusable aside, replace the partition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.contract.features import Feature
from churn_assets.data.checks import CheckResult
from churn_assets.data.features import (
    customer_features,
    require_look_back,
    scan_look_back,
)
from churn_assets.data.gate import judge_schema, judge_schema_in_engine
from churn_assets.data.labels import churn_labels, label_window_complete, scan_label_inputs
from churn_assets.data.lake import DAY, Lake
from churn_assets.data.late import (
    FEATURES_TABLE,
    LABELS_TABLE,
    note_change,
    noted_changes,
    settle,
)
from churn_assets.data.quarantine import store_quarantine
from churn_assets.data.ranges import CustomerRange, customer_ranges
from churn_assets.data.results import is_spark, to_arrow
from churn_assets.data.schema import features_schema
from churn_assets.data.sources import Source
from churn_assets.data.tables import RAW_ORDER, RAW_TABLES
from churn_assets.data.validation import ValidationPolicy, validate_events, validate_features
from churn_assets.data.versions import as_known, store_superseded
from churn_assets.data.windows import Windows, days_between

if TYPE_CHECKING:
    from ibis.backends import BaseBackend

# A year of features of a mid-sized shop is some hundred megabytes in memory.
CHUNK_DAYS = 366
SPARK_LABEL_DAYS = 31


@dataclass(frozen=True)
class Refreshed:
    """What a refresh of some partitions did.

    rows: rows per day now in the lake. rows_read: rows of the source looked at. filtered: rows not
    wanted. quarantined: unusable rows by reason. sample: a few rows of the last day.
    null_ratios: share of nulls by column, before anything went to quarantine.
    """

    rows: dict[date, int]
    rows_read: int
    filtered: int
    quarantined: Mapping[str, int]
    sample: pa.Table
    null_ratios: dict[str, float] = field(default_factory=dict)


def refresh_raw(
    lake: Lake, source: Source, table: str, first: date, last: date, *, now: datetime
) -> Refreshed:
    """Replace the partitions [first, last] of a raw table by what the source has for them.

    What replaced events said before is kept where the source tells when it learned of them, and
    that a partition changed is noted for what was made of it.

    Raises UserError for what is wrong with the source as a whole; rows that are wrong go to
    quarantine.
    """
    read = source.read(table, first, last, now)
    checked = validate_events(RAW_TABLES[table], read.events, first, last, now)
    refused = pa.concat_tables([read.quarantined, checked.quarantined])
    store_quarantine(lake, table, first, last, refused)
    events, superseded = checked.valid, None
    if present := [day for day in lake.days(table) if first <= day <= last]:
        known = as_known(table, lake.read(table, days=present), events)
        events, superseded = known.rows, known.superseded

    def before_replacing(days: list[date]) -> None:
        # In this order, a refresh killed at any point is found unfinished by the next.
        note_change(lake, table, days)
        if superseded is not None:
            store_superseded(lake, table, superseded)

    rows = lake.write(
        table,
        first,
        last,
        events,
        day_of="occurred_at",
        order_by=RAW_ORDER,
        before_replacing=before_replacing,
    )
    return Refreshed(rows, read.rows_read, read.filtered, count_reasons(refused), _newest(events))


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
    notes = noted_changes(lake, FEATURES_TABLE)
    rows: dict[date, int] = {}
    reasons: Counter[str] = Counter()
    nulls: Counter[str] = Counter()
    read, sample = 0, None
    for start, end in chunks(first, last, CHUNK_DAYS):
        refused = []
        with lake.replacing(
            FEATURES_TABLE,
            start,
            end,
            day_of=DAY,
            order_by=["customer_id"],
            before_replacing=lambda days: note_change(lake, FEATURES_TABLE, days),
        ) as files:
            for computed in compute_features(
                lake, con, tables, start, end, windows, data_start=data_start
            ):
                checked = validate_features(computed, names)
                files.append(checked.valid)
                refused.append(checked.quarantined)
                read += computed.num_rows
                nulls.update({name: computed[name].null_count for name in names})
                sample = _newest(checked.valid)
            quarantined = pa.concat_tables(refused)
            store_quarantine(lake, FEATURES_TABLE, start, end, quarantined)
        rows |= files.counts
        reasons.update(count_reasons(quarantined))
    assert sample is not None, "a range has at least one day"
    settle(lake, FEATURES_TABLE, notes, first, last, windows)
    ratios = {name: nulls[name] / read if read else 0.0 for name in names}
    return Refreshed(rows, read, 0, dict(reasons), sample, ratios)


def compute_features(
    lake: Lake,
    con: BaseBackend,
    tables: Sequence[str],
    first: date,
    last: date,
    windows: Windows,
    *,
    data_start: date,
    step_days: int = 1,
) -> Iterator[pa.Table]:
    """The rows of `customer_features`, computed for one range of customers after the other.

    In ascending order of the ranges; within one the rows come in no order. The next range is
    computed, on a thread of its own, while the caller does something with the last: `con` is not
    the caller's until the end. Raises UserError as `scan_look_back` does.
    """
    scans = scan_look_back(lake, con, tables, first, last, windows, data_start=data_start)

    def compute(customers: CustomerRange) -> pa.Table:
        events = {name: customers.of(table) for name, table in scans.items()}
        return to_arrow(customer_features(events, first, last, windows, step_days=step_days))

    ranges = customer_ranges(lake, scans, first, last, windows, step_days=step_days)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(compute, ranges[0])
        for customers in ranges[1:]:
            computed = waiting.result()
            waiting = pool.submit(compute, customers)
            yield computed
            # Not two of them beside the one that is being computed.
            del computed
        yield waiting.result()


def refresh_labels(
    lake: Lake, con: BaseBackend, first: date, last: date, windows: Windows
) -> Refreshed:
    """Compute the labels that mature with the days [first, last].

    Raises UserError when a feature partition or a day of a label window is missing.
    """
    notes = noted_changes(lake, LABELS_TABLE)
    rows: dict[date, int] = {}
    # DuckDB hands rows over as they are written; what Spark found comes at once.
    days = SPARK_LABEL_DAYS if is_spark(con) else (last - first).days + 1
    for start, end in chunks(first, last, days):
        orders, population = scan_label_inputs(lake, con, start, end, windows)
        labels = churn_labels(orders, population, start, end, windows)
        rows |= lake.write(LABELS_TABLE, start, end, labels, day_of=DAY, order_by=["customer_id"])
    settle(lake, LABELS_TABLE, notes, first, last, windows)
    return Refreshed(rows, sum(rows.values()), 0, {}, lake.read(LABELS_TABLE, last, last))


def check_feature_schema(
    lake: Lake,
    con: BaseBackend,
    features: Sequence[Feature],
    first: date,
    last: date,
    policy: ValidationPolicy,
) -> CheckResult:
    """Whether the feature partitions [first, last] have their columns, types and ranges.

    In memory, or in the engine `con` when they have more rows than the policy wants in memory.
    Raises UserError when one is missing.
    """
    schema = features_schema(features)
    rows = sum(lake.row_counts(FEATURES_TABLE, first, last).values())
    if rows <= policy.rows_in_memory:
        return judge_schema(lake.read(FEATURES_TABLE, first, last), schema)
    return judge_schema_in_engine(lake.scan(con, FEATURES_TABLE, first, last).drop(DAY), schema)


def check_label_windows(lake: Lake, first: date, last: date, windows: Windows) -> CheckResult:
    """Whether every day the labels of [first, last] look at was there; the first gap if not."""
    present = lake.days("orders")
    results = [
        label_window_complete(present, day, windows.horizon_days)
        for day in days_between(first, last)
    ]
    return next((result for result in results if not result.passed), results[-1])


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
