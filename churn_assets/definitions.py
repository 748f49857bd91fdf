"""The whole map: every asset, check, job, schedule, sensor and resource of the code location."""

import dagster as dg

from churn_assets.defs import (
    alerting,
    deployment,
    evaluation,
    features,
    healing,
    health,
    monitoring,
    online,
    performance,
    prediction_log,
    raw,
    registry,
    serving,
    serving_health,
    training,
    treatment,
    trial,
)
from churn_assets.defs.execution import check_pods, executor_for
from churn_assets.defs.jobs import JOBS
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.progress import progress
from churn_assets.defs.resources import Project, RecordIOManager, mlflow_for
from churn_assets.defs.schedules import SCHEDULES
from churn_assets.defs.sensors import SENSORS
from churn_assets.home import Home

HOME = Home.from_environment()
HOME.check_format()
ASSETS = [
    *raw.RAW_ASSETS,
    features.customer_features,
    features.churn_labels,
    online.online_features,
    training.training_set,
    training.trained_model,
    evaluation.evaluation_report,
    registry.registered_model,
    registry.promotion_decision,
    registry.production_release,
    registry.registry_history,
    serving.churn_bento,
    deployment.deployment,
    monitoring.drift_report,
    trial.trial_report,
    treatment.treatment_report,
    prediction_log.prediction_log,
    healing.feed_health,
    healing.retraining_decision,
    healing.rollback_decision,
    health.health_page,
    alerting.alerts,
    performance.performance_report,
    serving_health.serving_health,
]
STEPS = {asset.key.path[-1] for asset in ASSETS}
check_pods(STEPS | {job.name for job in JOBS})

defs = dg.Definitions(
    assets=ASSETS,
    asset_checks=[alerting.delivered],
    jobs=JOBS,
    schedules=SCHEDULES,
    sensors=[*SENSORS, alerting.alert_sensor],
    resources={
        "project": Project.of(HOME),
        "mlflow": mlflow_for(HOME),
        "io_manager": RecordIOManager(HOME.records),
    },
    loggers={"console": dg.colored_console_logger, "progress": progress},
    # A step is short beside the start of a process; a run is a process of its own anyway.
    executor=executor_for(SETTINGS.runs, STEPS),
)
