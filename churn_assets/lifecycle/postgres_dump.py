"""A Postgres database in a file and back, by Postgres' own programs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from churn_assets.contract.logged import one_line_without_password, without_password
from churn_assets.errors import UserError


def dump(url: str, to: Path, tables: str | None = None) -> None:
    """Write the database at `url` to `to`, in the custom format; all of it, as at one moment.

    tables: only those whose names match the pattern. Raises UserError.
    """
    some = ["--table", tables] if tables else []
    _run("pg_dump", url, "--format=custom", "--file", str(to), *some)


def load(url: str, dumped: Path) -> None:
    """Put the tables of a dump in place of those of their names, all or none. Raises UserError."""
    options = ("--clean", "--if-exists", "--single-transaction", "--exit-on-error")
    _run("pg_restore", url, *options, str(dumped))


def count_tables(url: str, pattern: str | None = None) -> int:
    """How many tables there are, of names that match. Raises UserError."""
    like = "%" if pattern is None else pattern.replace("_", r"\_").replace("*", "%")
    return _ask(
        url,
        "SELECT count(*) FROM pg_tables WHERE schemaname = current_schema() AND tablename LIKE %s",
        like,
    )


def count_users(url: str) -> int:
    """How many other connections the database has. Raises UserError."""
    return _ask(
        url,
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND backend_type = %s",
        "client backend",
    )


def _ask(url: str, question: str, value: str) -> int:
    import psycopg

    try:
        with psycopg.connect(_plain(url), connect_timeout=10) as connection:
            found = connection.execute(question.encode(), (value,)).fetchone()
    except psycopg.Error as error:
        raise UserError(
            f"the database {without_password(url)} cannot be used "
            f"({one_line_without_password(error, url)}); start it, or mend its URL"
        ) from None
    assert found is not None, "a count has a row"
    return found[0]


def _run(program: str, url: str, *arguments: str) -> None:
    from sqlalchemy.engine import make_url

    parts = make_url(_plain(url))
    # On a command line anybody on the machine would see the password.
    shown = parts._replace(password=None).render_as_string(hide_password=False)
    secret = {"PGPASSWORD": str(parts.password)} if parts.password else {}
    command = [program, "--no-owner", "--no-privileges", "--dbname", shown, *arguments]
    try:
        done = subprocess.run(command, env=os.environ | secret, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"there is no {program}, which the database {without_password(url)} needs; install "
            "Postgres' client programs (on Debian: postgresql-client)"
        ) from None
    if done.returncode:
        raise UserError(
            f"{program} of {without_password(url)} failed and changed nothing: "
            f"{' '.join(done.stderr.split())[:500]}"
        )


def _plain(url: str) -> str:
    """A URL as Postgres' own programs read it, which name no driver."""
    scheme, _, rest = url.partition("://")
    return f"{scheme.partition('+')[0]}://{rest}"
