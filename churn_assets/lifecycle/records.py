"""What one stage hands to the next: small, frozen, stored as JSON beside the run that wrote it."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from churn_assets.lifecycle.history import Step
from churn_assets.lifecycle.ledger import Use
from churn_assets.modeling.bootstrap import Interval, interval_text
from churn_assets.modeling.calibration import Calibration
from churn_assets.modeling.costs import ProfitCurve
from churn_assets.modeling.segments import Segment

_Record = TypeVar("_Record")


class TrainingSetRecord(msgspec.Struct, frozen=True):
    """Which training set a run assembled; the rows are in the lake under `data_hash`.

    plan: `history`, or `recent`, where the parts are of different customers (modeling/split.py).
    without: features the model has to do without, because their feed is broken. decision: what
    asked for the training, None for a schedule or a person.
    """

    data_hash: str
    rows: int
    churn_rate: float
    features: tuple[str, ...]
    train: tuple[date, ...]
    calibration: date
    test: date
    plan: Literal["history", "recent"] = "history"
    without: tuple[str, ...] = ()
    decision: str | None = None
    at: datetime | None = None


class FoldLine(msgspec.Struct, frozen=True):
    """The chosen candidate at one origin of the backtest. Days are feature days."""

    judged: date
    calibrated: date | None
    trained_first: date
    trained_last: date
    rows: int
    log_loss: float
    auc: float | None
    recency_auc: float | None


class Choice(msgspec.Struct, frozen=True):
    """How a model was chosen: why, among how many candidates, and what the backtest showed."""

    reason: str
    candidates: int
    folds_wanted: int
    params: dict[str, str | int | float | bool | None]
    trials_wanted: int
    backtest: tuple[FoldLine, ...]
    calibration: Calibration


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
    choice: Choice | None = None


class GateRecord(msgspec.Struct, frozen=True):
    """One gate's verdict; `value` is null when the evidence was missing."""

    name: str
    passed: bool
    value: float | None
    limit: float
    reason: str


class PairedReplay(msgspec.Struct, frozen=True):
    """Two versions on the same held-out rows: evidence of the kind `paired_replay`.

    differences: log loss, AUC and Brier score of the candidate minus those of the incumbent, each
    with its interval. no_worse: whether the gate found the candidate not surely worse.
    """

    incumbent: str
    day: date
    rows: int
    differences: dict[str, Interval]
    no_worse: bool

    def figures(self) -> dict[str, str]:
        """The differences in words."""
        return {
            f"{name} minus that of version {self.incumbent}": interval_text(difference)
            for name, difference in self.differences.items()
        }


class EvaluationRecord(msgspec.Struct, frozen=True):
    """The judgement of one version on the latest labelled window.

    intervals: figures of the model. against: log loss, AUC and Brier score of the model minus those
    of majority, recency and production. profit: of offers by this model. paired_replay: the
    comparison with the version in Production; None when there is none, or it could not be asked.
    """

    model: ModelRecord
    metrics: dict[str, float]
    gates: tuple[GateRecord, ...]
    release_dir: str
    release_id: str
    at: datetime | None = None
    intervals: dict[str, Interval] = {}
    against: dict[str, dict[str, Interval]] = {}
    segments: tuple[Segment, ...] = ()
    profit: ProfitCurve | None = None
    paired_replay: PairedReplay | None = None
    held_out_use: Use | None = None

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

    way_back: the version a rollback would go to. trial, challenger: the trial that is going on, and
    the version on trial, which the release then has, too.
    """

    name: str
    version: str
    release_dir: str
    release_id: str
    way_back: str | None
    step: Step
    trial: str | None = None
    challenger: str | None = None


class BentoRecord(msgspec.Struct, frozen=True):
    """A built bento and one prediction it answered."""

    tag: str
    path: str
    model_version: str
    release_id: str
    request: dict[str, str | int | float]
    response: dict[str, str | float | bool]
    latency_ms: float


class DeploymentRecord(msgspec.Struct, frozen=True):
    """A bento put where it serves, and what was seen of it there.

    previous: the release, bento or image that was served before, as the target tells it. digest: of
    the image, in the registry or else the engine's own. seconds_away: that nobody answered, where
    the target can tell.
    """

    target: str
    bento: str
    release_id: str
    model_version: str
    said: str
    image: str | None
    digest: str | None
    previous: str | None
    seconds: float
    seconds_away: float | None


def every_record(records: Path, asset: str, kind: type[_Record]) -> list[_Record]:
    """What each run of `asset` left, in no order. One of another format is left out."""
    return list(records_by_run(records, asset, kind).values())


def records_by_run(records: Path, asset: str, kind: type[_Record]) -> dict[str, _Record]:
    """What each run of `asset` left, by the run's id. One of another format is left out."""
    found = {}
    for path in (records / asset).glob("*.json"):
        if path.stem != "latest" and not path.name.startswith("."):
            try:
                found[path.stem] = msgspec.json.decode(path.read_bytes(), type=kind)
            except msgspec.ValidationError:
                continue
    return found
