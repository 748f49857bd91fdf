"""A small shop in a home of its own under `churn up`, and what a test wants to know of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from dagster import DagsterEventType, DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from churn_assets.home import PROJECT_ROOT, Home
from churn_assets.lifecycle.pointer import read_current
from churn_assets.up import MARKER, PART, SERVERS, free_port

Settings = Mapping[str, Any]

# As small as the gates allow; each training that ends comes into Production.
SHOP: Settings = {
    "source": {"kind": "shop", "shop": {"customers": 1500}},
    "calendar": {"start": "2024-01-01", "days": 220},
    "data_gate": {"min_rows": 5000},
    "training": {"families": ["logistic_regression"], "trials": 2},
    "promotion": {"mode": "automatic", "margin": 0.5},
    "quality_gates": {"p95_latency_ms": 5000, "log_loss_over_production": 0.5},
}
START_S = 600.0
POLL_S, SOON_S = 0.1, 0.02
UNFINISHED = [
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]
_LAUNCH = """
mutation($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on Error { message }
  }
}"""
_STATE = """{
  workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError { __typename } } } }
  instance { daemonHealth { allDaemonStatuses { daemonType required lastHeartbeatTime } } }
}"""


class NotThere(Exception):
    """What was waited for did not come; the message says what."""


class Shop:
    """`churn up` of the home in `folder`, with these settings.

    The shop has been run once when `start` returns, and everything answers.
    """

    def __init__(self, folder: Path, settings: Settings = SHOP) -> None:
        self.home = Home(folder / "home")
        self.config = folder / "shop.yaml"
        self.log = folder / "up.log"
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
        ports = {server.variable: str(free_port()) for server in SERVERS}
        ours = ("CHURN_", "DAGSTER_", "MLFLOW_", "BENTOML_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        mine = {"CHURN_HOME": str(self.home.root), "CHURN_CONFIG": str(self.config)}
        self._environment = clean | ports | mine
        self._ports = {server.name: int(ports[server.variable]) for server in SERVERS}
        self._up: subprocess.Popen | None = None
        self._instance: DagsterInstance | None = None

    def start(self) -> None:
        """Run the shop if it never has been, then `churn up`, and wait until it is well."""
        if not self.home.summary.exists():
            self._run_once()
        os.environ.update(self.home.environment())
        self._launch_up()
        self.wait_for(lambda: not self.ailments(), "everything answers", START_S)

    def start_again(self) -> None:
        """Once all that a killed `churn up` left has gone, run it again, as a supervisor would."""
        self.wait_for(lambda: not self.left(), "nothing is left of it", START_S)
        self._launch_up()

    def _launch_up(self) -> None:
        with self.log.open("ab") as sink:
            self._up = subprocess.Popen(
                [sys.executable, "-m", "churn_assets", "up"],
                cwd=PROJECT_ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End everything, as a person does."""
        if self._up is not None and self._up.poll() is None:
            self._up.send_signal(signal.SIGINT)
            self._up.wait(60)
        if self._instance is not None:
            self._instance.dispose()
            self._instance = None

    @property
    def up(self) -> psutil.Process:
        """`churn up` itself."""
        assert self._up is not None
        return psutil.Process(self._up.pid)

    @property
    def instance(self) -> DagsterInstance:
        """Dagster's instance of the home, as its processes open it."""
        if self._instance is None:
            self._instance = DagsterInstance.from_config(str(self.home.dagster))
        return self._instance

    def url(self, name: str, path: str = "/") -> str:
        """Where one of the servers answers."""
        return f"http://127.0.0.1:{self._ports[name]}{path}"

    def part(self, name: str) -> psutil.Process:
        """The process of this name that `churn up` started."""
        if not (found := self.parts(name)):
            raise NotThere(f"there is no process {name}")
        return found[0]

    def parts(self, name: str) -> list[psutil.Process]:
        """The processes of this name that `churn up` started: one, or none at the moment."""
        return [p for p in self.up.children() if _environment_of(p).get(PART) == name]

    def bento(self) -> psutil.Process:
        """BentoML's own process, below that of `churn serve`."""
        return next(p for p in self.part("service").children() if "serve" in p.cmdline())

    def service_worker(self) -> psutil.Process:
        """The process that answers requests."""
        below = self.bento().children(recursive=True)
        return next(p for p in below if "_bentoml_impl.worker" in " ".join(p.cmdline()))

    def run_worker(self, run_id: str) -> psutil.Process:
        """The process that executes a run."""
        noted = self.instance.all_logs(run_id, of_type=DagsterEventType.ENGINE_EVENT)
        metadata = [entry.get_dagster_event().engine_event_data.metadata for entry in noted]
        return psutil.Process(int(str([m["pid"].value for m in metadata if "pid" in m][-1])))

    def left(self) -> list[psutil.Process]:
        """Every process of this home, whoever its parent is."""
        processes = psutil.process_iter()
        mine = str(self.home.root)
        return [p for p in processes if MARKER in (e := _environment_of(p)) and _of(e, mine)]

    def launch(
        self, job: str, tags: Mapping[str, str] | None = None, assets: Sequence[str] | None = None
    ) -> str:
        """Ask the webserver for a run of `job`, or of some of its assets; returns the run's id."""
        selector: dict[str, Any] = {
            "repositoryLocationName": "churn_assets",
            "repositoryName": "__repository__",
            "pipelineName": job,
        }
        if assets:
            selector["assetSelection"] = [{"path": [asset]} for asset in assets]
        given = [{"key": key, "value": value} for key, value in (tags or {}).items()]
        metadata = {"tags": given}
        params = {"selector": selector, "mode": "default", "executionMetadata": metadata}
        answer = self._graphql(_LAUNCH, {"params": params})["launchRun"]
        if answer["__typename"] != "LaunchRunSuccess":
            raise NotThere(f"{job} was not launched: {answer}")
        return answer["run"]["runId"]

    def finish(self, job: str, tags: Mapping[str, str] | None = None) -> None:
        """Launch a run of `job` and wait until it has succeeded."""
        run_id, done = self.launch(job, tags), DagsterRunStatus.SUCCESS
        self.wait_for(lambda: self.status(run_id) is done, f"{job} is done", START_S)

    def runs(self, job: str) -> list[DagsterRun]:
        """The runs of a job, the newest first."""
        return list(self.instance.get_runs(RunsFilter(job_name=job)))

    def tries(self, run_id: str) -> list[DagsterRun]:
        """A run and those that tried it again, the oldest first."""
        group = self.instance.get_run_group(run_id)
        records = self.instance.get_run_records(
            RunsFilter(run_ids=[run.run_id for run in group[1]] if group else [run_id])
        )
        return [r.dagster_run for r in sorted(records, key=lambda r: r.create_timestamp)]

    def status(self, run_id: str) -> DagsterRunStatus:
        """How a run stands."""
        run = self.instance.get_run_by_id(run_id)
        assert run is not None, run_id
        return run.status

    def steps(self, run_id: str, kind: DagsterEventType) -> list[str]:
        """The steps of a run with an event of this kind, in order."""
        return [str(e.step_key) for e in self.instance.all_logs(run_id, of_type=kind)]

    def usual_seconds(self, step: str, job: str) -> float:
        """How long a step took when it was last finished, in any run of `job`."""
        for run in self.runs(job):
            done = self.instance.all_logs(run.run_id, of_type=DagsterEventType.STEP_SUCCESS)
            for entry in done:
                if entry.step_key == step:
                    return entry.get_dagster_event().step_success_data.duration_ms / 1000
        return 0.0

    def wait_until_in(self, run_id: str, step: str) -> None:
        """Wait until a run has begun a step."""
        begun = DagsterEventType.STEP_START
        waiting = {DagsterRunStatus.QUEUED, DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING}
        self.wait_for(lambda: self.status(run_id) not in waiting, f"run {run_id}", START_S)
        self.wait_for(
            lambda: step in self.steps(run_id, begun), f"run {run_id} in {step}", START_S, SOON_S
        )

    def wait_for(
        self, what: Callable[[], Any], name: str, seconds: float, every: float = POLL_S
    ) -> Any:
        """What `what` returns when it is true at last. Raises NotThere."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := what():
                return found
            time.sleep(every)
        raise NotThere(f"not within {seconds:.0f} s: {name}")

    def ailments(self) -> list[str]:
        """What does not answer or is not finished at this moment, a sentence each."""
        unfinished = self.instance.get_runs(RunsFilter(statuses=UNFINISHED))
        return self.silent() + [
            f"run {run.run_id} of {run.job_name} is {run.status.value}" for run in unfinished
        ]

    def silent(self, heartbeat_after: float | None = None) -> list[str]:
        """What does not answer at this moment, a sentence each.

        heartbeat_after: a time of the epoch from which on each of Dagster's daemons has to have
        given a sign of life.
        """
        found = []
        current = read_current(self.home.current)
        health = _json(self.url("service", "/health"))
        if current is None or health is None or health.get("release_id") != current.release_id:
            found.append("the service does not answer with what is in Production")
        if _get(self.url("mlflow", "/health")) is None:
            found.append("MLflow does not answer")
        if _get(self.url("reports")) is None:
            found.append("the reports are not shown")
        try:
            state = self._graphql(_STATE)
        except (OSError, ValueError, KeyError):
            return [*found, "the webserver does not answer"]
        entries = state["workspaceOrError"]["locationEntries"]
        kinds = [(entry["locationOrLoadError"] or {}).get("__typename") for entry in entries]
        if kinds != ["RepositoryLocation"]:
            found.append("the code location is not loaded")
        daemons = state["instance"]["daemonHealth"]["allDaemonStatuses"]
        since = heartbeat_after if heartbeat_after is not None else self.up.create_time()
        for daemon in daemons:
            if daemon["required"] and (daemon["lastHeartbeatTime"] or 0) < since:
                found.append(f"the daemon {daemon['daemonType']} gives no sign of life")
        return found

    def _run_once(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "churn_assets", "run"],
            cwd=PROJECT_ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise NotThere(f"churn run ended with {done.returncode}: {done.stderr[-2000:]}")

    def _graphql(self, query: str, variables: Mapping[str, Any] | None = None) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables or {}}).encode()
        request = urllib.request.Request(
            self.url("dagster", "/graphql"), body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)["data"]


def _environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _of(environment: Mapping[str, str], home: str) -> bool:
    return environment.get("CHURN_HOME") == home


def _get(url: str) -> bytes | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.read()
    except OSError:
        return None


def _json(url: str) -> dict[str, Any] | None:
    content = _get(url)
    return json.loads(content) if content else None
