"""The answers of the service, and how they are written."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from churn_assets.contract.request import Refusal
from churn_assets.contract.risk import RiskLevel, RiskThresholds

PROBABILITY_DIGITS = 4


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The answer to `POST /predict`."""

    customer_id: str
    churn_probability: float
    risk_level: RiskLevel
    model_version: str


class Health(msgspec.Struct, frozen=True):
    """The answer to `GET /health`: what is served here, and since when.

    `bento` is null where the service runs from its source.
    """

    status: Literal["healthy"]
    model: str
    version: str
    release_id: str
    bento: str | None
    features: tuple[str, ...]
    started_at: datetime


class ErrorDetail(msgspec.Struct, frozen=True):
    """What is at fault: a field of the body, or `body`, `content-type`, `method`, `path`."""

    field: str
    message: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    """The answer to every refused request."""

    error: ErrorDetail


def predict(
    customer_id: str, probability: float, model_version: str, thresholds: RiskThresholds
) -> Prediction:
    """The prediction for a raw `probability` of the model.

    The level is that of the rounded probability, so that an answer never contradicts itself.
    """
    rounded = round(min(max(probability, 0.0), 1.0), PROBABILITY_DIGITS)
    return Prediction(customer_id, rounded, thresholds.level(rounded), model_version)


def refuse(refusal: Refusal) -> ErrorAnswer:
    """The answer to a refused request."""
    return ErrorAnswer(ErrorDetail(refusal.field, refusal.message))
