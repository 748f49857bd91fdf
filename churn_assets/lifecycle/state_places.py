"""Where the state of an installation lies: in its home, and where settings put parts of it.

The order is that of a backup made while things run. What refers to something comes before what it
refers to: the pointer before the releases, Dagster's events before the records, the registry before
the artifacts, everything before the lake. Writers go the other way round, they point at a thing
when it is there, so whatever a copy refers to is found when its turn comes. The prediction log
comes before the lake, which its rows move to: a row that moves meanwhile is in both copies, where
the next ingestion sees that it is the same one, and never in none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from churn_assets.contract.logged import OFF, is_postgres, without_password
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.home_format import RESTORING
from churn_assets.settings import Settings

HOME = "home"
OUTSIDE = "outside"
POSTGRES = "postgres"

# With a colon: what settings or the environment put outside of the home.
_FIRST = ("serving/current.json", "alerts", "dagster")
_LAST = (
    *("mlflow.db", "mlflow:", "serving", "api_keys:", "bentoml", "mlartifacts"),
    *("feast", "feast:", "online_store:", "lake", "lake:"),
)
_LOG = "serving/log"
_PASSING = re.compile(
    r"^\.tmp-|^\..+(-\d+|\.tmp)$|^\.(restore|replaced|backup)-"
    r"|^(run|up|prepare|code-server)\.lock$|\.(db|sqlite)\.lock$|^\..+\.lock$|-(wal|shm|journal)$"
)
# Neither homes of drills nor measurements are state; the rest is of a process that runs.
_NOT_STATE = {"drill", "bench", "node", RESTORING}
_OF_A_PROCESS = {"dagster/workspace.yaml", "serving/service.json"}


@dataclass(frozen=True)
class Place:
    """A part of the state. under: the folder of the backup it goes to. path: where it lies, a file
    or a folder. url: of a Postgres database instead; tables: those that are the part, a pattern.
    """

    name: str
    under: str
    path: Path | None = None
    url: str | None = None
    tables: str | None = None


@dataclass(frozen=True)
class State:
    """All places of an installation, and what is kept elsewhere, with a sentence for a person."""

    places: tuple[Place, ...]
    elsewhere: Mapping[str, str]

    @property
    def outside(self) -> list[str]:
        """The folders and databases outside of the home, as a backup names them."""
        return sorted(place.under for place in self.places if not place.under.startswith(HOME))

    @property
    def log(self) -> Path | None:
        """The directory of the prediction log, where it is one outside of the home."""
        return next((p.path for p in self.places if p.name == "prediction_log"), None)


def state_of(home: Home, settings: Settings) -> State:
    """Where the state of `home` lies by `settings` and the environment. Raises UserError."""
    outer, elsewhere = _outer_places(home, settings)
    known = {name.partition("/")[0] for name in (*_FIRST, *_LAST)}
    rest = sorted(
        entry.name
        for entry in (home.root.iterdir() if home.root.is_dir() else ())
        if entry.name not in known | _NOT_STATE and not _passing(entry.name)
    )
    order = (*_FIRST, "dagster:", *rest, _LOG, "prediction_log:", *_LAST)
    places = (outer.get(n[:-1]) if n.endswith(":") else _inside(home, n) for n in order)
    return State(tuple(place for place in places if place is not None), elsewhere)


def _inside(home: Home, name: str) -> Place:
    return Place(name, f"{HOME}/{name}", home.root / name)


def _outer_places(home: Home, settings: Settings) -> tuple[dict[str, Place], dict[str, str]]:
    places: dict[str, Place] = {}
    elsewhere: dict[str, str] = {}

    def add(name: str, location: str, kept: str) -> None:
        if is_postgres(location) or location.startswith("postgresql+"):
            tables = "churn_prediction_log_v*" if name == "prediction_log" else None
            places[name] = Place(name, f"{POSTGRES}/{name}", url=location, tables=tables)
        elif location.startswith("sqlite:"):
            add(name, location.split(":///", 1)[-1], kept)
        elif "://" in location:
            elsewhere[name] = f"{without_password(location)}: {kept}"
        elif not (path := Path(location).absolute()).is_relative_to(home.root):
            places[name] = Place(name, f"{OUTSIDE}/{name}", path)

    copied = home.dagster / "dagster.yaml"
    # A home that is brought back to another machine is not there yet.
    if url := _dagster_url(copied if copied.exists() else home.dagster_yaml):
        add("dagster", url, "")
    log = settings.serving.prediction_log.location(home.prediction_log)
    if log != OFF:
        add("prediction_log", log, "kept by its server")
    add("mlflow", home.mlflow_uri, "kept by that server; back it up there, with its artifacts")
    add("feast", settings.feast.registry or str(home.feast_registry), "kept by its server")
    add(
        "online_store",
        settings.online_store.url or str(home.online_store),
        "not copied; after a restore, materialize online_features (`make run` does)",
    )
    add("api_keys", str(home.api_keys), "")
    add(
        "lake",
        settings.lake or str(home.lake),
        "not copied; switch on the versioning of the bucket, and bring it back to this time",
    )
    return places, elsewhere


def _dagster_url(configuration: Path) -> str | None:
    """The Postgres database of Dagster's storage, where `dagster.yaml` names one."""
    try:
        document = yaml.safe_load(configuration.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return None
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{configuration} cannot be read ({error}); mend it first") from None
    found = (document.get("storage") or {}).get("postgres")
    if not found:
        return None
    if "postgres_url" in found:
        return _value(found["postgres_url"])
    from sqlalchemy.engine import URL

    parts = {key: _value(value) for key, value in found["postgres_db"].items() if key != "params"}
    return URL.create(
        "postgresql",
        parts.get("username"),
        parts.get("password"),
        parts.get("hostname"),
        int(parts.get("port") or 5432),
        parts.get("db_name"),
    ).render_as_string(hide_password=False)


def _value(value: Any) -> str:
    """A value of dagster.yaml, which may name a variable: `{env: NAME}`."""
    if not isinstance(value, dict):
        return str(value)
    name = str(value.get("env"))
    if name not in os.environ:
        raise UserError(f"dagster.yaml takes {name} from the environment; set it")
    return os.environ[name]


def files_of(place: Place) -> Iterator[tuple[str, Path]]:
    """The files of a place as they are now, each with its name in a backup."""
    path = place.path
    assert path is not None, "a database has no files"
    if path.is_file():
        if not _passing(path.name):
            yield place.under, path
        return
    for folder, folders, names in os.walk(path, followlinks=True):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not _passing(name))
        for name in sorted(names):
            found = here / name
            under = f"{place.under}/{found.relative_to(path).as_posix()}"
            if not _passing(name) and under.removeprefix(f"{HOME}/") not in _OF_A_PROCESS:
                yield under, found


def _passing(name: str) -> bool:
    """Whether a file or folder of this name is a lock, half written, or a part of a database."""
    return bool(_PASSING.search(name))
