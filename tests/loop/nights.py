"""Nights of a home by a turned clock, each when a line comes in; what was run goes out as JSON.

The jobs and sensors are those of definitions.py, on the Dagster instance of the home. The second
argument is a process that is killed, with all of its group, as the first training begins.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from churn_assets.contract.clock import CLOCK_VARIABLE
from churn_assets.definitions import defs
from churn_assets.defs.healing import DECISION
from churn_assets.defs.resources import Project
from churn_assets.defs.simulated_daemon import SimulatedDaemon
from churn_assets.home import Home


class Nights:
    """The daemon of a home, from one night to the next."""

    def __init__(self, began: datetime, killed_at_training: int) -> None:
        self._home = Home.from_environment()
        self._victim: int | None = killed_at_training
        self._told = 0
        self._ticks_told = 0
        self._daemon = SimulatedDaemon(
            definitions=defs,
            instance=dg.DagsterInstance.get(),
            resources={"project": Project.of(self._home)},
            clock_path=Path(os.environ[CLOCK_VARIABLE]),
            state_path=self._home.root / "nights.json",
            began=began,
            alter=self._alter,
            sensors_every=timedelta(hours=1),
        )

    def _alter(self, job: str, request: dg.RunRequest, at: datetime) -> dg.RunRequest:
        if job == "training" and self._victim is not None:
            os.killpg(self._victim, signal.SIGKILL)
            self._victim = None
        return request

    def until(self, end: datetime) -> dict[str, Any]:
        """What came of the time up to `end`."""
        self._daemon.run_until(end)
        runs = self._daemon.runs[self._told :]
        failed = self._daemon.failed_ticks[self._ticks_told :]
        self._told, self._ticks_told = len(self._daemon.runs), len(self._daemon.failed_ticks)
        return {
            "runs": [[run.job, run.tags.get(DECISION), run.success] for run in runs],
            "failed_ticks": sorted({tick.sensor for tick in failed}),
        }


def main() -> None:
    began = datetime.fromisoformat(sys.argv[1])
    home = Home.from_environment()
    home.prepare()
    nights, out = Nights(began, int(sys.argv[2])), os.fdopen(os.dup(1), "w")
    # What assets print is not what is asked for here.
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(nights.until(datetime.fromisoformat(line.strip()))), file=out, flush=True)


if __name__ == "__main__":
    main()
