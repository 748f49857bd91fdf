"""From a bad model in Production back to the one before it, by one action, as a person does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from command import ROOT, churn, environment, write_config
from conftest import SHOP

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.release import MODEL, Release
from churn_assets.data.checks import CheckResult
from churn_assets.data.lake import content_hash, open_lake
from churn_assets.data.training_set import TrainingSet, TrainingSetManifest, store_training_set
from churn_assets.data.windows import cutoff_of
from churn_assets.home import Home
from churn_assets.lifecycle.experiments import ensure_experiment
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.pointer import read_current
from churn_assets.lifecycle.registry import PIPELINE, read_registry, register_version, transition
from churn_assets.lifecycle.release import build_release, reference_statistics, store_release
from churn_assets.lifecycle.serving import free_port
from churn_assets.modeling.onnx_export import export_onnx

pytestmark = pytest.mark.filterwarnings(
    # MLflow's way of asking its own database.
    "ignore:The ``noload`` loader strategy",
)
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
                mlflow.log_params({"data_test_cutoff": TEST_DAY.isoformat()})
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


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    folder = tmp_path_factory.mktemp("rollback")
    made = Shop(Home(folder / "home"), write_config(folder / "shop.yaml", SHOP), free_port())
    with mock.patch.dict(os.environ):
        made.home.prepare()
        log = folder / "service.log"
        with log.open("wb") as sink:
            service = subprocess.Popen(
                [sys.executable, "-m", "churn_assets", "serve", "--port", str(made.port)],
                cwd=ROOT,
                env=environment(made.home.root, made.config),
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            yield made
            assert service.poll() is None, log.read_text()
        finally:
            service.terminate()
            service.wait(60)


def done_by(shop: Shop, *arguments: str) -> str:
    done = shop.churn(*arguments)
    assert (done.code, done.err) == (0, ""), done
    return done.out


def test_from_a_bad_model_to_the_one_before_it_by_one_action(
    shop: Shop, record_property: Callable[[str, object], None]
) -> None:
    assert shop.register(good=True) == "1"
    done_by(shop, "approve", "--who", "ada", "--why", "the first one")
    good = shop.until_served("1")
    assert good["risk_level"] == "low"

    # A person may approve what the comparison speaks against; it is on record that it did.
    assert shop.register(good=False) == "2"
    done_by(shop, "approve", "--who", "eve", "--why", "a hunch")
    bad = shop.until_served("2")
    assert bad["risk_level"] == "high"
    evidence = shop.read().history[-1].evidence
    assert (evidence.kind, evidence.passed, evidence.incumbent) == ("paired_replay", False, "1")
    assert evidence.figures["candidate_auc"] < 0.1 < 0.9 < evidence.figures["incumbent_auc"]

    began = time.monotonic()
    told = done_by(shop, "rollback", "--who", "ada", "--why", "everyone is at risk")
    assert shop.until_served("1") == good
    seconds = time.monotonic() - began
    print(f"rolled back and served again after {seconds:.1f} s")
    record_property("rollback_seconds", round(seconds, 1))

    assert "version 1 is in Production (Dagster run " in told
    assert shop.get("/health")["release_id"] == shop.releases["1"].manifest.release_id
    registry = shop.read()
    assert {v.version: v.stage for v in registry.versions.values()} == {
        "1": "Production",
        "2": "Archived",
    }
    last = registry.history[-1]
    assert (last.who, last.why, last.evidence.kind) == ("ada", "everyone is at risk", "rollback")
    assert last.source == "Archived"
    pointer = read_current(shop.home.current)
    assert pointer
    assert (pointer.model_version, pointer.step) == ("1", last.number)


def test_a_pipeline_does_not_promote_again_what_was_taken_back(shop: Shop) -> None:
    before = shop.read()
    assert "\nversion 1 is in Production\n" in done_by(shop, "promote")
    assert shop.read().history == before.history
    assert "\nversion 1 is served by churn:v1-" in done_by(shop, "deploy")
    assert shop.get("/predict", CUSTOMER)["model_version"] == "1"


# What goes wrong afterwards: refused in one line, and version 1 goes on serving.


def assert_refused(shop: Shop, says: str, *arguments: str) -> None:
    before = shop.read()
    assert says in shop.churn(*arguments).refusal()
    after = shop.read()
    assert (after.production, after.history) == (before.production, before.history)
    assert shop.get("/predict", CUSTOMER)["model_version"] == "1"


def test_a_rollback_with_nothing_to_go_back_to_is_refused(shop: Shop) -> None:
    says = "version 1 is the only one of churn that has been in Production and is still good"
    assert_refused(shop, says, "rollback", "--who", "ada", "--why", "again")


def test_a_rollback_to_a_corrupted_release_is_refused(shop: Shop) -> None:
    kept = [path for path in shop.home.root.rglob("v2-*/model.onnx") if "bentoml" not in str(path)]
    assert len(kept) == 2
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert_refused(
        shop,
        "model.onnx was changed: its sha256 is not the manifest's",
        *("rollback", "--who", "ada", "--why", "once more", "--to", "2"),
    )


def test_a_candidate_whose_artifact_was_changed_is_not_promoted(shop: Shop) -> None:
    version = shop.register(good=True)
    (logged,) = [
        path
        for path in shop.home.mlflow_artifacts.rglob(MODEL)
        if "release" not in path.parts and path.read_bytes() == shop.releases[version].model
    ]
    logged.write_bytes(logged.read_bytes() + b"\0")
    assert_refused(
        shop,
        f"the model in the registry was changed since the gates let version {version} in",
        *("approve", "--who", "ada", "--why", "better"),
    )


@pytest.mark.parametrize("command", ["approve", "rollback"])
def test_a_word_without_a_name_is_refused(shop: Shop, command: str) -> None:
    says = "needs the name of the person who gives it; set who"
    assert_refused(shop, says, command, "--who", " ", "--why", "because")


@pytest.mark.parametrize(
    ("job", "says"),
    [("approve_promotion", "needs the name of the person"), ("rollback", "needs the name of")],
)
def test_the_job_in_the_ui_as_it_stands_asks_for_a_name(shop: Shop, job: str, says: str) -> None:
    """Launched without filling in its configuration."""
    import dagster as dg

    from churn_assets.definitions import defs
    from churn_assets.defs.partitions import SETTINGS
    from churn_assets.defs.registry import production_release, promotion_decision
    from churn_assets.defs.resources import Project, RecordIOManager

    config = defs.resolve_job_def(job).run_config
    assert config is not None
    asset = {"approve_promotion": promotion_decision, "rollback": production_release}[job]
    assert config["ops"] == {asset.key.path[-1]: {"config": {"who": "", "why": ""}}}
    with dg.instance_for_test() as instance:
        result = dg.materialize(
            [asset],
            instance=instance,
            run_config=dict(config),
            resources={
                "project": Project(shop.home, SETTINGS),
                "io_manager": RecordIOManager(shop.home.records),
            },
            raise_on_error=False,
        )
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert says in str(failure.step_failure_data.error)
