"""The online store: the newest features of every customer, where the service looks them up."""

import dagster as dg

from churn_assets.data.windows import cutoff_of
from churn_assets.defs.features import FEATURES, OWNERS
from churn_assets.defs.metadata import check_outcome, feature_schema
from churn_assets.defs.partitions import DAILY, SETTINGS, partition_range
from churn_assets.defs.resources import Project


@dg.asset(
    group_name="features",
    kinds={"feast", SETTINGS.online_store.kind},
    owners=OWNERS,
    partitions_def=DAILY,
    backfill_policy=dg.BackfillPolicy.single_run(),
    deps=["customer_features"],
    metadata={"dagster/column_schema": feature_schema(FEATURES)},
    check_specs=[
        dg.AssetCheckSpec(
            "same_as_lake",
            asset="online_features",
            blocking=True,
            description="Customers of the partition, read as the service does, have its values.",
        )
    ],
)
def online_features(
    context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]
) -> dg.MaterializeResult:
    """One row a customer, brought up to the newest partition of the run by Feast.

    Incrementally from what is online; a partition that was computed again is written again. A row
    is never replaced by an older one; one beyond the retention is removed.
    """
    _, last = partition_range(context)
    load = project.feature_repo.materialize(last, cutoff_of(project.data_time()))
    return dg.MaterializeResult(
        metadata={
            "rows": load.rows,
            "rows_purged": load.purged,
            "cutoff_online": load.state.newest_cutoff.isoformat(),
            "feature_service": project.feature_repo.service,
            "store": load.location,
        },
        check_results=[check_outcome(load.same, name="same_as_lake")],
    )
