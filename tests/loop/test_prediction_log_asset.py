"""The prediction log as an asset: what a person sees of it, and that an empty log is no error."""

import time
from pathlib import Path

import dagster as dg
import msgspec
import pytest

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.logged import LoggedPrediction, encode_logged
from churn_assets.data.prediction_log import PREDICTION_LOG
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.prediction_log import prediction_log
from churn_assets.defs.resources import Project
from churn_assets.home import Home
from churn_assets.settings import PredictionLogSettings
from churn_service.log_files import SqliteLog


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(Home(tmp_path), SETTINGS)


def materialize(project: Project) -> tuple[dict, dict]:
    """What the asset shows, and the outcomes of its checks."""
    with dg.instance_for_test() as instance:
        done = dg.materialize([prediction_log], resources={"project": project}, instance=instance)
    (shown,) = done.asset_materializations_for_node("prediction_log")
    checks = {check.check_name: check for check in done.get_asset_check_evaluations()}
    return {
        name: getattr(value, "records", value.value) for name, value in shown.metadata.items()
    }, checks


def answered(arm: str, at: int) -> bytes:
    features = (FEATURE_NAMES, (1, 2.5, 3, 4, 5.5))
    scores = (0.1235, 0.12345, 0.2)
    made = ("7", "v7-abc", "churn:x", None, None, 250)
    return encode_logged(LoggedPrediction("r", at, "c-1", *features, *scores, arm, *made))  # ty: ignore[invalid-argument-type]


def test_an_empty_log_is_no_error(project: Project) -> None:
    shown, checks = materialize(project)
    assert (shown["rows_added"], shown["lag_seconds"]) == (0, 0.0)
    assert all(check.passed for check in checks.values())
    assert not project.lake.days(PREDICTION_LOG)


def test_the_asset_shows_rows_by_day_arm_and_release(project: Project) -> None:
    log = SqliteLog(project.home.prediction_log, "process")
    minute_ago = (time.time_ns() // 1000) - 60_000_000
    arms = ["champion", "champion", "challenger"]
    log.write([answered(arm, minute_ago + n) for n, arm in enumerate(arms)])
    shown, checks = materialize(project)
    assert (shown["rows_added"], shown["dagster/row_count"], shown["rows_known"]) == (3, 3, 0)
    assert 60 <= shown["lag_seconds"] < 120
    (day,) = (record.data for record in shown["rows_by_day"])
    assert (day["added"], day["rows"]) == ("3", "3")
    assert set(checks) == {"keys_unique", "trimmed_what_is_there"}
    assert all(check.passed for check in checks.values())
    log.close()


def test_what_is_left_alone_shows_as_a_check_that_did_not_pass(project: Project) -> None:
    project.home.prediction_log.mkdir(parents=True)
    (project.home.prediction_log / "0.sqlite").write_bytes(b"SQLite format 3\0" + bytes(5000))
    _, checks = materialize(project)
    assert not checks["trimmed_what_is_there"].passed
    assert "left alone: 0.sqlite" in checks["trimmed_what_is_there"].description


def test_a_log_elsewhere_is_ingested_from_there(project: Project, tmp_path: Path) -> None:
    def place(store: str | bool | None) -> str:
        log = PredictionLogSettings(store=store)
        serving = msgspec.structs.replace(SETTINGS.serving, prediction_log=log)
        return Project(
            project.home, msgspec.structs.replace(SETTINGS, serving=serving)
        ).log_source.place

    home = str(project.home.prediction_log)
    assert place(None) == home
    assert place(False) == home
    assert place(str(tmp_path / "other")) == str(tmp_path / "other")
    assert place("postgresql://churn:secret@db:5432/log") == "postgresql://churn@db:5432/log"
