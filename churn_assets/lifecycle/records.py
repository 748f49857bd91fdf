"""What one stage hands to the next: small, frozen, stored as JSON beside the run that wrote it."""

from __future__ import annotations

from datetime import date

import msgspec

from churn_assets.lifecycle.history import Step


class TrainingSetRecord(msgspec.Struct, frozen=True):
    """Which training set a run assembled; the rows are in the lake under `data_hash`."""

    data_hash: str
    rows: int
    churn_rate: float
    features: tuple[str, ...]
    train: tuple[date, ...]
    calibration: date
    test: date


class ModelRecord(msgspec.Struct, frozen=True):
    """A trained model: where MLflow keeps it and what it was made from.

    `sklearn_uri` and `onnx_uri` are MLflow model URIs.
    """

    name: str
    version: str
    family: str
    mlflow_run: str
    dagster_run: str
    sklearn_uri: str
    onnx_uri: str
    fitted_on: tuple[date, ...]
    parity_max_difference: float | None
    training_set: TrainingSetRecord


class GateRecord(msgspec.Struct, frozen=True):
    """One gate's verdict; `value` is null when the evidence was missing."""

    name: str
    passed: bool
    value: float | None
    limit: float
    reason: str


class EvaluationRecord(msgspec.Struct, frozen=True):
    """The judgement of one version on the latest labelled window."""

    model: ModelRecord
    metrics: dict[str, float]
    gates: tuple[GateRecord, ...]
    release_dir: str
    release_id: str

    @property
    def passed(self) -> bool:
        """Whether there are gates and every one of them passed."""
        return bool(self.gates) and all(gate.passed for gate in self.gates)


class RegisteredModel(msgspec.Struct, frozen=True):
    """A version and the stage it is in, with the release made of it."""

    name: str
    version: str
    stage: str
    release_dir: str
    release_id: str


class HistoryRecord(msgspec.Struct, frozen=True):
    """Everything that has happened to the versions of a registered model, oldest first."""

    name: str
    production: str | None
    steps: tuple[Step, ...]


class ProductionRelease(msgspec.Struct, frozen=True):
    """The version in Production with its proven release, and the step that put it there.

    way_back: the version a rollback would go to.
    """

    name: str
    version: str
    release_dir: str
    release_id: str
    way_back: str | None
    step: Step


class BentoRecord(msgspec.Struct, frozen=True):
    """A built bento and one prediction it answered."""

    tag: str
    path: str
    model_version: str
    release_id: str
    request: dict[str, str | int | float]
    response: dict[str, str | float]
    latency_ms: float


class DriftRecord(msgspec.Struct, frozen=True):
    """The drift of the days [first, last] against a training set (`reference` is its hash)."""

    verdict: str
    reason: str
    first: date
    last: date
    statistics: dict[str, float | None]
    reference: str
    page: str
