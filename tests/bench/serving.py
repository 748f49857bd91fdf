"""What a prediction over HTTP costs, beside a server written by hand, MLflow's, and bare ones.

All servers run at the same time, one worker each, and are asked one after the other, round by
round, with the same customers; a figure is the median of its rounds. The customers and both models
come from the built-in shop: the one `make run` would serve, and the forest the seed's server has,
which ours serves as ONNX.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

from churn_assets.contract.features import features_for
from churn_assets.contract.logged import DURABILITY_VARIABLE, LOG_VARIABLE, OFF
from churn_assets.contract.release import Release
from churn_assets.data.lake import Lake
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.bento import build_bento
from churn_assets.lifecycle.release import build_release, reference_statistics
from churn_assets.lifecycle.serving import HOST, ask, free_port, serve
from churn_assets.modeling.onnx_export import export_onnx, predict_onnx
from churn_assets.modeling.rows import feature_matrix, outcomes, rows_of
from churn_assets.modeling.split import temporal_split
from churn_assets.modeling.training import fit
from tests.bench import model as shop
from tests.bench.measuring import Figures, rows

CONNECTIONS = (1, 16, 64)
ROUNDS = 5
SECONDS = 4
CUSTOMERS = 500
METRICS = ("requests_per_second", "p50_ms", "p95_ms", "p99_ms", "cpu_us")
OURS, FOREST = "ours", "ours-forest"
PEERS = ("seed", "seed-async", "mlflow", "bare", "mount", "unlogged", "power", "echo")
SAME_MODEL = {
    OURS: ("bare", "mount", "unlogged", "power"),
    FOREST: ("seed", "seed-async", "mlflow"),
}
START_SECONDS = 120.0
SAME = 1.5e-4

SCRIPT = Path(__file__).with_name("post.lua")


@dataclass(frozen=True)
class Prepared:
    """What the servers are started with, and the customers they are asked about."""

    release: Release
    forest: Release
    mlflow_model: Path
    customers: list[dict[str, Any]]


@dataclass(frozen=True)
class Server:
    """A running server; MLflow's has a contract of its own."""

    url: str
    process: psutil.Process
    of_mlflow: bool = False

    @property
    def path(self) -> str:
        """Where it is asked."""
        return "/invocations" if self.of_mlflow else "/predict"

    def body(self, customer: dict[str, Any]) -> bytes:
        """The question after `customer`."""
        if not self.of_mlflow:
            return msgspec.json.encode(customer)
        values = [value for name, value in customer.items() if name != "customer_id"]
        return msgspec.json.encode({"inputs": [values]})

    def probability(self, customer: dict[str, Any]) -> float:
        """The answer to it."""
        answer = ask(self.url, self.body(customer), path=self.path).json()
        return answer["predictions"][0][1] if self.of_mlflow else answer["churn_probability"]


def run(
    data: Path,
    customers: int = 12_000,
    days: int = 730,
    *,
    rounds: int = ROUNDS,
    seconds: int = SECONDS,
    connections: Sequence[int] = CONNECTIONS,
    peers: Sequence[str] = PEERS,
) -> list[Figures]:
    """The lines of serving.json. `data` keeps the shop's events.

    Peers: seed as `seed_server` is, in its two ways; MLflow's own server; bare, our endpoint on
    uvicorn alone; mount, our service without the fast lane; unlogged and power, it without a
    prediction log and with one that is synced; echo, which computes nothing.
    """
    if shutil.which("wrk") is None:
        print("nothing measured: there is no wrk; on Debian: apt-get install wrk")
        return []
    scratch = data / "serving"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    prepared = prepare(data / f"model-{customers}-{days}", scratch, customers, days)
    with ExitStack() as stack:
        servers = _start(stack, prepared, scratch, peers)
        require_same_answers(servers, prepared.customers[:50])
        found = _measure(servers, prepared.customers, scratch, rounds, seconds, connections)
    lines = []
    for count in connections:
        figures = {name: found[name, count] for name in servers}
        alike = [name for name in (*SAME_MODEL[FOREST], "echo") if name in figures]
        for case, ours, others in (
            (f"serving/c{count}", OURS, peers),
            (f"serving/c{count}-forest", FOREST, alike),
        ):
            lines += rows(case, figures[ours], {name: figures[name] for name in others}, METRICS)
    return lines


