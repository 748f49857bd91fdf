"""The `churn` command in a process of its own, stopped where a test wants it, and what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[2]
RAW = ("customers", "orders", "support_tickets", "logins")


@dataclass(frozen=True)
class Done:
    """How the command ended."""

    code: int
    out: str
    err: str

    def refusal(self) -> str:
        """The one line it was refused with."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("error: "), self
        return lines[0]


def environment(home: Path, config: Path | None, **more: str) -> dict[str, str]:
    """The environment of a person who has set nothing else."""
    ours = ("CHURN_", "DAGSTER_", "MLFLOW_", "BENTOML_")
    mine = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    mine |= {"CHURN_HOME": str(home)} | more
    return mine if config is None else mine | {"CHURN_CONFIG": str(config)}


def churn(
    home: Path, config: Path | None, *arguments: str, timeout: float = 300, **more: str
) -> Done:
    """Run the command to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "churn_assets", *(arguments or ("run",))],
        cwd=ROOT,
        env=environment(home, config, **more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def stop_at(
    home: Path, config: Path, moment: Callable[[str, psutil.Process], bool], number: int
) -> Done:
    """Send signal `number` to `churn run` at `moment`, which sees its output and its process.

    None of its processes may outlive it.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "churn_assets", "run"],
        cwd=ROOT,
        env=environment(home, config),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        out: list[bytes] = []
        reader = threading.Thread(target=_collect, args=(process.stdout, out))
        reader.start()
        seen = psutil.Process(process.pid)
        while not moment(b"".join(out).decode(), seen):
            assert process.poll() is None, (b"".join(out), process.communicate()[1])
            time.sleep(0.002)
        children = seen.children(recursive=True)
        # At a terminal Ctrl-C reaches the whole group.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        reader.join(timeout=60)
        err = process.stderr.read() if process.stderr else b""
        process.wait(timeout=60)
    left = psutil.wait_procs(children, timeout=20)[1]
    assert not left, left
    return Done(process.returncode, b"".join(out).decode(), err.decode())


def _collect(stream: Any, parts: list[bytes]) -> None:
    while part := stream.read1(4096):
        parts.append(part)


def started(step: str) -> Callable[[str, psutil.Process], bool]:
    """The moment a step begins."""
    return lambda out, _: f"\n  {step} " in out


def writing(folder: Path, step: str) -> Callable[[str, psutil.Process], bool]:
    """The moment a step has its temporary files in `folder`, or else its first partitions."""
    return lambda out, _: (
        f"\n  {step} " in out and (any(folder.glob(".tmp-*")) or any(folder.glob("day=*")))
    )


def with_a_child(step: str) -> Callable[[str, psutil.Process], bool]:
    """The moment a step has started a process."""
    return lambda out, process: f"\n  {step} " in out and bool(process.children())


def write_config(path: Path, document: Mapping[str, Any]) -> Path:
    """`document` as a configuration file."""
    path.write_text(yaml.safe_dump(dict(document)), encoding="utf-8")
    return path


def partitions(home: Path) -> dict[str, tuple[int, int]]:
    """Every partition of the lake by name, with what changes when it is written again."""
    lake = home / "lake"
    return {
        str(path.parent.relative_to(lake)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(lake.rglob("part-0.parquet"))
    }


def days_of(home: Path, table: str) -> list[str]:
    """The partitions of `table`, oldest first."""
    return sorted(path.name.removeprefix("day=") for path in (home / "lake" / table).glob("day=*"))


def assert_readable(home: Path) -> None:
    """No partition is half written."""
    for path in (home / "lake").rglob("day=*/*"):
        assert path.name == "part-0.parquet"
        pq.ParquetFile(path).read()


@contextmanager
def dagster_of(home: Path) -> Generator[Any]:
    """Dagster's instance of a home, as its processes open it."""
    from dagster import DagsterInstance

    from churn_assets.home import Home

    with (
        mock.patch.dict(os.environ, Home(home).environment()),
        DagsterInstance.from_config(str(home / "dagster")) as instance,
    ):
        yield instance


@dataclass(frozen=True)
class Seen:
    """What a run left in its home, looked at before the next one changes it.

    runs: (job, status) of Dagster's runs, newest first. materialized: partitions by asset, and
    the newest materialization. checks: the newest outcome by `asset.check`. mlflow: runs, newest
    first. versions: registered versions by number; aliases and
    history: of the model.
    """

    summary: dict[str, Any] | None
    partitions: dict[str, tuple[int, int]]
    runs: list[tuple[str, str]]
    materialized: dict[str, tuple[set[str], Any]]
    checks: dict[str, str]
    mlflow: list[Any]
    versions: dict[str, Any]
    aliases: dict[str, str]
    history: list[Any]
    bentos: list[str]
    home: Path


def look(home: Path) -> Seen:
    """See Seen."""
    with warnings.catch_warnings():
        # MLflow's way of asking its own database.
        warnings.filterwarnings("ignore", "The ``noload`` loader strategy")
        return _look(home)


def _look(home: Path) -> Seen:
    from dagster import AssetKey

    from churn_assets.definitions import defs
    from churn_assets.lifecycle.registry import read_registry

    graph = defs.resolve_asset_graph()
    with dagster_of(home) as instance:
        runs = [(run.job_name, run.status.value) for run in instance.get_runs()]
        materialized = {}
        for key in graph.get_all_asset_keys():
            event = instance.get_latest_materialization_event(key)
            if event is not None:
                days = instance.get_materialized_partitions(AssetKey(key.path))
                materialized[key.path[-1]] = (set(days), event)
        records = instance.event_log_storage.get_latest_asset_check_execution_by_key(
            list(graph.asset_check_keys)
        )
        checks = {
            f"{key.asset_key.path[-1]}.{key.name}": record.status.value
            for key, record in records.items()
        }
    client = mlflow_of(home)
    found = client.search_registered_models() if client else []
    history = [s for m in found if client for s in read_registry(client, m.name).history]
    summary = home / "run" / "summary.json"
    return Seen(
        summary=json.loads(summary.read_text()) if summary.exists() else None,
        partitions=partitions(home),
        runs=runs,
        materialized=materialized,
        checks=checks,
        mlflow=mlflow_runs(home),
        versions={str(v.version): v for v in client.search_model_versions()} if client else {},
        aliases={name: str(v) for m in found for name, v in m.aliases.items()},
        history=history,
        bentos=sorted(path.parent.name for path in home.glob("bentoml/bentos/churn/*/bento.yaml")),
        home=home,
    )


def mlflow_of(home: Path) -> Any:
    """A client of the home's MLflow, or None before there is one."""
    from mlflow import MlflowClient

    path = home / "mlflow.db"
    return MlflowClient(f"sqlite:///{path}") if path.exists() else None


def mlflow_runs(home: Path) -> list[Any]:
    """MLflow's runs of trainings, newest first, without the trials nested in them."""
    client = mlflow_of(home)
    if client is None:
        return []
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


@dataclass(frozen=True)
class Run:
    """A run, what was seen after it, and after every one stopped before it."""

    done: Done
    seen: Seen
    stopped: tuple[tuple[Done, Seen], ...] = ()

    @property
    def home(self) -> Path:
        return self.seen.home

    @property
    def summary(self) -> dict[str, Any]:
        assert self.done.code == 0, self.done
        assert self.seen.summary is not None
        return self.seen.summary
