"""A home says which formats it has; another one is migrated, or refused with what to do."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from unittest import mock

import pytest

from churn_assets.cli import cli
from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT, Home
from churn_assets.home_format import (
    FORMATS,
    MARKER,
    RESTORING,
    Marker,
    current_marker,
    is_older,
    read_marker,
    write_marker,
)
from churn_assets.lifecycle import upgrade as upgrades
from churn_assets.lifecycle.upgrade import Step, upgrade

WANTED = {**FORMATS, "lake": 3}


@pytest.fixture
def home(tmp_path: Path) -> Generator[Home]:
    with mock.patch.dict(os.environ, {"CHURN_HOME": str(tmp_path / "home")}):
        os.environ.pop("CHURN_MLFLOW_URI", None)
        made = Home(tmp_path / "home")
        made.prepare()
        yield made


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What the commands of the libraries were asked, which are tried with a real home elsewhere."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(upgrades, "_run", lambda _, *command: asked.append(command))
    return asked


def say_of(home: Home, **changes: object) -> None:
    path = home.root / MARKER
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def from_before_the_marker(home: Home) -> None:
    (home.root / MARKER).unlink()


def release_of_format(home: Home, number: int) -> None:
    release = home.releases / "v1-abc"
    release.mkdir()
    (release / "manifest.json").write_text(f'{{"format": {number}, "release_id": "v1-abc"}}')


def test_a_new_home_says_what_it_is_and_one_that_is_not_there_is_not_made(
    home: Home, tmp_path: Path
) -> None:
    assert read_marker(home.root) == current_marker()
    home.prepare()
    Home(tmp_path / "none").check_format()
    assert not (tmp_path / "none").exists()


def test_a_home_that_was_killed_while_it_was_made_is_finished(home: Home) -> None:
    (home.dagster / "dagster.yaml").unlink()
    home.prepare()
    from_before_the_marker(home)
    (home.dagster / "dagster.yaml").unlink()
    home.prepare()
    assert read_marker(home.root) == current_marker()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"formats": {**FORMATS, "home": 99}}, "newer version.*home has format 99.*upgrade the co"),
        ({"formats": {**FORMATS, "releases": 99}}, "releases has format 99"),
        ({"formats": {**FORMATS, "prediction_log": 99}}, "prediction_log has format 99"),
        ({"formats": {**FORMATS, "something": 1}}, "something has format 1, this code knows none"),
        ({"libraries": {"dagster": "1.13", "mlflow": "99.0"}}, "with mlflow 99.0.*requirements"),
        ({"libraries": {"dagster": "1.13", "mlflow": "3.0"}}, "older version.*`churn upgrade`"),
        # Numbers, not text: 1.9 is older than 1.13.
        ({"libraries": {"dagster": "1.9", "mlflow": "3.0"}}, "older version.*`churn upgrade`"),
        ({"formats": {**FORMATS, "home": 1}}, "older version.*`churn upgrade`"),
        ({"formats": 1}, "does not say which format.*churn restore"),
    ],
)
def test_another_format_is_refused_and_told_what_to_do(
    home: Home, changes: dict[str, object], says: str
) -> None:
    say_of(home, **changes)
    before = (home.root / MARKER).read_bytes()
    for entry in (home.check_format, home.prepare):
        with pytest.raises(UserError, match=says):
            entry()
    assert (home.root / MARKER).read_bytes() == before


def test_a_home_is_refused_by_the_command_and_by_the_code_location(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHURN_CONFIG", raising=False)
    from_before_the_marker(home)
    with pytest.raises(UserError, match="run `churn upgrade`"):
        cli.main(["versions"], standalone_mode=False)
    # Another test of this process may have loaded it, for another home.
    monkeypatch.delitem(sys.modules, "churn_assets.definitions", raising=False)
    with pytest.raises(UserError, match="run `churn upgrade`"):
        importlib.import_module("churn_assets.definitions")


def test_a_home_from_before_there_was_a_marker_is_migrated_once(
    home: Home, libraries: list[tuple[str, ...]]
) -> None:
    from_before_the_marker(home)
    release_of_format(home, 1)
    sqlite3.connect(home.root / "mlflow.db").close()
    told: list[str] = []
    kept: list[str] = []
    for _ in range(2):
        upgrade(home, log=None, back_up=lambda: kept.append("backup"), say=told.append)
    assert read_marker(home.root) == current_marker()
    home.prepare()
    assert kept == ["backup"]
    assert libraries == [("mlflow", "db", "upgrade", home.mlflow_uri),
                         ("dagster", "instance", "migrate")]  # fmt: skip
    assert told[-1].endswith("is up to date")


@pytest.mark.parametrize("foreign", ["release", "log"])
def test_what_is_of_a_format_nobody_knows_is_named_and_nothing_is_migrated(
    home: Home, libraries: list[tuple[str, ...]], foreign: str
) -> None:
    from_before_the_marker(home)
    if foreign == "release":
        release_of_format(home, 7)
    else:
        home.prediction_log.mkdir()
        with sqlite3.connect(home.prediction_log / "w.sqlite") as connection:
            connection.execute("PRAGMA user_version = 7")
        connection.close()
    with pytest.raises(UserError, match=r"has format 7.*move it out of the home"):
        upgrade(home, log=None, back_up=None, say=print)
    assert not (home.root / MARKER).exists()
    assert libraries == []


def appended(text: str) -> Step:
    """From the first or second format of the lake: a line more in a file, once."""

    def run(home: Home) -> None:
        path = home.lake / "lines"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in dict.fromkeys([*lines, text])))
        if text == "second" and os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)

    return Step("lake", {"first": 1, "second": 2}[text], text, run)


STEPS = (*upgrades.STEPS, appended("first"), appended("second"))


def killed_in_a_step() -> None:
    home = Home.from_environment()
    upgrade(home, log=None, back_up=None, say=print, steps=STEPS, formats=WANTED)


def test_an_upgrade_that_was_killed_goes_on_where_it_was(
    home: Home, libraries: list[tuple[str, ...]]
) -> None:
    from_before_the_marker(home)
    killed = "from test_home_format import killed_in_a_step; killed_in_a_step()"
    environment = os.environ | {"KILL": "1", "PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", killed], cwd=Path(__file__).parent, env=environment
    )
    assert done.returncode == -signal.SIGKILL
    stopped = read_marker(home.root)
    assert stopped is not None
    assert (stopped.formats["home"], stopped.formats["lake"]) == (2, 2)
    assert is_older(stopped, WANTED)
    told: list[str] = []
    upgrade(home, log=None, back_up=None, say=told.append, steps=STEPS, formats=WANTED)
    assert told[0] == "lake: format 3, second"
    done = read_marker(home.root)
    assert done is not None
    assert (done.formats, done.libraries) == (WANTED, current_marker().libraries)
    assert (home.lake / "lines").read_text() == "first\nsecond\n"


def test_a_format_no_step_leads_on_from_is_refused_before_anything_is_done(
    home: Home, libraries: list[tuple[str, ...]]
) -> None:
    kept: list[str] = []
    with pytest.raises(UserError, match="no step leads on from format 1 of lake"):
        upgrade(
            home,
            log=None,
            back_up=lambda: kept.append("backup"),
            say=print,
            steps=[appended("second")],
            formats=WANTED,
        )
    assert kept == libraries == []


def test_a_backup_that_fails_and_a_home_in_use_stop_an_upgrade(
    home: Home, libraries: list[tuple[str, ...]]
) -> None:
    from_before_the_marker(home)

    def no_space() -> None:
        raise UserError("no space")

    with pytest.raises(UserError, match="no space"):
        upgrade(home, log=None, back_up=no_space, say=print)
    with home.exclusive("up"), pytest.raises(UserError, match="another `make up`"):
        upgrade(home, log=None, back_up=None, say=print)
    assert not (home.root / MARKER).exists()
    (home.root / RESTORING).write_text("{}")
    with pytest.raises(UserError, match="restore"):
        upgrade(home, log=None, back_up=None, say=print)


def test_a_home_of_a_newer_version_is_not_upgraded(
    home: Home, libraries: list[tuple[str, ...]]
) -> None:
    say_of(home, formats={**FORMATS, "lake": 99, "home": 1})
    before = (home.root / MARKER).read_bytes()
    with pytest.raises(UserError, match="lake has format 99"):
        upgrade(home, log=None, back_up=lambda: pytest.fail("it was begun"), say=print)
    assert (home.root / MARKER).read_bytes() == before
    assert libraries == []


def test_databases_that_could_not_be_migrated_are_so_at_the_next_upgrade(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_before_the_marker(home)

    def fails(*_: object) -> None:
        raise UserError("no room")

    monkeypatch.setattr(upgrades, "_run", fails)
    for _ in range(2):
        with pytest.raises(UserError, match="no room"):
            upgrade(home, log=None, back_up=None, say=print)
        with pytest.raises(UserError, match="run `churn upgrade`"):
            home.check_format()


def test_a_marker_is_replaced_in_one_step(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_marker(home.root, Marker({}, {}))
    assert read_marker(home.root) == current_marker()
