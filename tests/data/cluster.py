"""A standalone Spark cluster on loopback, of the processes that pyspark's package brings."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyspark

HOST = "127.0.0.1"
# For a process of seconds the optimising compiler costs more than it gives.
QUICK_JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
_SECONDS_TO_START = 90.0


@contextmanager
def standalone(folder: Path, workers: int = 2) -> Generator[str]:
    """A master and its workers, a core each, for the length of a block; the master's URL."""
    with ExitStack() as stack:
        arguments = ("--host", HOST, "--port", "0", "--webui-port", "0")
        log = stack.enter_context(_daemon(folder, "master", "master.Master", *arguments))
        url = _wait_for(log, r"Starting Spark master at (spark://\S+)")
        resources = ("--cores", "1", "--memory", "1g", "--host", HOST, "--webui-port", "0")
        logs = [
            stack.enter_context(
                _daemon(
                    folder, name, "worker.Worker", *resources, "--work-dir", str(folder / name), url
                )
            )
            for name in (f"worker-{number}" for number in range(workers))
        ]
        for log in logs:
            _wait_for(log, r"(Successfully registered) with master")
        yield url


@contextmanager
def _daemon(folder: Path, name: str, kind: str, *arguments: str) -> Generator[Path]:
    home = Path(pyspark.__file__).parent
    log = folder / f"{name}.log"
    environment = os.environ | {
        "SPARK_HOME": str(home),
        "SPARK_LOCAL_IP": HOST,
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_DAEMON_JAVA_OPTS": QUICK_JAVA,
    }
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [home / "bin" / "spark-class", f"org.apache.spark.deploy.{kind}", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        yield log
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(log: Path, pattern: str) -> str:
    end = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < end:
        found = re.search(pattern, log.read_text(errors="replace"))
        if found:
            return found[1]
        time.sleep(0.05)
    raise TimeoutError(f"{log.name} does not say {pattern}:\n{log.read_text(errors='replace')}")
