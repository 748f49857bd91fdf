"""The asset: what it says of a deployment, how it fails, and what ends in it."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import msgspec
import pytest
from kubectl_player import APPLIED, NO_PODS, ROLLED_OUT, STUCK, UNDONE, Kubectl, there

from churn_assets.definitions import defs
from churn_assets.defs.deployment import deployment
from churn_assets.defs.resources import Project, RecordIOManager
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.pointer import Current, point_at
from churn_assets.lifecycle.records import BentoRecord, DeploymentRecord
from churn_assets.lifecycle.targets import DeploymentSettings, ImageSettings
from churn_assets.settings import load_settings

BENTO = BentoRecord("churn:v2-b", "/nowhere", "2", "v2", {}, {}, 1.0)
# Built elsewhere: there is no engine here.
SETTINGS = DeploymentSettings(target="kubernetes", image=ImageSettings(build=False))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    point_at(home.current, Current(BENTO.tag, "v2", "2", 1, datetime.now(UTC)))
    folder = home.records / "churn_bento"
    folder.mkdir(parents=True)
    (folder / "latest.json").write_bytes(msgspec.json.encode(BENTO))
    return home


def materialize(home: Home) -> dg.ExecuteInProcessResult:
    settings = msgspec.structs.replace(load_settings(), deployment=SETTINGS)
    return dg.materialize(
        [deployment, dg.AssetSpec("churn_bento").with_io_manager_key("io_manager")],
        selection=["deployment"],
        resources={"project": Project(home, settings), "io_manager": RecordIOManager(home.records)},
        raise_on_error=False,
    )


def test_a_deployment_is_told(home: Home, kubectl: Kubectl) -> None:
    kubectl.plays(there("churn:v1-a"), APPLIED, ROLLED_OUT)
    result = materialize(home)
    assert result.success
    (event,) = result.asset_materializations_for_node("deployment")
    shown = {name: value.value for name, value in event.metadata.items()}
    assert isinstance(shown.pop("seconds"), float)
    assert shown == {
        "target": "kubernetes",
        "release": "v2",
        "bento": "churn:v2-b",
        "image": "churn:v2-b",
        "previous": "churn:v1-a",
        "said": "rolled out to the Deployment churn of churn",
    }
    assert "CHURN_HOLDOUT_SHARE" in kubectl.given("apply")
    kept = (home.records / "deployment" / "latest.json").read_bytes()
    assert msgspec.json.decode(kept, type=DeploymentRecord).image == "churn:v2-b"


def test_what_is_undone_fails_with_the_reason(home: Home, kubectl: Kubectl) -> None:
    kubectl.plays(there("churn:v1-a"), APPLIED, STUCK, NO_PODS, UNDONE, ROLLED_OUT)
    result = materialize(home)
    assert not result.success
    (failure,) = [e for e in result.all_events if e.is_step_failure]
    error = failure.step_failure_data.error
    assert error is not None
    assert error.cause is not None
    assert error.cause.cls_name == UserError.__name__
    assert "exceeded its progress deadline; undone, churn:v1-a serves" in error.cause.message
    assert not (home.records / "deployment").exists()


@pytest.mark.parametrize("job", ["promotion", "approve_promotion", "rollback"])
def test_every_way_into_service_ends_in_it(job: str) -> None:
    layer = defs.resolve_job_def(job).asset_layer
    assert dg.AssetKey("deployment") in layer.selected_asset_keys
    assert layer.get(dg.AssetKey("deployment")).parent_keys == {dg.AssetKey("churn_bento")}


def test_the_player_notes_what_it_was_asked(kubectl: Kubectl) -> None:
    kubectl.plays(APPLIED)
    done = subprocess.run(["kubectl", "apply"], input="x", capture_output=True, text=True)
    assert done.stdout == APPLIED["out"]
    assert (kubectl.calls, kubectl.given("apply")) == ([["apply"]], "x")
    assert json.loads((kubectl.folder / "plan.json").read_text()) == [APPLIED]
