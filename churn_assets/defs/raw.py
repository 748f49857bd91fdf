"""Raw data: the source's events, validated, one partition a day; what is unusable to quarantine."""

from collections import Counter

import dagster as dg

from churn_assets.data.checks import CheckResult
from churn_assets.data.tables import RAW_TABLES, RawTable
from churn_assets.data.validation import validate_events
from churn_assets.defs.metadata import check_result, column_schema, rows_per_day, sample_table
from churn_assets.defs.partitions import DAILY, SETTINGS, partition_range
from churn_assets.defs.resources import Project


def _raw_asset(table: RawTable) -> dg.AssetsDefinition:
    @dg.asset(
        name=table.name,
        description=table.description,
        group_name="raw",
        kinds={"python", "parquet"},
        owners=[f"team:{SETTINGS.team}"],
        partitions_def=DAILY,
        backfill_policy=dg.BackfillPolicy.single_run(),
        metadata={"dagster/column_schema": column_schema(table.name)},
    )
    def raw(
        context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]
    ) -> dg.MaterializeResult:
        first, last = partition_range(context)
        read = project.source.read(table.name, first, last)
        events = validate_events(table, read.events, first, last, now=project.now())
        quarantined = store_quarantine(project, table.name, first, last, read, events)
        rows = project.lake.write(table.name, first, last, events.valid, day_of="occurred_at")
        rows_per_day(context, rows)
        return dg.MaterializeResult(
            metadata={
                "rows_read": read.rows_read,
                "rows_quarantined": sum(quarantined.values()),
                "quarantined_by_reason": dict(quarantined),
                "sample": sample_table(events.valid),
            }
        )

    return raw
