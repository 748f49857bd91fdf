"""What the project does otherwise where its parts run in containers of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import dagster as dg
import pytest

from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.experiments import code_version, ensure_experiment
from churn_assets.lifecycle.serving import HOST, free_port
from churn_assets.up import DAGSTER, MLFLOW, REPORTS


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def test_links_lead_to_where_people_open_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHURN_MLFLOW_PUBLIC_URL", raising=False)
    monkeypatch.setenv("CHURN_MLFLOW_PORT", "5001")
    assert MLFLOW.url == "http://127.0.0.1:5001/"
    for server, name in ((DAGSTER, "DAGSTER"), (MLFLOW, "MLFLOW"), (REPORTS, "REPORTS")):
        monkeypatch.setenv(f"CHURN_{name}_PUBLIC_URL", f"https://{name.lower()}.example.com")
        assert server.url == f"https://{name.lower()}.example.com{server.path}"
    monkeypatch.setenv("CHURN_MLFLOW_PUBLIC_URL", "https://example.com/mlflow/")
    assert MLFLOW.url == "https://example.com/mlflow/"


@pytest.mark.parametrize(
    ("uri", "stored"), [("http://mlflow:5000", None), ("sqlite:///x.db", "file:///there")]
)
def test_a_tracking_server_says_where_artifacts_go(uri: str, stored: str | None) -> None:
    asked: list[Any] = []
    client = SimpleNamespace(
        tracking_uri=uri,
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name, artifact_location, tags: asked.append(artifact_location),
    )
    ensure_experiment(cast("Any", client), Path("/there"))
    assert asked == [stored]


def test_an_image_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHURN_COMMIT", "c0ffee")
    version = code_version(tmp_path)
    assert (version.commit, version.dirty) == ("c0ffee", "false")
    monkeypatch.delenv("CHURN_COMMIT")
    assert code_version(tmp_path).commit == "unknown"


def test_the_code_server_closes_what_an_earlier_one_left_and_ends_when_told(
    tmp_path: Path,
) -> None:
    from churn_assets.home import Home

    home, port = Home(tmp_path / "home"), free_port()
    environment = os.environ | home.environment() | {"CHURN_CONFIG": ""}
    with mock.patch.dict(os.environ):
        home.prepare()
    instance_file = (PROJECT_ROOT / "dagster.yaml").read_text()
    storage = environment["CHURN_DAGSTER_STORAGE"]
    (home.dagster / "dagster.yaml").write_text(
        instance_file.replace("{env: CHURN_DAGSTER_STORAGE}", storage)
    )
    with dg.DagsterInstance.from_config(str(home.dagster)) as instance:
        left = dg.DagsterRun("training", run_id="left", status=dg.DagsterRunStatus.STARTED)
        instance.add_run(left)
        command = [sys.executable, "-m", "churn_assets", "code-server", "--port", str(port)]
        server = subprocess.Popen(
            command, env=environment, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            deadline = time.monotonic() + 300
            while not listens(port):
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            closed = instance.get_run_by_id("left")
            assert closed is not None
            assert closed.status == dg.DagsterRunStatus.FAILURE
            again = subprocess.run(command, env=environment, cwd=PROJECT_ROOT, capture_output=True)
            assert again.returncode == 2
            assert b"another `churn code-server` is using" in again.stderr
        finally:
            server.send_signal(signal.SIGTERM)
            said, _ = server.communicate()
    assert server.returncode == 0
    assert "closed run left, whose process is gone" in said
