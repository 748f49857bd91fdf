"""The service as a process: what starts, what is refused, and that nothing is left running."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import onnx
import psutil
import pytest
from serving_cases import (
    PATIENCE_S,
    SERVICE,
    VALID,
    Model,
    family,
    release_of,
    rewrite_manifest,
    wait_until_gone,
)

from churn_assets.contract.release import MODEL, Release, ReleaseError, read_release
from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.serving import (
    HOST,
    ask,
    check_port,
    free_port,
    measure_latency,
    measure_release,
    serve,
)


def test_leaves_no_process_and_no_file(release: Release, tmp_path: Path) -> None:
    before = {process.pid for process in family(os.getpid())}
    with serve(SERVICE, release.directory, scratch=tmp_path) as url:
        started = [p for p in family(os.getpid()) if p.pid not in before]
        assert len(started) >= 2
        assert ask(url, VALID).status == 200
        assert list(tmp_path.iterdir())
        parent = psutil.Process(os.getpid()).children()
        (boss,) = [p for p in parent if p.pid not in before]
        # The worst case: what would stop the workers is gone.
        boss.kill()
        boss.wait(PATIENCE_S)
    assert wait_until_gone(started) == []
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from churn_assets.lifecycle.serving import serve
with serve(Path(sys.argv[1]), Path(sys.argv[2]), scratch=Path(sys.argv[3])) as url:
    print(url, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_the_service_ends_with_the_process_that_started_it(
    release: Release, tmp_path: Path, number: signal.Signals
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(SERVICE), str(release.directory), str(tmp_path)],
        cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert holder.stdout
    with holder, holder.stdout:
        url = holder.stdout.readline().strip()
        started = family(holder.pid)
        assert ask(url, VALID).status == 200
        assert len(started) >= 2
        holder.send_signal(number)
        holder.wait(PATIENCE_S)
    assert wait_until_gone(started) == []
    with pytest.raises(UserError, match="is the service running"):
        ask(url, VALID)


@dataclass(frozen=True)
class Parts:
    """What a test makes a bad release of."""

    good: Release
    model: Model
    narrow: Model
    folder: Path


@pytest.fixture
def parts(release: Release, model: Model, model_of_three: Model, tmp_path: Path) -> Parts:
    return Parts(release, model, model_of_three, tmp_path)


def tampered(parts: Parts) -> tuple[Path, str]:
    directory = Path(shutil.copytree(parts.good.directory, parts.folder / "tampered"))
    (directory / MODEL).write_bytes(parts.model.onnx + b"\0")
    return directory, "model.onnx was changed"


def absent(parts: Parts) -> tuple[Path, str]:
    return parts.folder / "absent", "there is no release directory"


def forged(parts: Parts) -> tuple[Path, str]:
    directory = Path(shutil.copytree(parts.good.directory, parts.folder / "forged"))
    rewrite_manifest(directory, model_version="8")
    return directory, "manifest.json was changed"


def another_model(parts: Parts) -> tuple[Path, str]:
    x = parts.model.x[:40]
    made = release_of(parts.model, parts.folder, golden=(x, 1 - parts.model.predict(x)))
    return made.directory, "does not compute what it was released with"


def not_a_model(parts: Parts) -> tuple[Path, str]:
    made = release_of(parts.model, parts.folder, onnx=b"junk")
    return made.directory, "model.onnx cannot be loaded"


def too_narrow(parts: Parts) -> tuple[Path, str]:
    made = release_of(parts.model, parts.folder, onnx=parts.narrow.onnx)
    return made.directory, "the release has 5 features"


def of_doubles(parts: Parts) -> tuple[Path, str]:
    onnx_model = onnx.load_from_string(parts.model.onnx)
    graph = onnx_model.graph
    graph.node.append(onnx.helper.make_node("Cast", [graph.output[-1].name], ["doubles"], to=11))
    graph.output.append(onnx.helper.make_tensor_value_info("doubles", 11, [None, 2]))
    made = release_of(parts.model, parts.folder, onnx=onnx_model.SerializeToString())
    return made.directory, r"must end in class probabilities, not tensor\(double\)"


BAD_RELEASES = [tampered, absent, forged, another_model, not_a_model, too_narrow, of_doubles]


@pytest.mark.parametrize("bad", BAD_RELEASES, ids=lambda bad: bad.__name__)
def test_a_bad_release_is_refused_by_the_service(service: ModuleType, parts: Parts, bad) -> None:
    directory, reason = bad(parts)
    with pytest.raises(ReleaseError, match=reason):
        service.Served(read_release(directory))


@pytest.mark.parametrize("bad", [tampered, another_model], ids=lambda bad: bad.__name__)
def test_a_service_with_a_bad_release_does_not_start_and_says_why_in_one_line(
    parts: Parts, bad
) -> None:
    directory, reason = bad(parts)
    with pytest.raises(UserError, match=reason) as refused, serve(SERVICE, directory):
        pass
    assert "refused to start" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_release_at_all_refuses_to_start() -> None:
    with pytest.raises(UserError, match="there is no release to serve"), serve(SERVICE):
        pass


def test_a_taken_port_is_named(release: Release) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"port {port} .* choose another port"),
            serve(SERVICE, release.directory, port=port),
        ):
            pass
    check_port(free_port())
    with pytest.raises(UserError, match="port 70000"):
        check_port(70000)


def test_latency_is_measured_over_what_was_answered(url: str) -> None:
    latency = measure_latency(url, [VALID, VALID | {"customer_id": "c-2"}], warmup=3, requests=40)
    assert (latency.requests, latency.errors) == (40, 0)
    assert 0 < latency.p50_ms <= latency.p95_ms <= latency.p99_ms
    assert latency.figures()["p95_latency_ms"] == latency.p95_ms
    half = measure_latency(url, [VALID, b"{}"], warmup=4, requests=40)
    assert half.errors == 20
    with pytest.raises(UserError, match="answered none of 5 predictions"):
        measure_latency(url, [b"{}"], requests=5)
    with pytest.raises(UserError, match="at least one request"):
        measure_latency(url, [])
    with pytest.raises(UserError, match="no answer"):
        measure_latency(f"http://{HOST}:{free_port()}", [VALID], requests=5)


def test_a_candidate_that_refuses_a_customer_is_not_measured(release: Release) -> None:
    with pytest.raises(UserError, match=r"refuses a held-out customer.*avg_order_value"):
        measure_release(release.directory, [VALID, VALID | {"avg_order_value": -1}])
