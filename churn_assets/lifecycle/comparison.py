"""A candidate beside the version in Production, on the newest labelled customers.

Where some of them were served offers, on those held out from offers: an offer that keeps a customer
makes the version look wrong that saw the customer leaving, and the other one right.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Comparison:
    """What it takes to compare two versions on labelled customers of the lake.

    releases: the folder where fetched releases are kept. horizon_days: of the labels.
    """

    client: MlflowClient
    registry: Registry
    lake: Lake
    releases: Path
    policy: PromotionPolicy
    holdout: Holdout
    horizon_days: int

    def with_incumbent(self, version: str) -> Evidence | str | None:
        """`version` and the one in Production on the test cutoff of the former.

        Neither was fitted on those rows, unless the incumbent is the younger one. Returns why,
        when they cannot be compared, and None when nothing is in Production.
        """
        if self.registry.production is None:
            return None
        candidate = self.registry.version(version)
        try:
            data_hash = candidate.tags.get("data_hash")
            run = self.client.get_run(candidate.run_id) if candidate.run_id else None
            day = run.data.params.get("data_test_cutoff") if run else None
            if not data_hash or not day:
                raise UserError(f"version {version} names no training set or no test cutoff")
            frame = restore_training_set(self.lake, data_hash).to_pandas()
            cutoff = date.fromisoformat(day)
            rows = rows_of(frame, [cutoff])
            return self._replay(
                version, self.registry.production, rows, cutoff, self.policy.min_rows
            )
        except UserError as error:
            return str(error)

    def on_day(self, version: str, former: str, day: date, *, min_rows: int) -> Evidence | str:
        """`version` against `former` on the labelled customers of the feature day `day`.

        A version that has learned from that day is flattered by it, so that this can speak against
        it but not for it. min_rows: with fewer held out, everyone counts. Returns why, when they
        cannot be compared.
        """
        matured = label_partition(day, self.horizon_days)
        try:
            features = self.lake.read(FEATURES_TABLE, day, day).to_pandas()
            labels = self.lake.read(
                LABELS_TABLE, matured, matured, columns=["customer_id", "churned"]
            ).to_pandas()
            rows = features.merge(labels, on="customer_id", validate="one_to_one")
            return self._replay(version, former, rows, day, min_rows)
        except UserError as error:
            return str(error)

    def _replay(
        self, version: str, former: str, rows: pd.DataFrame, day: date, min_rows: int
    ) -> Evidence:
        """Both as they were released, on the customers of a feature day. Raises UserError."""
        kept, population = self._undistorted(rows, day, min_rows)
        scores = [
            _scores(self.client, self.registry.version(one), kept, self.releases)
            for one in (version, former)
        ]
        return paired_replay(
            outcomes(kept),
            *scores,
            incumbent_version=former,
            policy=self.policy,
            population=population,
        )

    def _undistorted(
        self, rows: pd.DataFrame, day: date, min_rows: int
    ) -> tuple[pd.DataFrame, dict[str, float | str]]:
        """The customers of a feature day to compare on, and who they are, for the evidence.

        All of them where none was served an offer since the day itself, whose requests are what
        offers are served on. Else those held out, unless they are fewer than `min_rows`: then all
        of them again, which the figures say.
        """
        cutoff = cutoff_of(day)
        until = label_window(cutoff, self.horizon_days).end
        treated = offered_between(self.lake, cutoff - timedelta(days=1), until)
        offered = int(rows["customer_id"].isin(treated).sum())
        if not offered:
            return rows, {}
        held_out = rows[rows["customer_id"].map(self.holdout.membership()).astype(bool)]
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
