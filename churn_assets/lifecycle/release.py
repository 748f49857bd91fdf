"""Writing a release: from a judged model to the directory a service serves."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from churn_assets.contract.features import features_named
from churn_assets.contract.release import (
    GOLDEN,
    MANIFEST,
    MODEL,
    Golden,
    Manifest,
    ReferenceStatistics,
    Release,
    ReleaseError,
    encode_manifest,
    read_release,
    release_id_of,
)
from churn_assets.contract.risk import RiskThresholds
from churn_assets.errors import UserError

QUANTILE_LEVELS = np.linspace(0.0, 1.0, 21)


def reference_statistics(
    columns: Mapping[str, ArrayLike], features: Sequence[str]
) -> dict[str, ReferenceStatistics]:
    """What the training rows looked like, by feature: 21 quantiles, 0 %, 5 %, ..., 100 %.

    `columns` maps a feature to its values, as a data frame does. Raises UserError when a feature
    has no values or one that is not finite.
    """
    statistics = {}
    for name in features:
        values = np.asarray(columns[name], dtype=np.float64)
        if not values.size or not np.isfinite(values).all():
            raise UserError(f"no finite reference values for {name}; check the training set")
        statistics[name] = ReferenceStatistics(
            count=int(values.size),
            mean=float(values.mean()),
            std=float(values.std()),
            minimum=float(values.min()),
            maximum=float(values.max()),
            quantiles=tuple(np.quantile(values, QUANTILE_LEVELS).tolist()),
        )
    return statistics


def build_release(
    releases: Path,
    *,
    onnx: bytes,
    model_name: str,
    model_version: str,
    features: Sequence[str],
    golden: tuple[ArrayLike, ArrayLike],
    reference: Mapping[str, ReferenceStatistics],
    mlflow_run: str,
    dagster_run: str,
    data_hash: str,
    created_at: datetime,
    thresholds: RiskThresholds | None = None,
) -> Release:
    """Write a release into `releases / <its id>`, whole or not at all, and read it back.

    `golden` is (X, p): held-out rows of shape (n, features) in the order of `features`, and the n
    probabilities the judged model gave them. An intact release of the same content is kept, with
    the time it was first made. Whether `onnx` computes the golden probabilities is for the service
    to see at its start. Raises ReleaseError when what was written would be refused.
    """
    rows, probabilities = (np.asarray(part, dtype=np.float64) for part in golden)
    files = {
        MODEL: onnx,
        GOLDEN: msgspec.json.encode(
            Golden(tuple(map(tuple, rows.tolist())), tuple(probabilities.tolist()))
        ),
    }
    manifest = Manifest(
        release_id="",
        model_name=model_name,
        model_version=model_version,
        risk=thresholds or RiskThresholds(),
        features=features_named(features),
        reference=dict(reference),
        files={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        mlflow_run=mlflow_run,
        dagster_run=dagster_run,
        data_hash=data_hash,
        created_at=created_at,
    )
    if list(manifest.feature_names) != list(features):
        raise ReleaseError(
            f"features must come in the order {', '.join(manifest.feature_names)}, "
            f"got {', '.join(features)}"
        )
    manifest = msgspec.structs.replace(manifest, release_id=release_id_of(manifest))
    directory = releases / manifest.release_id
    with contextlib.suppress(ReleaseError):
        return read_release(directory)
    releases.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".release-", dir=releases) as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        for name, content in {**files, MANIFEST: encode_manifest(manifest)}.items():
            (made / name).write_bytes(content)
        read_release(made)
        if directory.exists():
            os.rename(directory, Path(scratch) / "damaged")
        os.rename(made, directory)
    return read_release(directory)
