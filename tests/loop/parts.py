"""The parts a team already has, as servers: Postgres, Redis, an S3 endpoint, MLflow with a login.

Postgres and Redis are those of CHURN_TEST_POSTGRES and CHURN_TEST_REDIS; on them, a database each,
with a user and a password of its own. What is made here is gone at the end.
"""

from __future__ import annotations

import configparser
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import pytest
import yaml

from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.experiments import EXPERIMENT
from churn_assets.lifecycle.serving import HOST, free_port

COMPOSE = PROJECT_ROOT / "deploy" / "compose"
LAKE, ARTIFACTS = "lake", "mlflow"
# Of MLflow, for the project.
USER = "churn"
ROLES = ("dagster", "mlflow", "churn")
# Of a loaded machine; nothing here is timed.
PATIENCE_S = 900


@dataclass(frozen=True)
class Parts:
    """Where everything is. `environment` is what a team sets, `databases` the real names by role.

    secrets: every password and key, none of which may be found in what a run leaves. admin: the
    password of MLflow's administrator, which no run has.
    """

    environment: dict[str, str]
    settings: dict[str, Any]
    databases: dict[str, str]
    secrets: tuple[str, ...]
    postgres: str
    redis: str
    s3: str
    mlflow: str
    admin: str

    def query(self, role: str, statement: str) -> list[tuple[Any, ...]]:
        """The rows of a query of the database of `role`, asked as that role."""
        import psycopg

        name = self.databases[role]
        with psycopg.connect(self.postgres, user=name, dbname=name) as connection:
            return connection.execute(statement.encode()).fetchall()


def needed(variable: str, what: str) -> str:
    """The URL a variable names, or a skip that says what it should be."""
    url = os.environ.get(variable)
    if not url:
        pytest.skip(f"set {variable} to the URL of {what} to run this")
    return url


@contextmanager
def all_parts(folder: Path) -> Generator[Parts]:
    """Every part, started and empty. Skips where one cannot be had."""
    postgres = needed("CHURN_TEST_POSTGRES", "a Postgres server on which databases may be made")
    redis = needed("CHURN_TEST_REDIS", "a Redis server on which a user may be made")
    for module in ("dagster_postgres", "flask_wtf"):
        pytest.importorskip(module, reason=f"there is no {module}; it is of the extra `platform`")
    with ExitStack() as stack:
        passwords = {role: secrets.token_hex(16) for role in ROLES}
        names = stack.enter_context(databases(postgres, passwords))
        redis_password = secrets.token_hex(16)
        redis_url = stack.enter_context(redis_database(redis, redis_password))
        key = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": "s" + "3" * 31}
        s3 = stack.enter_context(s3_endpoint(key))
        admin, ordinary = secrets.token_hex(16), secrets.token_hex(16)
        store = database_url(postgres, names["mlflow"], passwords["mlflow"])
        mlflow = stack.enter_context(mlflow_server(folder, store, admin, s3, key))
        told = make_user(mlflow, admin, ordinary, EXPERIMENT, "churn")
        assert told == f"made the user {USER}\n"
        server = conninfo(postgres)
        yield Parts(
            environment={
                **key,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "CHURN_DAGSTER_YAML": str(dagster_yaml(folder, names["dagster"], server["port"])),
                "CHURN_POSTGRES_HOST": server["host"],
                "DAGSTER_DB_PASSWORD": passwords["dagster"],
                "CHURN_DB_PASSWORD": passwords["churn"],
                "REDIS_PASSWORD": redis_password,
                "CHURN_MLFLOW_URI": mlflow,
                "MLFLOW_TRACKING_USERNAME": USER,
                "MLFLOW_TRACKING_PASSWORD": ordinary,
            },
            settings={
                "lake": f"s3://{LAKE}",
                "lake_endpoint_url": s3,
                "online_store": {
                    "kind": "redis",
                    "url": redis_url.replace(redis_password, "${REDIS_PASSWORD}"),
                },
                "feast": {
                    "registry": database_url(postgres, names["churn"], "${CHURN_DB_PASSWORD}")
                },
                "serving": {
                    "prediction_log": {
                        "store": database_url(
                            postgres, names["churn"], "${CHURN_DB_PASSWORD}", "postgresql"
                        )
                    }
                },
            },
            databases=names,
            secrets=(*passwords.values(), redis_password, admin, ordinary, *key.values()),
            postgres=postgres,
            redis=redis_url,
            s3=s3,
            mlflow=mlflow,
            admin=admin,
        )


def conninfo(url: str) -> dict[str, str]:
    """Host and port of a server."""
    from psycopg.conninfo import conninfo_to_dict

    found = conninfo_to_dict(url)
    return {"host": str(found.get("host") or HOST), "port": str(found.get("port") or 5432)}


