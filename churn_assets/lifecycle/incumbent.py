"""The model in production, as it was released, for whoever compares another one with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from churn_assets.lifecycle.registry import read_registry
from churn_assets.lifecycle.release import fetch_release

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


def production_model(client: MlflowClient, name: str, releases: Path) -> Incumbent | None:
    """The model in production, or None when the registry knows of none.

    It is the one that was released, its digests verified. One that is there but cannot be loaded is
    not None: it is evidence that is missing.
    """
    registry = read_registry(client, name)
    number = registry.production
    if number is None:
        return None
    try:
        release = fetch_release(client, registry.version(number), releases, kept=True)
    except Exception as error:  # MLflow, its database, a disk, a digest: none of them is a pass
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Incumbent(number, None, (), f"version {number} cannot be loaded: {reason}")
    return Incumbent(number, release.model, release.manifest.feature_names)
