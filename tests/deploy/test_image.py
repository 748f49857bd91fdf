"""The container, built and run by a real engine: `make test-image`."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import pytest
from engine_cases import TOLD_TO_THE_BUILD, docker, hardened, inspected, quiet_port
from serving_cases import PATIENCE_S, VALID, Model

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.logged import FILE_SUFFIX
from churn_assets.errors import UserError
from churn_assets.lifecycle.bento import Bento
from churn_assets.lifecycle.container import Image, build_image
from churn_assets.lifecycle.serving import HOST, ask, ask_health
from churn_assets.lifecycle.targets import ImageSettings

pytestmark = pytest.mark.image

MOST_BYTES = 650_000_000
MOST_MEMORY = 400 * 2**20
TOOLS = "gcc cc g++ c++ clang ld make cmake rustc cargo go uv git curl wget"


@dataclass(frozen=True)
class Served:
    """A running container, and where it answers."""

    name: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


def wait_for(tell: Callable[[], object], name: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while tell() is None:
        assert time.monotonic() < deadline, docker("logs", name, check=False)
        time.sleep(0.1)


@pytest.fixture
def served(image: Image, name: str, network: str | None) -> Served:
    """The image run as an operator would."""
    port = quiet_port()
    options = hardened(network, HOST, port)
    docker("run", "-d", "--name", name, *options, "-e", "CHURN_PREDICTION_LOG=off", image.id)
    served = Served(name, port)
    wait_for(lambda: ask_health(served.url), name)
    return served


def run_in(image: Image, script: str) -> str:
    """What a shell in a fresh container says."""
    return docker("run", "--rm", "--network", "none", "--entrypoint", "sh", image.id, "-c", script)


def test_the_image_is_small_and_named_after_its_bento(image: Image, bento: Bento) -> None:
    print(f"{image.size_bytes / 1e6:.0f} MB")
    assert image.size_bytes < MOST_BYTES
    assert image.reference.partition(":")[2] == bento.tag.partition(":")[2]
    assert inspected(image.id)["Config"]["Labels"]["churn.bento"] == bento.tag


def test_it_holds_no_tools_and_no_pickles(image: Image) -> None:
    assert run_in(image, f"for tool in {TOOLS}; do command -v $tool; done; true") == ""
    assert run_in(image, "ls /app/.venv/bin | grep -E '^(pip|uv$)' || true") == ""
    names = "-name '*.pkl*' -o -name '*.pickle*' -o -name '*.joblib*'"
    everywhere = f"find / -xdev -not -path '/proc/*' \\( {names} \\) 2>/dev/null || true"
    assert run_in(image, everywhere) == ""
    packages = run_in(image, "ls /app/.venv/lib/python3*/site-packages")
    for needless in ("dagster", "mlflow", "pandas", "sklearn", "pyarrow", "feast"):
        assert f"\n{needless}\n" not in packages


def test_its_label_leads_to_the_bill_of_what_is_installed(image: Image) -> None:
    path = inspected(image.id)["Config"]["Labels"]["churn.sbom"]
    bill = json.loads(run_in(image, f"cat {path}"))
    listed = {f"{one['name']}=={one['version']}" for one in bill["components"]}
    script = (
        "from importlib.metadata import distributions as d; import re; "
        "print(*{re.sub(r'[-_.]+', '-', x.name).lower() + '==' + x.version for x in "
        "d(path=[p for p in __import__('sys').path if p.startswith('/app/.venv')])})"
    )
    found = run_in(image, f'/app/.venv/bin/python -c "{script}"').split()
    assert len(found) > 20
    assert listed == set(found)


def test_it_tells_nothing_of_the_index_it_was_built_from(image: Image) -> None:
    told = docker("history", "--no-trunc", image.id) + json.dumps(inspected(image.id))
    assert TOLD_TO_THE_BUILD not in told
    assert "PIP_INDEX" not in told
    search = f"grep -rlF {TOLD_TO_THE_BUILD} /app /etc /tmp /data 2>/dev/null || true"
    assert run_in(image, search) == ""


def test_the_user_is_not_root_and_owns_nothing_that_runs(image: Image) -> None:
    assert inspected(image.id)["Config"]["User"] == "1034:1034"
    assert run_in(image, "id -u; id -g").split() == ["1034", "1034"]
    assert run_in(image, "find /app -writable 2>/dev/null | head -3; true") == ""
    assert run_in(image, "touch /data/kept && echo kept") == "kept\n"


def test_it_answers_as_its_model_with_nothing_to_write_to(
    served: Served, model: Model, bento: Bento
) -> None:
    health = ask_health(served.url)
    assert health is not None
    assert health["bento"] == bento.tag
    for row in model.x[:5]:
        values = [float(v) if i in (1, 4) else int(v) for i, v in enumerate(row)]
        answer = ask(
            served.url, dict(zip(FEATURE_NAMES, values, strict=True)) | {"customer_id": "c"}
        )
        assert answer.status == 200
        expected = model.predict(row.reshape(1, -1))[0]
        assert answer.json()["churn_probability"] == pytest.approx(expected, abs=1e-3)
    assert ask(served.url, b"{").status == 400
    said = docker("exec", served.name, "sh", "-c", "touch /app/x || touch /data/x", check=False)
    assert said.count("Read-only file system") == 2


def test_its_memory_stays_far_below_its_limit(served: Served) -> None:
    for _ in range(200):
        assert ask(served.url, VALID).status == 200
    used = memory_of(served.name)
    print(f"{used / 2**20:.0f} MiB")
    assert 50 * 2**20 < used < MOST_MEMORY


def memory_of(name: str) -> float:
    told = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", name).split()[0]
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    unit = told[-3:]
    return float(told.removesuffix(unit)) * units[unit]


def test_sigterm_ends_it_when_the_requests_are_answered(served: Served) -> None:
    body = json.dumps(VALID).encode()
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += b"content-length: %d\r\n\r\n" % len(body)
    with socket.create_connection((HOST, served.port), timeout=PATIENCE_S) as connection:
        connection.sendall(head + body[:10])
        time.sleep(0.5)
        with stopping(served.name) as stopped:
            # The request was there before the signal, the rest of it comes after.
            time.sleep(1)
            assert stopped.poll() is None
            connection.sendall(body[10:])
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 "), answer
            assert stopped.wait(PATIENCE_S) == 0
    state = inspected(served.name)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    assert "Traceback" not in docker("logs", served.name, check=False)


def stopping(name: str) -> subprocess.Popen:
    return subprocess.Popen(["docker", "stop", "-t", str(PATIENCE_S), name])


def test_a_base_image_that_cannot_be_had_is_said(bento: Bento, image_settings: ImageSettings):
    nowhere = msgspec.structs.replace(image_settings, base="localhost:1/nowhere:1")
    with pytest.raises(UserError, match=r"the base image localhost:1/nowhere:1 is neither on this"):
        build_image(bento, nowhere)


COUNT = f"""
import pathlib, sqlite3
for file in pathlib.Path("/data").glob("**/*{FILE_SUFFIX}"):
    print(sqlite3.connect(file).execute("SELECT count(*) FROM prediction").fetchone()[0])
