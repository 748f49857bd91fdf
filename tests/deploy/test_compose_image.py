"""The project's image, built and run by a real engine as deploy/compose starts it.

The engine of a test may have no bridge and no registry: the containers share the machine's network,
each on ports of its own; the test's Postgres, Redis and a stand-in for the object store are theirs.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_cases import COMPOSE, own_databases
from engine_cases import BASE, TOLD_TO_THE_BUILD, docker, inspected, quiet_port
from serving_cases import VALID

from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.container import package_index
from churn_assets.lifecycle.serving import HOST

pytestmark = [pytest.mark.platform, pytest.mark.timeout(1700)]

DOCUMENT: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
IMAGE = "churn-assets:0.1.0"
ONE_OF_OURS = "churn-assets-test"
PATIENCE_S = 300
# Where each listens in its own container, if it does; here they share one machine.
PORTS = {
    "mlflow": 5000,
    "code": 4000,
    "webserver": 3000,
    "daemon": 0,
    "service": 3000,
    "reports": 3002,
}


@pytest.fixture(scope="module")
def project_image(network: str | None) -> str:
    """The image of the Dockerfile and the lock, built on the base image the engine has."""
    if "dagster-postgres==" not in (PROJECT_ROOT / "requirements.lock").read_text():
        pytest.skip("requirements.lock is without the extra `platform`; make lock")
    configured = subprocess.run(["pip", "config", "list"], capture_output=True, text=True).stdout
    options = dict(re.findall(r"^\w+\.([\w-]+)='(.*)'$", configured, re.MULTILINE))
    told = package_index(os.environ, options)
    # Of a host nobody asks; like the rest, it may leave no trace.
    told.setdefault("PIP_TRUSTED_HOST", TOLD_TO_THE_BUILD)
    command = ["docker", "build", "--file", "deploy/compose/Dockerfile", "--tag", ONE_OF_OURS]
    command += ["--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", "COMMIT=c0ffee"]
    command += ["--network", network] if network else []
    for name in told:
        command += ["--build-arg", name]
    done = subprocess.run(
        [*command, "."], cwd=PROJECT_ROOT, env=os.environ | told, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return ONE_OF_OURS


def run_in(image: str, script: str) -> str:
    return docker("run", "--rm", "--network", "none", image, "sh", "-c", script)


def test_it_is_nobodys_and_holds_no_secret_and_no_tool(project_image: str) -> None:
    assert inspected(project_image)["Config"]["User"] == "1034:1034"
    assert run_in(project_image, "id -u").strip() == "1034"
    # The home is the one place it could write to.
    writable = "find / -xdev -writable -type d -not -path '/proc/*' 2>/dev/null || true"
    places = set(run_in(project_image, writable).split())
    assert {p for p in places if not p.startswith(("/tmp", "/var/tmp", "/dev", "/run"))} == {
        "/var/lib/churn"
    }
    assert run_in(project_image, "find / -xdev -name '.env*' -not -path '/proc/*' || true") == ""
    absent = "import importlib.util as u; print([n for n in ('pytest', 'moto') if u.find_spec(n)])"
    assert run_in(project_image, f'python -c "{absent}"') == "[]\n"
    told = docker("history", "--no-trunc", project_image) + json.dumps(inspected(project_image))
    assert TOLD_TO_THE_BUILD not in told
    assert "PIP_INDEX" not in told
    assert run_in(project_image, "churn --help | head -1").startswith("Usage: ")


@dataclass
class Platform:
    """Containers started from compose.yaml."""

    image: str
    name: str
    network: str | None
    folder: Path
    variables: dict[str, str]
    names: dict[str, str]
    ports: dict[str, int] = field(default_factory=dict)

    def here(self, text: str) -> str:
        """A text of the configuration, for containers that share one machine."""
        for service, port in self.ports.items():
            text = re.sub(rf"\b{service}:\d{{4}}\b", f"{HOST}:{port}", text)
        for user, own in self.names.items():
            text = text.replace(f"//{user}@", f"//{own}@").replace(f"//{user}:", f"//{own}:")
            text = re.sub(rf"(:\d+)/{user}$", rf"\1/{own}", text, flags=re.MULTILINE)
        return text

    def value(self, text: str) -> str:
        """With the variables compose would fill in."""

        def fill(found: re.Match[str]) -> str:
            return self.variables.get(found[1]) or found[3] or ""

        return re.sub(r"(?<!\$)\$\{(\w+)(?::([-?])([^}]*))?\}", fill, text).replace("$$", "$")

    def file(self, name: str) -> Path:
        """A file of deploy/compose as it is here."""
        path = self.folder / name
        text = self.here((COMPOSE / name).read_text())
        if name == "dagster.yaml":
            document = yaml.safe_load(text)
            database = document["storage"]["postgres"]["postgres_db"]
            database |= {"db_name": self.names["dagster"], "username": self.names["dagster"]}
            database["port"] = self.ports["postgres"]
            text = yaml.safe_dump(document)
        if name == "churn.yaml":
            document = yaml.safe_load(text)
            document["source"]["shop"]["customers"] = 1500
            document["calendar"]["days"] = 220
            document |= {"data_gate": {"min_rows": 5000}}
            document |= {"quality_gates": {"p95_latency_ms": 5000}}
            text = yaml.safe_dump(document)
        path.write_text(text.replace("port: 4000", f"port: {self.ports['code']}"))
        path.chmod(0o644)
        return path

    def start(self, service: str) -> None:
        """As compose does, with what `here` changes; returns at once."""
        own, port = str(PORTS[service]), str(self.ports[service])
        command = [re.sub(rf"(^|=){own}$", rf"\g<1>{port}", w) for w in self.command(service)]
        options = ["-d", "--name", f"{self.name}-{service}", *self.options(service)]
        docker("run", *options, self.image, *command)

    def once(self, service: str, *command: str, image: str | None = None) -> str:
        """What a service that ends says, as `docker compose run --rm` starts it."""
        options = self.options(service)
        given = command or self.command(service)
        return docker("run", "--rm", *options, image or self.image, *given)

    def stop(self, *services: str) -> None:
        for service in services:
            docker("rm", "--force", f"{self.name}-{service}")

    def command(self, service: str) -> list[str]:
        return [self.here(self.value(word)) for word in DOCUMENT["services"][service]["command"]]

    def options(self, service: str) -> list[str]:
        """The service's options, as `docker run` takes them."""
        of = DOCUMENT["services"][service]
        options = ["--read-only", "--user", of["user"], "--memory", of["mem_limit"]]
        options += ["--pids-limit", str(of["pids_limit"]), "--network", "host"]
        options += [x for path in of["tmpfs"] for x in ("--tmpfs", path)]
        options += [x for each in of["cap_drop"] for x in ("--cap-drop", each)]
        options += [x for each in of.get("cap_add", ()) for x in ("--cap-add", each)]
        options += [x for each in of["security_opt"] for x in ("--security-opt", each)]
        for key, text in of.get("environment", {}).items():
            given = self.here(self.value(str(text)))
            if key in ("CHURN_POSTGRES_HOST", "CHURN_CODE_HOST"):
                given = HOST
            options += ["--env", f"{key}={given}"]
        for volume in map(self.value, of.get("volumes", ())):
            if not volume.startswith("."):
                options += ["--volume", f"{self.name}-{volume}"]
        for name in ("churn.yaml", "workspace.yaml", "mlflow-auth.ini", "dagster.yaml"):
            inside = "/app" if name == "dagster.yaml" else "/app/deploy/compose"
            options += ["--volume", f"{self.folder / name}:{inside}/{name}:ro"]
        return options

    def healthy(self, service: str) -> None:
        """Wait until the healthcheck of the file says so."""
        of = DOCUMENT["services"][service]
        own, port = str(PORTS[service]), str(self.ports[service])
        check = [re.sub(rf"(:|^){own}\b", rf"\g<1>{port}", w) for w in of["healthcheck"]["test"]]
        container, deadline = f"{self.name}-{service}", time.monotonic() + PATIENCE_S
        command = ["docker", "exec", container, *check[1:]]
        while (done := subprocess.run(command, capture_output=True, text=True)).returncode:
            running = inspected(container)["State"]["Running"]
            said = docker("logs", "--tail", "60", container, check=False)
            assert running, said
            assert time.monotonic() < deadline, done.stdout + done.stderr + said
            time.sleep(1)

    def run(self, *command: str) -> str:
        """What a command says in the code location's container."""
        try:
            return docker("exec", f"{self.name}-code", *command)
        except AssertionError as error:
            # Whatever failed, it may be the service that says why.
            said = docker("logs", "--tail", "80", f"{self.name}-service", check=False)
            raise AssertionError(f"{error}\n{said}") from error

    def ask(
        self, service: str, path: str, body: dict | None = None, authorization: str = ""
    ) -> Any:
        request = urllib.request.Request(f"http://{HOST}:{self.ports[service]}{path}")
        request.add_header("content-type", "application/json")
        if authorization:
            request.add_header("authorization", authorization)
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(request, data, timeout=60) as response:
            return json.loads(response.read())


