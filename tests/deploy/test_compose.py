"""The platform of deploy/compose, without an engine: what its files say, and that they fit."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_cases import COMPOSE, make_secrets, own_databases, postgres_url

from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.serving import HOST, free_port
from churn_assets.settings import load_settings

DOCUMENT: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = DOCUMENT["services"]
OURS = ("churn-assets:0.1.0", "churn-assets-backup:0.1.0")
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(?::([-?])([^}]*))?\}")
ONE_SHOT = {"volumes", "buckets", "mlflow-user", "backup"}
each_service = pytest.mark.parametrize("name", SERVICES)


def texts(node: Any) -> Iterator[str]:
    """Every string of a document."""
    if isinstance(node, dict):
        for value in node.values():
            yield from texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from texts(value)
    elif isinstance(node, str):
        yield node


def tool(name: str) -> str:
    """A program beside this Python or on the PATH, or a skip that says so."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name}")
    return found


def said_by(*command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **more)


def test_the_files_are_of_the_compose_specification() -> None:
    pytest.importorskip("check_jsonschema", reason="there is no check-jsonschema; make env")
    files = [COMPOSE / "compose.yaml", COMPOSE / "compose.tls.yaml"]
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = said_by(*check, *files)
    assert done.returncode == 0, done.stdout


def test_compose_itself_reads_them_and_says_what_is_missing(tmp_path: Path) -> None:
    if not shutil.which("docker") or said_by("docker", "compose", "version").returncode:
        pytest.skip("there is no docker compose")
    made, empty = tmp_path / "made", tmp_path / "empty"
    make_secrets.make_secrets(COMPOSE / "compose.yaml", made)
    empty.touch()
    config = ["docker", "compose", "--file", COMPOSE / "compose.yaml", "--env-file"]
    assert said_by(*config, made, "config", "--quiet").returncode == 0
    refused = said_by(*config, empty, "config", "--quiet")
    assert refused.returncode
    assert "run make secrets" in refused.stderr


@each_service
def test_every_service_is_guarded(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == ("no" if name in ONE_SHOT else "unless-stopped")
    user, _, group = service["user"].partition(":")
    assert user.isdecimal()
    assert group.isdecimal()
    # Only what makes a volume another user's is root, and can do nothing but that.
    assert (user == "0") == (name == "volumes")
    more = {"volumes": ["CHOWN"], "proxy": ["NET_BIND_SERVICE"]}
    assert service.get("cap_add", []) == more.get(name, [])
    assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()
    assert service["logging"]["options"]["max-size"]
    assert not {"privileged", "network_mode", "pid", "ipc"} & service.keys()
    assert not [volume for volume in service.get("volumes", []) if "docker.sock" in volume]


@each_service
def test_every_service_is_of_an_exact_image_and_says_whether_it_is_well(name: str) -> None:
    service = SERVICES[name]
    repository, _, tag = service["image"].partition(":")
    assert re.fullmatch(r"[a-z0-9./-]+", repository)
    assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-[a-z0-9.]+)?", tag), tag
    assert (service["image"] in OURS) == (service.get("pull_policy") == "never")
    if name in ONE_SHOT:
        assert service["healthcheck"] == {"disable": True}
    else:
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        assert {"interval", "timeout", "retries"} <= service["healthcheck"].keys()


def test_what_a_service_waits_for_is_there_and_comes_to_be() -> None:
    waits: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        waits[name] = set(service.get("depends_on", {}))
        for other, how in service.get("depends_on", {}).items():
            finished = "service_completed_successfully"
            assert how["condition"] == (finished if other in ONE_SHOT else "service_healthy")
    started: set[str] = set()
    while ready := {name for name in waits.keys() - started if waits[name] <= started}:
        started |= ready
    assert started == SERVICES.keys()


