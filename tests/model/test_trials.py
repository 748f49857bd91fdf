"""A trial begins, is released, and ends: in a real registry, with real releases."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from registry_cases import GATES, NOW, ROLLBACK, Model
from sklearn.linear_model import LogisticRegression

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.release import MANIFEST, read_release
from churn_assets.errors import UserError
from churn_assets.lifecycle.history import Evidence, trials
from churn_assets.lifecycle.lineage import _manifests
from churn_assets.lifecycle.production import in_production_now
from churn_assets.lifecycle.registry import finish_pending, in_use
from churn_assets.lifecycle.release import build_release, reference_statistics
from churn_assets.lifecycle.trials import start_trial, stop_trial
from churn_assets.modeling.onnx_export import export_onnx

LATER = NOW + timedelta(days=1)
ROWS = np.random.default_rng(0).integers(0, 30, (200, 5)).astype(np.float32)


class Shop(Model):
    """A registered model whose versions have releases."""

    releases: Path

    def stage(self, features: tuple[str, ...] = FEATURE_NAMES) -> str:
        version, x = self.register(), ROWS[:, : len(features)]
        chosen = LogisticRegression(C=int(version), max_iter=1000)
        fitted = chosen.fit(x, ROWS[:, 2] > ROWS[:, 0])
        onnx = export_onnx(fitted, len(features))
        release = build_release(
            self.releases,
            onnx=onnx,
            model_name=self.name,
            model_version=version,
            features=features,
            golden=(x[:5], fitted.predict_proba(x[:5])[:, 1]),
            reference=reference_statistics({n: x[:, i] for i, n in enumerate(features)}, features),
            mlflow_run=self.run_id,
            dagster_run="run",
            data_hash="data",
            created_at=NOW,
        )
        manifest = (release.directory / MANIFEST).read_bytes()
        tags = {
            "release_id": release.manifest.release_id,
            "release_sha256": hashlib.sha256(manifest).hexdigest(),
        }
        self.move(version, "Staging", evidence=GATES, tags=tags)
        return version

    def start(self, version: str, **changes: Any):
        given: dict[str, Any] = {
            "share": 0.2,
            "shadow": True,
            "who": "ada",
            "why": "looks good",
            "now": NOW,
        }
        return start_trial(self.client, self.name, version, self.releases, **(given | changes))

    def stop(self):
        return stop_trial(self.client, self.name, who="ada", why="enough", now=LATER)

    def serving(self):
        return in_production_now(self.client, self.name, self.releases)


@pytest.fixture
def shop(model: Model, tmp_path: Path) -> Shop:
    made = Shop(model.client, model.name, model.run_id)
    made.releases = tmp_path / "releases"
    made.promote()
    return made


def test_a_trial_begins_with_both_models_in_one_release(shop: Shop) -> None:
    alone = shop.serving()
    shop.stage()
    trial = shop.start("2")
    registry = shop.read()
    assert registry.aliases == {"production": "1", "staging": "2", "challenger": "2"}
    assert registry.version("2").stage == "Staging"
    assert registry.faults() == []
    assert registry.trial == trial
    assert (trial.challenger, trial.champion, trial.share, trial.shadow) == ("2", "1", 0.2, True)
    assert (trial.since, trial.until) == (NOW, None)
    step = registry.history[-1]
    assert (step.who, step.why, step.evidence.incumbent) == ("ada", "looks good", "1")
    assert in_use(registry)["2"]
    served = shop.serving()
    assert (served.version, served.challenger, served.trial) == ("1", "2", trial.id)
    assert served.release_id == trial.release_id != alone.release_id
    release = read_release(Path(served.release_dir))
    assert release.manifest.challenger is not None
    assert release.manifest.challenger.trial == trial.id
    assert release.manifest.challenger.share == 0.2
    plain = read_release(Path(alone.release_dir))
    assert release.model == plain.model
    for version in ("1", "2"):
        found = _manifests(shop.releases, f"*/{MANIFEST}", shop.name, version)
        assert trial.release_id in {manifest.release_id for _, manifest in found}
    # Made anew from the registry it is the same one.
    for made in shop.releases.iterdir():
        if made.name == trial.release_id:
            (made / "model.onnx").unlink()
    assert shop.serving() == served
    assert read_release(Path(served.release_dir)) == release


def test_a_trial_ends_and_the_version_stays_in_staging(shop: Shop) -> None:
    alone = shop.serving()
    shop.stage()
    trial = shop.start("2")
    assert shop.stop().id == trial.id
    registry = shop.read()
    assert registry.aliases == {"production": "1", "staging": "2"}
    assert (registry.trial, registry.faults()) == (None, [])
    assert [(t.id, t.until) for t in trials(registry.history)] == [(trial.id, LATER)]
    assert shop.serving() == alone
    with pytest.raises(UserError, match="is on trial; `churn trial start` begins"):
        shop.stop()
    # The same version may be tried again, with another assignment.
    assert shop.start("2", now=LATER).id != trial.id


def refused(shop: Shop, version: str, match: str, **changes: Any) -> None:
    before = shop.read()
    with pytest.raises(UserError, match=match):
        shop.start(version, **changes)
    assert shop.read() == before


def test_what_may_not_be_tried_is_refused(shop: Shop) -> None:
    shop.register()
    refused(shop, "1", "version 1 is in Production; only one in Staging can be on trial")
    refused(shop, "2", "version 2 is in None; only one in Staging")
    refused(shop, "9", "no version 9")
    shop.stage(FEATURE_NAMES[:3])
    shop.stage()
    for share in (0, 1, -0.1, 1e-9, float("nan")):
        refused(shop, "3", "the share of a trial is", share=share)
    refused(shop, "3", "name and a reason", who=" ")
    refused(shop, "3", "name and a reason", why="")
    refused(shop, "3", "shorten the reason", why="x" * 9000)
    # Fewer features than the champion's are in every request.
    shop.start("3")
    refused(shop, "4", "one trial at a time, and one is going on: trial-3-beside-1")
    shop.move("3", "Production", who="ada", evidence=replay("1"))
    refused(shop, "4", "needs support_tickets_90d, which version 3 does not take")


def test_nothing_is_tried_beside_nothing(model: Model, tmp_path: Path) -> None:
    alone = Shop(model.client, model.name, model.run_id)
    alone.releases = tmp_path
    alone.stage()
    refused(alone, "1", "nothing of .* is in Production to try version 1 beside")


def test_a_release_that_cannot_be_proven_is_not_tried(shop: Shop) -> None:
    shop.stage()
    release_id = shop.read().version("2").tags["release_id"]
    (shop.releases / release_id / "model.onnx").write_bytes(b"other")
    refused(shop, "2", "cannot be fetched|must not be served")


def replay(incumbent: str) -> Evidence:
    return Evidence("paired_replay", {"auc": 0.95}, incumbent=incumbent, rows=100)


@pytest.mark.parametrize("ending", ["its promotion", "another's", "a rollback", "archived"])
def test_what_changes_production_ends_a_trial(shop: Shop, ending: str) -> None:
    if ending == "a rollback":
        shop.stage()
        shop.move("2", "Production", who="ada", evidence=replay("1"), now=NOW)
    incumbent = str(shop.read().production)
    challenger, another = shop.stage(), shop.stage()
    trial = shop.start(challenger)
    given: dict[str, Any] = {"who": "ada", "why": "so", "now": LATER}
    if ending == "its promotion":
        evidence = Evidence("trial", {"difference": -0.01}, incumbent=incumbent, rows=100)
        shop.move(challenger, "Production", **given, evidence=evidence)
    elif ending == "another's":
        shop.move(another, "Production", **given, evidence=replay(incumbent))
    elif ending == "a rollback":
        shop.move("1", "Production", **given, evidence=ROLLBACK)
    else:
        shop.move(challenger, "Archived", **given, evidence=Evidence("retired"))
    registry = shop.read()
    assert (registry.trial, registry.aliases.get("challenger")) == (None, None)
    assert registry.faults() == []
    assert "the trial ends" in registry.history[-1].line()
    (ended,) = trials(registry.history)
    assert (ended.id, ended.until) == (trial.id, LATER)
    served = shop.serving()
    assert (served.trial, served.challenger) == (None, None)
    assert read_release(Path(served.release_dir)).manifest.challenger is None


def test_a_trial_whose_beginning_was_cut_short_has_begun(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.stage()

    def killed(*_: object) -> None:
        raise MlflowException("killed")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(UserError, match="churn history` shows"):
            shop.start("2")
    seen = shop.read()
    assert seen.pending is not None
    assert seen.trial is not None
    assert seen.aliases["challenger"] == "2"
    served = shop.serving()
    assert finish_pending(shop.client, shop.name) is not None
    after = shop.read()
    assert (after.pending, after.trial, after.aliases) == (None, seen.trial, seen.aliases)
    assert shop.serving() == served


def test_an_alias_set_by_hand_is_no_trial(shop: Shop) -> None:
    shop.stage()
    shop.client.set_registered_model_alias(shop.name, "challenger", "2")
    assert "alias challenger points to 2, on trial is nothing" in shop.read().faults()[0]
    refused(shop, "2", "contradicts itself")
