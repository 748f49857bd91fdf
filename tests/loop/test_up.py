"""`make up`: real processes on free ports; nothing is left however it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.defs.remote import RemoteDagster
from churn_assets.defs.weekly import week_tags
from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT, Home
from churn_assets.lifecycle.bento import build_bento
from churn_assets.lifecycle.pointer import Current, point_at
from churn_assets.lifecycle.release import build_release, reference_statistics
from churn_assets.modeling.onnx_export import export_onnx
from churn_assets.up import DAGSTER, MARKER, PART, SERVERS, check_ports, free_port

PATIENCE_S = 120
INSTIGATORS = """{
  assetNodes { assetKey { path } }
  workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError {
    ... on RepositoryLocation { repositories {
      schedules { name scheduleState { status } }
      sensors { name sensorState { status } }
    } } } } } }
}"""


@dataclass
class Up:
    """A running `churn up`: its process, what it has said so far, and where it listens."""

    process: subprocess.Popen
    log: Path
    ports: dict[str, int]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def url(self, name: str, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.ports[name]}{path}"


def environment_of(home: Path) -> dict[str, str]:
    ports = {server.variable: str(free_port()) for server in SERVERS}
    clean = {k: v for k, v in os.environ.items() if k not in ("CHURN_CONFIG", MARKER)}
    return clean | {"CHURN_HOME": str(home)} | ports


def start(program: list[str], environment: dict[str, str], log: Path) -> Up:
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, *program],
            cwd=PROJECT_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    ports = {server.name: int(environment[server.variable]) for server in SERVERS}
    return Up(process, log, ports)


def wait_for(
    what: Callable[[], Any], up: Up, *, alive: bool = True, patience_s: float = PATIENCE_S
) -> Any:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with suppress(OSError, urllib.error.URLError):
            if found := what():
                return found
        if alive and up.process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f"exit code {up.process.poll()} and no sign of it in\n{up.text()}")


def get(url: str, body: dict | None = None) -> str:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read().decode()


def processes_of(home: Path) -> list[psutil.Process]:
    """Every process, whoever its parent is, that works for this home."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("CHURN_HOME") == str(home):
                found.append(process)
    return found


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def home(tmp_path: Path) -> Generator[Path]:
    folder = tmp_path / "home"
    yield folder
    for process in processes_of(folder):
        with suppress(psutil.Error):
            process.kill()


def build_a_bento(home: Path) -> str:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    rows = rng.integers(0, 30, (200, len(FEATURE_NAMES))).astype(np.float32)
    churned = rows[:, 2] > rows[:, 0]
    estimator = LogisticRegression(max_iter=1000).fit(rows, churned)
    release = build_release(
        home / "serving" / "releases",
        onnx=export_onnx(estimator, len(FEATURE_NAMES)),
        model_name="churn",
        model_version="1",
        features=FEATURE_NAMES,
        golden=(rows[:10], estimator.predict_proba(rows[:10])[:, 1]),
        reference=reference_statistics(
            {name: rows[:, column] for column, name in enumerate(FEATURE_NAMES)}, FEATURE_NAMES
        ),
        mlflow_run="run",
        dagster_run="run",
        data_hash="hash",
        created_at=datetime(2025, 1, 1, tzinfo=UTC),
    )
    tag = build_bento(release.directory, home / "bentoml", project_root=PROJECT_ROOT).tag
    made = release.manifest
    point_at(
        Home(home).current,
        Current(tag, made.release_id, made.model_version, 1, datetime(2025, 1, 1, tzinfo=UTC)),
    )
    return tag


def test_everything_answers_and_ctrl_c_ends_all_of_it(home: Path, tmp_path: Path) -> None:
    environment = environment_of(home)
    up = start(["-m", "churn_assets", "up"], environment, tmp_path / "up.log")

    wait_for(lambda: "nothing is in Production yet" in up.text(), up)
    tag = build_a_bento(home)
    health = json.loads(wait_for(lambda: get(up.url("service", "/health")), up))
    assert health["bento"] == tag
    assert "Directory listing" in wait_for(lambda: get(up.url("reports")), up)
    assert "MLflow" in wait_for(lambda: get(up.url("mlflow")), up)
    wait_for(lambda: get(up.url("dagster", "/server_info")), up)
    shown = json.loads(get(up.url("dagster", "/graphql"), {"query": INSTIGATORS}))["data"]
    assert {node["assetKey"]["path"][0] for node in shown["assetNodes"]} >= {
        "orders",
        "customer_features",
        "evaluation_report",
        "churn_bento",
        "deployment",
        "drift_report",
    }
    # Dagster keeps what a person switched by the name of the location.
    (location,) = shown["workspaceOrError"]["locationEntries"]
    assert location["name"] == "churn_assets"
    (repository,) = location["locationOrLoadError"]["repositories"]
    states = {s["name"]: s["scheduleState"]["status"] for s in repository["schedules"]}
    states |= {s["name"]: s["sensorState"]["status"] for s in repository["sensors"]}
    assert states == dict.fromkeys(states, "RUNNING")
    assert {"daily_refresh_schedule", "training_schedule", "drift_schedule"} <= states.keys()
    assert "promotion_decided" in states
    for server in SERVERS:
        wait_for(lambda s=server: f"{s.title:14} {up.url(s.name)}" in up.text(), up)
    ask_for_a_training_from_elsewhere(up.url("dagster"))

    second = start(["-m", "churn_assets", "up"], environment, tmp_path / "second.log")
    assert second.process.wait(PATIENCE_S) == 2
    (line,) = second.text().splitlines()
    assert str(up.ports["dagster"]) in line
    assert "CHURN_DAGSTER_PORT" in line
    assert up.process.poll() is None

    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(PATIENCE_S) == 0
    assert processes_of(home) == []
    assert not [name for name, port in up.ports.items() if listening(port)]
    assert "Traceback" not in up.text()


