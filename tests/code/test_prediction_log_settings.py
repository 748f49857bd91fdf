from __future__ import annotations

from pathlib import Path

import pytest

from churn_assets.errors import UserError
from churn_assets.lifecycle.serving import PredictionLog
from churn_assets.settings import PredictionLogSettings, load_settings

SHOP = "source: {kind: shop}\ncalendar: {start: 2024-01-01}\n"


def settings(tmp_path: Path, text: str) -> PredictionLogSettings:
    path = tmp_path / "churn.yaml"
    path.write_text(f"{SHOP}serving: {{prediction_log: {{{text}}}}}")
    return load_settings(path).serving.prediction_log


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("", "/home/log"),
        ("store: off", "off"),
        ("store: 'off'", "off"),
        ("store: false", "off"),
        ("store: kept", "{here}/kept"),
        ("store: /var/lib/churn", "/var/lib/churn"),
        (
            "store: 'postgresql://churn:${CHURN_TEST_WORD}@db/log'",
            "postgresql://churn:a%2Fb@db/log",
        ),
    ],
)
def test_the_log_is_where_the_settings_say(tmp_path: Path, monkeypatch, text, location) -> None:
    monkeypatch.setenv("CHURN_TEST_WORD", "a%2Fb")
    log = settings(tmp_path, text)
    assert log.location(Path("/home/log")) == location.format(here=tmp_path)
    assert (log.durability, log.when_broken) == ("process", "refuse")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("store: on", "store: give a directory, a URL or off"),
        ("durability: some", "durability"),
        ("when_broken: hide", "when_broken"),
        ("place: here", "unknown field `place`"),
    ],
)
def test_a_setting_of_the_log_that_is_wrong_is_named(tmp_path: Path, text, says) -> None:
    with pytest.raises(UserError, match=says):
        settings(tmp_path, text)


def test_the_settings_reach_the_service_as_its_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PredictionLog("log", "power", "serve").environment() == {
        "CHURN_PREDICTION_LOG": str(tmp_path / "log"),
        "CHURN_LOG_DURABILITY": "power",
        "CHURN_LOG_WHEN_BROKEN": "serve",
    }
    for as_it_is in ("off", "postgresql://db/log"):
        named = PredictionLog(as_it_is).environment()
        assert named["CHURN_PREDICTION_LOG"] == as_it_is
