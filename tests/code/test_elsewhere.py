"""A home whose Dagster storage, MLflow or lake is elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT, Home
from churn_assets.up import DAGSTER, MLFLOW, check_ports, commands, free_port, started_here

SERVER = "https://ada:t0psecret@mlflow.example.com/at/"
DATABASE = "postgresql+psycopg://mlflow:t0psecret@db.example.com/mlflow"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    for name in ("CHURN_MLFLOW_URI", "CHURN_MLFLOW_PUBLIC_URL", "CHURN_DAGSTER_YAML"):
        monkeypatch.delenv(name, raising=False)
    home = Home(tmp_path / "home")
    # What it puts into the environment is taken back at the end.
    for name in home.environment():
        monkeypatch.setenv(name, "")
    return home


@pytest.mark.parametrize("name", ["CHURN_CONFIG", "CHURN_DAGSTER_YAML", "CHURN_API_KEYS"])
def test_a_file_named_from_where_one_stands_is_the_same_for_every_process(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "mine/file")
    assert home.environment()[name] == str(tmp_path / "mine" / "file")
    monkeypatch.setenv(name, "")
    assert name not in home.environment()


def test_dagsters_configuration_may_be_another(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = home.dagster / "dagster.yaml"
    home.prepare()
    assert copied.read_bytes() == (PROJECT_ROOT / "dagster.yaml").read_bytes()
    mine = tmp_path / "mine.yaml"
    mine.write_text("telemetry: {enabled: false}\n")
    monkeypatch.setenv("CHURN_DAGSTER_YAML", str(mine))
    home.prepare()
    assert copied.read_text() == mine.read_text()
    mine.unlink()
    with pytest.raises(UserError, match=r"mine\.yaml cannot be read .*set CHURN_DAGSTER_YAML"):
        home.prepare()
    monkeypatch.delenv("CHURN_DAGSTER_YAML")
    home.prepare()
    assert copied.read_bytes() == (PROJECT_ROOT / "dagster.yaml").read_bytes()


def test_no_mlflow_is_started_where_there_is_one(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "mlflow" in commands(home, 1)
    assert MLFLOW in started_here()
    monkeypatch.setenv("CHURN_MLFLOW_URI", SERVER)
    # Nor does it need its port.
    monkeypatch.setenv(MLFLOW.variable, str(DAGSTER.port))
    assert home.mlflow_uri == SERVER
    assert MLFLOW.url == "https://mlflow.example.com/at/"
    assert "mlflow" not in commands(home, 1)
    assert MLFLOW not in started_here()
    for server in started_here():
        monkeypatch.setenv(server.variable, str(free_port()))
    monkeypatch.setenv(MLFLOW.variable, str(DAGSTER.port))
    check_ports()
    monkeypatch.setenv("CHURN_MLFLOW_PUBLIC_URL", "https://public.example.com")
    assert MLFLOW.url == "https://public.example.com/"


def test_the_password_of_a_store_is_in_no_command_line(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHURN_MLFLOW_URI", DATABASE)
    assert MLFLOW.elsewhere is None
    found = commands(home, 1)
    assert "mlflow" in found
    assert "t0psecret" not in str(found)


def test_a_home_whose_lake_is_elsewhere_is_of_one_source(home: Home) -> None:
    home.prepare()
    assert not home.has_data()
    home.claim("one")
    home.claim("another")
    (home.records / "training_set").mkdir()
    (home.records / "training_set" / "latest.json").touch()
    assert home.has_data()
    with pytest.raises(UserError, match="another source"):
        home.claim("one")


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        (
            "run_storage: {module: dagster._core.storage.runs, class: SqliteRunStorage, "
            "config: {base_dir: {env: CHURN_TEST_UNSET}}}",
            "CHURN_TEST_UNSET is not set",
        ),
        (
            "run_storage: {module: no_such_module, class: Storage, config: {}}",
            "Couldn't import module no_such_module",
        ),
    ],
)
def test_a_storage_that_cannot_be_had_is_said(
    yaml: str, told: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster import DagsterInstance

    from churn_assets.defs.dagster_storage import open_dagster

    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml)
    monkeypatch.setenv("CHURN_DAGSTER_YAML", str(mine))
    home.prepare()
    with pytest.raises(UserError, match=rf"{told}.*; check .*mine\.yaml"):
        open_dagster(DagsterInstance.get)
    # What is the project's own matter is not said to be a person's.
    monkeypatch.delenv("CHURN_DAGSTER_YAML")
    with pytest.raises(Exception, match=r"CHURN_TEST_UNSET|no_such_module") as error:
        open_dagster(DagsterInstance.get)
    assert not isinstance(error.value, UserError)


def test_an_mlflow_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    from churn_assets.lifecycle.experiments import require_store

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="check CHURN_MLFLOW_URI") as error:
        require_store(MlflowClient("http://ada:t0psecret@127.0.0.1:9"))
    assert "t0psecret" not in str(error.value)