"""


def test_what_it_answered_is_in_the_volume_when_it_is_killed(
    image: Image, name: str, network: str | None
) -> None:
    port = quiet_port()
    kept = ["--volume", f"{name}:/data", "-e", "CHURN_PREDICTION_LOG=/data"]
    docker("run", "-d", "--name", name, *hardened(network, HOST, port), *kept, image.id)
    served = Served(name, port)
    wait_for(lambda: ask_health(served.url), name)
    for _ in range(20):
        assert ask(served.url, VALID).status == 200
    docker("kill", name)
    counted = docker("run", "--rm", *kept, "--entrypoint", "python", image.id, "-c", COUNT)
    assert sum(int(rows) for rows in counted.split()) == 20


@pytest.mark.parametrize("told", [[], ["-e", "CHURN_PREDICTION_LOG=/data"]])
def test_without_a_place_for_its_log_it_does_not_start(
    image: Image, name: str, network: str | None, told: list[str]
) -> None:
    options = [*hardened(network, HOST, quiet_port()), *told]
    docker("run", "-d", "--name", name, *options, image.id)
    wait_for(lambda: None if inspected(name)["State"]["Running"] else True, name)
    assert inspected(name)["State"]["ExitCode"] != 0
    assert "CHURN_PREDICTION_LOG" in docker("logs", name, check=False)
