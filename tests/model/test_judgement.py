"""A version judged: by itself, beside its baselines, and beside the version in production."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import mlflow
import mlflow.onnx
import msgspec
import numpy as np
import onnx
import pandas as pd
import pytest
from mlflow import MlflowClient

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.data.windows import Windows, cutoff_of
from churn_assets.errors import UserError
from churn_assets.lifecycle import history
from churn_assets.lifecycle.experiments import ensure_experiment
from churn_assets.lifecycle.incumbent import Incumbent, production_model
from churn_assets.lifecycle.judgement import asked, judgement, look_at
from churn_assets.lifecycle.ledger import Use, Window
from churn_assets.lifecycle.model_card import (
    About,
    Evidence,
    add_bento,
    card_markdown,
    limits_of,
    write_card,
)
from churn_assets.lifecycle.records import EvaluationRecord, ModelRecord, TrainingSetRecord
from churn_assets.lifecycle.registry import read_registry as read
from churn_assets.lifecycle.registry import register_version, rollback_plan, transition
from churn_assets.lifecycle.release import build_release, reference_statistics, store_release
from churn_assets.modeling.bootstrap import interval_text
from churn_assets.modeling.gates import QualityPolicy
from churn_assets.modeling.held_out import EvaluationPolicy, Judged, judge_held_out
from churn_assets.modeling.onnx_export import export_onnx, session_latency
from churn_assets.modeling.rows import outcomes, rows_of
from churn_assets.modeling.training import TrainedModel

NOW = datetime(2025, 9, 1, tzinfo=UTC)
POLICY = EvaluationPolicy(resamples=100, least_segment_rows=100)
LATENCY = {"p95_latency_ms": 1.0}


@dataclass(frozen=True)
class Candidate:
    trained: TrainedModel
    onnx: bytes
    record: ModelRecord


@pytest.fixture(scope="module")
def candidate(trained: TrainedModel, frame: pd.DataFrame) -> Candidate:
    split = trained.split
    data = TrainingSetRecord(
        "d" * 64, len(frame), 0.5, FEATURE_NAMES, split.train, split.calibration, split.test
    )
    record = ModelRecord(
        "churn", "7", trained.family, "m", "g", "s", "o", trained.fitted_on, 0.0, data
    )
    return Candidate(trained, export_onnx(trained.estimator, len(FEATURE_NAMES)), record)


def judge(
    candidate: Candidate, frame: pd.DataFrame, production: bytes | None = None, *, draw: bool = True
) -> Judged:
    return judge_held_out(
        frame,
        candidate.trained.split,
        FEATURE_NAMES,
        onnx=candidate.onnx,
        estimator=candidate.trained.estimator,
        fitted_on=candidate.trained.fitted_on,
        oracle=None,
        tenure=lambda customers, cutoff: np.arange(len(customers), dtype=np.float64),
        production=production,
        threshold=0.5,
        seed=1,
        policy=POLICY,
        draw=draw,
    )


def record_of(
    candidate: Candidate,
    judged: Judged,
    incumbent: Incumbent | None = None,
    problem: str | None = None,
) -> EvaluationRecord:
    return judgement(
        candidate.record,
        judged,
        LATENCY,
        QualityPolicy(),
        incumbent=incumbent,
        problem=problem,
        use=Use(Window(candidate.trained.split.test, 30, 90), "r", 1, 0, ()),
        release_dir="r",
        release_id="r",
        at=NOW,
    )


@pytest.fixture(scope="module")
def judged(candidate: Candidate, frame: pd.DataFrame) -> Judged:
    return judge(candidate, frame)


def test_a_good_model_shows_everything_it_was_asked(candidate: Candidate, judged: Judged) -> None:
    record = record_of(candidate, judged)
    assert record.passed, [gate.reason for gate in record.gates]
    assert record.paired_replay is None
    recency = judged.against["recency"]["auc"]
    assert recency.low is not None
    assert record.metrics["auc_over_recency"] == recency.low > 0
    assert judged.evaluation.recency is not None
    assert judged.evaluation.model.auc is not None
    assert judged.evaluation.recency.auc is not None
    assert recency.value == pytest.approx(
        judged.evaluation.model.auc - judged.evaluation.recency.auc
    )
    assert record.metrics["offer_threshold"] == pytest.approx(10 / 36)
    assert record.metrics["offer_accuracy"] != record.metrics["accuracy"]
    assert {segment.by for segment in record.segments} == {"tenure", "value", "activity"}
    again = msgspec.json.decode(msgspec.json.encode(record), type=EvaluationRecord)
    assert again == record


def test_a_better_incumbent_refuses_the_candidate(
    candidate: Candidate, frame: pd.DataFrame, judged: Judged
) -> None:
    """The incumbent is the same model; the candidate's answers have lost their calibration."""
    model = onnx.load_model_from_string(candidate.onnx)
    for tensor in model.graph.initializer:
        if tensor.name == "intercept":
            moved = onnx.numpy_helper.to_array(tensor) + np.array([-0.6, 0.6], np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(moved, "intercept"))
    worse = replace(candidate, onnx=model.SerializeToString())
    found = judge(worse, frame, production=candidate.onnx)
    incumbent = Incumbent("3", candidate.onnx, FEATURE_NAMES)
    record = record_of(worse, found, incumbent)
    (gate,) = (gate for gate in record.gates if gate.name == "log_loss_over_production")
    assert not gate.passed
    replay = record.paired_replay
    assert replay is not None
    assert (replay.incumbent, replay.no_worse) == ("3", False)
    assert replay.rows == found.evaluation.model.rows
    difference = replay.differences["log_loss"]
    assert difference.value == pytest.approx(
        found.evaluation.model.log_loss - judged.evaluation.model.log_loss
    )
    assert difference.low is not None
    assert difference.low > 0
    assert replay.differences["auc"].value == pytest.approx(0.0, abs=1e-3)
    assert "log_loss minus that of version 3" in replay.figures()
    # The other way round the candidate is the better one, and goes on.
    assert record_of(candidate, judge(candidate, frame, worse.onnx), incumbent).passed


