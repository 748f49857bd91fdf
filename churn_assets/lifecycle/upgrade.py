"""A home made by an older version, brought to the formats of this one in small steps.

After each step the home says which formats it has, so that an upgrade which was stopped goes on
with the step it was stopped in, which a step has to allow. Until the last one is done, everything
else refuses the home.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec

from churn_assets.contract.logged import FILE_SUFFIX, without_password
from churn_assets.contract.release import MANIFEST
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.home_format import (
    BEFORE_THE_MARKER,
    FORMATS,
    RESTORING,
    Marker,
    installed,
    is_older,
    read_marker,
    refuse_newer,
    write_marker,
)
from churn_assets.lifecycle.in_use import unused


@dataclass(frozen=True)
class Step:
    """From format `source` of a part to the next; `run` may be called again after it was killed."""

    part: str
    source: int
    title: str
    run: Callable[[Home], None]


class _Format(msgspec.Struct):
    format: int


def adopt(home: Home) -> None:
    """See that a home without a marker holds only what was written before there was one.

    Raises UserError naming a release or a file of the prediction log of another format.
    """
    for path in sorted(home.releases.glob(f"*/{MANIFEST}")):
        try:
            found = msgspec.json.decode(path.read_bytes(), type=_Format).format
        except msgspec.DecodeError:
            # No service takes it; `churn rollback` and the service say what is wrong with it.
            continue
        if found != BEFORE_THE_MARKER["releases"]:
            raise _foreign(path.parent, found)
    for path in sorted(home.prediction_log.glob(f"*{FILE_SUFFIX}")):
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            try:
                (found,) = connection.execute("PRAGMA user_version").fetchone()
            except sqlite3.Error:
                # Ingestion leaves a damaged file alone, and tells of it.
                continue
        if found not in (0, BEFORE_THE_MARKER["prediction_log"]):
            raise _foreign(path, found)


STEPS: Sequence[Step] = (Step("home", 1, "the formats are written down", adopt),)


def upgrade(
    home: Home,
    *,
    log: Path | None,
    back_up: Callable[[], object] | None,
    say: Callable[[str], None],
    steps: Sequence[Step] = STEPS,
    formats: Mapping[str, int] = FORMATS,
) -> None:
    """Bring `home` to `formats`, and the databases of its libraries to their schemas.

    log: the directory of the prediction log. back_up: called once, before anything is changed.
    Raises UserError when the home is newer, used, or of a format no step leads on from.
    """
    if (home.root / RESTORING).exists():
        raise UserError(f"a restore of {home.root} was stopped in the middle; restore it first")
    marker = read_marker(home.root)
    if marker is None:
        raise UserError(f"there is nothing to upgrade in {home.root}; set CHURN_HOME")
    refuse_newer(home.root, marker, formats)
    if not is_older(marker, formats):
        say(f"{home.root} is up to date")
        return
    planned = _plan(marker, steps, formats)
    with unused(home, log):
        if back_up is not None:
            back_up()
        for step in planned:
            step.run(home)
            reached = marker.formats | {step.part: step.source + 1}
            marker = Marker(reached, marker.libraries)
            write_marker(home.root, marker)
            say(f"{step.part}: format {step.source + 1}, {step.title}")
        _upgrade_databases(home, say)
        write_marker(home.root, Marker(marker.formats, installed()))
    say(f"{home.root} is up to date")


def _plan(marker: Marker, steps: Sequence[Step], formats: Mapping[str, int]) -> list[Step]:
    """Every step there is to take, by part. Raises UserError when one is missing."""
    known = {(step.part, step.source): step for step in steps}
    planned = []
    for part, wanted in formats.items():
        for source in range(marker.formats.get(part, 1), wanted):
            if (part, source) not in known:
                raise UserError(
                    f"no step leads on from format {source} of {part}; upgrade with a version of "
                    "churn_assets between the two first (docs/upgrades.md)"
                )
            planned.append(known[part, source])
    return planned


def _upgrade_databases(home: Home, say: Callable[[str], None]) -> None:
    """By the commands of the libraries, which leave alone what is up to date."""
    uri = home.mlflow_uri
    stored = not uri.startswith("sqlite:") or Path(uri.partition(":///")[2]).exists()
    if uri.startswith(("http:", "https:")):
        say(f"mlflow: {without_password(uri)} is its server's to upgrade")
    elif stored:
        _run(home, "mlflow", "db", "upgrade", uri)
        say(f"mlflow: the schema of {installed()['mlflow']}")
    _run(home, "dagster", "instance", "migrate")
    say(f"dagster: the schema of {installed()['dagster']}")


def _run(home: Home, program: str, *arguments: str) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments],
        env=os.environ | home.environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = " ".join((done.stderr or done.stdout).split())[-500:]
        raise UserError(
            f"{program} could not bring its database to its schema ({last}); mend it and run "
            "`churn upgrade` again, or go back with `churn restore`"
        )


def _foreign(path: Path, found: int) -> UserError:
    return UserError(
        f"{path} has format {found}, and the home does not say by which version it was written; "
        "move it out of the home and run `churn upgrade` again"
    )
