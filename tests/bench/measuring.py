"""One measurement, one process: seconds of the work alone, and the most memory the process held.

A measured function has a name `module:function` in this package and arguments that JSON knows. It
returns {"seconds": ..., further figures}; imports and preparations are not in its seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

Figures = dict[str, Any]
_PACKAGES = (
    "bentoml",
    "duckdb",
    "fastapi",
    "feast",
    "ibis-framework",
    "mlflow",
    "numpy",
    "onnxruntime",
    "pandas",
    "optuna",
    "pandera",
    "pyarrow",
    "pyspark",
    "redis",
    "scikit-learn",
    "scipy",
    "uvicorn",
    "uvloop",
)


def measure(function: str, *arguments: Any, runs: int = 1) -> Figures:
    """The figures of the run with the median time, out of `runs`.

    Raises RuntimeError with the end of what it printed when a run fails.
    """
    done = [_measure(function, arguments) for _ in range(runs)]
    middle = statistics.median_low(one["seconds"] for one in done)
    return next(one for one in done if one["seconds"] == middle) | {"runs": runs}


def _measure(function: str, arguments: tuple[Any, ...]) -> Figures:
    command = [sys.executable, "-m", "tests.bench.measuring", function, json.dumps(arguments)]
    print(f"  {function.partition(':')[2]} {' '.join(map(str, arguments[1:]))}", end="", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function}{arguments} failed:\n{done.stderr[-3000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    print(f"  {figures['seconds']:.2f} s, {figures['peak_mb']} MB", flush=True)
    return figures


def row(
    case: str, metric: str, ours: Figures, peer: str | None = None, theirs: Figures | None = None
) -> Figures:
    """One line of a result: ratio is ours divided by theirs."""
    line: Figures = {"case": case, "metric": metric, "ours": ours[metric]}
    if peer is not None and theirs is not None:
        ratio = ours[metric] / theirs[metric] if theirs[metric] else None
        line |= {"peer": peer, "theirs": theirs[metric], "ratio": ratio and round(ratio, 3)}
    return line | {"runs": ours["runs"]}


def rows(
    case: str, ours: Figures, peers: dict[str, Figures], metrics: tuple[str, ...]
) -> list[Figures]:
    """The lines of a case: each metric against each peer."""
    return [
        row(case, metric, ours, name, theirs)
        for metric in metrics
        for name, theirs in peers.items()
    ]


def store(folder: Path, name: str, lines: list[Figures]) -> Path:
    """Write `<folder>/<name>.json`: the machine, the versions, the lines."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    result = {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "system": f"{platform.system()} {platform.release()}",
            "load_before": round(os.getloadavg()[2], 2),
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": lines,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def main(function: str, arguments: str) -> None:
    """Run one measured function in this process and print its figures."""
    module, _, name = function.partition(":")
    figures = getattr(importlib.import_module(f"tests.bench.{module}"), name)(
        *json.loads(arguments)
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mb": round(peak)} | figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
