"""MLflow runs: how an experiment is set up, what every run is tagged with, how it truly ended."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from churn_assets.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "customer-churn"
DAGSTER_RUN_TAG = "dagster_run_id"

Ending = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class CodeVersion:
    """The git commit the code runs from, and whether the tree had changes on top of it."""

    commit: str
    dirty: str


def code_version(root: Path) -> CodeVersion:
    """The commit of `root`; both fields say `unknown` outside of a git checkout.

    An image has none, and is told by CHURN_COMMIT when it is built.
    """
    if commit := os.environ.get("CHURN_COMMIT"):
        return CodeVersion(commit, "false")
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = str(bool(_git(root, "status", "--porcelain", "--untracked-files=no"))).lower()
    except (OSError, subprocess.CalledProcessError):
        return CodeVersion("unknown", "unknown")
    return CodeVersion(commit, dirty)


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True, timeout=20
    )
    return done.stdout.strip()


@cache
def installed_packages() -> str:
    """Every installed distribution as `name==version`, a line each, sorted."""
    pins = {
        f"{d.metadata['Name']}=={d.version}"
        for d in importlib.metadata.distributions()
        if d.metadata["Name"]
    }
    return "\n".join(sorted(pins, key=str.lower)) + "\n"


def accelerator() -> str:
    """What computes: `none` unless the kernel shows an NVIDIA device."""
    devices = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    for device in devices:
        for line in device.read_text().splitlines():
            if line.startswith("Model:"):
                return f"{len(devices)} x {line.split(':', 1)[1].strip()}"
    return "none"


def environment_tags(root: Path) -> dict[str, str]:
    """The tags that say what code and machine made a run."""
    version = code_version(root)
    return {
        "git_commit": version.commit,
        "git_dirty": version.dirty,
        "python_version": platform.python_version(),
        "accelerator": accelerator(),
    }


def require_store(client: MlflowClient) -> None:
    """Raise UserError when the store of `client` does not answer, or not to this user."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        # What a first request imports shows the whole process deprecations of other libraries.
        with warnings.catch_warnings():
            client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = re.sub(r"//[^/@\s]+@", "//", str(error).strip().partition("\n")[0])
        raise UserError(
            f"MLflow cannot be asked ({reason}); check CHURN_MLFLOW_URI and, for a server with a "
            "login, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        ) from error


def ensure_experiment(client: MlflowClient, artifacts: Path) -> str:
    """The experiment's id; made with its artifacts under `artifacts` when it is not there yet.

    A tracking server keeps them itself, where it was told to.
    """
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return experiment.experiment_id
    return client.create_experiment(
        EXPERIMENT,
        artifact_location=(
            None if client.tracking_uri.startswith("http") else artifacts.resolve().as_uri()
        ),
        # MLflow's UI shows the experiment as one of models, not of language-model traces.
        tags={"mlflow.experimentKind": "custom_model_development"},
    )


def reconcile(client: MlflowClient, endings: Mapping[str, Ending]) -> dict[str, Ending]:
    """Give every MLflow run the ending its Dagster run had; returns what had to be changed.

    `endings` maps ids of Dagster runs that are over to how they ended. MLflow closes a run as
    FINISHED when the process exits, whatever happened in it; this tells the truth.
    """
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return {}
    changed: dict[str, Ending] = {}
    for dagster_run, ending in endings.items():
        runs = client.search_runs(
            [experiment.experiment_id], f"tags.{DAGSTER_RUN_TAG} = '{dagster_run}'"
        )
        for run in runs:
            if run.info.status != ending:
                client.set_terminated(run.info.run_id, ending)
                changed[run.info.run_id] = ending
    return changed
