"""What an MLflow run of a training holds: data, parameters, figures, models, environment."""

from __future__ import annotations

import logging
import tempfile
import time
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from churn_assets.errors import UserError
from churn_assets.lifecycle.experiments import environment_tags, installed_packages
from churn_assets.lifecycle.records import (
    Choice,
    EvaluationRecord,
    FoldLine,
    ModelRecord,
    TrainingSetRecord,
)
from churn_assets.lifecycle.registry import get_version, register_version
from churn_assets.modeling.training import best_of_families

if TYPE_CHECKING:
    from collections.abc import Generator

    from mlflow import MlflowClient

    from churn_assets.lifecycle.model_card import Card
    from churn_assets.modeling.backtest import CandidateResult
    from churn_assets.modeling.onnx_export import Parity
    from churn_assets.modeling.training import TrainedModel

PARENT_TAG = "mlflow.parentRunId"
_OF_TRIALS = ("log_loss", "auc", "accuracy", "brier")

# skops refuses these unless they are named: their files hold node indices that scikit-learn
# follows without a bounds check. They are trusted because this run has just trained them.
CALIBRATED = "churn_assets.modeling.calibrated_classifier.CalibratedClassifier"
TRUSTED_TYPES: Mapping[str, list[str]] = {
    "logistic_regression": [CALIBRATED],
    "random_forest": [CALIBRATED, "sklearn.tree._tree.Tree"],
    "hist_gradient_boosting": [
        CALIBRATED,
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    ],
}


REPORT = "evaluation/report.json"

# What MLflow calls the files of a model.
ONNX_FILE = "model.onnx"
SKLEARN_FILE = "model.skops"

# skops stores what it writes as it is.
_UNPACKED_TIMES = 20


def log_training_set(mlflow: Any, record: TrainingSetRecord, manifest: bytes) -> None:
    """The data version: the hash, the days and the features of the training set."""
    mlflow.set_tags({"data_hash": record.data_hash, "features": ",".join(record.features)})
    mlflow.log_params(
        {
            "data_rows": record.rows,
            "data_train_cutoffs": ",".join(day.isoformat() for day in record.train),
            "data_calibration_cutoff": record.calibration.isoformat(),
            "data_test_cutoff": record.test.isoformat(),
        }
    )
    mlflow.log_text(manifest.decode(), "data/training_set.json")


def log_trained_model(
    mlflow: Any,
    client: MlflowClient,
    trained: TrainedModel,
    onnx: bytes,
    *,
    parity: Parity,
    name: str,
    training_set: TrainingSetRecord,
    dagster_run: str,
    tags: Mapping[str, str],
    project_root: Path,
) -> ModelRecord:
    """Log both forms of the model with everything that made it, and register it in stage None.

    tags: team and use case. Returns where MLflow keeps it.
    """
    import mlflow.onnx
    import mlflow.sklearn
    from onnx import load_model_from_string

    active = mlflow.active_run()
    if active is None:
        raise RuntimeError("log_trained_model needs an active MLflow run")
    run_id = active.info.run_id
    mlflow.set_tags({**tags, **environment_tags(project_root), "family": trained.family})
    mlflow.log_params(
        {
            "family": trained.family,
            "selected_by": trained.selected_by,
            "seed": trained.seed,
            "fitted_rows": trained.fitted_rows,
            "trials": trained.trials,
            **{f"model_{key}": value for key, value in trained.params.items()},
        }
    )
    if parity.max_difference is not None:
        mlflow.log_metric("onnx_parity_max_difference", parity.max_difference)
    mlflow.set_tag("onnx_parity", parity.reason)
    line = trained.calibration
    mlflow.log_metrics(
        {"calibration_slope": line.slope, "calibration_intercept": line.intercept}
        | {
            f"backtest_{candidate.family}_{name}": candidate.figure(name)
            for candidate in best_of_families(trained.candidates)
            for name in ("accuracy", "auc", "log_loss", "brier")
        }
    )
    mlflow.log_text(installed_packages(), "environment/packages.txt")
    mlflow.log_dict(trained.to_dict(), "training/candidates.json")
    pins = [f"{package}=={installed_version(package)}" for package in ("numpy", "scikit-learn")]
    with _quiet("mlflow"):
        sklearn = mlflow.sklearn.log_model(
            trained.estimator,
            name="sklearn",
            skops_trusted_types=TRUSTED_TYPES[trained.family],
            pip_requirements=pins,
        )
        served = mlflow.onnx.log_model(
            load_model_from_string(onnx),
            name="onnx",
            pip_requirements=[f"onnxruntime=={installed_version('onnxruntime')}"],
            # MLflow would put large tensors into files beside the graph, which no digest is of.
            save_as_external_data=False,
        )
    version = register_version(
        client,
        name,
        model_uri=served.model_uri,
        run_id=run_id,
        tags={
            **tags,
            "family": trained.family,
            "data_hash": training_set.data_hash,
            "sklearn_uri": sklearn.model_uri,
            "dagster_run": dagster_run,
        },
    )
    return ModelRecord(
        name=name,
        version=version,
        family=trained.family,
        mlflow_run=run_id,
        dagster_run=dagster_run,
        sklearn_uri=sklearn.model_uri,
        onnx_uri=served.model_uri,
        fitted_on=trained.fitted_on,
        parity_max_difference=parity.max_difference,
        training_set=training_set,
        choice=_choice(trained),
    )