@pytest.fixture(scope="module")
def platform(
    project_image: str, network: str | None, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Platform]:
    from moto.server import ThreadedMotoServer
    from psycopg.conninfo import conninfo_to_dict

    redis_url = os.environ.get("CHURN_TEST_REDIS")
    if not redis_url:
        pytest.skip("set CHURN_TEST_REDIS to the URL of a Redis database to run this")
    name = f"churn-test-{os.urandom(4).hex()}"
    folder = tmp_path_factory.mktemp("compose")
    folder.parent.chmod(0o755)
    folder.chmod(0o755)
    with own_databases() as (names, passwords):
        server = conninfo_to_dict(os.environ["CHURN_TEST_POSTGRES"])
        of = Platform(project_image, name, network, folder, dict(passwords), names)
        for each in re.findall(r"\$\{(\w+):\?", (COMPOSE / "compose.yaml").read_text()):
            of.variables.setdefault(each, f"test-{os.urandom(8).hex()}")
        of.ports = {service: quiet_port() for service in PORTS}
        of.ports |= {"postgres": int(server.get("port") or 5432), "s3": quiet_port()}
        of.variables["MLFLOW_HOSTS"] = f"{HOST}:{of.ports['mlflow']}"
        for file in ("workspace.yaml", "mlflow-auth.ini", "dagster.yaml", "churn.yaml"):
            of.file(file)
        # The test's Redis has no password.
        settings = yaml.safe_load((folder / "churn.yaml").read_text())
        settings["online_store"]["url"] = redis_url
        (folder / "churn.yaml").write_text(yaml.safe_dump(settings))
        store = ThreadedMotoServer(HOST, of.ports["s3"], verbose=False)
        store.start()
        try:
            yield of
        finally:
            for left in docker("ps", "-aq", "--filter", f"name={name}").split():
                docker("rm", "--force", left)
            volumes = docker("volume", "ls", "--quiet", "--filter", f"name={name}").split()
            docker("volume", "rm", "--force", *volumes, check=False)
            store.stop()