def database_url(server: str, name: str, password: str, scheme: str = "postgresql+psycopg") -> str:
    """The URL of database `name` for the role of that name."""
    where = conninfo(server)
    return f"{scheme}://{name}:{password}@{where['host']}:{where['port']}/{name}"


@contextmanager
def databases(server: str, passwords: Mapping[str, str]) -> Generator[dict[str, str]]:
    """A database for each role, which nobody else may connect to; their names by role."""
    import psycopg
    from psycopg import sql

    suffix = secrets.token_hex(4)
    names = {role: f"parts_{role}_{suffix}" for role in passwords}

    def run(
        connection: psycopg.Connection, statement: LiteralString, name: str, *more: Any
    ) -> None:
        connection.execute(sql.SQL(statement).format(sql.Identifier(name), *more))

    try:
        with psycopg.connect(server, autocommit=True) as connection:
            for role, name in names.items():
                word = sql.Literal(passwords[role])
                run(connection, "CREATE ROLE {0} LOGIN PASSWORD {1}", name, word)
                run(connection, "CREATE DATABASE {0} OWNER {0}", name)
                run(connection, "REVOKE ALL ON DATABASE {0} FROM PUBLIC", name)
        yield names
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            for name in names.values():
                run(connection, "DROP DATABASE IF EXISTS {0} WITH (FORCE)", name)
                run(connection, "DROP ROLE IF EXISTS {0}", name)


@contextmanager
def redis_database(server: str, password: str) -> Generator[str]:
    """The URL of an empty database for a user of our own."""
    from redis import Redis

    name = f"churn_{secrets.token_hex(4)}"
    with Redis.from_url(server) as admin:
        used = {int(key.removeprefix("db")) for key in admin.info("keyspace")}
        free = sorted(set(range(16)) - used)
        if not free:
            pytest.skip("every database of the Redis server is in use")
        admin.acl_setuser(
            name, enabled=True, passwords=[f"+{password}"], keys=["*"], categories=["+@all"]
        )
        settings = admin.connection_pool.connection_kwargs
        where = f"{settings.get('host') or HOST}:{settings.get('port') or 6379}"
        url = f"redis://{name}:{password}@{where}/{free[-1]}"
        try:
            yield url
        finally:
            with Redis.from_url(url) as ours:
                ours.flushdb()
            admin.acl_deluser(name)


@contextmanager
def s3_endpoint(key: Mapping[str, str]) -> Generator[str]:
    """An S3 protocol over loopback, with the buckets of the lake and of MLflow's artifacts."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(HOST, 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=key["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=key["AWS_SECRET_ACCESS_KEY"],
    )
    for bucket in (LAKE, ARTIFACTS):
        client.create_bucket(Bucket=bucket)
    client.close()
    try:
        yield url
    finally:
        server.stop()


@contextmanager
def mlflow_server(
    folder: Path, store: str, password: str, s3: str, key: Mapping[str, str]
) -> Generator[str]:
    """`mlflow server` with a login, its store on Postgres and its artifacts on S3; its URL."""
    login = configparser.ConfigParser()
    login.read(COMPOSE / "mlflow-auth.ini")
    login["mlflow"]["database_uri"] = store.replace("%", "%%")
    with (folder / "mlflow-auth.ini").open("w", encoding="utf-8") as file:
        login.write(file)
    url = f"http://{HOST}:{(port := free_port())}"
    more = {
        **key,
        "MLFLOW_BACKEND_STORE_URI": store,
        "MLFLOW_S3_ENDPOINT_URL": s3,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "mlflow-auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    log = folder / "mlflow.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("mlflow")), "server", "--workers", "1"),
                *("--host", HOST, "--port", str(port), "--app-name", "basic-auth"),
                *("--artifacts-destination", f"s3://{ARTIFACTS}"),
            ],
            cwd=folder,
            env=os.environ | more,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(0.2)
        else:
            pytest.fail(log.read_text(errors="replace"))
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(PATIENCE_S)


def make_user(url: str, admin: str, password: str, experiment: str, model: str) -> str:
    """The project's own user of the server, as the platform makes it; what it says."""
    command = [sys.executable, COMPOSE / "mlflow_user.py", url, USER, experiment, model]
    login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": admin}
    environment = os.environ | login | {"MLFLOW_USER_PASSWORD": password}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def dagster_yaml(folder: Path, name: str, port: str) -> Path:
    """The platform's own, for database `name` of role `name` and the port of this server."""
    document = yaml.safe_load((COMPOSE / "dagster.yaml").read_text())
    document["storage"]["postgres"]["postgres_db"] |= {
        "port": int(port),
        "db_name": name,
        "username": name,
    }
    path = folder / "dagster.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path
