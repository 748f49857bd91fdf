"""Training: an exact training set, then the model that did best in a backtest, calibrated."""

from datetime import date
from typing import Any, Literal

import dagster as dg
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from churn_assets.data.checks import CheckResult
from churn_assets.data.gate import judge_data
from churn_assets.data.leaks import check_training_rows
from churn_assets.data.training_set import (
    TrainingSet,
    assemble_training_set,
    keep_rows,
    replace_values,
    restore_training_set,
    store_training_set,
)
from churn_assets.data.windows import partition_of_cutoff
from churn_assets.defs.features import FEATURES
from churn_assets.defs.metadata import (
    backtest_table,
    candidates_table,
    check_outcome,
    day_list,
    figures_table,
    sample,
    training_schema,
)
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.defs.weekly import REASON, stop_unless_first
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.records import TrainingSetRecord
from churn_assets.lifecycle.registry import WITHOUT_TAG
from churn_assets.lifecycle.tracking import TrialLog, log_trained_model, log_training_set
from churn_assets.modeling.onnx_export import check_parity, export_onnx
from churn_assets.modeling.plausibility import judge_single_features
from churn_assets.modeling.rows import rows_of
from churn_assets.modeling.split import Split, recent_split, temporal_split
from churn_assets.modeling.training import fit

GROUP = "training"
OWNERS = [f"team:{SETTINGS.team}"]


class Retrain(dg.Config):
    """How to train; without anything, on the history, as the schedule does.

    plan: `history` (parts split by time) or `recent` (the newest labels, parts split by customers).
    until: the last feature day to learn from. without: features to do without, whose feed is
    broken. decision: what asked for it.
    """

    plan: Literal["history", "recent"] = "history"
    until: str | None = None
    without: list[str] = Field(default_factory=list)
    decision: str | None = None


def split_of(record: TrainingSetRecord) -> Split:
    """The split a training set was assembled for."""
    return Split(
        record.train,
        record.calibration,
        record.test,
        SETTINGS.windows.horizon_days,
        by_customers=record.plan == "recent",
    )


def next_split(project: Project, config: Retrain | None = None) -> Split:
    """The split that a training started now has, on days that no fault of a feed has touched.

    Raises UserError when there is too little data.
    """
    config = config or Retrain()
    days = project.sound_days(project.labelled_days(), without=config.without)
    if config.until is not None:
        days = [day for day in days if day <= date.fromisoformat(config.until)]
    split = recent_split if config.plan == "recent" else temporal_split
    return split(
        days,
        SETTINGS.windows.horizon_days,
        max_train_cutoffs=SETTINGS.training.max_train_cutoffs,
    )


def as_trained_on(project: Project, assembled: TrainingSet, split: Split, config: Retrain):
    """The assembled rows as this training takes them: each customer in one part where the plan says
    so, and the features of a broken feed with the values it gives now."""
    table = assembled.table
    days = [partition_of_cutoff(cutoff) for cutoff in table["cutoff"].to_pylist()]
    customers = table["customer_id"].to_pylist()
    if split.by_customers:
        kept = np.zeros(len(days), dtype=np.bool_)
        for day in split.days:
            of_day = np.array([d == day for d in days])
            kept[of_day] = split.takes(day, [customers[i] for i in np.flatnonzero(of_day)])
        assembled = keep_rows(assembled, kept)
    if config.without:
        newest = project.lake.days("customer_features")[-1]
        now = project.lake.read("customer_features", newest, newest, columns=config.without)
        drawn = np.random.default_rng(SETTINGS.seed).integers(
            0, now.num_rows, assembled.table.num_rows
        )
        values = {name: now[name].take(pa.array(drawn)) for name in config.without}
        assembled = replace_values(assembled, values)
    return assembled


def judge_next_training_set(project: Project) -> CheckResult:
    """The data gate on the rows that a training started now would have."""
    days = next_split(project).days
    with project.local_engine() as con:
        assembled = assemble_training_set(project.lake, con, days, SETTINGS.windows, FEATURES)
    gate = judge_data(assembled.table, FEATURES, SETTINGS.data_gate)
    if assembled.complete.passed:
        return gate
    return CheckResult(False, f"{assembled.complete.reason}; {gate.reason}", gate.figures)