def test_an_incumbent_that_cannot_be_asked_is_missing_evidence(
    candidate: Candidate, judged: Judged
) -> None:
    for incumbent in (
        Incumbent("3", None, (), "version 3 cannot be loaded: gone"),
        Incumbent("3", candidate.onnx, FEATURE_NAMES[:3]),
    ):
        production, problem = asked(incumbent, FEATURE_NAMES)
        assert production is None
        record = record_of(candidate, judged, incumbent, problem)
        assert [gate.name for gate in record.gates if not gate.passed] == [
            "log_loss_over_production"
        ]
        assert record.gates[-1].reason == f"no evidence: {problem}"
        assert "version 3" in str(problem)
    assert asked(None, FEATURE_NAMES) == (None, None)


def test_a_collapsed_segment_refuses(candidate: Candidate, frame: pd.DataFrame) -> None:
    """Customers with one order in 30 days churn or stay by chance, whatever their features say."""
    broken = frame.copy()
    there = (broken["cutoff"] == pd.Timestamp(cutoff_of(candidate.trained.split.test))) & (
        broken["total_orders_30d"] == 1
    )
    broken.loc[there, "churned"] = np.random.default_rng(1).random(int(there.sum())) < 0.5
    record = record_of(candidate, judge(candidate, broken))
    refused = {gate.name: gate for gate in record.gates if not gate.passed}
    assert "segment_auc" in refused
    assert refused["segment_auc"].value == pytest.approx(0.5, abs=0.12)


def test_a_look_names_the_rows_it_sees(candidate: Candidate, frame: pd.DataFrame) -> None:
    look = look_at(frame, candidate.record, Windows(), "g", NOW)
    assert look.window == Window(candidate.trained.split.test, 30, 90)
    shuffled = look_at(frame.sample(frac=1, random_state=1), candidate.record, Windows(), "g", NOW)
    assert shuffled.rows_hash == look.rows_hash
    late = frame.copy()
    late.loc[late.index[-1], "churned"] = ~late["churned"].iloc[-1]
    assert look_at(late, candidate.record, Windows(), "g", NOW).rows_hash != look.rows_hash
    early = frame.copy()
    early.loc[0, "churned"] = ~early["churned"].iloc[0]
    assert look_at(early, candidate.record, Windows(), "g", NOW).rows_hash == look.rows_hash


def test_the_session_is_timed_as_it_is_served(candidate: Candidate, frame: pd.DataFrame) -> None:
    rows = rows_of(frame, [candidate.trained.split.test])[list(FEATURE_NAMES)].to_numpy()
    found = session_latency(candidate.onnx, rows, runs=50)
    assert 0 < found["session_p50_ms"] <= found["session_p95_ms"] <= found["session_p99_ms"]


ABOUT = About(
    team="growth",
    use_case="customer churn",
    source="own tables (orders)",
    activity_days=90,
    horizon_days=30,
    decision_threshold=0.5,
    confidence=0.95,
    offer=10,
    customer_value=120,
    success_rate=0.3,
    mlflow_url="http://127.0.0.1:5000/#/runs/m",
    commit="abc, changed",
)


def test_the_card_says_what_the_evidence_says(
    candidate: Candidate, judged: Judged, tmp_path: Path
) -> None:
    record = record_of(candidate, judged)
    card = write_card(tmp_path / "7", Evidence(record, ABOUT), judged.plots)
    page = card.page.read_text()
    for text in (card.markdown, page):
        assert "churn, version 7" in text
        for name in ("auc", "log_loss", "calibration_error"):
            assert interval_text(record.intervals[name]) in text
        for segment in record.segments:
            assert f"{segment.rows:,}" in text
        assert "abc, changed" in text
        assert "d" * 64 in text
    assert page.count("base64,") == len(judged.plots)
    assert "| bento | none yet |" in card.markdown
    again = add_bento(tmp_path / "7", "churn:v7")
    assert again is not None
    assert "| bento | `churn:v7` |" in again.markdown
    assert again.markdown.replace("`churn:v7`", "none yet") == card.markdown
    assert again.page.read_text() != page
    assert add_bento(tmp_path / "8", "churn:v7") is None
    (tmp_path / "7" / "evidence.json").write_text("{")
    with pytest.raises(UserError, match="evaluate the version again"):
        add_bento(tmp_path / "7", "churn:v7")


