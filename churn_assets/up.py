"""`make up`: every process of the product on this machine, started and stopped together."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT, Home

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """One process with a port; `variable` is the environment variable that moves the port."""

    name: str
    title: str
    variable: str
    default_port: int
    path: str = "/"

    @property
    def port(self) -> int:
        """The configured port. Raises UserError when it is not a number."""
        value = os.environ.get(self.variable) or str(self.default_port)
        if not value.isdecimal() or not 0 < int(value) < 65536:
            raise UserError(f"{self.variable}={value} is not a port; give a number up to 65535")
        return int(value)

    @property
    def url(self) -> str:
        """Where a person opens it."""
        return f"http://{HOST}:{self.port}{self.path}"


DAGSTER = Server("dagster", "Dagster UI", "CHURN_DAGSTER_PORT", 3000)
MLFLOW = Server("mlflow", "MLflow UI", "CHURN_MLFLOW_PORT", 5000)
SERVICE = Server("service", "Churn service", "CHURN_SERVICE_PORT", 3001)
REPORTS = Server("reports", "Reports", "CHURN_REPORTS_PORT", 3002)
SERVERS = (DAGSTER, MLFLOW, SERVICE, REPORTS)


def check_port(server: Server) -> None:
    """Raise UserError when the port of `server` is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, server.port))
        except OSError:
            raise UserError(
                f"port {server.port} for the {server.title} is taken; stop what listens there "
                f"or set {server.variable} to a free port"
            ) from None


def commands(home: Home) -> dict[str, list[str]]:
    """The command line of every process, by name."""
    scripts = Path(sys.executable).parent
    workspace = str(PROJECT_ROOT / "workspace.yaml")
    return {
        "dagster": [
            str(scripts / "dagster-webserver"),
            *("-w", workspace, "-h", HOST, "-p", str(DAGSTER.port)),
        ],
        "daemon": [str(scripts / "dagster-daemon"), "run", "-w", workspace],
        "mlflow": [
            *(str(scripts / "mlflow"), "server", "--workers", "1"),
            *("--host", HOST, "--port", str(MLFLOW.port)),
            *("--backend-store-uri", home.mlflow_uri),
            *("--artifacts-destination", str(home.mlflow_artifacts)),
        ],
        "service": [sys.executable, "-m", "churn_assets", "serve", "--port", str(SERVICE.port)],
        "reports": [
            *(sys.executable, "-m", "http.server", str(REPORTS.port)),
            *("--bind", HOST, "--directory", str(home.reports)),
        ],
    }


def run_all(home: Home) -> int:
    """Run everything until Ctrl-C or until one process ends; returns the exit code.

    Raises UserError when a port is taken, before anything is started.
    """
    from honcho.manager import Manager

    for server in SERVERS:
        check_port(server)
    manager = Manager()
    environment = os.environ | home.environment() | {"PYTHONUNBUFFERED": "1"}
    for name, command in commands(home).items():
        manager.add_process(name, f"exec {shlex.join(command)}", env=environment, cwd=PROJECT_ROOT)
    for server in SERVERS:
        print(f"  {server.title:14} {server.url}", flush=True)
    print("  Ctrl-C stops them all. The UI needs about twenty seconds to answer.", flush=True)
    try:
        manager.loop()
    finally:
        stop_descendants()
    stopped_by_user = manager.returncode in (130, 143)
    return 0 if stopped_by_user else int(manager.returncode or 1)


def stop_descendants(timeout: float = 10) -> None:
    """End every process this one started, directly or not; kill what does not listen."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        child.terminate()
    _, alive = psutil.wait_procs(children, timeout=timeout)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=timeout)
