"""What services answered, brought from their logs into the lake."""

import dagster as dg

from churn_assets.data.prediction_log import PREDICTION_LOG, all_trimmed, ingest, keys_unique
from churn_assets.defs.metadata import (
    check_outcome,
    prediction_log_schema,
    rows_by_day_table,
    served_table,
)
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project


@dg.asset(
    group_name="monitoring",
    kinds={"sqlite", "parquet"},
    owners=[f"team:{SETTINGS.team}"],
    deps=["churn_bento"],
    metadata={"dagster/column_schema": prediction_log_schema()},
    check_specs=[
        dg.AssetCheckSpec(
            "keys_unique",
            asset="prediction_log",
            description="No prediction is twice in the days that were added to.",
        ),
        dg.AssetCheckSpec(
            "trimmed_what_is_there",
            asset="prediction_log",
            description="What left the log is what the lake took over, and nothing was skipped.",
        ),
    ],
)
def prediction_log(
    context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]
) -> dg.MaterializeResult:
    """Every answered prediction once, by the UTC day it was answered.

    Rows leave the services' log when the lake has them. By operational time, as services answer in
    it; so this is no partition of the days of the data.
    """
    now, source = project.now(), project.log_source
    done = ingest(source, project.lake)
    rows = project.lake.row_counts(PREDICTION_LOG)
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": sum(rows.values()),
            "rows_added": sum(done.added.values()),
            "rows_known": done.known,
            "rows_by_day": rows_by_day_table(done.added, rows),
            "served": served_table(done.served),
            "lag_seconds": max(0.0, (now - done.oldest).total_seconds()) if done.oldest else 0.0,
            "log": source.place,
            "files_removed": len(done.removed),
        },
        check_results=[
            check_outcome(keys_unique(project.lake, list(done.added)), name="keys_unique"),
            check_outcome(all_trimmed(done), name="trimmed_what_is_there"),
        ],
    )
