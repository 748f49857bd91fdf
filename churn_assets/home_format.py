"""Which formats a home has: written in the home, and checked by everything that uses it.

The file `home.json` names the format of the home, of its lake, of its prediction log and of its
releases, and the versions of the libraries whose databases it holds. Homes from before there was
such a file have format 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import msgspec

from churn_assets.contract import logged, release
from churn_assets.errors import UserError

MARKER = "home.json"
# There while a restore puts the parts of a home in place.
RESTORING = "restoring.json"

# What this code writes and reads. Another layout of one of them needs a higher number here, and a
# step in lifecycle/upgrade.py that leads to it.
FORMATS: Mapping[str, int] = {
    "home": 2,
    "lake": 1,
    "prediction_log": logged.FORMAT,
    "releases": release.FORMAT,
}
BEFORE_THE_MARKER: Mapping[str, int] = {
    "home": 1,
    "lake": 1,
    "prediction_log": 1,
    "releases": 1,
}
# They change the schema of their databases from one minor version to the next.
LIBRARIES = ("dagster", "mlflow")


class Marker(msgspec.Struct, frozen=True):
    """What a home says of itself. libraries: major and minor version, by name."""

    formats: dict[str, int]
    libraries: dict[str, str]


def current_marker() -> Marker:
    """That of a home which this code made."""
    return Marker(dict(FORMATS), installed())


def installed() -> dict[str, str]:
    """The major and minor version of the libraries of this environment."""
    return {name: ".".join(version(name).split(".")[:2]) for name in LIBRARIES}


def read_marker(root: Path) -> Marker | None:
    """What the home at `root` says, None where there is no home yet. Raises UserError."""
    path = root / MARKER
    try:
        return msgspec.json.decode(path.read_bytes(), type=Marker)
    except (FileNotFoundError, NotADirectoryError):
        # A file in the place of a home is told when it is to be made. Whatever used a home has
        # handed Dagster its configuration first.
        made = (root / "dagster" / "dagster.yaml").exists()
        return Marker(dict(BEFORE_THE_MARKER), {}) if made else None
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(
            f"{path} does not say which format this home has ({error}); bring the home back with "
            "`churn restore`"
        ) from None


def write_marker(root: Path, marker: Marker) -> None:
    """Replace the marker in one step. Raises OSError."""
    written = root / f".{MARKER}-{os.getpid()}"
    written.write_bytes(msgspec.json.format(msgspec.json.encode(marker)) + b"\n")
    written.replace(root / MARKER)


def refuse_newer(root: Path, marker: Marker, formats: Mapping[str, int] = FORMATS) -> None:
    """Raise UserError for what a newer version of the code, or of a library, has written."""
    for name, found in marker.formats.items():
        known = formats.get(name)
        if known is None or found > known:
            raise UserError(
                f"{root} was written by a newer version of churn_assets ({name} has format {found},"
                f" this code knows {known or 'none'}); upgrade the code, or set CHURN_HOME to "
                "another folder"
            )
    for name, here in installed().items():
        found = marker.libraries.get(name)
        if found is not None and _number(found) > _number(here):
            raise UserError(
                f"{root} was written with {name} {found} and this environment has {here}; "
                "install what requirements.lock of that version names (`make env`)"
            )


def is_older(marker: Marker, formats: Mapping[str, int] = FORMATS) -> bool:
    """Whether `churn upgrade` has something to do."""
    return (
        any(marker.formats.get(name, 0) < known for name, known in formats.items())
        or marker.libraries != installed()
    )


def check(root: Path) -> Marker | None:
    """What the home at `root` says, None where there is none yet.

    Raises UserError unless this code and its libraries may use it as it is.
    """
    if (root / RESTORING).exists():
        raise UserError(
            f"a restore of {root} was stopped in the middle; run it again: "
            "churn restore BACKUP --replace"
        )
    marker = read_marker(root)
    if marker is not None:
        refuse_newer(root, marker)
        if is_older(marker):
            raise UserError(
                f"{root} was written by an older version; stop what uses it and run "
                "`churn upgrade`, which makes a backup first"
            )
    return marker


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())
