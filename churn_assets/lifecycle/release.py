"""Writing a release: from a judged model to the directory a service serves, and to the registry."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from churn_assets.contract.features import features_named
from churn_assets.contract.pointer import is_release_id
from churn_assets.contract.release import (
    CHALLENGER_GOLDEN,
    CHALLENGER_MODEL,
    GOLDEN,
    MANIFEST,
    MODEL,
    Challenger,
    Golden,
    Manifest,
    ReferenceStatistics,
    Release,
    ReleaseError,
    check_golden,
    encode_manifest,
    read_release,
    release_id_of,
)
from churn_assets.contract.risk import RiskThresholds
from churn_assets.errors import UserError
from churn_assets.lifecycle.registry import LOGGED_MODEL, Version
from churn_assets.modeling.onnx_export import predict_onnx

if TYPE_CHECKING:
    from mlflow import MlflowClient

# On a registered version: the release made of it, the sha256 of its manifest, which has those of
# its files, and the sha256 of the model as MLflow keeps it.
RELEASE_TAG = "release_id"
RELEASE_DIGEST_TAG = "release_sha256"
MODEL_DIGEST_TAG = "model_sha256"

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
        files={name: _sha256(content) for name, content in files.items()},
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
    return _write(releases, manifest, files)


def build_trial_release(
    releases: Path,
    champion: Release,
    challenger: Release,
    *,
    trial: str,
    share: float,
    shadow: bool,
    created_at: datetime,
) -> Release:
    """Write the release of a trial: that of `champion` with the model of `challenger` beside it.

    Customers go to the models by `trial` and `share`. Everything else, features and risk levels
    too, is the champion's, so that a trial changes nothing but the score. As build_release in the
    rest. Raises ReleaseError for a challenger that needs a feature the champion's requests do not
    bring, or defines one differently.
    """
    theirs = {feature.name: feature for feature in champion.manifest.features}
    for feature in challenger.manifest.features:
        if feature.name not in theirs:
            raise ReleaseError(
                f"version {challenger.manifest.model_version} needs {feature.name}, which version "
                f"{champion.manifest.model_version} does not take: requests do not bring it"
            )
        if msgspec.structs.replace(theirs[feature.name], meaning=feature.meaning) != feature:
            raise ReleaseError(
                f"versions {champion.manifest.model_version} and "
                f"{challenger.manifest.model_version} define {feature.name} differently"
            )
    files = {
        MODEL: champion.model,
        GOLDEN: msgspec.json.encode(champion.golden),
        CHALLENGER_MODEL: challenger.model,
        CHALLENGER_GOLDEN: msgspec.json.encode(challenger.golden),
    }
    manifest = msgspec.structs.replace(
        champion.manifest,
        challenger=Challenger(
            trial=trial,
            model_version=challenger.manifest.model_version,
            release_id=challenger.manifest.release_id,
            share=share,
            shadow=shadow,
            features=challenger.manifest.feature_names,
        ),
        files={name: _sha256(content) for name, content in files.items()},
        created_at=created_at,
    )
    manifest = msgspec.structs.replace(manifest, release_id=release_id_of(manifest))
    return _write(releases, manifest, files)


def _write(releases: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Release:
    """Write a release, whole or not at all, unless an intact one is there; read it back."""
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


def store_release(
    client: MlflowClient, run_id: str, source: str, release: Release
) -> dict[str, str]:
    """Keep `release` with the MLflow run that trained its model.

    source: where MLflow keeps the registered model. Returns the tags that hold what the registry
    later has to prove to be: put them on the version in the same step that lets it into Staging.
    Raises UserError when the registered model is not the release's.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        logged = _fetch_model(client, source, Path(folder))
        if onnx.load_model_from_string(logged).SerializeToString() != release.model:
            raise UserError(
                f"the model registered as version {release.manifest.model_version} is not the one "
                "that was judged; train again"
            )
    client.log_artifacts(run_id, str(release.directory), _stored_at(release.manifest.release_id))
    return {
        RELEASE_TAG: release.manifest.release_id,
        RELEASE_DIGEST_TAG: _sha256((release.directory / MANIFEST).read_bytes()),
        MODEL_DIGEST_TAG: _sha256(logged),
    }


