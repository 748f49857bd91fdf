"""The model in production, asked about the same held-out rows as one that would replace it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from churn_assets.lifecycle.registry import read_registry
from churn_assets.lifecycle.tracking import onnx_of

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Incumbent:
    """The version that the alias `production` names.

    onnx: its graph; None when it cannot be had, and `problem` says why. features: in its order.
    """

    version: str
    onnx: bytes | None
    features: tuple[str, ...]
    problem: str | None = None


def production_model(client: MlflowClient, name: str, tracking_uri: str) -> Incumbent | None:
    """The model in production, or None when the registry knows of none.

    One that is there but cannot be loaded is not None: it is evidence that is missing.
    """
    registry = read_registry(client, name)
    number = registry.production
    if number is None:
        return None
    version = registry.version(number)
    try:
        features = client.get_run(str(version.run_id)).data.tags["features"].split(",")
        return Incumbent(number, onnx_of(version.source, tracking_uri), tuple(features))
    except Exception as error:  # MLflow, its database, a disk or onnx: none of them is a pass
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Incumbent(number, None, (), f"version {number} cannot be loaded: {reason}")