def ask_for_a_training_from_elsewhere(url: str) -> None:
    dagster, week = RemoteDagster(url), "2026-W48"
    run = dagster.train(week_tags(week))
    assert dagster.trained_in(week) == run, "it is being trained"
    assert dagster.trained_in("2026-W49") is None
    # There is no data in this home, so there is no model and the week is not done.
    assert dagster.wait(run) == "FAILURE"
    assert dagster.trained_in(week) is None
    with pytest.raises(UserError, match=r"refuses: .*no-such-run"):
        dagster.wait("no-such-run")


# A server that ignores being asked, with a child in a session of its own: the worst kind of family.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True)
print("stubborn is there", flush=True)
time.sleep(600)
"""
WITH_STAND_INS = """
import sys
from churn_assets import up
from churn_assets.errors import UserError
from churn_assets.home import Home
def commands(home, code_port):
    return {{"stubborn": [sys.executable, "-c", {stubborn!r}],
             "other": [sys.executable, "-c", {other!r}]}}
up.commands = commands
home = Home.from_environment()
home.prepare()
sys.exit(up.run_all(home, stop_timeout=1, restarts=up.Restarts(limit=3, delay_s=0.1)))
"""


def start_stand_ins(home: Path, tmp_path: Path, other: str) -> Up:
    program = WITH_STAND_INS.format(stubborn=STUBBORN, other=other)
    return start(["-c", program], environment_of(home), tmp_path / "up.log")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_does_not_want_to_end(number: int, home: Path, tmp_path: Path) -> None:
    up = start_stand_ins(home, tmp_path, "import time; time.sleep(600)")
    wait_for(lambda: "stubborn is there" in up.text(), up)
    up.process.send_signal(number)
    assert up.process.wait(PATIENCE_S) == 0
    assert processes_of(home) == []


def test_nothing_is_left_when_it_is_killed(home: Path, tmp_path: Path) -> None:
    up = start_stand_ins(home, tmp_path, "import time; time.sleep(600)")
    wait_for(lambda: "stubborn is there" in up.text(), up)
    assert len(processes_of(home)) >= 4
    up.process.kill()
    up.process.wait()
    wait_for(lambda: not processes_of(home), up, alive=False)


def test_one_that_dies_again_and_again_ends_all_and_is_named(home: Path, tmp_path: Path) -> None:
    log = str(tmp_path / "up.log")
    dying = f"""if True:
        import pathlib, time
        while "stubborn is there" not in pathlib.Path({log!r}).read_text():
            time.sleep(0.1)
        raise SystemExit(7)"""
    up = start_stand_ins(home, tmp_path, dying)
    assert up.process.wait(PATIENCE_S) == 7
    assert up.text().count("other stopped with exit code 7; it is started again") == 2
    assert "error: other stopped with exit code 7, 3 times in a row" in up.text()
    assert processes_of(home) == []


def test_a_killed_one_is_started_again_without_what_it_left(home: Path, tmp_path: Path) -> None:
    up = start_stand_ins(home, tmp_path, "import time; time.sleep(600)")
    wait_for(lambda: "stubborn is there" in up.text(), up)
    boss, child = stand_ins(home, "stubborn")
    (other,) = stand_ins(home, "other")
    boss.kill()
    wait_for(lambda: up.text().count("stubborn is there") == 2, up)
    assert "stubborn stopped with exit code -9; it is started again" in up.text()
    assert not {boss, child} & set(stand_ins(home, "stubborn"))
    assert len(stand_ins(home, "stubborn")) == 2
    assert stand_ins(home, "other") == [other]
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(PATIENCE_S) == 0


def stand_ins(home: Path, part: str) -> list[psutil.Process]:
    """The processes of one part, the oldest first."""
    found = [p for p in processes_of(home) if p.environ().get(PART) == part]
    return sorted(found, key=psutil.Process.create_time)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CHURN_MLFLOW_PORT", "http", "CHURN_MLFLOW_PORT=http is not a port"),
        ("CHURN_REPORTS_PORT", "70000", "CHURN_REPORTS_PORT=70000 is not a port"),
        ("CHURN_REPORTS_PORT", "same", "wanted by the Dagster UI and the Reports"),
    ],
)
def test_a_wrong_port_is_refused(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for server in SERVERS:
        monkeypatch.setenv(server.variable, str(free_port()))
    monkeypatch.setenv(variable, str(DAGSTER.port) if value == "same" else value)
    with pytest.raises(UserError, match=said):
        check_ports()