@pytest.fixture(scope="module")
def running(platform: Platform) -> Platform:
    """With every service of the image healthy."""
    platform.once("volumes")
    said = platform.once("buckets")
    assert said.splitlines() == ["made the bucket lake", "made the bucket mlflow"]
    for service in PORTS:
        platform.start(service)
        platform.healthy(service)
        if service == "mlflow":
            said = platform.once("mlflow-user")
            assert said.splitlines()[-1] == "made the user churn"
    return platform


def test_the_platform_comes_up(running: Platform) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        running.ask("mlflow", "/api/2.0/mlflow/experiments/search?max_results=1")
    query = "{ workspaceOrError { ... on Workspace { locationEntries { name loadStatus } } } }"
    found = running.ask("webserver", "/graphql", {"query": query})
    assert found["data"]["workspaceOrError"]["locationEntries"] == [
        {"name": "churn_assets", "loadStatus": "LOADED"}
    ]


def test_the_platform_trains_and_serves(running: Platform) -> None:
    import psycopg

    key = running.run("churn", "keys", "add", "test").split()[-1]
    # The whole graph: the lake and MLflow's artifacts in the store, features in Redis.
    print(running.run("churn", "run"))
    admin = f"admin:{running.variables['MLFLOW_ADMIN_PASSWORD']}".encode()
    login = "Basic " + base64.b64encode(admin).decode()
    path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=customer-churn"
    experiment = running.ask("mlflow", path, authorization=login)["experiment"]
    assert experiment["artifact_location"].startswith("mlflow-artifacts:")
    running.healthy("service")
    assert running.ask("service", "/health")["version"] == "1"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        running.ask("service", "/predict", VALID)
    answer = running.ask("service", "/predict", VALID, authorization=f"Bearer {key}")
    assert answer["model_version"] == "1"
    own = running.names["churn"]
    with psycopg.connect(os.environ["CHURN_TEST_POSTGRES"], user=own, dbname=own) as connection:
        logged = connection.execute("SELECT count(*) FROM churn_prediction_log_v1").fetchone()
    assert logged == (1,)


