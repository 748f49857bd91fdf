"""The registry behind an MLflow server: no database at hand, artifacts through the server."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from registry_cases import BOOTSTRAP, NOW, Model
from tracking import tracking_server

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.errors import UserError
from churn_assets.lifecycle.registry import register_version
from churn_assets.lifecycle.release import (
    build_release,
    fetch_release,
    reference_statistics,
    store_release,
)
from churn_assets.lifecycle.serving import free_port
from churn_assets.modeling.onnx_export import export_onnx


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Generator[MlflowClient]:
    folder = tmp_path_factory.mktemp("server")
    url = f"http://127.0.0.1:{(port := free_port())}"
    with tracking_server(folder, port):
        yield MlflowClient(url)


def logged_in(client: MlflowClient, onnx: bytes) -> tuple[str, str]:
    """The run and the URI of a model that a training has logged."""
    with warnings.catch_warnings():
        # MLflow's own, about its imports.
        warnings.simplefilter("ignore")
        import mlflow.onnx
        from onnx import load_model_from_string

        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(client.tracking_uri)
        try:
            with mlflow.start_run() as run:
                logged = mlflow.onnx.log_model(
                    load_model_from_string(onnx), name="onnx", pip_requirements=["onnxruntime"]
                )
        finally:
            mlflow.set_tracking_uri(before)
    return run.info.run_id, logged.model_uri


def test_a_version_goes_its_way_behind_a_server(remote: MlflowClient, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    rows = np.random.default_rng(0).integers(0, 30, (200, len(FEATURE_NAMES))).astype(np.float32)
    estimator = LogisticRegression(max_iter=1000).fit(rows, rows[:, 2] > rows[:, 0])
    onnx = export_onnx(estimator, len(FEATURE_NAMES))
    (run_id, source), name = logged_in(remote, onnx), "churn"
    version = register_version(
        remote, name, model_uri=source, run_id=run_id, tags={"family": "logistic"}
    )
    release = build_release(
        tmp_path / "trained",
        onnx=onnx,
        model_name=name,
        model_version=version,
        features=FEATURE_NAMES,
        golden=(rows[:10], estimator.predict_proba(rows[:10])[:, 1]),
        reference=reference_statistics(
            {feature: rows[:, i] for i, feature in enumerate(FEATURE_NAMES)}, FEATURE_NAMES
        ),
        mlflow_run=run_id,
        dagster_run="run",
        data_hash="hash",
        created_at=NOW,
    )
    model = Model(remote, name, run_id, source)
    model.move(version, "Staging", tags=store_release(remote, run_id, source, release))
    # Another machine has nothing but the registry.
    fetched = fetch_release(remote, model.read().version(version), tmp_path / "elsewhere")
    assert fetched.directory == tmp_path / "elsewhere" / release.manifest.release_id
    assert (fetched.manifest, fetched.model) == (release.manifest, release.model)
    registered = model.read().version(version)
    for tags, says in (
        ({"release_sha256": "0" * 64}, r"manifest\.json has another sha256"),
        ({"model_sha256": "0" * 64}, "the model in the registry was changed"),
        ({"release_id": ""}, "has no release in the registry"),
        ({"release_id": "../elsewhere"}, "has no release in the registry"),
        ({"release_id": "v1-000000000000"}, "cannot be fetched"),
    ):
        changed = dataclasses.replace(registered, tags=registered.tags | tags)
        with pytest.raises(UserError, match=says):
            fetch_release(remote, changed, tmp_path / "nowhere")
    assert list((tmp_path / "nowhere").iterdir()) == []
    # One that is at hand and proves to be the same needs no server; one that does not is replaced.
    (fetched.directory / "model.onnx").write_bytes(b"half")
    again = fetch_release(remote, registered, tmp_path / "elsewhere", kept=True)
    assert again.model == release.model
    nobody = MlflowClient("http://127.0.0.1:9")
    assert fetch_release(nobody, registered, tmp_path / "elsewhere", kept=True) == again

    model.promote()
    with pytest.raises(UserError, match="must be compared with it"):
        model.move(version, "Production", who="ada", evidence=BOOTSTRAP)
    assert model.stages() == {version: "Staging", "2": "Production"}
    assert model.read().faults() == []
    leases = remote.search_registered_models("name LIKE 'churn.lock.%'")
    assert [lease.tags["expires"] for lease in leases] == ["0"]
