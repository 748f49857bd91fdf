from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from registry_cases import BOOTSTRAP, GATES, NOW, ROLLBACK, Model

from churn_assets.errors import UserError
from churn_assets.lifecycle.experiments import (
    DAGSTER_RUN_TAG,
    accelerator,
    code_version,
    ensure_experiment,
    installed_packages,
    reconcile,
)
from churn_assets.lifecycle.history import (
    Evidence,
    RollbackPlan,
    Stage,
    in_production,
    moment,
)
from churn_assets.lifecycle.registry import (
    INTENT_TAG,
    POLICY,
    TAG_LIMIT,
    get_version,
    read_registry,
    rollback_target,
)


def test_a_version_starts_in_none_and_remembers_its_tags(model: Model):
    version = model.register()
    registered = model.read().version(version)
    assert registered.stage == "None"
    assert registered.tags["family"] == "forest"
    assert model.read().history == ()


def test_a_model_that_is_not_there_has_no_versions(client: MlflowClient):
    assert read_registry(client, "nobody").versions == {}


def test_staging_sets_tag_alias_mirror_and_history(model: Model):
    version = model.register()
    model.move(version, "Staging", tags={"release_id": "v1-abc"})
    registered = get_version(model.client, model.name, version)
    assert registered.tags["stage"] == "Staging"
    assert registered.tags["release_id"] == "v1-abc"
    assert str(model.client.get_model_version_by_alias(model.name, "staging").version) == version
    assert registered.current_stage == "Staging"
    (step,) = model.read().history
    assert (step.source, step.target, step.who, step.at) == ("None", "Staging", "pipeline", NOW)
    assert step.evidence == GATES


def test_another_in_production_archives_the_one_before_it(model: Model):
    first, second = model.promote(), model.promote()
    assert model.stages() == {first: "Archived", second: "Production"}
    assert model.client.get_registered_model(model.name).aliases == {"production": int(second)}
    mirrored = model.client.search_model_versions(f"name = '{model.name}'")
    assert {str(v.version): v.current_stage for v in mirrored} == model.stages()
    archived = model.read().version(first)
    assert archived.tags["archived_at"] == NOW.isoformat()
    last = model.read().history[-1]
    assert [(m.version, m.target) for m in last.moves] == [
        (second, "Production"),
        (first, "Archived"),
    ]
    assert last.plan == RollbackPlan(first, None, f"the job rollback goes back to version {first}")


def test_staging_left_goes_to_the_newest_that_is_still_there(model: Model):
    first, second = model.stage(), model.stage()
    assert model.read().aliases == {"staging": second}
    model.move(second, "Archived", evidence=Evidence("retired", {"why": "too slow"}))
    assert model.read().aliases == {"staging": first}
    model.move(first, "Production", evidence=BOOTSTRAP)
    assert model.read().aliases == {"production": first}


@pytest.mark.parametrize("target", ["Production", "Archived", "None", "Deleted"])
def test_an_illegal_transition_is_refused_and_changes_nothing(model: Model, target: Stage):
    version = model.register()
    with pytest.raises(UserError, match="is in None and may go to Staging, not to"):
        model.move(version, target)
    assert model.stages() == {version: "None"}
    assert model.read().history == ()


def test_production_is_left_only_by_being_replaced(model: Model):
    version = model.promote()
    with pytest.raises(UserError, match="only when another takes its place"):
        model.move(version, "Archived", evidence=Evidence("retired"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"who": " "}, "needs a name and a reason"),
        ({"why": ""}, "needs a name and a reason"),
        ({"evidence": Evidence("gates")}, "needs evidence"),
        ({"evidence": BOOTSTRAP}, "needs evidence"),
        ({"evidence": Evidence("gates", {"auc": "low"}, passed=False)}, "the gates refused"),
        ({"why": "x" * TAG_LIMIT}, "shorten the reason"),
    ],
)
def test_a_way_to_staging_without_what_it_needs_is_refused(model: Model, changes: dict, says: str):
    version = model.register()
    with pytest.raises(UserError, match=says):
        model.move(version, "Staging", **changes)
    assert model.stages() == {version: "None"}


def test_a_version_the_gates_refused_stays_whatever_is_said_of_it(model: Model):
    version = model.register()
    model.client.set_model_version_tag(model.name, version, "gates", "refused")
    with pytest.raises(UserError, match="the gates refused"):
        model.move(version, "Staging")


def compared(**changes: Any) -> Evidence:
    given: dict[str, Any] = {"figures": {"auc": 0.95}, "incumbent": "1", "rows": 100}
    return Evidence("paired_replay", **(given | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"who": ""}, "needs a name and a reason"),
        ({"evidence": GATES}, "a trial or a paired replay, not gates"),
        ({"evidence": BOOTSTRAP}, "must be compared with it"),
        ({"evidence": compared(incumbent="7")}, "in Production is 1; compare it with that"),
        ({"evidence": compared(incumbent=None)}, "in Production is 1; compare it with that"),
        ({"evidence": compared(rows=0)}, "no figures or no rows"),
        ({"evidence": compared(rows=None)}, "no figures or no rows"),
        ({"evidence": compared(figures={})}, "no figures or no rows"),
        ({"evidence": compared(figures={"auc": float("nan")})}, "auc is nan; measure it again"),
        ({"who": POLICY, "evidence": compared(passed=False)}, "does not pass the policy"),
        ({"plan": None}, "needs a rollback plan that goes back to version 1"),
        ({"plan": RollbackPlan(None, None, "hope")}, "goes back to version 1"),
        ({"plan": RollbackPlan("1", None, " ")}, "needs a rollback plan"),
    ],
)
def test_a_way_to_production_without_what_it_needs_is_refused(
    model: Model, changes: dict, says: str
):
    model.promote()
    before = model.read()
    with pytest.raises(UserError, match=says):
        model.promote(**changes)
    assert model.read().production == before.production == "1"
    model.promote(evidence=compared(passed=False))
    assert model.read().production == "3"


