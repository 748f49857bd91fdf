"""The target `local`: what is said of the service of this home, and seen of it when it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle import deployment
from churn_assets.lifecycle.deployment import Running, announced, deploy, running_service
from churn_assets.lifecycle.pointer import Current, point_at
from churn_assets.lifecycle.records import BentoRecord
from churn_assets.lifecycle.targets import DeploymentSettings, LocalSettings

LOCAL = DeploymentSettings()


def record(release: str) -> BentoRecord:
    return BentoRecord(f"churn:{release}-c0de", "/nowhere", "2", release, {}, {}, 1.0)


def health(release: str, code: str = "c0de") -> dict[str, Any]:
    # The bento names the code that runs; the release it serves need not be the one baked in.
    return {"release_id": release, "bento": f"churn:v0-{code}", "release_refused": None}


def point(home: Home, release: str) -> None:
    point_at(home.current, Current(f"churn:{release}", release, "2", 1, datetime.now(UTC)))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    point(home, "v2")
    return home


@dataclass
class Service:
    """What stands for the service: /health says these, the last one again and again."""

    url: str = ""
    says: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def service() -> Generator[Service]:
    service = Service()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = service.says.pop(0) if len(service.says) > 1 else service.says[0]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(msgspec.json.encode(said))

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        service.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield service
        server.shutdown()
        thread.join()


def test_without_a_service_it_says_so(home: Home) -> None:
    done = deploy(record("v2"), home, LOCAL)
    assert (done.target, done.release_id, done.image, done.previous) == ("local", "v2", None, None)
    assert "no service of this home is running" in done.said


def test_the_running_service_is_waited_for(home: Home, service: Service) -> None:
    service.says = [health("v1"), health("v2", "0ther"), health("v2")]
    with announced(home, service.url):
        done = deploy(record("v2"), home, LOCAL)
        assert (done.said, done.previous) == (f"{service.url} answers from it", "v1")
        again = deploy(record("v2"), home, LOCAL)
        assert again.previous is None
    assert "no service" in deploy(record("v2"), home, LOCAL).said


def test_a_service_of_another_container_is_asked_where_the_settings_say(
    home: Home, service: Service
) -> None:
    there = DeploymentSettings(local=LocalSettings(url=service.url))
    service.says = [health("v1"), health("v2")]
    done = deploy(record("v2"), home, there)
    assert (done.said, done.previous) == (f"{service.url} answers from it", "v1")
    service.says = [health("v1")]
    with pytest.raises(UserError, match="still serves v1"):
        deploy(record("v2"), home, there, swap_timeout_s=0.3)
    with pytest.raises(ValueError, match=r"deployment\.local\.url is 'service:3000'"):
        LocalSettings(url="service:3000")


def test_what_the_service_refuses_fails(home: Home, service: Service) -> None:
    refused = {"release_id": "v2", "reason": "model.onnx was changed"}
    service.says = [health("v1") | {"release_refused": refused}]
    with (
        announced(home, service.url),
        pytest.raises(UserError, match=r"refuses v2: model\.onnx was changed; it .* serving v1"),
    ):
        deploy(record("v2"), home, LOCAL)
    service.says = [health("v1")]
    with (
        announced(home, service.url),
        pytest.raises(
            UserError, match=r"after 0 s .* still serves v1 as .*, not v2 as .*; its log says why"
        ),
    ):
        deploy(record("v2"), home, LOCAL, swap_timeout_s=0.3)


def test_what_is_not_in_production_any_more_is_left_alone(home: Home, service: Service) -> None:
    point(home, "v3")
    done = deploy(record("v2"), home, LOCAL)
    assert done.said == "left alone: v3 is in Production now"
    # As well while the service is waited for.
    point(home, "v2")
    service.says = [health("v1")]
    with announced(home, service.url):
        mover = threading.Timer(0.3, point, (home, "v3"))
        mover.start()
        done = deploy(record("v2"), home, LOCAL)
        mover.join()
    assert done.said == "left alone: v3 is in Production now"


def test_a_service_that_was_killed_is_not_asked(home: Home) -> None:
    with announced(home, "http://127.0.0.1:9"):
        mine = running_service(home)
        assert mine is not None
        assert mine.pid == os.getpid()
    assert running_service(home) is None
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    home.running_service.write_bytes(msgspec.json.encode(Running("http://x", ended.pid, 1.0)))
    assert running_service(home) is None
    # The number of a process that lives, but another one than the service was.
    home.running_service.write_bytes(
        msgspec.json.encode(msgspec.structs.replace(mine, started=1.0))
    )
    assert running_service(home) is None
    home.running_service.write_text("garbage")
    assert running_service(home) is None


def test_one_deployment_of_a_home_at_a_time(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "POLL_S", 0.01)
    with deployment._alone(home):
        waiting = threading.Thread(target=deploy, args=(record("v2"), home, LOCAL))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        with (
            pytest.raises(UserError, match="another deployment has held"),
            deployment._alone(home, timeout=0.05),
        ):
            pass
    waiting.join(10)
    assert not waiting.is_alive()
