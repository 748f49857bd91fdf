"""A Postgres database in a file and back, by Postgres' own programs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from churn_assets.contract.logged import one_line_without_password, without_password
from churn_assets.errors import UserError

# As SHOW server_version_num says it. It is set in the first lines of a script.
_TRANSACTION_TIMEOUT_SINCE = 170_000
_HEAD = 2048


def dump(url: str, to: Path, tables: str | None = None) -> None:
    """Write the database at `url` to `to`, in the custom format; all of it, as at one moment.

    tables: only those whose names match the pattern. Raises UserError.
    """
    some = ["--table", tables] if tables else []
    options = ("--no-owner", "--no-privileges", "--format=custom")
    _run("pg_dump", url, *options, "--file", str(to), *some)


def load(url: str, dumped: Path | None, tables: str | None = None) -> list[str]:
    """Put what was dumped in place of what the database has, all of it or nothing.

    tables: the pattern it was dumped with; others are left alone. dumped: None where there was
    nothing to dump. Returns the tables that were there, are not in the dump, and are gone. Raises
    UserError.
    """
    before = _tables(url, tables)
    # A table of a newer version may refer to one of the dump, which could not be replaced then.
    statements = [f"DROP TABLE {quoted} CASCADE" for quoted in before.values()]
    commands = [argument for one in statements for argument in ("--command", one)]
    quiet = ("--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", "--single-transaction")
    if dumped is None:
        if commands:
            _run("psql", url, *quiet, *commands)
        return list(before)
    script = dumped.with_name(f"{dumped.name}.sql")
    try:
        options = ("--no-owner", "--no-privileges", "--clean", "--if-exists")
        _run("pg_restore", None, *options, "--file", str(script), str(dumped))
        if int(_ask(url, "SHOW server_version_num")[0][0]) < _TRANSACTION_TIMEOUT_SINCE:
            _without_transaction_timeout(script)
        _run("psql", url, *quiet, *commands, "--file", str(script))
    finally:
        script.unlink(missing_ok=True)
    return [name for name in before if name not in _tables(url, tables)]


def _without_transaction_timeout(script: Path) -> None:
    """Take out of the head of a script what newer programs set and older servers do not know."""
    with script.open("r+b") as file:
        head = file.read(_HEAD)
        at = head.find(b"\nSET transaction_timeout = 0;\n")
        if at >= 0:
            file.seek(at + 1)
            file.write(b"-- ")


def count_tables(url: str, pattern: str | None = None) -> int:
    """How many tables there are, of names that match. Raises UserError."""
    return len(_tables(url, pattern))


def count_rows(url: str, pattern: str) -> int:
    """How many rows the tables have whose names match. Raises UserError."""
    return sum(
        _ask(url, f"SELECT count(*) FROM {quoted}")[0][0]
        for quoted in _tables(url, pattern).values()
    )


def _tables(url: str, pattern: str | None) -> dict[str, str]:
    """The tables of the database's own schema by name, each as a statement writes it.

    Those of an extension are its own.
    """
    like = "%" if pattern is None else pattern.replace("_", r"\_").replace("*", "%")
    found = _ask(
        url,
        "SELECT c.relname, format('%%I.%%I', n.nspname, c.relname) FROM pg_class c "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = current_schema() "
        "AND c.relkind IN ('r', 'p') AND c.relname LIKE %s AND NOT EXISTS "
        "(SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e') ORDER BY 1",
        like,
    )
    return dict(found)


def count_users(url: str, application: str = "%") -> int:
    """How many other connections the database has, of programs of this name. Raises UserError."""
    return _ask(
        url,
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid() AND backend_type = 'client backend' "
        "AND application_name LIKE %s",
        application,
    )[0][0]


def _ask(url: str, question: str, *values: str) -> list[tuple[Any, ...]]:
    import psycopg

    try:
        with psycopg.connect(_plain(url), connect_timeout=10) as connection:
            return connection.execute(question.encode(), values or None).fetchall()
    except psycopg.Error as error:
        raise UserError(
            f"the database {without_password(url)} cannot be used "
            f"({one_line_without_password(error, url)}); start it, or mend its URL"
        ) from None


def _run(program: str, url: str | None, *arguments: str) -> None:
    """Run a program on the database at `url`, or on files alone."""
    where: list[str] = []
    secret: dict[str, str] = {}
    if url is not None:
        from sqlalchemy.engine import make_url

        parts = make_url(_plain(url))
        # On a command line anybody on the machine would see the password.
        shown = parts._replace(password=None).render_as_string(hide_password=False)
        where = ["--dbname", shown]
        secret = {"PGPASSWORD": str(parts.password)} if parts.password else {}
    of = f" of {without_password(url)}" if url is not None else ""
    try:
        done = subprocess.run(
            [program, *where, *arguments], env=os.environ | secret, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no {program}, which the database{of} needs; install "
            "Postgres' client programs (on Debian: postgresql-client)"
        ) from None
    if done.returncode:
        raise UserError(
            f"{program}{of} failed and changed nothing: {' '.join(done.stderr.split())[:500]}"
        )


def _plain(url: str) -> str:
    """A URL as Postgres' own programs read it, which name no driver."""
    scheme, _, rest = url.partition("://")
    return f"{scheme.partition('+')[0]}://{rest}"
