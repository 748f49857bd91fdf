"""What the tests of deploy/compose share."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from churn_assets.home import PROJECT_ROOT

COMPOSE = PROJECT_ROOT / "deploy" / "compose"

_spec = importlib.util.spec_from_file_location("make_secrets", COMPOSE / "make_secrets.py")
assert _spec is not None
assert _spec.loader is not None
make_secrets = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_secrets)


def postgres_url() -> str:
    """The server the tests may make databases on, or a skip."""
    url = os.environ.get("CHURN_TEST_POSTGRES")
    if not url:
        pytest.skip("set CHURN_TEST_POSTGRES to the URL of a database to run this")
    return url


@contextmanager
def own_databases() -> Generator[tuple[dict[str, str], dict[str, str]]]:
    """The databases as the script makes them, on the test server under names of their own.

    Yields those names, and the passwords as compose would give them.
    """
    import psycopg
    from psycopg import sql

    server, psql = postgres_url(), shutil.which("psql")
    if psql is None:
        pytest.skip("there is no psql; on Debian: apt-get install postgresql-client")
    suffix = secrets.token_hex(4)
    script = (COMPOSE / "databases.sql").read_text()
    names = {name: f"{name}_{suffix}" for name in ("dagster", "mlflow", "churn")}
    for name, own in names.items():
        script = re.sub(rf"\b{name}\b(?=[ ,;])", own, script)
    passwords = {f"{name.upper()}_DB_PASSWORD": secrets.token_urlsafe(16) for name in names}
    done = subprocess.run(
        [psql, server, "--no-psqlrc", "--quiet", "--file", "-"],
        input=script,
        env=os.environ | passwords,
        capture_output=True,
        text=True,
    )
    try:
        assert (done.returncode, done.stderr) == (0, "")
        yield names, passwords
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            for own in map(sql.Identifier, names.values()):
                connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(own))
                connection.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(own))
