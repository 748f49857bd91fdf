"""A home that was copied to another place, made to refer to itself.

Most of a home is found by where it lies. MLflow, though, keeps the whole path of every artifact,
and so do the records that say where a release, a bento or a page is.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from churn_assets.errors import UserError
from churn_assets.home import Home

_TEXTS = ("*.json", "*.jsonl", "MLmodel")
_COLUMN_TYPES = ("CHAR", "TEXT")


def relocate(home: Home, former: Path) -> int:
    """Let what `home` holds, a copy of the home at `former`, refer to `home`; how many places did.

    Feast's registry is written anew whenever it is used, and is left. Call it before anything else
    uses the copy; called again, it finds nothing. Raises UserError where MLflow's store is not the
    SQLite file of the home: what others use too is not this home's to change.
    """
    database = home.root / "mlflow.db"
    if home.mlflow_uri != f"sqlite:///{database}":
        raise UserError(
            "MLflow's store is not in the home, so its artifact paths are not changed; unset "
            "CHURN_MLFLOW_URI, or copy the artifacts to where the store says they are"
        )
    found = _in_database(database, str(former), str(home.root)) if database.exists() else 0
    # Of a path the end must be one: /data/home is not a part of /data/home-2.
    before, after = f"{former}/".encode(), f"{home.root}/".encode()
    for folder in (home.records, home.mlflow_artifacts, home.reports, home.root / "serving"):
        for pattern in _TEXTS:
            for path in folder.rglob(pattern):
                content = path.read_bytes()
                if before in content:
                    written = path.with_name(f".{path.name}.tmp")
                    written.write_bytes(content.replace(before, after))
                    written.replace(path)
                    found += 1
    return found


def _in_database(path: Path, before: str, after: str) -> int:
    """In every column of text, in one transaction."""
    changed = 0
    with closing(sqlite3.connect(path)) as connection, connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for (table,) in tables.fetchall():
            for _, column, kind, *_ in connection.execute(f'PRAGMA table_info("{table}")'):
                if any(word in kind.upper() for word in _COLUMN_TYPES):
                    changed += connection.execute(
                        f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) '
                        f'WHERE instr("{column}", ?)',
                        (f"{before}/", f"{after}/", f"{before}/"),
                    ).rowcount
    return changed
