"""`make up`: every process of the product on this machine, started, kept and stopped together."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit, urlunsplit

import psutil
import yaml

from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT, Home

HOST = "127.0.0.1"
# Every process below a `make up` inherits it, so that those whose parent has gone are found too.
MARKER = "CHURN_UP"
# Which of them a process belongs to, by the name of `commands`.
PART = "CHURN_UP_PART"
# Dagster keeps what a person switched on or off by this name.
LOCATION = "churn_assets"
# They ask the code server for its definitions as soon as they start.
NEEDS_CODE = ("dagster", "daemon")
CODE = "code"
STOP_TIMEOUT_S = 15.0
POLL_S = 0.2
LOOK_AGAIN_S = 5.0
_SETTLED = {
    # A run that did not begin in time goes back into the queue: a machine that is busy should not
    # begin it twice.
    "DAGSTER_GRPC_TIMEOUT_SECONDS": "240",
    "PYTHONUNBUFFERED": "1",
    # MLflow's jobs judge language models; they would add four processes and state elsewhere.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # MLflow's own affair; the filter is a literal prefix of the message.
    "PYTHONWARNINGS": "ignore:starlette.middleware.wsgi is deprecated",
}


@dataclass(frozen=True)
class Restarts:
    """When a process that died is started again.

    The first time after `delay_s`, then after twice as long each time. One that dies `limit` times
    in a row is given up; it is in a row until it has lived for `steady_s`.
    """

    limit: int = 5
    delay_s: float = 0.5
    steady_s: float = 120.0


@dataclass
class _Part:
    """One of the processes: how to start it, and how often in a row it has died."""

    name: str
    command: list[str]
    process: subprocess.Popen | None = None
    deaths: int = 0
    started: float = 0.0
    due: float = 0.0

    def died(self, now: float, restarts: Restarts) -> bool:
        """Count a death; returns whether it is to be started again."""
        lived = now - self.started
        self.process = None
        self.deaths = 1 if lived >= restarts.steady_s else self.deaths + 1
        self.due = now + restarts.delay_s * 2 ** (self.deaths - 1)
        return self.deaths < restarts.limit


@dataclass(frozen=True)
class Server:
    """One process with a port; `variable` is the environment variable that moves the port.

    `instead` is the variable that may name one that runs already, by its http URL.
    """

    name: str
    title: str
    variable: str
    default_port: int
    path: str = "/"
    instead: str | None = None

    @property
    def port(self) -> int:
        """The configured port. Raises UserError when it is not a number."""
        value = os.environ.get(self.variable) or str(self.default_port)
        if not value.isdecimal() or not 0 < int(value) < 65536:
            raise UserError(f"{self.variable}={value} is not a port; give a number up to 65535")
        return int(value)

    @property
    def url(self) -> str:
        """Where a person opens it: what CHURN_DAGSTER_PUBLIC_URL and its like say, or loopback."""
        public = os.environ.get(self.variable.replace("_PORT", "_PUBLIC_URL"))
        found = public or self.elsewhere or f"http://{HOST}:{self.port}"
        return f"{found.rstrip('/')}{self.path}"

    @property
    def elsewhere(self) -> str | None:
        """The URL of the one to use instead, without its user and password."""
        parts = urlsplit(os.environ.get(self.instead, "") if self.instead else "")
        if parts.scheme not in ("http", "https"):
            return None
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


DAGSTER = Server("dagster", "Dagster UI", "CHURN_DAGSTER_PORT", 3000)
MLFLOW = Server("mlflow", "MLflow UI", "CHURN_MLFLOW_PORT", 5000, instead="CHURN_MLFLOW_URI")
SERVICE = Server("service", "Churn service", "CHURN_SERVICE_PORT", 3001)
REPORTS = Server("reports", "Reports", "CHURN_REPORTS_PORT", 3002)
SERVERS = (DAGSTER, MLFLOW, SERVICE, REPORTS)


def started_here() -> list[Server]:
    """Those `make up` starts: all but the ones that run elsewhere."""
    return [server for server in SERVERS if server.elsewhere is None]


def check_ports() -> None:
    """Raise UserError naming the first server whose port is taken, or wanted by another one."""
    taken: dict[int, Server] = {}
    for server in started_here():
        if other := taken.get(server.port):
            raise UserError(
                f"port {server.port} is wanted by the {other.title} and the {server.title}; "
                f"set {other.variable} or {server.variable} to another port"
            )
        taken[server.port] = server
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, server.port))
            except OSError as error:
                raise UserError(
                    f"port {server.port} for the {server.title} cannot be used "
                    f"({error.strerror}); stop what listens there or set {server.variable} "
                    "to a free port"
                ) from None


def commands(home: Home, code_port: int) -> dict[str, list[str]]:
    """The command line of every process, by name.

    Webserver and daemon share one code server at `code_port`: given the module itself, each has
    one of its own, and the daemon starts a new one every minute.
    """
    scripts = Path(sys.executable).parent
    workspace = str(_workspace(home))
    found = {
        CODE: code_command(HOST, code_port),
        "dagster": [
            *(str(scripts / "dagster-webserver"), "-w", workspace),
            *("-h", HOST, "-p", str(DAGSTER.port), "--dagster-log-level", "warning"),
        ],
        "daemon": [str(scripts / "dagster-daemon"), "run", "-w", workspace],
        "mlflow": [
            *(str(scripts / "mlflow"), "server", "--workers", "1"),
            *("--host", HOST, "--port", str(MLFLOW.port)),
            *("--artifacts-destination", str(home.mlflow_artifacts)),
            *("--uvicorn-opts", "--log-level warning"),
        ],
        "service": [sys.executable, "-m", "churn_assets", "serve", "--port", str(SERVICE.port)],
        "reports": [
            *(sys.executable, "-m", "churn_assets.reports"),
            *(HOST, str(REPORTS.port), str(home.reports)),
        ],
    }
    unneeded = {server.name for server in SERVERS} - {server.name for server in started_here()}
    return {name: command for name, command in found.items() if name not in unneeded}


def code_command(host: str, port: int) -> list[str]:
    """The command line of the code server that answers on `port` of the interface `host`."""
    return [
        *(str(Path(sys.executable).parent / "dagster"), "api", "grpc", "--log-level", "warning"),
        *("--module-name", "churn_assets.definitions", "--location-name", LOCATION),
        *("--host", host, "--port", str(port)),
    ]


def _workspace(home: Home) -> Path:
    """Where the home says which code server its webserver and daemon ask."""
    return home.dagster / "workspace.yaml"


def _write_workspace(home: Home, code_port: int) -> None:
    server = {"host": HOST, "port": code_port, "location_name": LOCATION}
    document = {"load_from": [{"grpc_server": server}]}
    _workspace(home).write_text(yaml.safe_dump(document), encoding="utf-8")


def run_all(
    home: Home,
    stop_timeout: float = STOP_TIMEOUT_S,
    restarts: Restarts | None = None,
    close_lost_runs: Callable[[Callable[[], set[int]]], list[str]] | None = None,
) -> int:
    """Run everything until Ctrl-C, or until one process dies again and again.

    One that dies is started again, after what is left of it has been stopped. The runs of a code
    server that died go on: they are processes of their own. Whenever one of those may have ended,
    `close_lost_runs` is called with what tells the ids of the processes that are alive; it returns
    the ids of the runs that nobody executes any more.

    Returns the exit code: 0 when a person stopped it, or else that of the process that was given
    up. Raises UserError when a port is taken, before anything is started. Nothing that was started
    is left at the end, also when this process is killed.
    """
    check_ports()
    restarts = restarts or Restarts()
    with _stop_asked_for() as asked, _family(stop_timeout) as token:
        # The store's URL may hold a password, which a command line would show to every user.
        store = {"MLFLOW_BACKEND_STORE_URI": home.mlflow_uri}
        environment = os.environ | home.environment() | _SETTLED | store | {MARKER: token}
        code_port = free_port()
        _write_workspace(home, code_port)
        parts = [_Part(name, command) for name, command in commands(home, code_port).items()]
        orphans = _Orphans(token, close_lost_runs)
        silent = started_here()
        _say("up", "starting; Ctrl-C stops everything")
        for server in SERVERS:
            if server.elsewhere:
                _say("up", f"{server.title:14} {server.url}")
        while not asked:
            now = time.monotonic()
            for part in parts:
                if part.process is None:
                    ready = part.name not in NEEDS_CODE or _listens(code_port)
                    if now >= part.due and ready:
                        part.process = _start(part, environment, mute=asked)
                        part.started = now
                elif (code := part.process.poll()) is not None and not asked:
                    how = f"{part.name} stopped with exit code {code}"
                    if not part.died(now, restarts):
                        again = f", {part.deaths} times in a row" if part.deaths > 1 else ""
                        _say("up", f"error: {how}{again}", sys.stderr)
                        asked.append(signal.SIGTERM)
                        return code if code > 0 else 1
                    _say("up", f"{how}; it is started again", sys.stderr)
                    if part.name == CODE:
                        orphans.look_for()
                    else:
                        stop(token, stop_timeout, part.name)
            # Whoever tries a lost run again asks the code server for its job.
            if orphans.some_may_have_ended() and _listens(code_port):
                orphans.close_runs()
            for server in [server for server in silent if _listens(server.port)]:
                silent.remove(server)
                _say("up", f"{server.title:14} {server.url}")
            time.sleep(POLL_S)
        _say("up", "stopping")
    _say("up", "stopped")
    return 0


@dataclass
class _Orphans:
    """The processes of runs whose code server died: nobody else sees them end."""

    token: str
    close_lost_runs: Callable[[Callable[[], set[int]]], list[str]] | None
    living: list[psutil.Process] = field(default_factory=list)
    ended: bool = False
    due: float = 0.0

    def look_for(self) -> None:
        """Take in what the code server that just died has left."""
        self.living = members(self.token, CODE)
        self.ended = True

    def some_may_have_ended(self) -> bool:
        """Whether one has since the last look, or the code server has died since; not too often."""
        alive = [process for process in self.living if _is_alive(process)]
        self.ended = self.ended or len(alive) < len(self.living)
        self.living = alive
        return self.ended and time.monotonic() >= self.due

    def close_runs(self) -> None:
        """Close the runs of those that have ended; what goes wrong is said, and tried again."""
        self.due = time.monotonic() + LOOK_AGAIN_S
        try:
            lost = self.close_lost_runs(self._alive) if self.close_lost_runs is not None else []
        except Exception as error:
            # Dagster's database may be busy: no reason to stop everything.
            _say("up", f"error: cannot look for runs without a process: {error}", sys.stderr)
            return
        self.ended = False
        for run in lost:
            _say("up", f"run {run} has lost its process and is closed as failed", sys.stderr)

    def _alive(self) -> set[int]:
        return {process.pid for process in members(self.token) if _is_alive(process)}


def _is_alive(process: psutil.Process) -> bool:
    """A zombie has ended: only nobody has asked after it yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def members(token: str, part: str | None = None) -> list[psutil.Process]:
    """The living processes that were started, directly or not, with this marker.

    part: only those that belong to this one.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            given = process.environ()
            if given.get(MARKER) == token and part in (None, given.get(PART)):
                found.append(process)
    return found


def stop(token: str, timeout: float, part: str | None = None) -> None:
    """End every process with this marker; kill what has not gone after `timeout` seconds.

    Again and again, as a process may start another one while it is asked to stop.
    """
    deadline = time.monotonic() + timeout
    told: set[psutil.Process] = set()
    while alive := members(token, part):
        late = time.monotonic() > deadline
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                if late:
                    process.kill()
                elif process not in told:
                    process.terminate()
        told.update(alive)
        psutil.wait_procs(alive, timeout=POLL_S)


@contextlib.contextmanager
def _family(stop_timeout: float) -> Generator[str]:
    """A new marker; at the end, every process that carries it is ended.

    A guard waits for this process to close a pipe, which the kernel does too when it is killed.
    """
    token = secrets.token_hex(8)
    guard = subprocess.Popen(
        [sys.executable, "-m", "churn_assets.up", token, str(stop_timeout)],
        cwd=PROJECT_ROOT,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield token
    finally:
        stop(token, stop_timeout)
        guard.communicate()


@contextlib.contextmanager
def _stop_asked_for() -> Generator[list[int]]:
    """The signals that came while the block runs; none of them ends it."""
    asked: list[int] = []
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in wanted}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(part: _Part, environment: Mapping[str, str], *, mute: list[int]) -> subprocess.Popen:
    """Start a process that Ctrl-C at the terminal does not reach; its lines carry its name.

    What it says once something is in `mute` is not shown: servers complain of being stopped.
    """
    process = subprocess.Popen(
        part.command,
        env=dict(environment) | {PART: part.name},
        cwd=PROJECT_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    threading.Thread(target=_relay, args=(part.name, process.stdout, mute), daemon=True).start()
    return process


def _relay(name: str, lines: IO[bytes], mute: list[int]) -> None:
    for line in lines:
        if not mute:
            _say(name, line.decode(errors="replace").rstrip())


def _say(name: str, line: str, stream: IO[str] | None = None) -> None:
    # A terminal that has gone is no reason to leave the servers running.
    with contextlib.suppress(OSError, ValueError):
        print(f"{name:8}| {line}", file=stream or sys.stdout, flush=True)


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(POLL_S)
        return probe.connect_ex((HOST, port)) == 0


if __name__ == "__main__":
    sys.stdin.buffer.read()
    stop(sys.argv[1], float(sys.argv[2]))
