"""Features and labels: what the model may see of a customer at a cutoff, and what came of it."""

from collections.abc import Iterator

import dagster as dg

from churn_assets.contract.features import features_for
from churn_assets.data import features as feature_table
from churn_assets.data import labels as label_table
from churn_assets.data.checks import CheckResult
from churn_assets.defs.metadata import (
    add_rows_per_day,
    check_outcome,
    counts_table,
    feature_schema,
    label_schema,
    sample,
)
from churn_assets.defs.partitions import DAILY, SETTINGS, days_before, look_back, partition_range
from churn_assets.defs.resources import Project

GROUP = "features"
FEATURES = features_for(SETTINGS.raw_tables)
HORIZON = SETTINGS.windows.horizon_days
LOOK_BACK_DAYS = {
    table: max(f.window_days for f in FEATURES if table in f.tables)
    for table in SETTINGS.raw_tables
    if any(table in f.tables for f in FEATURES)
}


@dg.asset(
    group_name=GROUP,
    kinds={"duckdb", "pandera", "parquet"},
    owners=[f"team:{SETTINGS.team}"],
    partitions_def=DAILY,
    backfill_policy=dg.BackfillPolicy.single_run(),
    deps=[
        dg.AssetDep(table, partition_mapping=look_back(days))
        for table, days in LOOK_BACK_DAYS.items()
    ],
    metadata={"dagster/column_schema": feature_schema(FEATURES)},
)
def customer_features(
    context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]
) -> dg.MaterializeResult:
    """What is known of every active customer at the end of the day, one row a customer.

    A customer is in with an order in the activity window. A feature sees only what happened before
    the cutoff and was known by then. Rows the schema refuses go to quarantine with a reason.
    """
    first, last = partition_range(context)
    built = project.materialize_features(first, last)
    add_rows_per_day(context, built.rows)
    return dg.MaterializeResult(
        metadata={
            "rows": sum(built.rows.values()),
            "rows_quarantined": sum(built.quarantined.values()),
            "quarantined_by_reason": counts_table(built.quarantined, "reason"),
            "sample": sample(built.sample),
        }
    )