def _choice(trained: TrainedModel) -> Choice:
    return Choice(
        reason=trained.reason,
        candidates=trained.trials,
        trials_wanted=trained.trials_wanted,
        folds_wanted=trained.folds_wanted,
        params=trained.params,
        backtest=tuple(
            FoldLine(
                judged=result.fold.judged,
                calibrated=result.fold.calibration,
                trained_first=result.fold.train[0],
                trained_last=result.fold.train[-1],
                rows=result.scores.rows,
                log_loss=result.scores.log_loss,
                auc=result.scores.auc,
                recency_auc=result.recency_auc,
            )
            for result in trained.chosen.folds
        ),
        calibration=trained.calibration,
    )


class TrialLog:
    """Logs each trial of a search as a run of its own, nested in the run of the training.

    They carry no Dagster run's tag: that one names the run of the training alone.
    """

    def __init__(self, client: MlflowClient, parent: str) -> None:
        self._client = client
        self._parent = parent
        self._experiment = client.get_run(parent).info.experiment_id
        self._begun = int(time.time() * 1000)

    def __call__(self, number: int, candidate: CandidateResult) -> None:
        """Log trial `number`, counted from 0, which has just ended."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        run = self._client.create_run(
            self._experiment,
            start_time=self._begun,
            run_name=f"trial {number + 1} {candidate.family}",
            tags={
                PARENT_TAG: self._parent,
                "family": candidate.family,
                "given_up": str(candidate.pruned).lower(),
            },
        ).info.run_id
        figures = {name: candidate.figure(name) for name in _OF_TRIALS}
        self._client.log_batch(
            run,
            metrics=[
                *(Metric(name, value, now, 0) for name, value in figures.items()),
                *(
                    Metric(f"fold_{name}", getattr(result.scores, name), now, step)
                    for step, result in enumerate(candidate.folds)
                    for name in _OF_TRIALS
                ),
            ],
            params=[Param(name, str(value)) for name, value in candidate.params.items()],
        )
        self._client.set_terminated(run, end_time=now)
        self._begun = now


def log_evaluation(
    client: MlflowClient, record: EvaluationRecord, plots: Mapping[str, bytes], folder: Path
) -> None:
    """Put the judgement and its plots on the run that trained the model, and on the version."""
    from mlflow.entities import Metric

    run_id, now = record.model.mlflow_run, int(time.time() * 1000)
    figures = dict(record.metrics)
    for name, found in record.intervals.items():
        if found.low is not None and found.high is not None:
            figures |= {f"{name}_low": found.low, f"{name}_high": found.high}
    client.log_batch(run_id, [Metric(name, value, now, 0) for name, value in figures.items()])
    client.log_dict(run_id, msgspec.to_builtins(record), REPORT)
    for name, png in plots.items():
        path = folder / f"{name}.png"
        path.write_bytes(png)
        client.log_artifact(run_id, str(path), "evaluation")
    refused = ", ".join(gate.name for gate in record.gates if not gate.passed)
    if record.held_out_use is not None:
        client.set_tag(run_id, "held_out_use", record.held_out_use.sentence)
    client.set_tag(run_id, "gates", f"refused by {refused}" if refused else "passed")
    name, version = record.model.name, record.model.version
    client.set_model_version_tag(name, version, "gates", "refused" if refused else "passed")


def evaluation_of(client: MlflowClient, name: str, version: str) -> EvaluationRecord:
    """The judgement of a registered version. Raises UserError when it was never judged."""
    from mlflow.exceptions import MlflowException

    run_id = str(get_version(client, name, version).run_id)
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run_id, REPORT, folder)
        except (MlflowException, OSError) as error:
            raise UserError(
                f"version {version} of {name} has no evaluation; materialize evaluation_report in "
                "the run that trained it"
            ) from error
        return msgspec.json.decode(Path(path).read_bytes(), type=EvaluationRecord)


def log_card(client: MlflowClient, run_id: str, card: Card) -> None:
    """Put a model card with its plots on the run that trained the model."""
    for path in sorted(card.folder.iterdir()):
        if path.suffix in (".html", ".md", ".png"):
            client.log_artifact(run_id, str(path), "model_card")


def load_onnx(record: ModelRecord, tracking_uri: str) -> bytes:
    """The ONNX graph of a registered model, as it was logged."""
    from google.protobuf.message import DecodeError
    from onnx import load_model_from_string

    with _stored(record.onnx_uri, ONNX_FILE, tracking_uri) as path:
        try:
            return load_model_from_string(path.read_bytes()).SerializeToString()
        except DecodeError as error:
            raise UserError(
                f"the model of run {record.mlflow_run} is damaged ({error}); train again"
            ) from error


def load_sklearn(record: ModelRecord, tracking_uri: str) -> Any:
    """The scikit-learn estimator of a registered model.

    MLflow's own loader takes a pickle, code and trusted types from where the artifact says. What
    lies there is taken here as skops alone, with the types this code trusts. Raises UserError.
    """
    from skops import io

    trusted = TRUSTED_TYPES.get(record.family, [])
    whose = f"the estimator of run {record.mlflow_run}"
    with _stored(record.sklearn_uri, SKLEARN_FILE, tracking_uri) as path:
        try:
            with zipfile.ZipFile(path) as members:
                unpacked = sum(member.file_size for member in members.infolist())
            if unpacked > _UNPACKED_TIMES * path.stat().st_size:
                raise UserError(f"{whose} unpacks to {unpacked} bytes; it was changed, train again")
            if foreign := sorted(set(io.get_untrusted_types(file=path)) - set(trusted)):
                raise UserError(f"{whose} holds {foreign[0]}; it was changed, train again")
            return io.load(path, trusted=trusted)
        except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{whose} is damaged ({error}); train again") from error


@contextmanager
def _stored(uri: str, name: str, tracking_uri: str) -> Generator[Path]:
    """One file of a model as MLflow keeps it. Raises UserError when it is not there."""
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    with tempfile.TemporaryDirectory() as folder:
        with _quiet("mlflow"):
            found = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
        path = Path(found) / name
        if not path.is_file():
            raise UserError(f"MLflow has no {name} at {uri}; it was changed, train again")
        yield path


@contextmanager
def _quiet(logger: str) -> Generator[None]:
    """MLflow's progress lines are not for the person at this terminal; its warnings are."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)
