"""What the cleaning takes, what it leaves, and what it makes of one that was stopped."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from registry_cases import NOW, ROLLBACK, Model

from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle import cleaning
from churn_assets.lifecycle.cleaning import RetentionPolicy, clean, plan_cleaning
from churn_assets.lifecycle.history import Evidence, trial_figures
from churn_assets.lifecycle.pointer import Current, point_at
from churn_assets.lifecycle.registry import take_step
from churn_assets.lifecycle.trials import trial_step
from churn_assets.settings import load_settings

POLICY = RetentionPolicy()
RETIRED = Evidence("retired", {"why": "too slow"})
LATER = NOW + timedelta(days=31)


def files_of(home: Home, version: str) -> list[Path]:
    return [
        home.releases / f"v{version}-abc",
        home.bentoml / "bentos" / "churn" / f"v{version}-abc-code1",
        home.bentoml / "bentos" / "churn" / f"v{version}-abc-code2",
    ]


@pytest.fixture
def home(model: Model, tmp_path: Path) -> Home:
    """Versions 1 to 4 were in Production, 5 was retired, 6 is in Staging, 7 in None."""
    made = Home(tmp_path)
    for _ in range(4):
        promote(model)
    model.move(stage(model), "Archived", who="ada", evidence=RETIRED)
    stage(model)
    model.register()
    for version in range(1, 8):
        for path in files_of(made, str(version)):
            path.mkdir(parents=True)
            (path / "file").write_text("content")
    return made


def stage(model: Model) -> str:
    version = model.register()
    model.move(version, "Staging", tags={"release_id": f"v{version}-abc"})
    return version


def promote(model: Model) -> None:
    version = stage(model)
    incumbent = model.read().production
    evidence = Evidence("paired_replay", {"auc": 0.9}, incumbent=incumbent, rows=9)
    if incumbent is None:
        evidence = Evidence("bootstrap", {"auc": 0.9})
    model.move(version, "Production", who="ada", evidence=evidence)


def there(home: Home) -> list[str]:
    """The versions all of whose files are there; of the others, none must be."""
    found = []
    for version in map(str, range(1, 8)):
        present = [path.is_dir() for path in files_of(home, version)]
        assert len(set(present)) == 1, version
        found += [version] * present[0]
    return found


def run(model: Model, home: Home, now: Any = LATER, policy: RetentionPolicy = POLICY) -> Any:
    return clean(model.client, model.name, policy, home, now=now)


def test_what_is_old_goes_and_what_is_in_use_stays(model: Model, home: Home) -> None:
    before = model.read()
    planned = plan_cleaning(before, POLICY, home, now=LATER)
    assert model.read() == before
    assert there(home) == ["1", "2", "3", "4", "5", "6", "7"]
    done = run(model, home)
    assert done == planned
    assert done.versions == ("1", "2", "5")
    assert done.kept == {"3": "a rollback would go back to it"}
    assert there(home) == ["3", "4", "6", "7"]
    assert sorted(model.stages()) == ["3", "4", "6", "7"]
    steps = model.read().history[len(before.history) :]
    assert [(s.version, s.target, s.who) for s in steps] == [
        (version, "Deleted", "retention") for version in done.versions
    ]
    # It is still known what they were, and the way back is still open.
    assert [s.version for s in before.history] == [
        s.version for s in model.read().history[: len(before.history)]
    ]
    model.move("3", "Production", who="ada", evidence=ROLLBACK)
    assert run(model, home).lines() == ["nothing is old enough"]
    assert list((home.root / "tmp").iterdir()) == []


@pytest.mark.parametrize(("days", "gone"), [(29, []), (30, ["1", "2", "5"])])
def test_a_version_is_kept_for_its_days(model: Model, home: Home, days: int, gone: list) -> None:
    assert list(run(model, home, NOW + timedelta(days=days)).versions) == gone
    assert run(model, home, NOW, RetentionPolicy(1)).versions == ()


def test_what_the_service_is_pointed_at_stays(model: Model, home: Home) -> None:
    point_at(home.current, Current("churn:v1-abc-code1", "v1-abc", "1", 2, NOW))
    done = run(model, home)
    assert done.versions == ("2", "5")
    assert done.kept["1"] == "the service is pointed at it"
    assert there(home) == ["1", "3", "4", "6", "7"]


def test_with_a_pointer_that_says_nothing_nothing_goes(model: Model, home: Home) -> None:
    home.current.write_text("{")
    with pytest.raises(UserError, match="does not say what serves"):
        run(model, home)
    assert there(home) == ["1", "2", "3", "4", "5", "6", "7"]
    assert len(model.stages()) == 7


def test_a_version_archived_by_hand_is_kept_and_named(model: Model, home: Home) -> None:
    model.client.set_model_version_tag(model.name, "5", "archived_at", "a while ago")
    done = run(model, home)
    assert done.versions == ("1", "2")
    assert "no tag archived_at" in done.kept["5"]


def test_files_of_a_cleaning_that_was_stopped_go_with_the_next(
    model: Model, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(path: Path, root: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cleaning, "_remove", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(model, home)
    assert sorted(model.stages()) == ["3", "4", "6", "7"]
    assert there(home) == ["1", "2", "3", "4", "5", "6", "7"]
    done = run(model, home)
    assert done.versions == ()
    assert len(done.files) == 9
    assert there(home) == ["3", "4", "6", "7"]


def test_what_comes_into_use_meanwhile_stays(
    model: Model, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan_cleaning(model.read(), POLICY, home, now=LATER)
    model.move("1", "Production", who="ada", evidence=ROLLBACK)
    monkeypatch.setattr(cleaning, "plan_cleaning", lambda *_, **__: planned)
    done = run(model, home)
    assert done.versions == ("2", "5")
    assert "1" in done.kept
    assert "1" in there(home)
    assert model.stages()["1"] == "Production"


def test_a_policy_of_nonsense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "churn.yaml"
    start = "source: {kind: shop}\ncalendar: {start: 2024-01-01}\nregistry: "
    path.write_text(f"{start}{{keep_archived_days: 0}}\n")
    with pytest.raises(UserError, match=r"registry\.keep_archived_days is 0; set at least 1"):
        load_settings(path)
    path.write_text(f"{start}{{keep_archived_days: 45}}\n")
    assert load_settings(path).registry.keep_archived_days == 45


def test_releases_of_trials_go_with_either_of_their_versions(model: Model, home: Home) -> None:
    """6 was tried beside 4, and 8 beside 4 still is."""

    def try_out(version: str, release_id: str, ended: bool) -> Path:
        figures = trial_figures(f"trial-{version}", 0.1, True, release_id)
        begins = Evidence("trial_begins", figures, incumbent="4")
        ends = Evidence("trial_ends", {"trial": f"trial-{version}"}, incumbent="4")
        for evidence, alias in ((begins, version), (ends, None))[: 1 + ended]:
            take_step(
                model.client,
                model.name,
                lambda r, e=evidence, a=alias: trial_step(
                    r, version, a, who="ada", why="so", evidence=e, now=NOW
                ),
                doing="a trial",
            )
        (home.releases / release_id).mkdir()
        return home.releases / release_id

    over = try_out("6", "v4-over", ended=True)
    assert run(model, home).files
    assert over.is_dir(), "its versions are still there"
    model.move("6", "Archived", who="ada", evidence=RETIRED)
    going_on = try_out(stage(model), "v4-going", ended=False)
    much_later = LATER + timedelta(days=31)
    assert over in plan_cleaning(model.read(), POLICY, home, now=much_later).files
    assert run(model, home, much_later).versions == ("6",)
    assert not over.exists()
    assert going_on.is_dir()
