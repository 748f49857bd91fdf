"""The whole life on the parts a team already has: nothing stays in files that belongs to them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from cluster import QUICK_JAVA, standalone
from command import Done, churn, environment, write_config
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from parts import ARTIFACTS, PATIENCE_S, USER, Parts, all_parts, database_url, make_user
from test_up import get, processes_of, start, wait_for

from churn_assets.contract.features import FEATURES
from churn_assets.contract.logged import TABLE
from churn_assets.data.engines import DuckDBSettings, SparkSettings, open_engine
from churn_assets.data.lake import Lake, open_lake
from churn_assets.data.prediction_log import PREDICTION_LOG
from churn_assets.data.refresh import refresh_features
from churn_assets.data.windows import Windows
from churn_assets.lifecycle.lock import registry_lock
from churn_assets.lifecycle.registry import read_registry
from churn_assets.up import SERVERS, free_port

pytestmark = [pytest.mark.parts, pytest.mark.timeout(1500)]

# Small windows and few customers: what comes of the servers is the same, in half the time.
SHOP: Mapping[str, Any] = {
    "source": {"kind": "shop", "shop": {"customers": 400}},
    "windows": {"activity_days": 60, "horizon_days": 10},
    "data_gate": {"min_rows": 200},
    "training": {"families": ["logistic_regression"], "trials": 2},
    "promotion": {"mode": "automatic", "margin": 0.5},
    "quality_gates": {
        "accuracy": 0.5,
        "auc": 0.5,
        "p95_latency_ms": 60_000,
        "calibration_error": 0.5,
        "segment_auc": 0.0,
        "auc_over_recency": -0.5,
        "log_loss_over_production": 5.0,
    },
}
# The second run brings in the last of these days.
FIRST, LAST = date(2024, 1, 1), date(2024, 5, 10)
DAY = timedelta(days=1)
SESSION = {
    "spark.sql.shuffle.partitions": "2",
    "spark.executor.memory": "600m",
    "spark.executor.extraJavaOptions": QUICK_JAVA,
    "spark.driver.extraJavaOptions": QUICK_JAVA,
}
RAW = ("customers", "orders", "support_tickets", "logins")
RUNS = """{ runsOrError(filter: {pipelineName: "training"}) { ... on Runs {
  results { jobName status }
} } }"""
# What is open of alerts is the home's own, wherever the rest is.
OF_THE_HOME = {"alerts/outbox.db"}


@dataclass(frozen=True)
class Lived:
    """A shop's first run, a day of service under `churn up`, and a run of the day after, on Spark.

    answer: to a request by id alone. shown: of Dagster's UI. kept: the rows of the prediction log
    before the second run. written: when a partition of the lake was, by its name, after the first.
    cluster: what Spark's master said of the second run.
    """

    parts: Parts
    home: Path
    first: Done
    summary: dict[str, Any]
    up: str
    answer: dict[str, Any]
    shown: dict[str, Any]
    kept: int
    written: dict[str, Any]
    second: Done
    cluster: str

    @property
    def lake(self) -> Lake:
        return open_lake(self.parts.settings["lake"], self.parts.s3)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Generator[Lived]:
    folder = tmp_path_factory.mktemp("parts")
    if shutil.which("java") is None:
        pytest.skip("there is no Java; install Java 17 to run this")
    with all_parts(folder) as parts, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]:
            patch.delenv(name)
        for name, value in parts.environment.items():
            if name.startswith(("AWS_", "MLFLOW_")):
                patch.setenv(name, value)
        yield live(parts, folder)


def live(parts: Parts, folder: Path) -> Lived:
    config = configured(parts, folder, LAST - DAY)
    first = churn(folder / "home", config, timeout=PATIENCE_S, **parts.environment)
    assert first.code == 0, first
    return go_on(parts, folder, first)


def go_on(parts: Parts, folder: Path, first: Done) -> Lived:
    """A day of service after the first run, and the run of the day after."""
    home, config = folder / "home", configured(parts, folder, LAST - DAY)
    summary = json.loads((home / "run" / "summary.json").read_text())
    written = written_at(open_lake(parts.settings["lake"], parts.s3))
    ports = {server.variable: str(free_port()) for server in SERVERS}
    up = start(
        ["-m", "churn_assets", "up"],
        environment(home, config, **parts.environment, **ports),
        folder / "up.log",
    )
    try:
        wait_for(lambda: get(up.url("service", "/health")), up, patience_s=PATIENCE_S)
        customer = summary["prediction"]["request"]["customer_id"]
        answer = get(up.url("service", "/predict"), {"customer_id": customer})
        wait_for(lambda: get(up.url("dagster", "/server_info")), up, patience_s=PATIENCE_S)
        shown = get(up.url("dagster", "/graphql"), {"query": RUNS})
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(PATIENCE_S) == 0, up.text()
    finally:
        for process in processes_of(home):
            process.kill()
    ((kept,),) = parts.query("churn", f"SELECT count(*) FROM {TABLE}")
    (folder / "spark").mkdir()
    with standalone(folder / "spark", workers=1) as master:
        spark = {"engine": "spark", "spark": {"master": master, "memory": "512m", "conf": SESSION}}
        config = configured(parts, folder, LAST, **spark)
        second = churn(home, config, timeout=PATIENCE_S, **parts.environment)
    return Lived(
        parts,
        home,
        first,
        summary,
        up.text(),
        json.loads(answer),
        json.loads(shown),
        kept,
        written,
        second,
        (folder / "spark" / "master.log").read_text(),
    )


def configured(parts: Parts, folder: Path, last: date, **more: Any) -> Path:
    calendar = {"start": str(FIRST), "days": (last - FIRST).days + 1}
    settings = {**SHOP, **parts.settings, "calendar": calendar, **more}
    return write_config(folder / "churn.yaml", settings)


def written_at(lake: Lake) -> dict[str, Any]:
    found = lake.filesystem.find(lake.base, detail=True)
    return {name: about["LastModified"] for name, about in found.items() if "/day=" in name}


def test_a_run_says_the_same_as_on_one_machine(lived: Lived) -> None:
    assert lived.first.err == ""
    assert f"MLflow {lived.parts.mlflow}/" in lived.first.out
    assert lived.summary["registered"]["version"] == "1"
    assert lived.summary["registered"]["stage"] == "Production"
    assert lived.summary["days"] == [str(FIRST), str(LAST - DAY)]


def test_the_service_answers_by_id_from_redis_and_logs_to_postgres(lived: Lived) -> None:
    asked = lived.summary["prediction"]
    assert lived.answer["customer_id"] == asked["request"]["customer_id"]
    expected = asked["response"]["churn_probability"]
    assert lived.answer["churn_probability"] == pytest.approx(expected, abs=1e-6)
    assert lived.answer["cutoff"] == f"{LAST}T00:00:00Z"
    assert lived.answer["stale"] is False
    assert lived.kept == 1


def test_up_starts_no_mlflow_of_its_own_where_there_is_one(lived: Lived) -> None:
    assert "Traceback" not in lived.up
    assert "mlflow  |" not in lived.up
    assert f"MLflow UI      {lived.parts.mlflow}/" in lived.up
    runs = lived.shown["data"]["runsOrError"]["results"]
    assert runs == [{"jobName": "training", "status": "SUCCESS"}]


def test_the_next_run_finds_everything(lived: Lived) -> None:
    assert lived.second.code == 0, lived.second
    # Spark's Java says what it lacks.
    assert "Traceback" not in lived.second.err
    assert "model       version 2, " in lived.second.out
    lake = lived.lake
    for table in (*RAW, "customer_features"):
        assert lake.days(table)[-1] == LAST
    now = written_at(lake)
    assert {name: now[name] for name in lived.written} == lived.written
    assert lake.row_counts(PREDICTION_LOG) != {}
    assert sum(lake.row_counts(PREDICTION_LOG).values()) == lived.kept
    assert lived.parts.query("churn", f"SELECT count(*) FROM {TABLE}") == [(0,)]


def test_everything_is_in_the_servers(lived: Lived) -> None:
    parts, lake = lived.parts, lived.lake
    runs = parts.query("dagster", "SELECT pipeline_name FROM runs WHERE status = 'SUCCESS'")
    assert [name for (name,) in runs].count("training") == 2
    ((events,),) = parts.query("dagster", "SELECT count(*) FROM event_logs")
    assert events > 1000
    assert parts.query("mlflow", "SELECT version FROM model_versions ORDER BY 1") == [(1,), (2,)]
    users = parts.query("mlflow", "SELECT username, is_admin FROM users ORDER BY 1")
    assert users == [("admin", True), (USER, False)]
    assert parts.query("churn", "SELECT feature_view_name FROM feature_views") == [
        ("customer_features",)
    ]
    for table in RAW:
        assert len(lake.days(table)) == (LAST - FIRST).days + 1
    assert lake.filesystem.find(f"{ARTIFACTS}/")
    from redis import Redis

    with Redis.from_url(parts.redis) as redis:
        assert redis.dbsize() > 0


def test_nothing_of_it_is_in_files(lived: Lived) -> None:
    home = lived.home
    files = {str(path.relative_to(home)): path for path in home.rglob("*") if path.is_file()}
    databases = {
        name for name, path in files.items() if path.read_bytes()[:15] == b"SQLite format 3"
    }
    assert databases <= OF_THE_HOME
    for folder in ("lake", "mlartifacts", "feast", "serving/log"):
        assert not [name for name in files if name.startswith(f"{folder}/")], folder
    assert not [path for path in home.rglob("*") if "mlruns" in path.name]


def test_no_password_is_in_what_is_left(lived: Lived) -> None:
    said = lived.first.out + lived.second.out + lived.second.err + lived.up
    stored = b"".join(path.read_bytes() for path in lived.home.rglob("*") if path.is_file())
    (events,) = lived.parts.query("dagster", "SELECT string_agg(event, '') FROM event_logs")
    (runs,) = lived.parts.query("dagster", "SELECT string_agg(run_body, '') FROM runs")
    for secret in lived.parts.secrets:
        assert secret not in said
        assert secret.encode() not in stored
        assert secret not in events[0] + runs[0]


def test_mlflow_asks_who_one_is(lived: Lived) -> None:
    url = f"{lived.parts.mlflow}/api/2.0/mlflow/experiments/get?experiment_id=1"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url)


# MLflow's way of asking its own database.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_the_registry_is_the_same_behind_its_server_and_in_its_database(lived: Lived) -> None:
    parts = lived.parts
    store = database_url(parts.postgres, parts.databases["mlflow"], "unneeded")
    direct, served = MlflowClient(store), MlflowClient(parts.mlflow)
    there = read_registry(served, "churn")
    assert there.faults() == []
    assert read_registry(direct, "churn") == there
    with registry_lock(direct, "churn", wait_s=5) as check:
        check()


def test_spark_made_the_features_of_the_last_day_from_the_bucket(
    lived: Lived, tmp_path: Path
) -> None:
    """DuckDB makes the same of a copy in a folder."""
    there, here = lived.lake, Lake(str(tmp_path / "lake"))
    assert "Registered app churn_assets" in lived.cluster
    for table in RAW:
        there.filesystem.get(f"{there.base}/{table}", f"{tmp_path}/lake/{table}", recursive=True)
    with open_engine("duckdb", DuckDBSettings(), SparkSettings(), tmp_path / "spill") as con:
        refresh_features(
            here, con, FEATURES, RAW, LAST, LAST, Windows(**SHOP["windows"]), data_start=FIRST
        )
    ours, theirs = (lake.read("customer_features", LAST, LAST) for lake in (here, there))
    assert ours.num_rows > 100
    assert ours.equals(theirs)


def test_the_user_of_mlflow_is_no_administrator_and_gets_what_was_there_before(
    lived: Lived, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture's environment has the user's login."""
    parts = lived.parts

    def as_admin(command: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
            patch.setenv("MLFLOW_TRACKING_PASSWORD", parts.admin)
            command()

    client = MlflowClient(parts.mlflow)
    password = parts.environment["MLFLOW_TRACKING_PASSWORD"]
    login = base64.b64encode(f"{USER}:{password}".encode()).decode()
    create_user = urllib.request.Request(
        f"{parts.mlflow}/api/2.0/mlflow/users/create",
        json.dumps({"username": "eve", "password": "a long enough password"}).encode(),
        {"content-type": "application/json", "authorization": f"Basic {login}"},
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(create_user)
    as_admin(lambda: client.create_experiment("former"))
    as_admin(lambda: client.create_registered_model("former-model"))
    former = client.get_experiment_by_name("former")
    assert former is not None

    def change() -> None:
        client.set_experiment_tag(former.experiment_id, "changed", "yes")
        client.set_registered_model_tag("former-model", "changed", "yes")

    with pytest.raises(MlflowException, match="Permission denied"):
        change()
    told = (
        f"the user {USER} has its password, and may change the experiment former, "
        "and may change the registered model former-model\n"
    )
    assert make_user(parts.mlflow, parts.admin, password, "former", "former-model") == told
    change()
    again = make_user(parts.mlflow, parts.admin, password, "former", "former-model")
    assert again == f"the user {USER} has its password\n"
