"""An MLflow server of a test's own: SQLite behind it, artifacts through it, no login."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

# Of a loaded machine; nothing here is timed.
PATIENCE_S = 120


@contextmanager
def tracking_server(folder: Path, port: int) -> Generator[subprocess.Popen]:
    """The server on 127.0.0.1:`port`, answering; what it keeps is in `folder`, from then on too.

    It leads a process group of its own.
    """
    with (folder / "log").open("ab") as sink:
        server = subprocess.Popen(
            [
                *(str(Path(sys.executable).parent / "mlflow"), "server", "--workers", "1"),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
                *("--artifacts-destination", str(folder / "artifacts")),
            ],
            cwd=folder,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and server.poll() is None:
            url = f"http://127.0.0.1:{port}/health"
            with suppress(OSError), urllib.request.urlopen(url, timeout=5):
                break
            time.sleep(0.1)
        else:
            pytest.fail((folder / "log").read_text())
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(PATIENCE_S)
