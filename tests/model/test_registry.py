from __future__ import annotations

import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from churn_assets.errors import UserError
from churn_assets.lifecycle.experiments import (
    DAGSTER_RUN_TAG,
    accelerator,
    code_version,
    ensure_experiment,
    installed_packages,
    reconcile,
)
from churn_assets.lifecycle.registry import (
    get_version,
    history_of,
    register_version,
    stage_of,
    transition,
)

NOW = datetime(2026, 1, 2, tzinfo=UTC)
NAME = "churn"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    folder = tmp_path_factory.mktemp("mlflow")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        ensure_experiment(made, folder / "artifacts")
    return made


@pytest.fixture
def version(client: MlflowClient, tmp_path: Path) -> str:
    experiment = ensure_experiment(client, tmp_path)
    run = client.create_run(experiment)
    return register_version(
        client, NAME, model_uri=str(tmp_path), run_id=run.info.run_id, tags={"family": "forest"}
    )


def move(client: MlflowClient, version: str, target, **changes):
    given: dict[str, Any] = {"who": "pipeline", "why": "gates passed", "now": NOW}
    given |= {"evidence": {"auc": "0.95"}, **changes}
    return transition(client, NAME, version, target, **given)


def test_a_version_starts_in_none_and_remembers_its_tags(client: MlflowClient, version: str):
    registered = get_version(client, NAME, version)
    assert stage_of(registered) == "None"
    assert history_of(registered) == []
    assert registered.tags["family"] == "forest"


def test_staging_sets_tag_alias_mirror_and_history(client: MlflowClient, version: str):
    move(client, version, "Staging")
    registered = get_version(client, NAME, version)
    assert stage_of(registered) == "Staging"
    assert str(client.get_model_version_by_alias(NAME, "staging").version) == version
    assert registered.current_stage == "Staging"
    (step,) = history_of(registered)
    assert (step.source, step.target, step.who, step.at) == ("None", "Staging", "pipeline", NOW)
    assert step.evidence == {"auc": "0.95"}


def test_a_version_walks_to_archived_and_keeps_its_whole_history(
    client: MlflowClient, version: str
):
    for target in ("Staging", "Production", "Archived"):
        move(client, version, target)
    registered = get_version(client, NAME, version)
    assert [step.target for step in history_of(registered)] == ["Staging", "Production", "Archived"]
    assert "production" not in client.get_registered_model(NAME).aliases


@pytest.mark.parametrize("target", ["Production", "Archived", "None"])
def test_an_illegal_transition_is_refused_and_changes_nothing(
    client: MlflowClient, version: str, target: str
):
    with pytest.raises(UserError, match="may go to Staging"):
        move(client, version, target)
    assert stage_of(get_version(client, NAME, version)) == "None"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"who": " "}, "needs a name and a reason"),
        ({"why": ""}, "needs a name and a reason"),
        ({"evidence": {}}, "needs evidence"),
    ],
)
def test_a_transition_without_a_name_a_reason_or_evidence_is_refused(
    client: MlflowClient, version: str, changes: dict, says: str
):
    with pytest.raises(UserError, match=says):
        move(client, version, "Staging", **changes)
    assert stage_of(get_version(client, NAME, version)) == "None"


def test_a_version_that_does_not_exist_is_named(client: MlflowClient, version: str):
    with pytest.raises(UserError, match="no version 9999"):
        move(client, "9999", "Staging")


def test_reconcile_gives_a_run_the_ending_dagster_saw(client: MlflowClient, tmp_path: Path):
    experiment = ensure_experiment(client, tmp_path)
    runs = {
        name: client.create_run(experiment, tags={DAGSTER_RUN_TAG: name}).info.run_id
        for name in ("failed", "canceled", "fine", "unknown")
    }
    for run_id in runs.values():
        client.set_terminated(run_id, "FINISHED")
    changed = reconcile(
        client, {"failed": "FAILED", "canceled": "KILLED", "fine": "FINISHED", "absent": "FAILED"}
    )
    assert changed == {runs["failed"]: "FAILED", runs["canceled"]: "KILLED"}
    assert client.get_run(runs["failed"]).info.status == "FAILED"
    assert client.get_run(runs["unknown"]).info.status == "FINISHED"
    assert reconcile(client, {"failed": "FAILED"}) == {}


def test_the_code_version_says_dirty_only_when_it_is(tmp_path: Path):
    import subprocess

    assert code_version(tmp_path).commit == "unknown"

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    git("init", "-q")
    (tmp_path / "a.txt").write_text("one")
    git("add", "a.txt")
    git("commit", "-qm", "one")
    clean = code_version(tmp_path)
    assert len(clean.commit) == 40
    assert clean.dirty == "false"
    (tmp_path / "a.txt").write_text("two")
    assert code_version(tmp_path).dirty == "true"


def test_the_environment_is_described():
    assert any(line.startswith("dagster==") for line in installed_packages().splitlines())
    assert accelerator()
