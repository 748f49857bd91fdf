"""Packaging a release: one bento, always the same one for the same release and code.

BentoML reads BENTOML_HOME once a process, so a build runs in a process of its own, on a clean copy
of what the service needs, into a scratch store; the finished bento is moved into the store in one
step. A build that is killed leaves no bento, and nothing is written outside the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from churn_assets.contract.release import MANIFEST, Release, read_release
from churn_assets.errors import UserError

BENTO_NAME = "churn"
SERVICE_REQUIREMENTS = (
    "bentoml",
    "httptools",
    "msgspec",
    "numpy",
    "onnxruntime",
    "prometheus-client",
    "psycopg[binary]",
    "redis",
    "uvloop",
)

DOCKERFILE = "Dockerfile"
_BUILD_TIMEOUT_S = 120
_LATEST = "latest"


@dataclass(frozen=True)
class Bento:
    """A built bento: its tag and its directory in the store."""

    tag: str
    path: Path


def build_bento(release_dir: Path | str, bentoml_home: Path, *, project_root: Path) -> Bento:
    """Package the release with the service of `project_root` into the store under `bentoml_home`.

    The tag is made of the release id and of a digest of the service's code and requirements: an
    intact bento of that tag is returned, a damaged one is built anew. Raises ReleaseError for a
    release that must not be served, UserError when the build fails.
    """
    release = read_release(Path(release_dir))
    temporary = bentoml_home / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=temporary) as scratch:
        context, store = Path(scratch) / "context", Path(scratch) / "store"
        code = _stage_code(context, project_root)
        _stage_release(context, release)
        bento = _bento(bentoml_home, f"{release.manifest.release_id}-{code}")
        if not _is_intact(bento.path, context):
            _run_bentoml_build(context, store, bento.tag)
            _move(store / "bentos" / BENTO_NAME / bento.path.name, bento.path, Path(scratch))
        _point_latest_at(bento)
    return bento


def newest_bento(bentoml_home: Path) -> Bento | None:
    """The bento built last in the store under `bentoml_home`, or None."""
    try:
        version = (bentoml_home / "bentos" / BENTO_NAME / _LATEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    bento = _bento(bentoml_home, version.strip())
    return bento if bento.path.is_dir() else None


def bento_of_tag(tag: str, bentoml_home: Path) -> Bento:
    """The bento called `tag` (name:version, or name:latest). Raises UserError if there is none."""
    name, _, version = tag.partition(":")
    bento = _bento(bentoml_home, version)
    if version in ("", _LATEST):
        bento = newest_bento(bentoml_home) or bento
    if name != BENTO_NAME or not version or not (bento.path / "bento.yaml").is_file():
        raise UserError(f"there is no bento {tag} in {bentoml_home}; build it first")
    return bento


def code_of(tag: str) -> str:
    """The digest in a bento's tag: bentos that share it differ in their release alone."""
    return tag.rpartition("-")[2]


def pinned_requirements(names: Iterable[str]) -> list[str]:
    """`names` and all they need, pinned to what is installed here, in alphabetical order.

    BentoML itself is left out: it writes its own pin into every bento.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    wanted = [Requirement(name) for name in names]
    waiting = [
        (canonicalize_name(one.name), extra) for one in wanted for extra in ("", *one.extras)
    ]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            pins[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise UserError(f"{name} is not installed; run `make env`") from None
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                other = canonicalize_name(needed.name)
                waiting += [(other, extra) for extra in ("", *needed.extras)]
    return [f"{name}=={version}" for name, version in sorted(pins.items()) if name != "bentoml"]


def _bento(bentoml_home: Path, version: str) -> Bento:
    return Bento(f"{BENTO_NAME}:{version}", bentoml_home / "bentos" / BENTO_NAME / version)


def _stage_code(context: Path, project_root: Path) -> str:
    """Copy the service and the contract into `context`; returns 8 hex digits of their sha256."""
    service, package = project_root / "bentos" / BENTO_NAME, project_root / "churn_assets"
    sources = {str(path.relative_to(service)): path for path in service.rglob("*.py")}
    sources |= {"churn_assets/__init__.py": package / "__init__.py"}
    # Part of the tag too: another way to make the container is another bento.
    sources |= {DOCKERFILE: service / DOCKERFILE}
    contract = sorted((package / "contract").glob("*.py"))
    sources |= {f"churn_assets/contract/{path.name}": path for path in contract}
    if "service.py" not in sources or not contract:
        raise UserError(f"{project_root} has no bentos/{BENTO_NAME}/service.py; is it the project?")
    contents = {name: path.read_bytes() for name, path in sources.items()}
    contents["requirements.txt"] = "".join(
        f"{pin}\n" for pin in pinned_requirements(SERVICE_REQUIREMENTS)
    ).encode()
    contents["bentofile.yaml"] = _bentofile()
    digest = hashlib.sha256(metadata.version("bentoml").encode())
    for name, content in sorted(contents.items()):
        path = context / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:8]


def _bentofile() -> bytes:
    """The build's description, as JSON, which is YAML."""
    description = "Churn probability: POST /predict, POST /predict_batch, GET /health."
    return json.dumps(
        {
            "service": "service:Churn",
            "name": BENTO_NAME,
            "description": description,
            "include": [
                "*.py",
                "churn_service/*.py",
                "churn_assets/**/*.py",
                "release/*",
                "requirements.txt",
                DOCKERFILE,
            ],
            "python": {"requirements_txt": "requirements.txt"},
        }
    ).encode()


def _stage_release(context: Path, release: Release) -> None:
    target = context / "release"
    target.mkdir()
    for name in (MANIFEST, *release.manifest.files):
        shutil.copyfile(release.directory / name, target / name)


def _is_intact(bento: Path, context: Path) -> bool:
    """Whether the bento holds what would be built, and nothing that was built is damaged."""
    if not (bento / "bento.yaml").is_file():
        return False
    for staged in context.rglob("*"):
        name = staged.relative_to(context)
        # BentoML writes its own bentofile.yaml; its content is part of the tag.
        if not staged.is_file() or name.name == "bentofile.yaml":
            continue
        built = bento / "src" / name
        if not built.is_file() or built.read_bytes() != staged.read_bytes():
            return False
    return True


def _run_bentoml_build(context: Path, store: Path, tag: str) -> None:
    version = tag.partition(":")[2]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "BENTOML_HOME": str(store),
        "BENTOML_DO_NOT_TRACK": "True",
        "TMPDIR": str(store.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bentoml", "build", ".", "--version", version, "-o", "tag"],
            cwd=context,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_BUILD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"building {tag} took more than {_BUILD_TIMEOUT_S} s; try again") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = re.sub(r"\s+", " ", " | ".join(lines[-3:])) or f"exit code {done.returncode}"
        raise UserError(f"building {tag} failed: {reason}")


def _move(made: Path, target: Path, scratch: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        os.rename(target, scratch / "damaged")
    os.rename(made, target)


def _point_latest_at(bento: Bento) -> None:
    latest = bento.path.parent / _LATEST
    written = latest.with_name(f".{_LATEST}-{os.getpid()}")
    written.write_text(bento.path.name, encoding="utf-8")
    os.replace(written, latest)