def fetch_release(
    client: MlflowClient, version: Version, releases: Path, *, kept: bool = False
) -> Release:
    """The release of a registered version, from the registry, proven to be what was judged.

    The manifest and the registered model have the digests that were noted when the version came
    into Staging, every file has the manifest's, and the model computes the golden predictions. The
    release then lies in `releases / <its id>`. kept: take the one that lies there, when it proves
    to be the same, without asking MLflow for its files. Raises UserError, and then nothing there
    has changed.
    """
    release_id, digest = version.tags.get(RELEASE_TAG), version.tags.get(RELEASE_DIGEST_TAG)
    if not release_id or not digest or not is_release_id(release_id):
        raise UserError(
            f"version {version.version} has no release in the registry: it was registered before "
            "releases were kept there; train again"
        )
    directory = releases / release_id
    try:
        if kept:
            with contextlib.suppress(ReleaseError, OSError):
                return _proven(directory, version, digest)
        releases.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".release-", dir=releases) as scratch:
            found = _fetch_files(client, version, release_id, Path(scratch))
            release = _proven(found, version, digest)
            with contextlib.suppress(ReleaseError, OSError):
                return _proven(directory, version, digest)
            if directory.exists():
                os.rename(directory, Path(scratch) / "damaged")
            os.rename(found, directory)
        return dataclasses.replace(release, directory=directory)
    except ReleaseError as error:
        raise UserError(
            f"version {version.version} must not be served: {error}; another version may be"
        ) from error


def _fetch_files(client: MlflowClient, version: Version, release_id: str, scratch: Path) -> Path:
    """The directory of a release as MLflow keeps it; the registered model is looked at, too."""
    from mlflow.exceptions import MlflowException

    try:
        logged = _fetch_model(client, version.source, scratch / "model")
        found = Path(
            client.download_artifacts(version.run_id or "", _stored_at(release_id), str(scratch))
        )
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the artifacts of version {version.version} cannot be fetched ({reason}); bring them "
            "back, or take another version"
        ) from error
    if _sha256(logged) != version.tags.get(MODEL_DIGEST_TAG):
        raise ReleaseError(
            f"the model in the registry was changed since the gates let version {version.version} "
            "in: its sha256 is another"
        )
    return found


def _fetch_model(client: MlflowClient, source: str, folder: Path) -> bytes:
    import mlflow

    folder.mkdir(parents=True, exist_ok=True)
    if logged := LOGGED_MODEL.fullmatch(source):
        # MLflow would look the model up wherever this process tracks by default.
        source = client.get_logged_model(logged[1]).artifact_location
    found = mlflow.artifacts.download_artifacts(
        artifact_uri=source, dst_path=str(folder), tracking_uri=client.tracking_uri
    )
    return (Path(found) / MODEL).read_bytes()


def _proven(directory: Path, version: Version, digest: str) -> Release:
    release = read_release(directory)
    if _sha256((directory / MANIFEST).read_bytes()) != digest:
        raise ReleaseError(
            f"release {directory.name} was changed since the gates let version {version.version} "
            f"in: {MANIFEST} has another sha256"
        )
    if release.manifest.release_id != directory.name:
        raise ReleaseError(
            f"release {directory.name} is another one: it calls itself "
            f"{release.manifest.release_id[:100]!r}"
        )
    if release.manifest.model_version != version.version:
        raise ReleaseError(
            f"release {directory.name} is of version {release.manifest.model_version}"
        )
    try:
        check_golden(lambda rows: predict_onnx(release.model, rows), release.golden)
    except ReleaseError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class of its own
        raise ReleaseError(f"{MODEL} cannot be run: {str(error).splitlines()[0]}") from error
    return release


def _stored_at(release_id: str) -> str:
    return f"release/{release_id}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