def test_the_first_version_needs_a_bootstrap(model: Model):
    with pytest.raises(UserError, match="in Production is none; compare it with that"):
        model.promote(evidence=compared())
    assert model.read().production is None


def test_a_rollback_goes_back_to_the_last_known_good_version(model: Model):
    first, second, third = model.promote(), model.promote(), model.promote()
    assert rollback_target(model.read()) == second
    model.move(second, "Production", evidence=ROLLBACK, plan=None)
    assert model.stages() == {first: "Archived", second: "Production", third: "Archived"}
    # Not to the one that was bad.
    assert rollback_target(model.read()) == first
    model.move(first, "Production", evidence=ROLLBACK)
    with pytest.raises(UserError, match="there is nothing to roll back to"):
        rollback_target(model.read())
    # A person may put it back by name, and then it is one to go back from.
    assert rollback_target(model.read(), third) == third
    model.move(third, "Production", evidence=ROLLBACK)
    assert rollback_target(model.read()) == first


def test_nothing_in_production_is_nothing_to_roll_back(model: Model):
    model.stage()
    with pytest.raises(UserError, match="has nothing in Production"):
        rollback_target(model.read())


@pytest.mark.parametrize("evidence", [GATES, BOOTSTRAP, compared(incumbent="2")])
def test_archived_comes_back_only_by_rollback(model: Model, evidence: Evidence):
    first, second = model.promote(), model.promote()
    with pytest.raises(UserError, match="only by a rollback"):
        model.move(first, "Production", evidence=evidence)
    assert model.read().production == second


def test_a_rollback_to_a_version_that_never_served_is_refused(model: Model):
    retired = model.stage()
    model.move(retired, "Archived", evidence=Evidence("retired", {"why": "too slow"}))
    model.promote()
    with pytest.raises(UserError, match="has never been in Production"):
        model.move(retired, "Production", evidence=ROLLBACK)


def test_what_is_in_use_cannot_be_deleted(model: Model):
    first, second, third = model.promote(), model.promote(), model.promote()
    seen = model.read().version(first).tags["archived_at"]
    retention = Evidence("retention", {"archived_at": seen})
    with pytest.raises(UserError, match="a rollback would go back to it"):
        model.move(second, "Deleted", evidence=retention)
    with pytest.raises(UserError, match="at another time than was seen"):
        model.move(first, "Deleted", evidence=Evidence("retention", {"archived_at": "then"}))
    model.move(first, "Deleted", evidence=retention)
    assert sorted(model.stages()) == [second, third]
    with pytest.raises(UserError, match=f"no version {first}"):
        model.move(first, "Production", evidence=ROLLBACK)


def test_a_version_that_does_not_exist_is_named(model: Model):
    model.register()
    with pytest.raises(UserError, match="no version 9999"):
        model.move("9999", "Staging")


def test_a_registry_changed_by_hand_is_refused_and_named(model: Model):
    version = model.promote()
    model.client.set_registered_model_alias(model.name, "production", model.register())
    assert model.read().faults()
    with pytest.raises(UserError, match="contradicts itself"):
        model.stage()
    model.client.set_registered_model_alias(model.name, "production", version)
    assert model.read().faults() == []
    model.client.set_registered_model_tag(model.name, INTENT_TAG, "{")
    with pytest.raises(UserError, match=r"transition\.intent .* is not a step"):
        model.read()


def test_a_clock_that_went_back_does_not_reorder_the_history(model: Model):
    model.promote()
    model.promote(now=NOW - timedelta(days=3))
    assert [step.at for step in model.read().history] == [NOW] * 4


def at(day: str) -> datetime:
    return datetime.fromisoformat(f"{day}T10:00+00:00")


def test_what_was_in_production_on_a_day(model: Model):
    first = model.promote(now=at("2026-03-01"), who="ada", why="the first")
    second = model.promote(now=at("2026-03-03"), who="bob", why="better")
    model.move(first, "Production", evidence=ROLLBACK, who="eve", why="worse", now=at("2026-03-05"))
    history = model.read().history

    def there(on: str) -> list[tuple[str, str]]:
        return [(t.version, t.step.who) for t in in_production(history, moment(on))]

    assert there("2026-02-28") == []
    assert there("2026-03-01T09:59") == []
    assert there("2026-03-01T10:00") == [(first, "ada")]
    assert there("2026-03-02") == [(first, "ada")]
    assert there("2026-03-03") == [(first, "ada"), (second, "bob")]
    assert there("2026-03-03T10:00") == [(second, "bob")]
    assert there("2026-03-03T12:00+03:00") == [(first, "ada")]
    assert there("2026-03-04") == [(second, "bob")]
    assert there("2027-01-01") == [(first, "eve")]
    told = "\n".join(in_production(history, moment("2026-03-04"))[0].lines())
    assert "since 2026-03-03 10:00:00, until 2026-03-05 10:00:00 UTC" in told
    assert "bob: better" in told
    assert f"paired_replay against version {first} on 100 rows: auc 0.95" in told
    assert f"goes back to version {first}" in told


@pytest.mark.parametrize("text", ["3 March", "2026-13-01", "2026-03-03T25:00", ""])
def test_what_is_no_day_is_refused(text: str):
    with pytest.raises(UserError, match="is no day; give one such as"):
        moment(text)


def test_a_registry_that_is_down_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"the registry did not answer .* goes on serving"):
        read_registry(MlflowClient("http://127.0.0.1:9"), "churn")


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