def prepare(lake: Path, scratch: Path, customers: int, days: int) -> Prepared:
    """Train the product's model and the seed's forest on the same rows, and release both."""
    from sklearn.ensemble import RandomForestClassifier

    settings, _ = shop._shop(customers)
    last = settings.calendar.start + timedelta(days=days - 1)
    split = temporal_split(shop._labelled_days(settings, last), settings.windows.horizon_days)
    frame = shop._frame(shop._with_events(Lake(str(lake)), settings, last), settings, split.days)
    features = features_for(settings.raw_tables)
    names = [feature.name for feature in features]
    train, test = rows_of(frame, split.train), rows_of(frame, [split.test])
    ours = fit(frame, split, names, seed=settings.seed, policy=settings.training)
    forest = RandomForestClassifier(
        n_estimators=200, max_depth=15, min_samples_split=5, class_weight="balanced",
        random_state=42, n_jobs=-1,
    ).fit(feature_matrix(train, names), outcomes(train))  # fmt: skip
    # The seed's has no n_jobs: threads would only slow a single row down.
    forest.n_jobs = None
    held_out = feature_matrix(test, names)
    print(f"  {ours.family} and a forest trained on {len(train)} rows", flush=True)

    def release(name: str, estimator: Any) -> Release:
        onnx = export_onnx(estimator, len(names))
        return build_release(
            scratch / "releases",
            onnx=onnx,
            model_name="churn",
            model_version=name,
            features=names,
            golden=(held_out[:40], predict_onnx(onnx, held_out[:40])),
            reference=reference_statistics({name: train[name] for name in names}, names),
            mlflow_run="bench",
            dagster_run="bench",
            data_hash="bench",
            created_at=datetime.now(UTC),
        )

    model = scratch / "mlflow-model"
    _save_with_mlflow(forest, model)
    kinds = {feature.name: int if feature.dtype == "int" else float for feature in features}
    asked = [
        {"customer_id": str(row["customer_id"])}
        | {name: kind(row[name]) for name, kind in kinds.items()}
        for row in test.iloc[:CUSTOMERS].to_dict("records")
    ]
    return Prepared(release("1", ours.estimator), release("2", forest), model, asked)


def _save_with_mlflow(forest: Any, path: Path) -> None:
    with warnings.catch_warnings():
        # MLflow warns of the type hints of its own wrappers when they are imported.
        warnings.filterwarnings("ignore", ".*Any type hint is inferred")
        import mlflow.sklearn

        from churn_assets.lifecycle.tracking import TRUSTED_TYPES

        mlflow.sklearn.save_model(
            forest,
            str(path),
            skops_trusted_types=TRUSTED_TYPES["random_forest"],
            pip_requirements=["scikit-learn"],
            pyfunc_predict_fn="predict_proba",
        )


def _start(
    stack: ExitStack, prepared: Prepared, scratch: Path, peers: Sequence[str]
) -> dict[str, Server]:
    """Ours and the peers by name, ready. The slow starters start beside each other."""
    seed = {"SEED_MODEL": str(prepared.mlflow_model)}
    bare = {
        "CHURN_RELEASE_DIR": str(prepared.release.directory),
        LOG_VARIABLE: str((scratch / "bare-log").resolve()),
    }
    mlflow = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(prepared.mlflow_model),
              "--env-manager", "local", "--workers", "1", "--host", HOST, "--port"]  # fmt: skip
    commands = {
        "seed": (_uvicorn("seed_server"), seed),
        "seed-async": (_uvicorn("seed_server"), seed | {"SEED_ASYNC": "1"}),
        "mlflow": (mlflow, {}),
        "bare": (_uvicorn("bare_server"), bare),
        "echo": (_uvicorn("echo_server"), {}),
    }
    servers = {
        name: _process(stack, *commands[name], scratch) for name in commands if name in peers
    }
    home = scratch / "bentoml"
    for name, release, environment in (
        (OURS, prepared.release, {}),
        (FOREST, prepared.forest, {}),
        ("mount", prepared.release, {"CHURN_FAST_LANE": "off"}),
        ("unlogged", prepared.release, {LOG_VARIABLE: OFF}),
        ("power", prepared.release, {DURABILITY_VARIABLE: "power"}),
    ):
        if name in (OURS, FOREST, *peers):
            bento = build_bento(release.directory, home, project_root=PROJECT_ROOT)
            before = set(psutil.Process().children())
            url = stack.enter_context(serve(bento.tag, bentoml_home=home, environment=environment))
            (process,) = set(psutil.Process().children()) - before
            servers[name] = Server(url, process)
    for name, server in servers.items():
        _wait(server, prepared.customers[0], name)
    return servers


