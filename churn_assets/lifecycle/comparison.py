"""A candidate beside the version in Production, on the newest labelled customers."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from churn_assets.data.lake import Lake
from churn_assets.data.training_set import restore_training_set
from churn_assets.errors import UserError
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.promotion import PromotionPolicy, paired_replay
from churn_assets.lifecycle.registry import Registry
from churn_assets.lifecycle.release import fetch_release
from churn_assets.modeling.onnx_export import predict_onnx
from churn_assets.modeling.rows import feature_matrix, outcomes, rows_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


def compare_with_incumbent(
    client: MlflowClient,
    lake: Lake,
    registry: Registry,
    version: str,
    releases: Path,
    policy: PromotionPolicy,
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
        rows = rows_of(frame, [date.fromisoformat(day)])
        scores = []
        for compared in (candidate, incumbent):
            release = fetch_release(client, compared, releases, kept=True)
            names = release.manifest.feature_names
            if missing := [name for name in names if name not in rows]:
                raise UserError(
                    f"version {compared.version} needs {missing[0]}, which the rows do not have"
                )
            scores.append(predict_onnx(release.model, feature_matrix(rows, names)))
    except UserError as error:
        return str(error)
    return paired_replay(
        outcomes(rows), *scores, incumbent_version=incumbent.version, policy=policy
    )
