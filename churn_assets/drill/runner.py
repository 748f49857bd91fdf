"""The drill: every case in a process and a home of its own, some at a time, and one report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import yaml

from churn_assets.contract.clock import CLOCK_VARIABLE
from churn_assets.drill.cases import Case, configuration
from churn_assets.drill.outcome import OUTCOME, Outcome
from churn_assets.drill.report import goals, table, write_report
from churn_assets.home import PROJECT_ROOT, Home

_LAST_LINES = 25


def run_cases(cases: Sequence[Case], home: Home, *, jobs: int, short: bool = False) -> bool:
    """Run `cases`, at most `jobs` at a time; print and write the report. Whether all goals are met.

    Each case's home is kept at `drill/<case>` until the next drill, for whoever wants to look.
    """
    folder = home.root / "drill"
    folder.mkdir(parents=True, exist_ok=True)
    # The longest first, so that none of them is left alone at the end.
    ordered = sorted(cases, key=lambda case: case.days / case.every, reverse=True)
    running: list[subprocess.Popen] = []
    with ThreadPoolExecutor(jobs) as pool:
        begun = {case.name: pool.submit(_run, case, folder, short, running) for case in ordered}
        try:
            found = {name: case.result() for name, case in begun.items()}
        except BaseException:
            # Nothing goes on that nobody waits for.
            for case in begun.values():
                case.cancel()
            for process in running:
                process.terminate()
            raise
    outcomes = [found[case.name] for case in cases]
    done = [one for one in outcomes if isinstance(one, Outcome)]
    write_report(folder, done)
    print(table(done))
    missed = [line for line in goals(done) if not line.met]
    for line in goals(done):
        print(f"  {'met   ' if line.met else 'MISSED'}  {line.text}")
    for case, one in zip(cases, outcomes, strict=True):
        if not isinstance(one, Outcome):
            print(f"{case.name} did not come to an end: {one}", file=sys.stderr)
    print(f"\n  {folder / 'report.html'}")
    return not missed and len(done) == len(cases)


def _run(case: Case, folder: Path, short: bool, running: list[subprocess.Popen]) -> Outcome | str:
    """The outcome of a case, or how its process ended."""
    root = folder / case.name
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump(configuration(case)), encoding="utf-8")
    ours = ("CHURN_", "DAGSTER_", "MLFLOW_", "BENTOML_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {
        "CHURN_HOME": str(root),
        "CHURN_CONFIG": str(config),
        CLOCK_VARIABLE: str(root / "drill" / "clock"),
        # As many threads as its share of the machine.
        "OMP_NUM_THREADS": "1",
    }
    print(f"  {case.name:24} begins ({case.days} days)", flush=True)
    log = root / "drill.log"
    command = [sys.executable, "-m", "churn_assets", "drill", "--one"]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, *(["--short"] if short else []), case.name],
            cwd=PROJECT_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
        running.append(process)
        code = process.wait()
    if code:
        last = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return f"exit code {code}\n" + "\n".join(last)
    found = msgspec.json.decode((root / OUTCOME).read_bytes(), type=Outcome)
    print(f"  {case.name:24} done in {found.seconds:.0f} s", flush=True)
    return found
