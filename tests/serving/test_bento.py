"""The bento: what is in it, that it is always the same one, and that it answers the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from log_cases import stored
from online_cases import CUTOFF, HOUR, content, until, write
from serving_cases import (
    NOON,
    PATIENCE_S,
    SERVICE,
    THREE,
    VALID,
    Model,
    changed,
    family,
    release_of,
    wait_until_gone,
)

from churn_assets.contract.release import MODEL, Release, ReleaseError, read_release
from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT, Home
from churn_assets.lifecycle.bento import (
    Bento,
    bento_of_tag,
    build_bento,
    newest_bento,
    pinned_requirements,
)
from churn_assets.lifecycle.pointer import Current, point_at
from churn_assets.lifecycle.serving import Answer, ask, ask_bento, free_port, serve

ALLOWED_FILES = re.compile(
    r"README\.md|bento\.yaml|env/.*|apis/.*|src/(service\.py|requirements\.txt|bentofile\.yaml|Dockerfile|"
    r"release/(manifest\.json|model\.onnx|golden\.json)|"
    r"churn_service/\w+\.py|churn_assets/(contract/)?\w+\.py)"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / "bentoml"


@pytest.fixture(scope="module")
def bento(release_of_three: Release, store: Path) -> Bento:
    return build_bento(release_of_three.directory, store, project_root=PROJECT_ROOT)


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_holds_the_service_the_contract_and_one_release(
    bento: Bento, release_of_three: Release
) -> None:
    assert read_release(bento.path / "src" / "release").model == release_of_three.model
    names = files_of(bento.path)
    assert {"src/service.py", "src/churn_assets/contract/features.py"} <= names.keys()
    assert [name for name in names if not ALLOWED_FILES.fullmatch(name)] == []


def test_its_requirements_are_pinned_and_name_no_index(bento: Bento) -> None:
    lines = (bento.path / "env" / "python" / "requirements.txt").read_text().split()
    assert f"onnxruntime=={metadata.version('onnxruntime')}" in lines
    assert f"bentoml=={metadata.version('bentoml')}" in lines
    assert f"redis=={metadata.version('redis')}" in lines
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[\w.!+]+", line)] == []
    heavy = ("dagster", "mlflow", "pandas", "scikit-learn")
    assert [line for line in lines if line.startswith(heavy)] == []


def test_a_requirement_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match="no-such-thing is not installed"):
        pinned_requirements(["no-such-thing"])


def test_the_image_needs_no_build_tools(bento: Bento) -> None:
    dockerfile = (bento.path / "env" / "docker" / "Dockerfile").read_text()
    assert "FROM python:3.11-slim" in dockerfile
    assert "apt-get" not in dockerfile
    assert "BENTOML_DO_NOT_TRACK" in dockerfile


def test_building_twice_is_building_once(
    bento: Bento, release_of_three: Release, store: Path
) -> None:
    before = (bento.path / "bento.yaml").stat()
    again = build_bento(release_of_three.directory, store, project_root=PROJECT_ROOT)
    assert again == bento
    assert (bento.path / "bento.yaml").stat().st_ino == before.st_ino
    assert newest_bento(store) == bento_of_tag(bento.tag, store) == bento
    assert bento_of_tag("churn:latest", store) == bento
    assert [path.name for path in (store / "tmp").iterdir()] == []


def test_a_damaged_bento_is_built_anew_and_other_code_is_another_bento(
    bento: Bento, release_of_three: Release, store: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(store, tmp_path / "store")
    damaged = own / "bentos" / "churn" / bento.path.name
    (damaged / "src" / "release" / MODEL).write_bytes(b"half")
    project = tmp_path / "project"
    shutil.copytree(SERVICE, project / "bentos" / "churn")
    shutil.copytree(PROJECT_ROOT / "churn_assets" / "contract", project / "churn_assets/contract")
    shutil.copy(PROJECT_ROOT / "churn_assets" / "__init__.py", project / "churn_assets")
    rebuilt = build_bento(release_of_three.directory, own, project_root=project)
    assert rebuilt.tag == bento.tag
    assert files_of(rebuilt.path / "src") == files_of(bento.path / "src")

    with (project / "bentos" / "churn" / "service.py").open("a") as service:
        service.write("raise RuntimeError('broken on purpose')\n")
    with pytest.raises(UserError, match="broken on purpose") as failed:
        build_bento(release_of_three.directory, own, project_root=project)
    assert "\n" not in str(failed.value)
    assert bento.tag not in str(failed.value)
    assert newest_bento(own) == rebuilt
    assert not list((own / "tmp").iterdir())


def test_a_release_that_is_not_one_is_not_built(copy: Path, store: Path) -> None:
    (copy / MODEL).write_bytes(b"other")
    with pytest.raises(ReleaseError, match=r"model\.onnx was changed"):
        build_bento(copy, store, project_root=PROJECT_ROOT)


def test_a_project_without_the_service_is_named(
    release: Release, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is it the project"):
        build_bento(release.directory, store, project_root=tmp_path)


def test_a_build_writes_nothing_outside_the_store(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("home", "temporary", "config"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "home" / "bentoml"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    build_bento(release.directory, tmp_path / "store", project_root=PROJECT_ROOT)
    assert [p for n in ("home", "temporary", "config") for p in (tmp_path / n).rglob("*")] == []


def test_an_unknown_tag_is_named(store: Path, bento: Bento, tmp_path: Path) -> None:
    for tag in ("churn:v0-000", "churn", "other:latest", f"other:{bento.path.name}", "churn:../x"):
        with pytest.raises(UserError, match=re.escape(f"there is no bento {tag}")):
            bento_of_tag(tag, store)
    assert newest_bento(tmp_path) is None
    with pytest.raises(UserError, match="there is no bento churn:latest"):
        bento_of_tag("churn:latest", tmp_path)
    with pytest.raises(UserError, match="no service directory"), serve("churn:latest"):
        pass


def test_a_bento_served_from_its_tag_answers_as_its_source_does(
    bento: Bento, store: Path, release_of_three: Release, service: ModuleType
) -> None:
    source = service.Served(read_release(release_of_three.directory))
    good = json.dumps({name: VALID[name] for name in ("customer_id", *THREE)}).encode()
    source_answer = msgspec.json.encode(source.predict(source.decoder.decode(good)).answer)
    with serve(bento.tag, bentoml_home=store) as url:
        answer = ask(url, good)
        refused = [ask(url, changed(total_orders_30d="3")), ask(url, json.dumps(VALID).encode())]
        health = json.loads(_get(url, "/health"))
    assert (answer.status, answer.content) == (200, source_answer)
    assert answer.json()["model_version"] == "3-features"
    assert [r.status for r in refused] == [422, 422]
    assert [r.json()["error"]["field"] for r in refused] == [
        "total_orders_30d",
        "support_tickets_90d",
    ]
    assert health["bento"] == bento.tag
    assert health["release_id"] == release_of_three.manifest.release_id
    assert health["features"] == list(THREE)


def _get(url: str, path: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(url + path, timeout=20) as response:
        return response.read()


def test_a_bento_is_asked_for_a_prediction_whose_answer_is_known(
    bento: Bento, store: Path, release_of_three: Release
) -> None:
    proof = ask_bento(bento, store)
    assert proof.as_expected, proof.reason
    assert proof.release_id == release_of_three.manifest.release_id
    assert list(proof.request) == ["customer_id", *THREE]
    assert proof.response["customer_id"] == proof.request["customer_id"]
    expected = release_of_three.golden.probabilities[0]
    assert proof.response["churn_probability"] == pytest.approx(expected, abs=6e-5)
    assert proof.latency_ms > 0


CONFIG = """
source: {kind: shop}
calendar: {start: 2024-01-01}
serving: {max_age_hours: 12, when_stale: flag, prediction_log: {durability: power}}
"""


@dataclass
class Foreground:
    """A running `churn serve`."""

    home: Home
    process: subprocess.Popen[str]
    url: str
    step: int = 0

    def point(self, tag: str, release_id: str, version: str) -> None:
        self.step += 1
        point_at(self.home.current, Current(tag, release_id, version, self.step, NOON))

    def told(self, *words: str) -> str:
        """The next line it writes that has all of `words`."""
        assert self.process.stdout
        return next(line for line in self.process.stdout if all(word in line for word in words))

    def health(self) -> dict:
        return json.loads(_get(self.url, "/health"))


@pytest.fixture
def foreground(store: Path, tmp_path: Path) -> Generator[Foreground]:
    """`churn serve` in a home with the bento, and nothing in Production."""
    shutil.copytree(store, tmp_path / "bentoml")
    (tmp_path / "churn.yaml").write_text(CONFIG)
    port = free_port()
    own = {"CHURN_HOME": str(tmp_path), "CHURN_CONFIG": str(tmp_path / "churn.yaml")}
    process = subprocess.Popen(
        [sys.executable, "-m", "churn_assets", "serve", "--port", str(port)],
        cwd=PROJECT_ROOT, env=os.environ | own,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout
    with process, process.stdout:
        yield Foreground(Home(tmp_path), process, f"http://127.0.0.1:{port}")
        started = family(process.pid)
        assert len(started) >= 2
        process.terminate()
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + 15
    assert wait_until_gone(started) == []


def test_what_is_in_production_is_waited_for_served_and_followed(
    foreground: Foreground,
    bento: Bento,
    model_of_three: Model,
    release_of_three: Release,
    tmp_path: Path,
) -> None:
    url, three = foreground.url, release_of_three.manifest
    body = {name: VALID[name] for name in ("customer_id", *THREE)}
    foreground.told("nothing is in Production yet")
    foreground.point(bento.tag, three.release_id, "3-features")
    foreground.told(f"{bento.tag} answers at {url}/predict")
    first = foreground.health()
    assert (first["bento"], first["release_refused"]) == (bento.tag, None)
    assert ask(url, body).status == 200
    assert ask(url, {"customer_id": "c-1"}).status == 503
    write(tmp_path / "feast" / "online.db", *content(cutoffs={"c-1": CUTOFF - 13 * HOUR}))
    by_id = until(lambda: [a for a in [ask(url, {"customer_id": "c-1"})] if a.status == 200])
    assert by_id[0].json()["stale"] is True
    log = foreground.health()["prediction_log"]
    assert (log["store"], log["durability"]) == (str(foreground.home.prediction_log), "power")
    kept = stored(foreground.home.prediction_log)
    assert len(kept) == log["rows_waiting"] > 1
    assert (kept[-1].bento, kept[-1].model_version, kept[-1].stale) == (
        bento.tag,
        "3-features",
        True,
    )
    assert kept[-1].cutoff == (CUTOFF - 13 * HOUR).timestamp() * 1e6

    # Another release with the same code is swapped to; its bento is not even looked for.
    other = release_of(model_of_three, foreground.home.releases, "8").manifest
    code = bento.tag.rpartition("-")[2]
    foreground.point(f"churn:{other.release_id}-{code}", other.release_id, "8")
    foreground.told(f"{other.release_id} is served from now on")
    health = until(lambda: [h for h in [foreground.health()] if h["version"] == "8"])[0]
    assert (health["bento"], health["release_id"]) == (bento.tag, other.release_id)
    assert (health["worker"], health["started_at"]) == (first["worker"], first["started_at"])

    # What cannot be served is told, and what serves goes on serving.
    damaged = release_of(model_of_three, foreground.home.releases, "9")
    (damaged.directory / MODEL).write_bytes(b"half")
    refused = damaged.manifest.release_id
    foreground.point(f"churn:{refused}-{code}", refused, "9")
    foreground.told(f"refused release {refused}", MODEL, f"{other.release_id} goes on serving")
    foreground.point("churn:gone", other.release_id, "8")
    foreground.told("there is no bento churn:gone", f"{bento.tag} goes on serving")
    broken = foreground.home.bentoml / "bentos" / "churn" / "broken"
    shutil.copytree(bento.path, broken)
    (broken / "src" / "release" / MODEL).write_bytes(b"half")
    foreground.point("churn:broken", other.release_id, "8")
    foreground.told("model.onnx was changed", f"{bento.tag} goes on serving")
    foreground.home.current.write_text("{")
    foreground.told("does not say what serves", f"{bento.tag} goes on serving")
    assert ask(url, body).json()["model_version"] == "8"

    # Other code takes the place of the one that runs, with the release the pointer names.
    newer = f"{three.release_id}-00000000"
    shutil.copytree(bento.path, broken.with_name(newer))
    description = (broken.with_name(newer) / "bento.yaml").read_text()
    description = description.replace(bento.path.name, newer)
    (broken.with_name(newer) / "bento.yaml").write_text(description)
    foreground.point(f"churn:{newer}", other.release_id, "8")
    foreground.told(f"churn:{newer} answers at {url}/predict")
    health = foreground.health()
    assert (health["bento"], health["release_id"]) == (f"churn:{newer}", other.release_id)
    assert health["worker"] != first["worker"]

    # A worker starts again although its bento has gone.
    shutil.rmtree(broken.with_name(newer))
    os.kill(health["worker"], signal.SIGKILL)
    assert until(lambda: _answer(url, body)).json()["model_version"] == "8"


def _answer(url: str, body: dict) -> Answer | None:
    try:
        return ask(url, body)
    except UserError:
        return None


LOAD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import service
from pathlib import Path
served = service.Served(service.read_release(Path(sys.argv[2])))
served.predict(served.decoder.decode(sys.argv[3].encode()))
origins = {n: getattr(m, "__file__", None) for n, m in sys.modules.items()}
print(json.dumps({n: f for n, f in origins.items() if not n.startswith("_")}))
"""


def test_the_service_imports_the_contract_and_nothing_else_of_the_project(bento: Bento) -> None:
    source = bento.path / "src"
    body = json.dumps({name: VALID[name] for name in ("customer_id", *THREE)})
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(source), str(source / "release"), body],
        capture_output=True, text=True, env=environment, cwd=bento.path, check=True,
    )  # fmt: skip
    modules = json.loads(done.stdout)
    ours = {name: path for name, path in modules.items() if name.split(".")[0] == "churn_assets"}
    assert "churn_assets.contract.request" in ours
    for name, path in ours.items():
        assert name == "churn_assets" or name.startswith("churn_assets.contract"), name
        assert Path(path).is_relative_to(source), f"{name} comes from outside of the bento: {path}"
    heavy = {"dagster", "mlflow", "pandas", "sklearn", "skl2onnx", "onnx", "pyarrow", "duckdb",
             "ibis", "evidently", "scipy", "matplotlib", "feast", "redis"}  # fmt: skip
    assert {name.split(".")[0] for name in modules} & heavy == set()
