"""The drill: every case in a process and a home of its own, some at a time, and one report.

All cases of one size begin as the same stable shop: its months and its first model are made once,
and each case goes on in a copy.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import yaml

from churn_assets.contract.clock import CLOCK_VARIABLE
from churn_assets.drill.cases import Case, configuration, start_of
from churn_assets.drill.outcome import OUTCOME, Outcome
from churn_assets.drill.report import goals, table, write_report
from churn_assets.home import PROJECT_ROOT, Home

_LAST_LINES = 25


def run_cases(cases: Sequence[Case], home: Home, *, jobs: int, short: bool = False) -> bool:
    """Run `cases`, at most `jobs` at a time; print and write the report. Whether all goals are met.

    Each case's home is kept at `drill/<case>` until the next drill, for whoever wants to look.
    """
    since = time.monotonic()
    folder = home.root / "drill"
    folder.mkdir(parents=True, exist_ok=True)
    # The longest first, so that none of them is left alone at the end.
    ordered = sorted(cases, key=lambda case: case.days / case.every, reverse=True)
    processes = _Processes(folder, short)
    with ThreadPoolExecutor(jobs) as pool:
        # A case waits for its start, which nothing that waits may keep from beginning.
        needed = {start.name: start for start in map(start_of, ordered)}
        starts = {name: pool.submit(processes.start, start) for name, start in needed.items()}
        begun = {
            case.name: pool.submit(processes.case, case, starts[start_of(case).name])
            for case in ordered
        }
        try:
            found = {name: case.result() for name, case in begun.items()}
        except BaseException:
            # Nothing goes on that nobody waits for.
            for each in (*starts.values(), *begun.values()):
                each.cancel()
            processes.terminate()
            raise
    outcomes = [found[case.name] for case in cases]
    done = [one for one in outcomes if isinstance(one, Outcome)]
    write_report(folder, done)
    print(table(done))
    for one in done:
        if one.treated is not None:
            print(f"  {one.title}: {one.treated.line()}")
    missed = [line for line in goals(done) if not line.met]
    for line in goals(done):
        print(f"  {'met   ' if line.met else 'MISSED'}  {line.text}")
    for case, one in zip(cases, outcomes, strict=True):
        if not isinstance(one, Outcome):
            print(f"{case.name} did not come to an end: {one}", file=sys.stderr)
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"\n  {folder / 'report.html'}, after {(time.monotonic() - since) / 60:.0f} minutes and "
        f"{(of_children.ru_utime + of_children.ru_stime) / 60:.0f} minutes of processor time"
    )
    return not missed and len(done) == len(cases)


class _Processes:
    """Runs starts and cases, each in a process and a home of its own below `folder`."""

    def __init__(self, folder: Path, short: bool) -> None:
        self._folder, self._short = folder, short
        self._running: list[subprocess.Popen] = []

    def start(self, case: Case) -> Path | str:
        """The home in which `case`, a start, has been trained; or how its process ended."""
        root = self._home(case)
        ended = self._run(root, case, "--begin")
        return ended or root

    def case(self, case: Case, start: Future[Path | str]) -> Outcome | str:
        """The outcome of a case, or how its process ended."""
        begun = start.result()
        if isinstance(begun, str):
            return f"its start did not come to an end: {begun}"
        root = self._home(case)
        shutil.copytree(begun, root, ignore=shutil.ignore_patterns("*.lock"))
        print(f"  {case.name:24} begins ({case.days} days)", flush=True)
        short = ["--short"] if self._short else []
        if ended := self._run(root, case, "--from", str(begun), *short, case.name):
            return ended
        found = msgspec.json.decode((root / OUTCOME).read_bytes(), type=Outcome)
        print(f"  {case.name:24} done in {found.seconds:.0f} s", flush=True)
        return found

    def terminate(self) -> None:
        """End those that run."""
        for process in self._running:
            process.terminate()

    def _home(self, case: Case) -> Path:
        root = self._folder / case.name
        shutil.rmtree(root, ignore_errors=True)
        return root

    def _run(self, root: Path, case: Case, *arguments: str) -> str | None:
        """Run `churn drill` for a case; how it ended, when not well."""
        root.mkdir(parents=True, exist_ok=True)
        config = root / "config.yaml"
        config.write_text(yaml.safe_dump(configuration(case)), encoding="utf-8")
        ours = ("CHURN_", "DAGSTER_", "MLFLOW_", "BENTOML_")
        environment = {name: v for name, v in os.environ.items() if not name.startswith(ours)}
        environment |= {
            "CHURN_HOME": str(root),
            "CHURN_CONFIG": str(config),
            CLOCK_VARIABLE: str(root / "drill" / "clock"),
            # As many threads as its share of the machine.
            "OMP_NUM_THREADS": "1",
        }
        log = root / "drill.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "churn_assets", "drill", *arguments],
                cwd=PROJECT_ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )
            self._running.append(process)
            code = process.wait()
        if code:
            last = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
            return f"exit code {code}\n" + "\n".join(last)
        return None
