"""Deployment: the bento in Production, put where the settings say and seen to serve there."""

import dagster as dg

from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project
from churn_assets.lifecycle.deployment import deploy
from churn_assets.lifecycle.records import BentoRecord
from churn_assets.monitoring.service_samples import take_sample

TARGET = SETTINGS.deployment.target


@dg.asset(
    group_name="serving",
    kinds={"bentoml"} if TARGET == "local" else {TARGET},
    owners=[f"team:{SETTINGS.team}"],
)
def deployment(project: dg.ResourceParam[Project], churn_bento: BentoRecord):
    """What is in Production where it serves: this home, a container engine or a cluster.

    A promotion, a rollback and `churn deploy` all end here. What does not come to serve fails this
    asset with the reason, and what served before goes on serving.
    """
    settings = project.settings
    held_out = settings.holdout.environment()
    record = deploy(churn_bento, project.home, settings.deployment, environment=held_out)
    # What this release answers is told apart from what was answered before it.
    take_sample(project.home, project.now(), settings.serving_health.url)
    metadata = {
        "target": record.target,
        "release": record.release_id,
        "bento": record.bento,
        "said": record.said,
        "image": record.image,
        "digest": record.digest,
        "previous": record.previous,
        "seconds": record.seconds,
        "seconds_away": record.seconds_away,
    }
    return dg.MaterializeResult(
        value=record,
        metadata={name: value for name, value in metadata.items() if value is not None},
    )
