"""A candidate beside the version in Production, on the newest labelled customers.

Where some of them were served offers, on those held out from offers: an offer that keeps a customer
makes the version look wrong that saw the customer leaving, and the other one right.
"""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from churn_assets.contract.holdout import Holdout
from churn_assets.data.lake import Lake
from churn_assets.data.offers import offered_between
from churn_assets.data.training_set import FEATURES_TABLE, LABELS_TABLE, restore_training_set
from churn_assets.data.windows import cutoff_of, label_partition, label_window
from churn_assets.errors import UserError
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.promotion import PromotionPolicy, paired_replay
from churn_assets.lifecycle.registry import Registry, Version
from churn_assets.lifecycle.release import fetch_release
from churn_assets.modeling.onnx_export import ModelFails, predict_onnx
from churn_assets.modeling.rows import feature_matrix, outcomes, rows_of

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient


def compare_with_incumbent(
    client: MlflowClient,
    lake: Lake,
    registry: Registry,
    version: str,
    releases: Path,
    policy: PromotionPolicy,
    horizon_days: int,
    holdout: Holdout,
) -> Evidence | str | None:
    """`version` and the one in Production on the test cutoff of the former, as both are released.

    Neither was fitted on those rows, unless the incumbent is the younger one. Returns why, when
    they cannot be compared, and None when nothing is in Production.
    """
    if registry.production is None:
        return None
    candidate, incumbent = registry.version(version), registry.version(registry.production)
    try:
        data_hash = candidate.tags.get("data_hash")
        params = client.get_run(candidate.run_id).data.params if candidate.run_id else {}
        day = params.get("data_test_cutoff")
        if not data_hash or not day:
            raise UserError(f"version {version} names no training set or no test cutoff")
        frame = restore_training_set(lake, data_hash).to_pandas()
        cutoff = date.fromisoformat(day)
        rows, population = _undistorted(
            lake, rows_of(frame, [cutoff]), cutoff, horizon_days, holdout, policy.min_rows
        )
        scores = [_scores(client, one, rows, releases) for one in (candidate, incumbent)]
    except UserError as error:
        return str(error)
    return paired_replay(
        outcomes(rows),
        *scores,
        incumbent_version=incumbent.version,
        policy=policy,
        population=population,
    )


def replay_on_day(
    client: MlflowClient,
    lake: Lake,
    registry: Registry,
    version: str,
    former: str,
    day: date,
    horizon_days: int,
    releases: Path,
    policy: PromotionPolicy,
    holdout: Holdout,
    min_rows: int,
) -> Evidence | str:
    """`version` against `former` on the labelled customers of the feature day `day`.

    A version that has learned from that day is flattered by it, so that this can speak against it
    but not for it. min_rows: fewer are no evidence. Returns why, when they cannot be compared.
    """
    matured = label_partition(day, horizon_days)
    try:
        features = lake.read(FEATURES_TABLE, day, day).to_pandas()
        labels = lake.read(
            LABELS_TABLE, matured, matured, columns=["customer_id", "churned"]
        ).to_pandas()
        rows, population = _undistorted(
            lake,
            features.merge(labels, on="customer_id", validate="one_to_one"),
            day,
            horizon_days,
            holdout,
            min_rows,
        )
        scores = [
            _scores(client, registry.version(one), rows, releases) for one in (version, former)
        ]
    except UserError as error:
        return str(error)
    return paired_replay(
        outcomes(rows), *scores, incumbent_version=former, policy=policy, population=population
    )


def _undistorted(
    lake: Lake,
    rows: pd.DataFrame,
    day: date,
    horizon_days: int,
    holdout: Holdout,
    min_rows: int,
) -> tuple[pd.DataFrame, dict[str, float | str]]:
    """The customers of a feature day to compare on, and who they are, as figures of the evidence.

    All of them where none was served an offer since the day itself, whose requests are what offers
    are served on. Else those held out, unless they are fewer than `min_rows`: then all of them
    again, which the figures say.
    """
    cutoff = cutoff_of(day)
    until = label_window(cutoff, horizon_days).end
    treated = offered_between(lake, cutoff - timedelta(days=1), until)
    offered = int(rows["customer_id"].isin(treated).sum())
    if not offered:
        return rows, {}
    held_out = rows[rows["customer_id"].map(holdout.membership()).astype(bool)]
    enough = len(held_out) >= min_rows
    figures: dict[str, float | str] = {
        "population": "held out" if enough else "everyone",
        "offered": offered,
        "held_out": len(held_out),
    }
    return (held_out if enough else rows), figures


def _scores(
    client: MlflowClient, version: Version, rows: pd.DataFrame, releases: Path
) -> NDArray[np.float64]:
    """P(churn) [rows] by a version as it was released. Raises UserError."""
    release = fetch_release(client, version, releases, kept=True)
    names = release.manifest.feature_names
    if missing := [name for name in names if name not in rows]:
        raise UserError(f"version {version.version} needs {missing[0]}, which the rows do not have")
    try:
        return predict_onnx(release.model, feature_matrix(rows, names))
    except ModelFails as error:
        raise UserError(f"version {version.version}: {error}") from error
