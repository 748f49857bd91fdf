"""Postgres and Redis servers of our own, which may be killed and are started again."""

from __future__ import annotations

import getpass
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from churn_assets.up import free_port

READY_S = 60.0
# How long whoever keeps a server takes to start it again.
DOWN_S = 5.0


class NotInstalled(Exception):
    """A program of the server is not on this machine; the message names it."""


class _Server:
    """A server that whoever keeps it starts again a little after it died."""

    _server: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it with what it kept, and wait until it answers."""
        raise NotImplementedError

    def start_again(self) -> None:
        """As whoever keeps it would, a little later."""
        assert self._server is not None
        self._server.wait(READY_S)
        time.sleep(DOWN_S)
        self.start()


class Postgres(_Server):
    """A Postgres of its own on a free port, with its data in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._data, self._port = folder / "postgres", free_port()
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name)
        if not found and shutil.which("postgres") is None:
            raise NotInstalled("Postgres is not installed")
        self._programs = found[-1] if found else Path(str(shutil.which("postgres"))).parent
        # Postgres refuses to run as root.
        self._as = ["runuser", "-u", "postgres", "--"] if getpass.getuser() == "root" else []

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Start it, with a new database the first time, and wait until it answers."""
        if not self._data.exists():
            self._data.mkdir(parents=True)
            if self._as:
                shutil.chown(self._data, "postgres")
            initdb = [str(self._programs / "initdb"), "-U", "postgres", "-A", "trust"]
            subprocess.run(
                [*self._as, *initdb, "-D", str(self._data)], check=True, capture_output=True
            )
        self._server = subprocess.Popen(
            [
                *(*self._as, str(self._programs / "postgres"), "-D", str(self._data)),
                *("-h", "127.0.0.1", "-p", str(self._port), "-k", str(self._data)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ready = [str(self._programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(self._port)]
        _wait_until(lambda: subprocess.run(ready, capture_output=True).returncode == 0)

    def process(self) -> psutil.Process:
        """The one that starts the others."""
        assert self._server is not None
        started = psutil.Process(self._server.pid)
        return started.children()[0] if self._as else started

    def stop(self) -> None:
        """End it; its data stays."""
        if self._server is not None and self._server.poll() is None:
            self.process().send_signal(signal.SIGINT)
            self._server.wait(READY_S)


class Redis(_Server):
    """A Redis of its own on a free port, which keeps what it is told in an append-only file."""

    def __init__(self, folder: Path) -> None:
        self._data, self._port = folder / "redis", free_port()
        if shutil.which("redis-server") is None:
            raise NotInstalled("Redis is not installed")

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Start it with what it kept, and wait until it answers."""
        import redis

        self._data.mkdir(parents=True, exist_ok=True)
        self._server = subprocess.Popen(
            [
                *("redis-server", "--port", str(self._port), "--bind", "127.0.0.1"),
                *("--dir", str(self._data), "--save", "", "--appendonly", "yes"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def answers() -> bool:
            with redis.Redis(port=self._port) as client:
                try:
                    return bool(client.ping())
                except redis.exceptions.ConnectionError:
                    return False

        _wait_until(answers)

    def process(self) -> psutil.Process:
        """The server."""
        assert self._server is not None
        return psutil.Process(self._server.pid)

    def stop(self) -> None:
        """End it; its data stays."""
        if self._server is not None and self._server.poll() is None:
            self._server.terminate()
            self._server.wait(READY_S)


def _wait_until(answers: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_S
    while not answers():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the server did not answer within {READY_S:.0f} s")
        time.sleep(0.1)
