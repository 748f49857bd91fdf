"""What the tests of the container share."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess

from churn_assets.lifecycle.serving import HOST

BASE = "python:3.11-slim"
# A build is told of this as of an index; no trace of it may be in the image.
TOLD_TO_THE_BUILD = "registry-of-nobody.example"


def docker(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    assert not check or done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout + ("" if check else done.stderr)


def inspected(name: str) -> dict:
    return json.loads(docker("inspect", name))[0]


def quiet_port() -> int:
    """A free port that nobody who asks for any is given; a container takes seconds to bind it."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


def hardened(network: str | None, host: str, port: int) -> list[str]:
    """How an operator runs it: nothing writable but /tmp, no capability, a memory limit."""
    options = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--memory", "1g"]
    options += ["--security-opt", "no-new-privileges"]
    if network == "host":
        where = ["-e", f"BENTOML_HOST={host}", "-e", f"BENTOML_PORT={port}"]
        return [*options, "--network", "host", *where]
    return [*options, "--publish", f"{host}:{port}:3000"]
