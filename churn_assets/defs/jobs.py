"""The jobs: what a schedule, a sensor or a person starts."""

import dagster as dg

from churn_assets.defs.partitions import SETTINGS

# Two runs that train at once would judge themselves against the same incumbent. One that refreshes
# data needs what the one before it wrote, so these wait for each other too, in order.
EXCLUSIVE = {"churn/exclusive": "training"}

daily_refresh = dg.define_asset_job(
    "daily_refresh",
    selection=dg.AssetSelection.assets(
        *SETTINGS.raw_tables, "customer_features", "churn_labels", "online_features"
    ),
    tags={"churn/exclusive": "data"},
    description="A day's events, its features, also online, and the labels that mature with it.",
)
training = dg.define_asset_job(
    "training",
    selection=dg.AssetSelection.assets(
        "training_set",
        "trained_model",
        "evaluation_report",
        "registered_model",
        "registry_history",
    ),
    tags=EXCLUSIVE,
    description="Train on what has matured, judge once, and register what passes the gates.",
)
build_bento = dg.define_asset_job(
    "build_bento",
    selection=dg.AssetSelection.assets("churn_bento"),
    # The sensor asks once a version, also when the run it asked for was stopped in the middle.
    tags={"dagster/max_retries": "2"},
    description="Package the version in Staging for serving.",
)
drift = dg.define_asset_job(
    "drift",
    selection=dg.AssetSelection.assets("drift_report"),
    description="Compare the last seven days of features with what the model was trained on.",
)

JOBS = [daily_refresh, training, build_bento, drift]
