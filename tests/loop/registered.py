"""A home whose versions were registered as the pipeline registers them, without its runs."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from command import churn

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.release import Release
from churn_assets.data.checks import CheckResult
from churn_assets.data.lake import content_hash, open_lake
from churn_assets.data.training_set import TrainingSet, TrainingSetManifest, store_training_set
from churn_assets.data.windows import cutoff_of
from churn_assets.home import Home
from churn_assets.lifecycle.experiments import ensure_experiment
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.registry import PIPELINE, read_registry, register_version, transition
from churn_assets.lifecycle.release import build_release, reference_statistics, store_release
from churn_assets.modeling.onnx_export import export_onnx

PATIENCE_S = 120
TEST_DAY = date(2024, 6, 1)
NOW = datetime(2024, 7, 1, tzinfo=UTC)
CUSTOMER = {
    "customer_id": "c-1",
    "total_orders_30d": 20,
    "avg_order_value": 10.0,
    "days_since_last_order": 2,
    "support_tickets_90d": 1,
    "login_frequency_7d": 5.0,
}


@dataclass
class Shop:
    """A home with a registry, and the service that serves what is in Production there."""

    home: Home
    config: Path
    port: int
    releases: dict[str, Release] = field(default_factory=dict)

    def churn(self, *arguments: str) -> Any:
        return churn(self.home.root, self.config, *arguments)

    def get(self, path: str, body: dict | None = None) -> dict:
        url = f"http://127.0.0.1:{self.port}{path}"
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read())

    def until_served(self, version: str) -> dict:
        """The prediction of the service once it is of `version`."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with suppress(OSError, urllib.error.URLError):
                answer = self.get("/predict", CUSTOMER)
                if answer["model_version"] == version:
                    return answer
            time.sleep(0.05)
        pytest.fail(f"version {version} is not served")

    def read(self) -> Any:
        return read_registry(self.client(), "churn")

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.home.mlflow_uri)

    def register(self, *, good: bool) -> str:
        """A version in Staging, registered as the pipeline does; a bad one has it backwards."""
        from sklearn.linear_model import LogisticRegression

        rng = np.random.default_rng(len(self.releases))
        rows = rng.integers(0, 30, (800, len(FEATURE_NAMES))).astype(np.float32)
        churned = rows[:, 2] > rows[:, 0]
        estimator = LogisticRegression(max_iter=1000).fit(rows, churned if good else ~churned)
        onnx = export_onnx(estimator, len(FEATURE_NAMES))
        data_hash = self.store(rows, churned)
        client, run_id, source = self.log(onnx)
        version = register_version(
            client, "churn", model_uri=source, run_id=run_id, tags={"data_hash": data_hash}
        )
        release = build_release(
            self.home.releases,
            onnx=onnx,
            model_name="churn",
            model_version=version,
            features=FEATURE_NAMES,
            golden=(rows[:10], estimator.predict_proba(rows[:10])[:, 1]),
            reference=reference_statistics(
                {name: rows[:, i] for i, name in enumerate(FEATURE_NAMES)}, FEATURE_NAMES
            ),
            mlflow_run=run_id,
            dagster_run="run",
            data_hash=data_hash,
            created_at=NOW,
        )
        transition(
            client, "churn", version, "Staging", who=PIPELINE, why="every quality gate passed",
            evidence=Evidence("gates", {"auc": "auc 0.95 is at least 0.9"}), now=NOW,
            tags=store_release(client, run_id, source, release),
        )  # fmt: skip
        self.releases[version] = release
        return version

    def log(self, onnx: bytes) -> tuple[Any, str, str]:
        """The model in MLflow, as a training logs it."""
        import mlflow
        import mlflow.onnx
        from onnx import load_model_from_string

        client = self.client()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            experiment = ensure_experiment(client, self.home.mlflow_artifacts)
            mlflow.set_tracking_uri(self.home.mlflow_uri)
            with mlflow.start_run(experiment_id=experiment) as run:
                day = TEST_DAY.isoformat()
                mlflow.log_params({"data_train_cutoffs": day, "data_test_cutoff": day})
                mlflow.log_metrics({"auc": 0.95})
                logged = mlflow.onnx.log_model(
                    load_model_from_string(onnx), name="onnx", pip_requirements=["onnxruntime"]
                )
        return client, run.info.run_id, logged.model_uri

    def store(self, rows: np.ndarray, churned: np.ndarray) -> str:
        """The training set of a version, which its comparison is made on."""
        columns: dict[str, Any] = {
            "customer_id": [f"c-{n}" for n in range(len(rows))],
            "cutoff": pa.array([cutoff_of(TEST_DAY)] * len(rows), pa.timestamp("us", "UTC")),
        }
        columns |= {name: rows[:, n].astype(float) for n, name in enumerate(FEATURE_NAMES)}
        table = pa.table({**columns, "churned": churned})
        manifest = TrainingSetManifest(
            content_hash(table), len(rows), FEATURE_NAMES, (TEST_DAY,), 90, 30, ()
        )
        lake = open_lake(str(self.home.lake))
        store_training_set(lake, TrainingSet(table, manifest, CheckResult(True, "whole", {})))
        return manifest.data_hash


def done_by(shop: Shop, *arguments: str) -> str:
    done = shop.churn(*arguments)
    assert (done.code, done.err) == (0, ""), done
    return done.out
