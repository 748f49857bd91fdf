"""Whether features that lie in the lake, or are about to be trained on, saw past their cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from churn_assets.data.checks import (
    MAX_CUSTOMERS,
    CheckResult,
    choose_customers,
    no_event_after_cutoff,
)
from churn_assets.data.features import look_back_days
from churn_assets.data.lake import Lake
from churn_assets.data.tables import TIMESTAMP
from churn_assets.data.versions import read_events_known
from churn_assets.data.windows import Windows, cutoff_of


def check_no_event_after_cutoff(
    lake: Lake, tables: Sequence[str], day: date, windows: Windows, *, data_start: date
) -> CheckResult:
    """Recompute the features of the partition `day` from what happened before its cutoff alone."""
    features = lake.read("customer_features", day, day)
    return _recomputed(lake, features, tables, day, windows, data_start, MAX_CUSTOMERS)


def check_training_rows(
    lake: Lake,
    rows: pa.Table,
    tables: Sequence[str],
    days: Sequence[date],
    windows: Windows,
    *,
    data_start: date,
    max_customers: int = MAX_CUSTOMERS,
) -> CheckResult:
    """Recompute the features of training rows, cutoff by cutoff, from what was known by then.

    rows: customer_id, cutoff (those of the partitions `days`) and features, as they will be trained
    on, whatever way they came. At most `max_customers` of each cutoff are compared. Without days
    or rows nothing was compared, and it does not pass.
    """
    figures: dict[str, float | int | str] = {"cutoffs": len(days), "customers_compared": 0}
    known = {cutoff_of(day) for day in days}
    others = set(pc.unique(rows["cutoff"]).to_pylist()) - known
    if others or not days:
        what = f"rows of {min(others)}" if others else "no cutoff"
        return CheckResult(False, f"there are {what}, which cannot be compared", figures)
    compared = 0
    for day in days:
        own = rows.filter(pc.equal(rows["cutoff"], pa.scalar(cutoff_of(day), TIMESTAMP)))
        if not own.num_rows:
            return CheckResult(False, f"there are no rows of {day} to compare", figures)
        own = own.drop([name for name in ("churned",) if name in own.column_names])
        found = _recomputed(lake, own, tables, day, windows, data_start, max_customers)
        compared += int(found.figures.get("customers_compared", 0))
        if not found.passed:
            return CheckResult(False, found.reason, figures | found.figures)
    figures["customers_compared"] = compared
    return CheckResult(
        True,
        f"{compared:,} customers of {len(days)} cutoffs follow from events before them alone",
        figures,
    )


def _recomputed(
    lake: Lake,
    features: pa.Table,
    tables: Sequence[str],
    day: date,
    windows: Windows,
    data_start: date,
    max_customers: int,
) -> CheckResult:
    # Events of the two days after are handed over where there are any: only there a leak shows.
    last = day + timedelta(days=2)
    reaches = {table: look_back_days(table, windows) for table in tables}
    starts = {
        table: max(data_start, day - timedelta(days=reach))
        for table, reach in reaches.items()
        if reach
    }

    def customers(table: str, first: date, last: date) -> set[str]:
        found = lake.read(table, first, last, columns=["customer_id"], strict=False)
        return set(found["customer_id"].unique().to_pylist())

    present = set(features["customer_id"].unique().to_pylist())
    active_from = max(data_start, day - timedelta(days=windows.activity_days))
    everyone = present | customers("orders", active_from, day)
    chosen = None
    if len(everyone) > max_customers:
        active = set().union(*(customers(table, day + timedelta(days=1), last) for table in starts))
        chosen = choose_customers(everyone, active, max_customers)
        among = pc.is_in(features["customer_id"], value_set=pa.array(sorted(chosen), pa.string()))
        features = features.filter(among)
    raw = {
        table: read_events_known(lake, table, first, last, cutoff_of(day), chosen)
        for table, first in starts.items()
    }
    return no_event_after_cutoff(
        features, raw, windows, cutoff=cutoff_of(day), max_customers=max_customers
    )
