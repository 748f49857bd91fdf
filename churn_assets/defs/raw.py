"""Raw data: the source's events, validated, a partition a day; what is unusable to quarantine."""

import dagster as dg

from churn_assets.data.refresh import refresh_raw
from churn_assets.data.tables import RAW_TABLES, RawTable
from churn_assets.defs.metadata import add_rows_per_day, quarantine_counts, raw_schema, sample
from churn_assets.defs.partitions import DAILY, SETTINGS, partition_range
from churn_assets.defs.resources import Project


def raw_asset(table: RawTable) -> dg.AssetsDefinition:
    """The asset of one raw table."""

    @dg.asset(
        name=table.name,
        description=f"{table.description}. Unusable rows are in quarantine, each with its reason.",
        group_name="raw",
        kinds={"python", "parquet"},
        owners=[f"team:{SETTINGS.team}"],
        partitions_def=DAILY,
        backfill_policy=dg.BackfillPolicy.single_run(),
        metadata={"dagster/column_schema": raw_schema(table)},
    )
    def raw(
        context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]
    ) -> dg.MaterializeResult:
        first, last = partition_range(context)
        done = refresh_raw(project.lake, project.source, table.name, first, last, now=project.now())
        add_rows_per_day(context, done.rows)
        context.add_asset_metadata({"sample": sample(done.sample)}, partition_key=last.isoformat())
        return dg.MaterializeResult(
            metadata={
                "rows": sum(done.rows.values()),
                "rows_read": done.rows_read,
                "rows_filtered": done.filtered,
            }
            | quarantine_counts(done.quarantined)
        )

    return raw


RAW_ASSETS = [raw_asset(RAW_TABLES[name]) for name in SETTINGS.raw_tables]
