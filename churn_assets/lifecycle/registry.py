"""The registry's states and the one function that moves a version between them.

None -> Staging -> Production -> Archived. The tag `stage` and the aliases are the truth; MLflow's
own stages mirror them for as long as MLflow has them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Literal

import msgspec

from churn_assets.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

Stage = Literal["None", "Staging", "Production", "Archived"]

LEGAL: dict[Stage, tuple[Stage, ...]] = {
    "None": ("Staging",),
    "Staging": ("Production", "Archived"),
    "Production": ("Archived",),
    "Archived": (),
}
ALIAS: dict[Stage, str] = {"Staging": "staging", "Production": "production"}

STAGE_TAG = "stage"
HISTORY_TAG = "stage_history"


class Transition(msgspec.Struct, frozen=True):
    """One step of a version's history."""

    source: Stage
    target: Stage
    who: str
    why: str
    at: datetime
    evidence: dict[str, str]


def register_version(
    client: MlflowClient, name: str, *, model_uri: str, run_id: str, tags: Mapping[str, str]
) -> str:
    """Register the model logged at `model_uri` as a new version of `name`, in stage None.

    Returns the version number.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name, source=model_uri, run_id=run_id, tags={**tags, STAGE_TAG: "None", HISTORY_TAG: "[]"}
    )
    return str(version.version)


def get_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    """Version `version` of `name`. Raises UserError when there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise UserError(
            f"the registry has no version {version} of {name}; `churn versions` lists what it has"
        ) from error


def stage_of(version: ModelVersion) -> Stage:
    """The stage of a registered version. Raises UserError for a tag that is no stage."""
    stage = version.tags.get(STAGE_TAG, "None")
    if stage not in LEGAL:
        raise UserError(
            f"version {version.version} of {version.name} has the tag {STAGE_TAG}={stage!r}, which "
            f"is no stage; set it to one of {', '.join(LEGAL)}"
        )
    return stage


def history_of(version: ModelVersion) -> list[Transition]:
    """Every transition of a version, oldest first."""
    return msgspec.json.decode(version.tags.get(HISTORY_TAG, "[]"), type=list[Transition])


def transition(
    client: MlflowClient,
    name: str,
    version: str,
    target: Stage,
    *,
    who: str,
    why: str,
    evidence: Mapping[str, str],
    now: datetime,
) -> Transition:
    """Move a version to `target` and append to its history.

    Raises UserError for a transition that is not legal, without a person or policy that answers
    for it, or without evidence.
    """
    current = get_version(client, name, version)
    source = stage_of(current)
    if target not in LEGAL[source]:
        allowed = ", ".join(LEGAL[source]) or "nowhere"
        raise UserError(
            f"version {version} of {name} is in {source} and may go to {allowed}, not to {target}"
        )
    if not who.strip() or not why.strip():
        raise UserError(
            f"moving version {version} to {target} needs a name and a reason; give both"
        )
    if not evidence:
        raise UserError(
            f"moving version {version} of {name} to {target} needs evidence; evaluate it first"
        )
    step = Transition(source, target, who.strip(), why.strip(), now, dict(evidence))
    history = msgspec.json.encode([*history_of(current), step]).decode()
    client.set_model_version_tag(name, version, HISTORY_TAG, history)
    client.set_model_version_tag(name, version, STAGE_TAG, target)
    if source in ALIAS and _aliased(client, name, ALIAS[source]) == version:
        client.delete_registered_model_alias(name, ALIAS[source])
    if target in ALIAS:
        client.set_registered_model_alias(name, ALIAS[target], version)
    with warnings.catch_warnings():
        # Stages are deprecated in MLflow; they are a mirror here, not the truth.
        warnings.simplefilter("ignore", FutureWarning)
        client.transition_model_version_stage(name, version, target)
    return step


def _aliased(client: MlflowClient, name: str, alias: str) -> str | None:
    versions = client.get_registered_model(name).aliases
    return str(versions[alias]) if alias in versions else None