def test_without_plots_everything_else_is_the_same(
    candidate: Candidate, frame: pd.DataFrame, judged: Judged, tmp_path: Path
) -> None:
    plain = judge(candidate, frame, draw=False)
    assert plain.plots == {}
    assert (plain.intervals, plain.segments) == (judged.intervals, judged.segments)
    card = write_card(tmp_path / "7", Evidence(record_of(candidate, plain), ABOUT), plain.plots)
    assert "base64," not in card.page.read_text()
    assert ".png" not in card.markdown


def test_the_card_hides_no_limit(candidate: Candidate, judged: Judged) -> None:
    record = record_of(candidate, judged, Incumbent("3", None, (), "gone"), "gone")
    used = Use(Window(candidate.trained.split.test, 30, 90), "r", 2, 1, ("6",))
    small = tuple(
        replace(segment, too_small="12 rows, fewer than 200") for segment in record.segments[:1]
    )
    limits = "\n".join(
        limits_of(
            Evidence(
                msgspec.structs.replace(record, held_out_use=used, segments=small),
                ABOUT,
            )
        )
    )
    assert "used for the 2nd time (before: version 6)" in limits
    assert "Gate log_loss_over_production: no evidence: gone." in limits
    assert "12 rows, fewer than 200" in limits
    refused = card_markdown(Evidence(record, ABOUT))
    assert "It **was refused by the gates**." in refused
    assert "| log_loss_over_production | **no** | no evidence: gone |" in refused


@dataclass(frozen=True)
class Store:
    client: MlflowClient
    uri: str
    folder: Path
    experiment: str

    @property
    def releases(self) -> Path:
        return self.folder / "releases"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("incumbent")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = MlflowClient(uri)
        return Store(client, uri, folder, ensure_experiment(client, folder / "artifacts"))


def promoted(store: Store, content: bytes, golden: tuple[np.ndarray, np.ndarray]) -> str:
    """The graph as a version that is in Production, with its release."""
    client = store.client
    mlflow.set_tracking_uri(store.uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tags = {"features": ",".join(FEATURE_NAMES)}
        with mlflow.start_run(experiment_id=store.experiment, tags=tags) as run:
            logged = mlflow.onnx.log_model(
                onnx.load_model_from_string(content), name="onnx", pip_requirements=["onnxruntime"]
            )
        version = register_version(
            client, "churn", model_uri=logged.model_uri, run_id=run.info.run_id, tags={}
        )
        x = golden[0]
        release = build_release(
            store.releases,
            onnx=content,
            model_name="churn",
            model_version=version,
            features=FEATURE_NAMES,
            golden=golden,
            reference=reference_statistics(
                {name: x[:, column] for column, name in enumerate(FEATURE_NAMES)}, FEATURE_NAMES
            ),
            mlflow_run=run.info.run_id,
            dagster_run="run",
            data_hash="d" * 64,
            created_at=NOW,
        )
        tags = store_release(client, run.info.run_id, logged.model_uri, release)
        for target, evidence in (
            ("Staging", history.Evidence("gates", {"auc": 0.95})),
            ("Production", history.Evidence("bootstrap", {"auc": 0.95})),
        ):
            transition(
                client,
                "churn",
                version,
                target,
                who="Ada",
                why="the first one",
                evidence=evidence,
                now=NOW,
                plan=rollback_plan(read(client, "churn")),
                tags=tags if target == "Staging" else {},
            )
    return version


def test_the_incumbent_is_the_graph_in_production(
    store: Store, candidate: Candidate, frame: pd.DataFrame, judged: Judged
) -> None:
    client, releases = store.client, store.releases
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert production_model(client, "churn", releases) is None
        version = promoted(store, candidate.onnx, judged.golden)
        found = production_model(client, "churn", releases)
    assert found is not None
    assert (found.version, found.features, found.problem) == (version, FEATURE_NAMES, None)
    assert found.onnx is not None
    beside = judge(candidate, frame, production=found.onnx)
    assert beside.against["production"]["log_loss"].value == pytest.approx(0.0, abs=1e-9)
    assert record_of(candidate, beside, found).passed
    for kept in list(store.folder.rglob("model.onnx")):
        kept.write_bytes(b"another")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gone = production_model(client, "churn", releases)
    assert gone is not None
    assert gone.onnx is None
    assert f"version {version} cannot be loaded" in str(gone.problem)


def test_outcomes_decide_and_nothing_is_kept_from_the_test_rows(
    candidate: Candidate, frame: pd.DataFrame, judged: Judged
) -> None:
    rows = rows_of(frame, [candidate.trained.split.test])
    assert judged.evaluation.model.rows == len(rows)
    assert judged.evaluation.model.churn_rate == outcomes(rows).mean()
