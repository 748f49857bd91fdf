"""What drift is measured from: the rows the model in Production was trained on, and its answers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from churn_assets.data.lake import Lake
from churn_assets.data.training_set import read_manifest, restore_training_set
from churn_assets.errors import UserError
from churn_assets.lifecycle.incumbent import production_model
from churn_assets.lifecycle.registry import read_registry
from churn_assets.lifecycle.release import RELEASE_TAG
from churn_assets.modeling.onnx_export import predict_onnx
from churn_assets.modeling.rows import rows_of
from churn_assets.monitoring.drift import DriftPolicy, DriftReport, drift_report

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Reference:
    """The version in Production and its training rows: customer_id, cutoff, features, churned.

    train: the feature days of those rows, oldest first. onnx: the released model, None when it
    cannot be had, and `problem` says why.
    """

    version: str
    release_id: str | None
    data_hash: str
    features: tuple[str, ...]
    train: tuple[date, ...]
    rows: pd.DataFrame
    onnx: bytes | None
    problem: str | None = None

    def predictions(self, rows: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """P(churn) of the `rows` that have every feature, and which ones those are [rows].

        The model must be there. A row without a column or a value has no prediction.
        """
        assert self.onnx is not None, self.problem
        if not set(self.features) <= set(rows.columns):
            return np.empty(0), np.zeros(len(rows), np.bool_)
        values = rows[list(self.features)].to_numpy(dtype=np.float64, na_value=np.nan)
        with np.errstate(over="ignore"):
            known = np.isfinite(values.astype(np.float32)).all(axis=1)
        if not known.any():
            return np.empty(0), known
        return predict_onnx(self.onnx, values[known]), known

    def drift(self, policy: DriftPolicy) -> DriftReport | None:
        """The newest training cutoff against the oldest: what drifts there is no steady yardstick.

        None where the model was trained on one cutoff.
        """
        if len(self.train) < 2:
            return None
        oldest, newest = (rows_of(self.rows, [self.train[place]]) for place in (0, -1))
        return drift_report(oldest, newest, self.features, policy)


def production_reference(
    client: MlflowClient, name: str, lake: Lake, releases: Path
) -> Reference | None:
    """The reference of what is in Production now; None when nothing is.

    Raises UserError when the version does not say what it was trained on, or that is gone.
    """
    model = production_model(client, name, releases)
    if model is None:
        return None
    version = read_registry(client, name).version(model.version)
    data_hash = version.tags.get("data_hash")
    params = client.get_run(version.run_id).data.params if version.run_id else {}
    cutoffs = params.get("data_train_cutoffs")
    if not data_hash or not cutoffs:
        raise UserError(
            f"version {model.version} of {name} does not say which rows it was trained on "
            "(tag data_hash, parameter data_train_cutoffs of its run); train and promote another"
        )
    train = tuple(date.fromisoformat(day) for day in cutoffs.split(","))
    return Reference(
        version=model.version,
        release_id=version.tags.get(RELEASE_TAG),
        data_hash=data_hash,
        features=model.features or read_manifest(lake, data_hash).features,
        train=train,
        rows=rows_of(restore_training_set(lake, data_hash).to_pandas(), train),
        onnx=model.onnx,
        problem=model.problem,
    )