@pytest.fixture(scope="module")
def backup_image(platform: Platform, network: str | None, tmp_path_factory) -> str:
    """The image of backup.Dockerfile, on the engine's base with this machine's package sources."""
    folder = tmp_path_factory.mktemp("base")
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    if not sources.exists():
        pytest.skip(f"there is no {sources} to build with")
    shutil.copy(sources, folder)
    (folder / "Dockerfile").write_text(
        f"FROM {BASE}\nCOPY debian.sources /etc/apt/sources.list.d/\n", encoding="utf-8"
    )
    build = ["docker", "build", *(["--network", network] if network else [])]
    base, image = f"{ONE_OF_OURS}-base", f"{ONE_OF_OURS}-backup"
    file = COMPOSE / "backup.Dockerfile"
    for command in (
        [*build, "--tag", base, str(folder)],
        [
            *(*build, "--tag", image, "--file", str(file)),
            *(
                "--build-arg",
                f"PROJECT_IMAGE={platform.image}",
                "--build-arg",
                f"BASE_IMAGE={base}",
            ),
            *("--build-arg", f"POSTGRES={server_version()}", str(PROJECT_ROOT)),
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return image


def server_version() -> int:
    import psycopg

    with psycopg.connect(os.environ["CHURN_TEST_POSTGRES"]) as connection:
        return connection.info.server_version // 10_000


def test_everything_comes_back_from_a_backup(running: Platform, backup_image: str) -> None:
    """After the home is gone and the databases have gone on, as docs/compose.md has it."""
    assert inspected(backup_image)["Config"]["User"] == "1034:1034"
    history = running.run("churn", "history")
    assert history.strip()
    print(running.once("backup", "backup", "/backups/b.tar", image=backup_image))
    running.run("churn", "train", "--reason", "after the backup")
    assert running.run("churn", "history") != history

    running.stop("code", "webserver", "daemon", "service", "reports", "mlflow")
    docker("volume", "rm", f"{running.name}-home")
    print(running.once("backup", "restore", "/backups/b.tar", "--replace", image=backup_image))
    for service in PORTS:
        running.start(service)
        running.healthy(service)
    assert running.run("churn", "history") == history
    assert running.ask("service", "/health")["version"] == "1"
