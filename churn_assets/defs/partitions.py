"""The settings of this code location and the one daily partitions definition all assets share."""

from __future__ import annotations

from datetime import date, timedelta

import dagster as dg

from churn_assets.settings import load_settings

SETTINGS = load_settings()

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"

_END = SETTINGS.calendar.end
DAILY = dg.DailyPartitionsDefinition(
    start_date=SETTINGS.calendar.start.isoformat(),
    end_date=(_END + timedelta(days=1)).isoformat() if _END else None,
)


def look_back(days: int) -> dg.TimeWindowPartitionMapping:
    """Partition d needs the partitions [d - days + 1, d]; those before the start never existed."""
    return dg.TimeWindowPartitionMapping(
        start_offset=1 - days, end_offset=0, allow_nonexistent_upstream_partitions=True
    )


def days_before(days: int) -> dg.TimeWindowPartitionMapping:
    """Partition d needs partition d - days alone."""
    return dg.TimeWindowPartitionMapping(
        start_offset=-days, end_offset=-days, allow_nonexistent_upstream_partitions=True
    )


def range_tags(first: date, last: date) -> dict[str, str]:
    """The tags of a run that materializes the partitions first to last at once."""
    return {RANGE_START: first.isoformat(), RANGE_END: last.isoformat()}


def partition_range(context: dg.AssetExecutionContext) -> tuple[date, date]:
    """The first and last day this run materializes, both included."""
    keys = context.partition_key_range
    return date.fromisoformat(keys.start), date.fromisoformat(keys.end)
