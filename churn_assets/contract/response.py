"""The answers of the service, and how they are written."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from churn_assets.contract.logged import Durability, WhenBroken
from churn_assets.contract.request import Refusal
from churn_assets.contract.risk import RiskLevel, RiskThresholds

PROBABILITY_DIGITS = 4

Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]
Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The answer to `POST /predict`.

    `holdout` is true for a customer nobody may treat, so that outcomes without treatment are seen.
    """

    customer_id: str
    churn_probability: Probability
    risk_level: RiskLevel
    model_version: str
    holdout: bool


class StoredPrediction(msgspec.Struct, frozen=True, gc=False):
    """The answer to a request by id: the prediction, and the cutoff its features were stamped with.

    `holdout` is true for a customer nobody may treat. `stale` is true for values older than the
    limit, which are only served where that is configured.
    """

    customer_id: str
    churn_probability: Probability
    risk_level: RiskLevel
    model_version: str
    holdout: bool
    cutoff: Moment
    stale: bool


class OnlineHealth(msgspec.Struct, frozen=True):
    """The online store as the service sees it. `reason` says what keeps it from being used.

    `data_time` is what ages are counted to: that of the store, or the wall clock.
    """

    reachable: bool
    usable: bool
    newest_cutoff: Moment | None
    data_time: Moment | None
    features: tuple[str, ...] | None
    max_age_hours: float
    when_stale: Literal["refuse", "flag"]
    reason: str | None


class RefusedRelease(msgspec.Struct, frozen=True):
    """What the pointer names and is not served. `release_id` is null when it names nothing."""

    release_id: str | None
    reason: str
    since: Moment


class AccessHealth(msgspec.Struct, frozen=True):
    """How many API keys are valid. `reason` says why a change of their file is not taken over."""

    keys: int
    reason: str | None


class TrialHealth(msgspec.Struct, frozen=True):
    """A trial as one process of the service has seen it since it began to serve the release.

    `asked` counts the rows the challenger was asked about, `failed` those it had no score for: the
    champion answered them.
    """

    trial: str
    challenger: str
    share: float
    shadow: bool
    asked: int
    failed: int


class LaneHealth(msgspec.Struct, frozen=True):
    """How requests reach the endpoint. `reason` says why it is not the fast lane."""

    fast: bool
    reason: str | None


class LogHealth(msgspec.Struct, frozen=True):
    """The prediction log as this worker sees it. `reason` says what keeps it from being used.

    store: the directory or the server, without a password; `off` where the service was told to
    serve unlogged. rows_waiting: kept, but not ingested yet, the oldest answered at oldest_waiting;
    of this worker or, on a server, of all. unlogged: predictions this worker has answered that are
    not in the log.
    """

    store: str
    usable: bool
    durability: Durability | None = None
    when_broken: WhenBroken | None = None
    rows_waiting: int | None = None
    oldest_waiting: datetime | None = None
    unlogged: int = 0
    reason: str | None = None


class Health(msgspec.Struct, frozen=True):
    """The answer to `GET /health`: what is served here, and since when.

    `status` is `degraded` while the prediction log is broken. `worker` is the process that
    answered, each of which follows the pointer by itself. `bento` is the code that runs, whose
    baked release need not be the one served, and null where the service runs from its source.
    `release_refused` is what the pointer names instead of `release_id`, null where nothing is
    followed or all is well. `online_store` is null where there is none, `api_keys` where none are
    asked for, `trial` while no other model is on trial.
    """

    status: Literal["healthy", "degraded"]
    model: str
    version: str
    release_id: str
    bento: str | None
    features: tuple[str, ...]
    started_at: Moment
    worker: int
    release_refused: RefusedRelease | None
    online_store: OnlineHealth | None
    api_keys: AccessHealth | None
    lane: LaneHealth
    prediction_log: LogHealth
    trial: TrialHealth | None = None


class ErrorDetail(msgspec.Struct, frozen=True):
    """What is at fault: a field of the body, `body`, `online_store`, `content-type`, `method`..."""

    field: str
    message: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The answer to every refused request."""

    error: ErrorDetail


class RowErrorDetail(msgspec.Struct, frozen=True):
    """Why one row of a batch has no prediction; `status` is what it alone would have got."""

    status: int
    field: str
    message: str


class RowError(msgspec.Struct, frozen=True):
    """What stands in a batch in place of a prediction."""

    error: RowErrorDetail


class BatchAnswer(msgspec.Struct, frozen=True):
    """The answer to `POST /predict_batch`, in the order of the rows."""

    predictions: list[Prediction | StoredPrediction | RowError]


def predict(
    customer_id: str,
    probability: float,
    model_version: str,
    thresholds: RiskThresholds,
    *,
    holdout: bool,
) -> Prediction:
    """The prediction for a raw `probability` of the model.

    The level is that of the rounded probability, so that an answer never contradicts itself.
    """
    rounded = round(min(max(probability, 0.0), 1.0), PROBABILITY_DIGITS)
    level = thresholds.level(rounded)
    return Prediction(customer_id, rounded, level, model_version, holdout)


def predict_stored(prediction: Prediction, cutoff: datetime, stale: bool) -> StoredPrediction:
    """The `prediction` of features stamped with `cutoff`."""
    return StoredPrediction(
        prediction.customer_id,
        prediction.churn_probability,
        prediction.risk_level,
        prediction.model_version,
        prediction.holdout,
        cutoff,
        stale,
    )


def refuse(refusal: Refusal) -> ErrorAnswer:
    """The answer to a refused request."""
    return ErrorAnswer(ErrorDetail(refusal.field, refusal.message))


def refuse_row(refusal: Refusal) -> RowError:
    """What stands in a batch in place of a refused row."""
    return RowError(RowErrorDetail(refusal.status, refusal.field, refusal.message))