def _uvicorn(module: str) -> list[str]:
    # Access log off: it would be our advantage.
    return [sys.executable, "-m", "uvicorn", f"tests.bench.{module}:app", "--workers", "1",
            "--no-access-log", "--log-level", "warning", "--host", HOST, "--port"]  # fmt: skip


def _process(
    stack: ExitStack, command: list[str], environment: Mapping[str, str], scratch: Path
) -> Server:
    """Start `command` with a free port at its end; it ends, with its children, with `stack`."""
    port = free_port()
    process = stack.enter_context(_running([*command, str(port)], environment, scratch))
    return Server(f"http://{HOST}:{port}", process, of_mlflow="mlflow" in command)


@contextmanager
def _running(
    command: list[str], environment: Mapping[str, str], scratch: Path
) -> Generator[psutil.Process]:
    ours = {
        "PYTHONPATH": os.pathsep.join([str(PROJECT_ROOT), str(PROJECT_ROOT / "bentos" / "churn")]),
        # MLflow starts the uvicorn it finds.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    with (scratch / "servers.log").open("ab") as sink:
        process = subprocess.Popen(
            command,
            cwd=scratch,
            env={**os.environ, **ours, **environment},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield psutil.Process(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _wait(server: Server, customer: dict[str, Any], name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            answer = ask(server.url, server.body(customer), path=server.path)
        except Exception:
            if server.process.status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.1)
            continue
        if answer.status == 200:
            return
        raise RuntimeError(f"{name} answers {answer.status}: {answer.content[:300]!r}")
    raise RuntimeError(f"{name} did not start; servers.log says why")


def require_same_answers(servers: Mapping[str, Server], customers: list[dict[str, Any]]) -> None:
    """Raise RuntimeError unless those with the same model give the same probabilities."""
    answers = {
        name: np.array([server.probability(customer) for customer in customers])
        for name, server in servers.items()
    }
    for ours, peers in SAME_MODEL.items():
        for peer in set(peers) & set(servers):
            # Four digits are answered, and the last may round the other way.
            difference = float(np.abs(answers[peer] - answers[ours]).max())
            if difference > SAME:
                raise RuntimeError(f"{peer} and {ours} differ by {difference} on a customer")


def _measure(
    servers: Mapping[str, Server],
    customers: list[dict[str, Any]],
    scratch: Path,
    rounds: int,
    seconds: int,
    connections: Sequence[int],
) -> dict[tuple[str, int], Figures]:
    """The medians over the rounds, by server and number of connections."""
    files = {}
    for name, server in servers.items():
        files[name] = scratch / f"{name}.jsonl"
        files[name].write_bytes(b"".join(server.body(c) + b"\n" for c in customers))
    seen: dict[tuple[str, int], list[Figures]] = {}
    names = list(servers)
    for number in range(rounds):
        load = os.getloadavg()[0]
        for count in connections:
            # Each begins once, so that none always comes after the same other.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                done = _wrk(servers[name], files[name], count, seconds)
                seen.setdefault((name, count), []).append(done)
        shown = ", ".join(
            f"{name} {seen[name, connections[-1]][-1]['requests_per_second']}" for name in names
        )
        print(f"  round {number + 1}, load {load:.1f}: {shown}", flush=True)
    return {
        key: {
            metric: round(statistics.median(one[metric] for one in each), 3) for metric in METRICS
        }
        | {"runs": rounds}
        for key, each in seen.items()
    }


def _wrk(server: Server, bodies: Path, connections: int, seconds: int) -> Figures:
    """Load on `server`; its figures. Raises RuntimeError for an answer that is none."""
    before = _cpu_seconds(server.process)
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(SCRIPT),
         server.url + server.path, "--", str(bodies)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"wrk failed: {done.stderr[-500:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    if told["errors"] or not told["requests"]:
        raise RuntimeError(f"{server.url} did not answer everything: {done.stdout[-500:]}")
    return {
        "requests_per_second": round(told["requests"] / told["duration"] * 1e6, 1),
        "p50_ms": told["p50"] / 1000,
        "p95_ms": told["p95"] / 1000,
        "p99_ms": told["p99"] / 1000,
        "cpu_us": (_cpu_seconds(server.process) - before) / told["requests"] * 1e6,
    }


def _cpu_seconds(process: psutil.Process) -> float:
    """Processor time of the process and its children, all they have ever used."""
    family = [process, *process.children(recursive=True)]
    return sum(sum(member.cpu_times()[:2]) for member in family)