def test_every_secret_is_one_make_secrets_makes_and_none_stands_here(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    made = make_secrets.make_secrets(COMPOSE / "compose.yaml", file)
    used = {
        name: how
        for path in (COMPOSE / "compose.yaml", COMPOSE / "churn.yaml")
        for text in texts(yaml.safe_load(path.read_text()))
        for name, how, _ in VARIABLE.findall(text)
    }
    needed = {name for name, how in used.items() if how != "-"}
    assert set(made) == needed
    assert not needed & {name for name, how in used.items() if how == "-"}
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|PGPASS", key):
                assert re.fullmatch(r"\$\{[A-Z0-9_]+:\?run make secrets\}", value), key
    for path in COMPOSE.iterdir():
        if path.name.startswith(".env") or path.is_dir():
            continue
        for line in path.read_text().splitlines():
            assert not re.search(
                r"(?i)(password|secret)\w*\s*[:=]\s*['\"]?[A-Za-z0-9+/]{12,}$", line
            )


def test_only_the_proxy_and_the_service_are_to_be_had_and_on_loopback_until_told() -> None:
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert published.keys() == {"proxy", "service"}
    for name, ports in published.items():
        bind = {"proxy": "PROXY_BIND", "service": "SERVICE_BIND"}[name]
        for port in ports:
            assert re.fullmatch(rf"\$\{{{bind}:-127\.0\.0\.1\}}:\d+:\d+", port)
    assert DOCUMENT["networks"]["inner"] == {"internal": True}
    assert all("inner" in service["networks"] for service in SERVICES.values())
    outside = {name for name, s in SERVICES.items() if "outer" in s["networks"]}
    # Alerts leave from the code location and Alertmanager; the rest has no way out.
    assert outside == {"proxy", "service", "code", "alertmanager"}


def test_every_volume_and_file_is_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = VARIABLE.sub(r"\3", volume).partition(":")[0]
            if source.startswith("."):
                assert (COMPOSE / source).exists(), source
                assert volume.endswith(":ro")
            else:
                assert source in DOCUMENT["volumes"]
    homes = {n: v for n, s in SERVICES.items() for v in s.get("volumes", []) if "home:" in v}
    # Who only reads the home cannot do otherwise.
    assert {name for name, volume in homes.items() if volume.endswith(":ro")} == {
        "service",
        "reports",
    }
    assert homes.keys() == {"code", "webserver", "daemon", "service", "reports", "backup"}


def test_what_asks_a_service_asks_one_that_is_there_at_its_port() -> None:
    listens = {
        "postgres": 5432,
        "redis": 6379,
        "s3": 7070,
        "mlflow": 5000,
        "code": 4000,
        "webserver": 3000,
        "service": 3000,
        "reports": 3002,
        "prometheus": 9090,
        "alertmanager": 9093,
        "grafana": 3000,
    }
    for name in ("s3", "mlflow", "code", "webserver", "service", "reports"):
        assert str(listens[name]) in " ".join(SERVICES[name]["command"])
    files = ["compose.yaml", "Caddyfile", "prometheus.yml", "churn.yaml", "mlflow-auth.ini"]
    asked = [
        (host, int(port))
        for file in files
        for host, port in re.findall(
            rf"\b({'|'.join(listens)}):(\d{{4}})\b", (COMPOSE / file).read_text()
        )
    ]
    assert len(asked) > 15
    assert set(asked) <= set(listens.items())
    grpc = yaml.safe_load((COMPOSE / "workspace.yaml").read_text())["load_from"][0]["grpc_server"]
    assert grpc["port"] == listens["code"]
    assert SERVICES["webserver"]["environment"]["CHURN_CODE_HOST"] == "code"


def test_prometheus_knows_the_jobs_its_rules_ask_for(tmp_path: Path) -> None:
    document = yaml.safe_load((COMPOSE / "prometheus.yml").read_text())
    of_this_machine = yaml.safe_load(
        (PROJECT_ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()
    )
    jobs = {job["job_name"]: job for job in document["scrape_configs"]}
    for job in of_this_machine["scrape_configs"]:
        ours = dict(jobs.pop(job["job_name"]))
        assert ours.pop("static_configs") != job["static_configs"]
        assert ours == {key: value for key, value in job.items() if key != "static_configs"}
    assert not jobs
    retention = "--storage.tsdb.retention.time=35d"
    assert retention in SERVICES["prometheus"]["command"]
    promtool = tool("promtool")
    shutil.copy(COMPOSE / "prometheus.yml", tmp_path)
    shutil.copy(PROJECT_ROOT / "deploy" / "prometheus" / "rules.yml", tmp_path)
    done = said_by(promtool, "check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stderr


def test_alertmanager_takes_its_configuration() -> None:
    done = said_by(tool("amtool"), "check-config", COMPOSE / "alertmanager.yml")
    assert done.returncode == 0, done.stderr


def test_the_project_reads_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    settings_of = SERVICES["code"]["environment"]
    named = {name for name, _, _ in VARIABLE.findall((COMPOSE / "churn.yaml").read_text())}
    assert named <= settings_of.keys()
    assert named <= SERVICES["service"]["environment"].keys()
    for name in named:
        monkeypatch.setenv(name, "of-a-test")
    settings = load_settings(COMPOSE / "churn.yaml")
    assert settings.online_store.url == "redis://:of-a-test@redis:6379/0"
    assert settings.serving.api_keys
    assert settings.deployment.local.url == settings.serving_health.url == "http://service:3000"


def test_the_image_passes_hadolint_and_takes_the_lock() -> None:
    dockerfile = COMPOSE / "Dockerfile"
    done = said_by(tool("hadolint"), "--no-color", "--failure-threshold", "style", dockerfile)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text = dockerfile.read_text()
    assert "--require-hashes" in text
    assert "--constraint requirements.lock" in text
    assert "--group dev" not in text
    assert re.search(r"^ARG BASE_IMAGE=python:3\.11\.\d+-slim-\w+$", text, re.MULTILINE)
    assert re.search(r"^USER 1034:1034$", text, re.MULTILINE)
    ignored = (PROJECT_ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    # The last word on a file counts.
    assert ignored.index("**/.env*") > ignored.index("!deploy/compose")
    copied = re.findall(r"^COPY (?!--from)((?:[\w./-]+ )+)", text, re.MULTILINE)
    for source in (source for sources in copied for source in sources.split()):
        assert (PROJECT_ROOT / source).exists(), source
        assert any(source.startswith(line[1:]) for line in ignored if line.startswith("!"))


def environment_of(dockerfile: Path) -> dict[str, str]:
    (block,) = re.findall(r"^ENV ((?:.*\\\n)+.*)$", dockerfile.read_text(), re.MULTILINE)
    return dict(line.strip(" \\").split("=", 1) for line in block.split("\n"))


def test_the_image_of_backups_is_the_projects_with_the_programs_of_the_servers_version() -> None:
    dockerfile = COMPOSE / "backup.Dockerfile"
    done = said_by(tool("hadolint"), "--no-color", "--failure-threshold", "style", dockerfile)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text = dockerfile.read_text()
    of_project = environment_of(COMPOSE / "Dockerfile")
    assert environment_of(dockerfile).items() <= of_project.items()
    (server,) = re.findall(r"^postgres:(\d+)\.", SERVICES["postgres"]["image"])
    assert re.findall(r"^ARG POSTGRES=(\d+)$", text, re.MULTILINE) == [server]
    assert re.findall(r"postgresql-client\S*", text) == ["postgresql-client-${POSTGRES}"]
    assert f"ARG PROJECT_IMAGE={OURS[0]}\n" in text
    # The same Python, which the environment in /app links to.
    (python,) = re.findall(r"^ARG BASE_IMAGE=(\S+)-slim", text, re.MULTILINE)
    assert f"ARG BASE_IMAGE={python}-slim" in (COMPOSE / "Dockerfile").read_text()
    assert text.rstrip().splitlines()[-3] == "USER 1034:1034"
    # Nobody starts it, and who does not ask for a backup needs no image of it.
    assert SERVICES["backup"]["profiles"] == ["backup"]


def test_secrets_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / ".env"
    assert make_secrets.main(file) == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    first = file.read_text()
    values = dict(line.split("=", 1) for line in first.splitlines())
    assert len(set(values.values())) == len(values) > 10
    assert all(re.fullmatch(r"[\w-]{43}", value) for value in values.values())
    told = capsys.readouterr().out
    assert all(name in told for name in values)
    assert not any(value in told for value in values.values())

    assert make_secrets.main(file) == 0
    assert file.read_text() == first
    assert "nothing was changed" in capsys.readouterr().out


def test_only_missing_secrets_are_added(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(
        "# ours\nPROXY_USER=ada\nREDIS_PASSWORD='a b'\nPROXY_TOKEN=\nexport S3_SECRET_KEY=x"
    )
    file.chmod(0o644)
    made = make_secrets.make_secrets(COMPOSE / "compose.yaml", file)
    assert not {"REDIS_PASSWORD", "S3_SECRET_KEY"} & set(made)
    assert "PROXY_TOKEN" in made
    kept, _, added = file.read_text().partition("export S3_SECRET_KEY=x\n")
    assert kept == "# ours\nPROXY_USER=ada\nREDIS_PASSWORD='a b'\n"
    assert sorted(line.partition("=")[0] for line in added.splitlines()) == sorted(made)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o640)
    assert make_secrets.make_secrets(COMPOSE / "compose.yaml", file) == []
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_a_place_for_secrets_that_cannot_be_had_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_secrets.main(tmp_path / "nowhere" / ".env") == 2
    assert "cannot be used" in capsys.readouterr().err


def test_git_and_the_image_leave_the_secrets_alone() -> None:
    for name in (".env", ".env-0123abcd"):
        ignored = said_by("git", "-C", PROJECT_ROOT, "check-ignore", f"deploy/compose/{name}")
        if ignored.returncode == 128:
            pytest.skip("this is no git checkout")
        assert ignored.returncode == 0


@pytest.fixture
def databases(monkeypatch: pytest.MonkeyPatch) -> Generator[dict[str, str]]:
    with own_databases() as (names, passwords):
        for name, password in passwords.items():
            monkeypatch.setenv(name, password)
        yield names


def test_no_role_reads_the_database_of_another(databases: dict[str, str]) -> None:
    import psycopg

    def as_role(role: str, database: str) -> psycopg.Connection:
        return psycopg.connect(postgres_url(), user=databases[role], dbname=databases[database])

    for role in databases:
        with as_role(role, role) as connection:
            connection.execute("CREATE TABLE own (n int)")
            super_user, hashed = connection.execute(
                "SELECT rolsuper OR rolcreatedb OR rolcreaterole, "
                "(SELECT rolpassword FROM pg_roles WHERE rolname = current_user) "
                "FROM pg_roles WHERE rolname = current_user"
            ).fetchall()[0]
            assert super_user is False
            assert hashed == "********"
        for other in databases.keys() - {role}:
            with pytest.raises(psycopg.OperationalError, match="does not have CONNECT privilege"):
                as_role(role, other)


def test_dagster_runs_a_job_on_the_platforms_instance(
    databases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dagster_postgres", reason="there is no dagster-postgres; make env")
    import dagster as dg
    from psycopg.conninfo import conninfo_to_dict

    document = yaml.safe_load((COMPOSE / "dagster.yaml").read_text())
    database = document["storage"]["postgres"]["postgres_db"]
    server = conninfo_to_dict(postgres_url())
    assert (database["db_name"], database["username"]) == ("dagster", "dagster")
    database |= {"db_name": databases["dagster"], "username": databases["dagster"]}
    database["port"] = int(server.get("port") or 5432)
    monkeypatch.setenv("CHURN_POSTGRES_HOST", str(server["host"]))
    monkeypatch.setenv("CHURN_DAGSTER_STORAGE", str(tmp_path / "storage"))
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(document))

    @dg.op
    def greet() -> str:
        return "hello"

    @dg.job
    def greeting() -> None:
        greet()

    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert type(instance.run_launcher).__name__ == "DefaultRunLauncher"
        assert instance.run_monitoring_enabled
        assert instance.run_retries_enabled
        done = greeting.execute_in_process(instance=instance)
        assert done.success
        stored = instance.get_run_by_id(done.run_id)
        assert stored is not None
        assert stored.status == dg.DagsterRunStatus.SUCCESS
    assert not list(tmp_path.rglob("*.db"))


def test_a_backup_takes_the_databases_of_all_three_roles_to_another_server(
    databases: dict[str, str], tmp_path: Path
) -> None:
    """With the environment and the configuration of the service `backup`, as these roles."""
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    if not shutil.which("pg_dump"):
        pytest.skip("there is no pg_dump; on Debian: apt-get install postgresql-client")
    server = conninfo_to_dict(postgres_url())
    host, port = str(server["host"]), str(server.get("port") or 5432)

    def of_this_server(text: str) -> str:
        text = text.replace("postgres:5432", f"{host}:{port}").replace(
            "port: 5432", f"port: {port}"
        )
        for name, own in databases.items():
            text = text.replace(f"://{name}", f"://{own}")
            text = text.replace(f"{port}/{name}", f"{port}/{own}")
            text = text.replace(f"name: {name}\n", f"name: {own}\n")
        return text

    for name in ("churn.yaml", "dagster.yaml"):
        (tmp_path / name).write_text(of_this_server((COMPOSE / name).read_text()))
    secret = os.environ | {"REDIS_PASSWORD": "of-a-test"}
    environment = {
        key: of_this_server(VARIABLE.sub(lambda found: secret[found[1]], value))
        for key, value in SERVICES["backup"]["environment"].items()
    } | {
        "CHURN_POSTGRES_HOST": host,
        "CHURN_CONFIG": str(tmp_path / "churn.yaml"),
        "CHURN_DAGSTER_YAML": str(tmp_path / "dagster.yaml"),
        "CHURN_HOME": str(tmp_path / "home"),
        "PATH": os.environ["PATH"],
    }

    def churn(*arguments: str) -> str:
        command = [sys.executable, "-m", "churn_assets", *arguments]
        done = said_by(*command, cwd=PROJECT_ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def asked(role: str, statement: str) -> list[tuple[Any, ...]]:
        name = databases[role]
        with psycopg.connect(postgres_url(), user=name, dbname=name) as connection:
            done = connection.execute(statement.encode())
            return done.fetchall() if done.description else []

    churn("prepare")
    tables = {"dagster": "runs", "mlflow": "experiments", "churn": "churn_prediction_log_v1"}
    for role, table in tables.items():
        asked(role, f"CREATE TABLE {table} (n int PRIMARY KEY, content bytea)")
        asked(role, f"INSERT INTO {table} VALUES (1, 'kept')")
    asked("churn", "CREATE TABLE feast_metadata (n int)")
    said = churn("backup", str(tmp_path / "b.tar"))
    for part in ("dagster", "mlflow", "prediction_log", "feast"):
        assert re.search(rf"^{part} +1 files", said, re.MULTILINE), said
    for part in ("lake", "online_store"):
        assert re.search(rf"^{part} +elsewhere", said, re.MULTILINE), said
    # To a server where the databases are, and nothing else.
    shutil.rmtree(tmp_path / "home")
    for role, table in tables.items():
        asked(role, f"DROP TABLE {table}")
    asked("churn", "DROP TABLE feast_metadata")
    churn("restore", str(tmp_path / "b.tar"))
    for role, table in tables.items():
        assert asked(role, f"SELECT n FROM {table}") == [(1,)]
        owner = f"SELECT tableowner FROM pg_tables WHERE tablename = '{table}'"
        assert asked(role, owner) == [(databases[role],)]
    assert asked("churn", "SELECT * FROM feast_metadata") == []
    # And once more over what is there and newer by now.
    for role, table in tables.items():
        asked(role, f"INSERT INTO {table} VALUES (2, 'newer')")
    said = churn("restore", str(tmp_path / "b.tar"), "--replace")
    assert "prediction_log: 2 rows were in" in said
    for role, table in tables.items():
        assert asked(role, f"SELECT n FROM {table}") == [(1,)]


def test_the_instance_is_the_projects_but_for_where_it_is_stored() -> None:
    ours = yaml.safe_load((COMPOSE / "dagster.yaml").read_text())
    projects = yaml.safe_load((PROJECT_ROOT / "dagster.yaml").read_text())
    stores = {"storage", "run_storage", "event_log_storage", "schedule_storage", "run_launcher"}
    left = [{k: v for k, v in each.items() if k not in stores} for each in (ours, projects)]
    assert left[0] == left[1]


class Echo(BaseHTTPRequestHandler):
    """Answers with the headers it was asked with."""

    def do_GET(self) -> None:
        said = json.dumps(dict(self.headers.items())).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def fetched(port: int, authorization: str | None = None) -> tuple[int, dict[str, str]]:
    """Status, and the headers that came through."""
    request = urllib.request.Request(f"http://{HOST}:{port}/")
    if authorization:
        request.add_header("Authorization", authorization)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {}


SITES = ("DAGSTER", "REPORTS", "PROMETHEUS", "ALERTMANAGER", "MLFLOW", "GRAFANA", "SERVICE")


@pytest.fixture
def proxy(tmp_path: Path) -> Generator[dict[str, int]]:
    """The proxy as compose starts it, before a server that tells what it was asked; its ports."""
    tool("caddy")
    ports = {site: free_port() for site in SITES}
    with ThreadingHTTPServer((HOST, 0), Echo) as behind:
        threading.Thread(target=behind.serve_forever, daemon=True).start()
        text = (COMPOSE / "Caddyfile").read_text()
        upstream = r"\b(webserver|reports|prometheus|alertmanager|mlflow|grafana|service):\d+"
        text = re.sub(upstream, f"{HOST}:{behind.server_port}", text)
        text = text.replace("http://:8080", f"http://{HOST}:{free_port()}")
        (tmp_path / "Caddyfile").write_text(text)
        given = SERVICES["proxy"]["environment"]
        given = given | {"PROXY_USER": "ada", "PROXY_PASSWORD": "p-w", "PROXY_TOKEN": "t-k"}
        given |= {f"{site}_SITE": f"http://{HOST}:{port}" for site, port in ports.items()}
        given |= {"XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
        given["PATH"] = f"{Path(tool('caddy')).parent}:{os.environ['PATH']}"
        script = SERVICES["proxy"]["command"][-1].replace("$$", "$")
        script = script.replace("/etc/caddy/Caddyfile", str(tmp_path / "Caddyfile"))
        said = tmp_path / "said"
        with said.open("wb") as sink:
            process = subprocess.Popen(
                ["sh", "-ec", script], env=given, stdout=sink, stderr=sink, cwd=tmp_path
            )
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    assert fetched(ports["GRAFANA"])[0] == 200
                    break
                except urllib.error.URLError:
                    assert process.poll() is None, said.read_text()
                    assert time.monotonic() < deadline, said.read_text()
                    time.sleep(0.05)
            yield ports
        finally:
            process.terminate()
            process.wait()
            behind.shutdown()


def test_nobody_comes_past_the_proxy_without_a_login(proxy: dict[str, int]) -> None:
    def basic(user: str, password: str) -> str:
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    for site in ("DAGSTER", "REPORTS", "PROMETHEUS", "ALERTMANAGER"):
        for refused in (None, "Bearer t-x", "Bearer "):
            assert fetched(proxy[site], refused)[0] == 401, (site, refused)
        status, came = fetched(proxy[site], "Bearer t-k")
        assert status == 200
        assert "Authorization" not in came
    assert fetched(proxy["DAGSTER"], basic("ada", "p-w"))[0] == 200
    # A hash takes its time, on purpose.
    for refused in (basic("ada", "p-x"), basic("bob", "p-w")):
        assert fetched(proxy["DAGSTER"], refused)[0] == 401
    # These ask themselves, and need to see what they were given.
    for site in ("MLFLOW", "GRAFANA", "SERVICE"):
        assert fetched(proxy[site], "Bearer own")[1]["Authorization"] == "Bearer own"


def test_redis_wants_the_password_and_shows_it_nobody(tmp_path: Path) -> None:
    import redis

    tool("redis-server")
    port, service = free_port(), SERVICES["redis"]
    script = service["command"][-1].replace("$$", "$")
    script = script.replace("/tmp/redis.conf", f"{tmp_path}/redis.conf").replace(
        "dir /data\\n", f"dir {tmp_path}\\nbind {HOST}\\nport {port}\\n"
    )
    given = {"PATH": os.environ["PATH"], "REDIS_PASSWORD": "p-w", "REDISCLI_AUTH": ""}
    process = subprocess.Popen(["sh", "-ec", script], env=given, stdout=subprocess.DEVNULL)
    try:
        ping = service["healthcheck"]["test"][1].replace("$$", "$")
        ping = ping.replace("redis-cli", f"redis-cli -p {port}")
        deadline = time.monotonic() + 30
        while subprocess.run(["sh", "-c", ping], env=given).returncode:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert stat.S_IMODE((tmp_path / "redis.conf").stat().st_mode) == 0o600
        assert b"p-w" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert subprocess.run(["sh", "-c", ping], env=given | {"REDIS_PASSWORD": "x"}).returncode
        with redis.Redis(HOST, port) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
    finally:
        process.terminate()
        process.wait()


def test_a_healthcheck_waits_for_an_answer_only_once_there_is_one_to_expect(
    tmp_path: Path,
) -> None:
    def health(url: str, *more: str) -> int:
        return said_by(sys.executable, COMPOSE / "answers.py", url, *more).returncode

    there = tmp_path / "current.json"
    nowhere = f"http://{HOST}:{free_port()}/"
    assert health(nowhere) == 1
    assert health(nowhere, "--once", str(there)) == 0
    there.touch()
    assert health(nowhere, "--once", str(there)) == 1
    with ThreadingHTTPServer((HOST, 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert health(f"http://{HOST}:{server.server_port}/", "--once", str(there)) == 0
        server.shutdown()


def test_buckets_are_made_where_they_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(HOST, free_port(), verbose=False)
    server.start()
    try:
        given = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        given["AWS_DEFAULT_REGION"] = "us-east-1"
        url = f"http://{HOST}:{server._port}"
        command = [sys.executable, COMPOSE / "buckets.py", url, "lake", "mlflow"]
        for said in ("made the bucket lake\nmade the bucket mlflow\n", ""):
            done = said_by(*command, env=os.environ | given)
            assert (done.returncode, done.stdout) == (0, said), done.stderr
    finally:
        server.stop()
