"""The jobs: what a schedule, a sensor or a person starts."""

import dagster as dg

from churn_assets.defs.execution import asset_job, pod_tags
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.lifecycle.cleaning import clean, plan_cleaning
from churn_assets.lifecycle.registry import read_registry

# Two runs that train at once would judge themselves against the same incumbent. One that refreshes
# data needs what the one before it wrote, so these wait for each other too, in order.
EXCLUSIVE = {"churn/exclusive": "training"}
# A run whose process was killed is tried again. One that a step failed is not, where it is a gate
# that refuses: it would refuse again. What only reads from a source or a server may find it back.
# A person's rollback or trial is left alone: the registry may have changed before the kill, and
# doing it again would go one version further.
TRIED_AGAIN = {"dagster/max_retries": "2"}
IF_KILLED = TRIED_AGAIN | {"dagster/retry_on_asset_or_op_failure": "false"}

daily_refresh = asset_job(
    "daily_refresh",
    selection=dg.AssetSelection.assets(
        *SETTINGS.raw_tables, "customer_features", "churn_labels", "online_features"
    ),
    tags={"churn/exclusive": "data"} | TRIED_AGAIN,
    description="A day's events, its features, also online, and the labels that mature with it.",
)
training = asset_job(
    "training",
    selection=dg.AssetSelection.assets(
        "training_set",
        "trained_model",
        "evaluation_report",
        "registered_model",
        "promotion_decision",
        "registry_history",
    ),
    # From the beginning: a model and its evaluation belong to one run, in MLflow as well.
    tags=EXCLUSIVE | IF_KILLED | {"dagster/retry_strategy": "ALL_STEPS"},
    description="Train on what has matured, judge once, and register what passes the gates.",
)
# What brings a version into service; everything but the decision.
_INTO_SERVICE = ("production_release", "churn_bento", "deployment", "registry_history")
_ONE_PROMOTION = {"churn/exclusive": "promotion"}
# A person waits for these.
_URGENT = {"dagster/priority": "10"}

promotion = asset_job(
    "promotion",
    selection=dg.AssetSelection.assets(*_INTO_SERVICE),
    # The sensor asks once a decision, also when the run it asked for was stopped in the middle.
    tags=TRIED_AGAIN | _ONE_PROMOTION,
    description="Carry out the latest decision, package what is in Production and deploy it.",
)
approve_promotion = asset_job(
    "approve_promotion",
    selection=dg.AssetSelection.assets("promotion_decision", *_INTO_SERVICE),
    config={"ops": {"promotion_decision": {"config": {"who": "", "why": ""}}}},
    tags=_ONE_PROMOTION | _URGENT | IF_KILLED,
    description=(
        "A person puts the version in Staging into Production: who, why, and the version when it "
        "is not the newest."
    ),
)
# Nothing keeps it waiting: it belongs to no group of runs that go one after the other.
rollback = asset_job(
    "rollback",
    selection=dg.AssetSelection.assets(*_INTO_SERVICE),
    config={"ops": {"production_release": {"config": {"who": "", "why": ""}}}},
    tags=_URGENT,
    description=(
        "Take the version in Production back: who, why, and to which version when it is not the "
        "last known good one."
    ),
)
start_trial = asset_job(
    "start_trial",
    selection=dg.AssetSelection.assets(*_INTO_SERVICE),
    config={
        "ops": {"production_release": {"config": {"what": "start_trial", "who": "", "why": ""}}}
    },
    tags=_ONE_PROMOTION,
    description=(
        "Put a version in Staging on trial beside the one in Production: who, why, and the version "
        "when it is not the newest; share and shadow when they are not those of the settings."
    ),
)
stop_trial = asset_job(
    "stop_trial",
    selection=dg.AssetSelection.assets(*_INTO_SERVICE),
    config={
        "ops": {"production_release": {"config": {"what": "stop_trial", "who": "", "why": ""}}}
    },
    tags=_URGENT,
    description="End the trial that is going on: who and why. The version stays in Staging.",
)
drift = asset_job(
    "drift",
    selection=dg.AssetSelection.assets("drift_report"),
    tags={"churn/exclusive": "monitoring"} | IF_KILLED,
    description="Compare the last days' requests with what the model in Production learned from.",
)
# Where trials are the evidence, a report is followed by the decision.
_JUDGED = ("promotion_decision",) if SETTINGS.promotion.evidence == "trial" else ()
trial = asset_job(
    "trial",
    selection=dg.AssetSelection.assets("trial_report", *_JUDGED),
    tags={"churn/exclusive": "monitoring"},
    description="Judge the version on trial by what has become known of its predictions.",
)
treatment = asset_job(
    "treatment",
    selection=dg.AssetSelection.assets("treatment_report"),
    tags={"churn/exclusive": "monitoring"},
    description="Compare the customers nobody treats with the others.",
)
performance = asset_job(
    "performance",
    selection=dg.AssetSelection.assets("performance_report"),
    tags={"churn/exclusive": "monitoring"} | IF_KILLED,
    description="Hold the version in Production against what has become known of its predictions.",
)
watch_service = asset_job(
    "watch_service",
    selection=dg.AssetSelection.assets("serving_health"),
    tags={"churn/exclusive": "serving_health"},
    description="Look at the latency, the errors and the volume of the service.",
)
# What is not there yet is there an hour later; two passes at once would refuse each other.
# A job may not be called like an asset: a code server would refuse both.
ingest_predictions = asset_job(
    "ingest_predictions",
    selection=dg.AssetSelection.assets("prediction_log"),
    tags={"churn/exclusive": "prediction_log"} | TRIED_AGAIN,
    description="Bring what services answered from their log into the lake.",
)


decisions = asset_job(
    "decisions",
    selection=dg.AssetSelection.assets("feed_health", "retraining_decision", "rollback_decision"),
    tags={"churn/exclusive": "monitoring"} | IF_KILLED,
    description="Decide whether to retrain and whether to roll back; sensors carry it out.",
)
health = asset_job(
    "health",
    selection=dg.AssetSelection.assets("health_page"),
    tags={"churn/exclusive": "health"},
    description="Draw the page with every metric over time, what was decided, and what is open.",
)


class Clean(dg.Config):
    """dry_run: only say what would go."""

    dry_run: bool = False


@dg.op(out=dg.Out(dg.Nothing))
def remove_old_versions(
    context: dg.OpExecutionContext, config: Clean, project: dg.ResourceParam[Project]
) -> None:
    """Versions archived for long enough, with their releases and bentos; nothing in use."""
    client, name, policy = project.mlflow_client(), SETTINGS.model_name, SETTINGS.registry
    if config.dry_run:
        cleaning = plan_cleaning(
            read_registry(client, name), policy, project.home, now=project.now()
        )
    else:
        cleaning = clean(client, name, policy, project.home, now=project.now())
    for line in cleaning.lines():
        context.log.info("%s%s", "would go: " if config.dry_run else "", line)
    context.add_output_metadata(
        {
            "versions": ", ".join(cleaning.versions) or "none",
            "directories": len(cleaning.files),
            "kept": dict(cleaning.kept),
        }
    )


@dg.job(
    tags=_ONE_PROMOTION | pod_tags("clean_archive"),
    description="Remove versions archived for long enough, with their releases and bentos.",
)
def clean_archive() -> None:
    """See the description."""
    remove_old_versions()


JOBS = [
    daily_refresh,
    training,
    promotion,
    approve_promotion,
    rollback,
    start_trial,
    stop_trial,
    drift,
    ingest_predictions,
    trial,
    decisions,
    treatment,
    performance,
    watch_service,
    health,
    clean_archive,
]
