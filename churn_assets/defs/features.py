"""Features and labels: what the model may see of a customer at a cutoff, and what came of it."""

from datetime import date

import dagster as dg

from churn_assets.contract.features import features_for
from churn_assets.data.checks import CheckResult
from churn_assets.data.features import look_back_days
from churn_assets.data.gate import judge_null_ratios
from churn_assets.data.leaks import check_no_event_after_cutoff
from churn_assets.data.refresh import (
    check_feature_schema,
    check_label_windows,
    refresh_features,
    refresh_labels,
)
from churn_assets.defs.metadata import (
    add_rows_per_day,
    check_outcome,
    feature_schema,
    label_schema,
    plot,
    quarantine_counts,
    sample,
)
from churn_assets.defs.partitions import DAILY, SETTINGS, days_before, look_back, partition_range
from churn_assets.defs.resources import Project
from churn_assets.modeling.plots import feature_distributions

OWNERS = [f"team:{SETTINGS.team}"]
FEATURES = features_for(SETTINGS.raw_tables)
HORIZON = SETTINGS.windows.horizon_days
LOOK_BACK = {table: look_back_days(table, SETTINGS.windows) for table in SETTINGS.raw_tables}


@dg.asset(
    group_name="features",
    kinds={SETTINGS.engine, "pandera", "parquet"},
    owners=OWNERS,
    partitions_def=DAILY,
    backfill_policy=dg.BackfillPolicy.single_run(),
    deps=[
        dg.AssetDep(table, partition_mapping=look_back(days))
        for table, days in LOOK_BACK.items()
        if days
    ],
    metadata={"dagster/column_schema": feature_schema(FEATURES)},
    check_specs=[
        dg.AssetCheckSpec(
            "schema",
            asset="customer_features",
            blocking=True,
            description="Columns, types and ranges are those of the feature contract.",
        ),
        dg.AssetCheckSpec(
            "nulls",
            asset="customer_features",
            blocking=True,
            description=f"At most {SETTINGS.data_gate.max_null_ratio:.0%} nulls in a column.",
        ),
        dg.AssetCheckSpec(
            "no_event_after_cutoff",
            asset="customer_features",
            blocking=True,
            description=(
                "The newest partition, and the oldest of a backfill, follow from the events "
                "before their cutoff alone: recomputed another way, customer by customer."
            ),
        ),
    ],
)
def customer_features(
    context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]
) -> dg.MaterializeResult:
    """What is known of every active customer at the end of the day, one row a customer.

    A customer is in with an order in the activity window. A feature sees only what happened before
    the cutoff and was known by then. Rows the schema refuses go to quarantine with a reason.
    """
    first, last = partition_range(context)
    with project.engine() as con:
        done = refresh_features(
            project.lake,
            con,
            FEATURES,
            SETTINGS.raw_tables,
            first,
            last,
            SETTINGS.windows,
            data_start=SETTINGS.calendar.start,
        )
        schema = check_feature_schema(
            project.lake, con, FEATURES, first, last, project.settings.validation
        )
    add_rows_per_day(context, done.rows)
    names = [feature.name for feature in FEATURES]
    newest = project.lake.read("customer_features", last, last)
    shown: dict[str, dg.MetadataValue] = {"sample": sample(newest)}
    if SETTINGS.plots:
        png = feature_distributions(newest, names, title=f"Customers on {last}")
        shown["distributions"] = plot(png, "distributions")
    context.add_asset_metadata(shown, partition_key=last.isoformat())
    return dg.MaterializeResult(
        metadata={"rows": sum(done.rows.values())} | quarantine_counts(done.quarantined),
        check_results=[
            check_outcome(schema, name="schema"),
            check_outcome(judge_null_ratios(done.null_ratios, SETTINGS.data_gate), name="nulls"),
            check_outcome(_leakage(project, first, last), name="no_event_after_cutoff"),
        ],
    )


def _leakage(project: Project, first: date, last: date) -> CheckResult:
    """The oldest partition has days after it, where a leak can show; the newest is the one used."""
    for day in dict.fromkeys((first, last)):
        result = check_no_event_after_cutoff(
            project.lake,
            SETTINGS.raw_tables,
            day,
            SETTINGS.windows,
            data_start=SETTINGS.calendar.start,
        )
        if not result.passed:
            break
    return result


@dg.asset(
    group_name="features",
    kinds={SETTINGS.engine, "parquet"},
    owners=OWNERS,
    partitions_def=DAILY,
    backfill_policy=dg.BackfillPolicy.single_run(),
    deps=[
        dg.AssetDep("orders", partition_mapping=look_back(HORIZON)),
        dg.AssetDep("customer_features", partition_mapping=days_before(HORIZON)),
    ],
    metadata={"dagster/column_schema": label_schema()},
    check_specs=[
        dg.AssetCheckSpec(
            "whole_window_there",
            asset="churn_labels",
            blocking=True,
            description="Every day of the label window was in the lake; a gap looks like churn.",
        )
    ],
)
def churn_labels(
    context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]
) -> dg.MaterializeResult:
    """Who churned: the labels that mature with the day, of the cutoff one horizon before.

    A customer of that cutoff has churned with no order from the cutoff up to the end of the day.
    """
    first, last = partition_range(context)
    with project.engine() as con:
        done = refresh_labels(project.lake, con, first, last, SETTINGS.windows)
    add_rows_per_day(context, done.rows)
    context.add_asset_metadata({"sample": sample(done.sample)}, partition_key=last.isoformat())
    whole = check_label_windows(project.lake, first, last, SETTINGS.windows)
    return dg.MaterializeResult(
        metadata={"rows": sum(done.rows.values())},
        check_results=[check_outcome(whole, name="whole_window_there")],
    )