@dg.asset(
    group_name=GROUP,
    kinds={"feast", "parquet", "mlflow"},
    owners=OWNERS,
    deps=["customer_features", "churn_labels"],
    metadata={"dagster/column_schema": training_schema(FEATURES)},
    check_specs=[
        dg.AssetCheckSpec(
            "data_gate",
            asset="training_set",
            blocking=True,
            description=(
                f"At least {SETTINGS.data_gate.min_rows:,} rows, at most "
                f"{SETTINGS.data_gate.max_null_ratio:.0%} nulls in a column, and the schema."
            ),
        ),
        dg.AssetCheckSpec(
            "no_row_lost",
            asset="training_set",
            blocking=True,
            description="Every feature row found its label, and every label its features.",
        ),
        dg.AssetCheckSpec(
            "known_at_cutoff",
            asset="training_set",
            blocking=True,
            description=(
                "At every cutoff the rows follow from the events before it alone: recomputed "
                "another way, for up to 20,000 customers of each."
            ),
        ),
        dg.AssetCheckSpec(
            "no_feature_too_good",
            asset="training_set",
            blocking=True,
            description=(
                f"No feature by itself has an AUC above {SETTINGS.data_gate.max_feature_auc:g}, "
                "on all rows or on those of a cutoff."
            ),
        ),
    ],
)
def training_set(
    context: dg.AssetExecutionContext,
    config: Retrain,
    project: dg.ResourceParam[Project],
    mlflow: dg.ResourceParam[Any],
):
    """The rows a model is trained and judged on: labels, and Feast's features as of then.

    The newest labelled cutoff judges, the one a horizon before it calibrates, those before train;
    a training that cannot wait is split by customers instead. Days that a fault of a feed has
    touched are left out. The set is kept under its content hash, so that `churn training-set` can
    bring it back.
    """
    stop_unless_first(context.instance, context.run)
    split = next_split(project, config)
    names = [feature.name for feature in FEATURES]
    with project.local_engine() as con:
        assembled = assemble_training_set(
            project.lake,
            con,
            split.days,
            SETTINGS.windows,
            FEATURES,
            retrieve=project.feature_repo.training_rows,
            feature_service=project.feature_repo.service,
        )
    known = check_training_rows(
        project.lake,
        assembled.table,
        SETTINGS.raw_tables,
        split.days,
        SETTINGS.windows,
        data_start=SETTINGS.calendar.start,
    )
    assembled = as_trained_on(project, assembled, split, config)
    record = TrainingSetRecord(
        data_hash=assembled.data_hash,
        rows=assembled.table.num_rows,
        churn_rate=pc.mean(assembled.table["churned"]).as_py(),
        features=tuple(names),
        train=split.train,
        calibration=split.calibration,
        test=split.test,
        plan=config.plan,
        without=tuple(config.without),
        decision=config.decision,
        at=project.now(),
    )
    store_training_set(project.lake, assembled)
    log_training_set(mlflow, record, msgspec.json.encode(assembled.manifest))
    gate = judge_data(assembled.table, FEATURES, SETTINGS.data_gate)
    plausible = judge_single_features(
        assembled.table.to_pandas(), names, SETTINGS.data_gate.max_feature_auc
    )
    return dg.MaterializeResult(
        value=record,
        data_version=dg.DataVersion(record.data_hash),
        metadata={
            "dagster/row_count": record.rows,
            "churn_rate": record.churn_rate,
            "data_hash": record.data_hash,
            "feature_service": project.feature_repo.service,
            "train_cutoffs": day_list(record.train),
            "calibration_cutoff": record.calibration.isoformat(),
            "test_cutoff": record.test.isoformat(),
            "plan": record.plan,
            "without": ", ".join(record.without) or "no feature",
            "sample": sample(assembled.table),
        },
        check_results=[
            check_outcome(gate, name="data_gate"),
            check_outcome(assembled.complete, name="no_row_lost"),
            check_outcome(known, name="known_at_cutoff"),
            check_outcome(plausible, name="no_feature_too_good"),
        ],
    )


@dg.asset(
    group_name=GROUP,
    kinds={"scikitlearn", "onnx", "mlflow"},
    owners=OWNERS,
    check_specs=[
        dg.AssetCheckSpec(
            "onnx_parity",
            asset="trained_model",
            blocking=True,
            description="ONNX answers as scikit-learn does, within 1e-5 on held-out rows.",
        )
    ],
)
def trained_model(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    mlflow: dg.ResourceParam[Any],
    training_set: TrainingSetRecord,
):
    """The best found of three families in a rolling-origin backtest, calibrated, as ONNX too.

    It enters the registry in stage None. Only the ONNX form is ever served, and only when it
    answers as scikit-learn does.
    """
    split = split_of(training_set)
    frame = restore_training_set(project.lake, training_set.data_hash).to_pandas()
    trained = fit(
        # What never changes is learned from by none of the families.
        frame.assign(**dict.fromkeys(training_set.without, 0)),
        split,
        training_set.features,
        seed=SETTINGS.seed,
        policy=SETTINGS.training,
        progress=context.log.info,
        on_trial=TrialLog(project.mlflow_client(), mlflow.active_run().info.run_id),
    )
    onnx = export_onnx(trained.estimator, len(training_set.features))
    held_out = rows_of(frame, [split.test])[list(training_set.features)].to_numpy(dtype=float)
    parity = check_parity(trained.estimator, onnx, held_out)
    record = log_trained_model(
        mlflow,
        project.mlflow_client(),
        trained,
        onnx,
        parity=parity,
        name=SETTINGS.model_name,
        training_set=training_set,
        dagster_run=context.run_id,
        tags={
            "team": SETTINGS.team,
            "use_case": SETTINGS.use_case,
            "retrain_reason": context.run.tags.get(REASON, "by hand in Dagster"),
            WITHOUT_TAG: ",".join(training_set.without),
        },
        project_root=PROJECT_ROOT,
    )
    return dg.MaterializeResult(
        value=record,
        metadata={
            "version": record.version,
            "family": record.family,
            "why": trained.reason,
            "candidates": candidates_table(trained),
            "backtest": backtest_table(trained),
            "calibration": figures_table([trained.calibration.to_dict()]),
            "mlflow_run": dg.MetadataValue.url(project.mlflow_run_url(record.mlflow_run)),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="onnx_parity",
                passed=parity.passed,
                description=parity.reason,
                metadata={"rows": parity.rows, "tolerance": parity.tolerance},
            )
        ],
    )
