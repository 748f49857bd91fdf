"""API keys: who is let in, how often, and that a key is nowhere to be read."""

from __future__ import annotations

import hmac
import http.client
import json
import os
import stat
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner, Result
from online_cases import until
from serving_cases import NOON, SERVICE, VALID

from churn_assets.cli import cli
from churn_assets.contract.keys import KEYS_VARIABLE, digest_of, read_keys
from churn_assets.contract.release import Release, ReleaseError
from churn_assets.contract.request import Refusal
from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.bento import build_bento
from churn_assets.lifecycle.keys import add_key, list_keys, revoke_keys
from churn_assets.lifecycle.serving import serve
from churn_service.access import Access, access


def bearer(key: str, scheme: str = "Bearer") -> list[tuple[bytes, bytes]]:
    return [(b"accept", b"*/*"), (b"authorization", f"{scheme} {key}".encode())]


def make(path: Path, name: str = "crm", rate: float | None = None, days: int | None = None) -> str:
    return add_key(path, name, now=NOON, rate=rate, days=days)[1]


@dataclass
class Clocked:
    """The keys of `path`, and the clocks they are judged by."""

    path: Path
    now: float = 1000.0
    wall: float = field(default=NOON.timestamp())

    def __post_init__(self) -> None:
        self.access = Access(
            self.path, monotonic=lambda: self.now, wall_clock=lambda: self.wall
        )  # fmt: skip

    def status(self, headers: list[tuple[bytes, bytes]]) -> int:
        try:
            self.access.admit(headers)
        except Refusal as refusal:
            return refusal.status
        return 200


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "serving" / "keys.json"


def test_a_key_lets_in_and_nothing_like_it_does(path: Path) -> None:
    key, other = make(path), make(path, "web")
    keys = Clocked(path)
    assert keys.status(bearer(key)) == 200
    assert keys.status(bearer(other, "bearer")) == 200
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    swapped = other[:14] + key[14:]
    kept = digest_of(key).hex()
    for text in (wrong, swapped, key[:-1], key + "A", key.upper(), kept, f"churn_{kept}", "", "é"):
        assert keys.status(bearer(text)) == 401, text
    for headers in (
        [],
        [(b"authorization", key.encode())],
        bearer(key, "Basic"),
        [(b"x-api-key", key.encode())],
        bearer(key) + bearer(key),
    ):
        assert keys.status(headers) == 401, headers


def test_the_comparison_takes_constant_time_and_is_made_for_unknown_keys_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    key = make(path)
    keys = Clocked(path)
    for text in (key, "churn_00000000_" + key[15:], "x"):
        keys.status(bearer(text))
    assert compared == [digest_of(key), bytes(32), bytes(32)]


def test_a_key_expires(path: Path) -> None:
    key = make(path, days=2)
    keys = Clocked(path)
    keys.wall += timedelta(days=2).total_seconds() - 1
    assert keys.status(bearer(key)) == 200
    assert keys.access.health().keys == 1
    keys.wall += 1
    assert keys.status(bearer(key)) == 401
    assert keys.access.health().keys == 0


def test_a_limit_lets_through_what_its_rate_brings(path: Path) -> None:
    limited, free, slow = make(path, rate=5), make(path), make(path, rate=0.1)
    keys = Clocked(path)
    assert [keys.status(bearer(limited)) for _ in range(7)] == [200] * 5 + [429] * 2
    assert [keys.status(bearer(free)) for _ in range(50)] == [200] * 50
    keys.now += 0.45
    assert [keys.status(bearer(limited)) for _ in range(3)] == [200, 200, 429]
    # What was not used is saved up for one second only.
    keys.now += 3600
    assert [keys.status(bearer(limited)) for _ in range(6)] == [200] * 5 + [429]
    assert keys.status(bearer(slow)) == 200
    with pytest.raises(Refusal) as refused:
        keys.access.admit(bearer(slow))
    assert refused.value.retry_after == 10
    # Taken at its word: a moment before is too early, then is not.
    keys.now += 9.9
    assert keys.status(bearer(slow)) == 429
    keys.now += 0.1
    assert keys.status(bearer(slow)) == 200


def test_a_batch_counts_as_its_rows(path: Path) -> None:
    key = make(path, rate=5)
    keys = Clocked(path)
    keys.access.admit(bearer(key)).spend_more(99)
    with pytest.raises(Refusal) as refused:
        keys.access.admit(bearer(key))
    assert refused.value.retry_after == 20
    keys.now += 19.1
    assert keys.status(bearer(key)) == 429
    keys.now += 0.1
    assert keys.status(bearer(key)) == 200


def test_a_change_of_the_file_is_seen_within_a_second_and_a_limit_goes_on(path: Path) -> None:
    first = make(path, rate=0.1)
    keys = Clocked(path)
    assert [keys.status(bearer(first)) for _ in range(2)] == [200, 429]
    second = make(path, "web")
    assert keys.status(bearer(second)) == 401
    keys.now += 1
    assert keys.status(bearer(second)) == 200
    assert keys.status(bearer(first)) == 429
    revoke_keys(path, "crm")
    keys.now += 1
    assert keys.status(bearer(first)) == 401
    assert keys.status(bearer(second)) == 200


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no file of API keys"),
        (b"{", "is no file of API keys"),
        (b'{"keys": [{"id": "00000000", "name": "x", "sha256": "short"}]}', "sha256"),
        (b'{"keys": [], "more": 1}', "more"),
        (b'{"keys": [], "format": 2}', "has format 2"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_file_keeps_the_keys_there_were_and_is_told(
    path: Path, content: bytes | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = make(path)
    keys, good = Clocked(path), path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for _ in range(3):
        keys.now += 1
        assert keys.status(bearer(key)) == 200
    health = keys.access.health()
    assert health.keys == 1
    assert reason in str(health.reason)
    assert len([r for r in caplog.records if reason in r.getMessage()]) == 1
    with pytest.raises(ReleaseError, match=f"{KEYS_VARIABLE}: .*churn keys add"):
        access({KEYS_VARIABLE: str(path)})
    path.write_bytes(good)
    keys.now += 1
    assert keys.status(bearer(key)) == 200
    assert keys.access.health().reason is None


def test_two_keys_of_one_id_are_refused(path: Path) -> None:
    make(path)
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps(document | {"keys": document["keys"] * 2}))
    with pytest.raises(ValueError, match="two keys of one id"):
        read_keys(path)


def test_without_the_setting_nobody_is_asked() -> None:
    assert access({}) is None
    assert access({KEYS_VARIABLE: ""}) is None


@pytest.fixture
def churn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHURN_HOME", str(tmp_path))
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["keys", *arguments], catch_exceptions=False)

    return call


def test_keys_are_made_listed_and_revoked(churn, path: Path) -> None:
    assert "there are no keys" in churn("list").output
    made = churn("add", "crm", "--rate", "50", "--days", "30")
    key = made.stdout.strip()
    assert str(path) in made.stderr
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.encode() not in path.read_bytes()
    churn("add", "web")
    assert Clocked(path, wall=time.time()).status(bearer(key)) == 200
    listed = churn("list").output
    assert [line.split()[1] for line in listed.splitlines()] == ["crm", "web"]
    assert "50/s" in listed
    assert key not in listed
    assert digest_of(key).hex() not in listed
    web = list_keys(path)[1]
    assert f"key {web.id} of web is revoked" in churn("revoke", web.id).output
    assert [kept.name for kept in list_keys(path)] == ["crm"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(each.name for each in path.parent.iterdir()) == [".keys.json.lock", "keys.json"]
    for arguments, why in (
        (("revoke", "nobody"), "there is no key nobody"),
        (("add", " "), "no key was made"),
        (("add", "crm", "--rate", "-1"), "no key was made"),
    ):
        with pytest.raises(UserError, match=why):
            churn(*arguments)
    path.write_text("{")
    with pytest.raises(UserError, match="is no file of API keys"):
        churn("add", "late")
    assert path.read_text() == "{"


def test_one_setting_has_the_service_ask_for_the_keys_of_the_home(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = "source: {kind: shop}\ncalendar: {start: 2024-01-01}\nserving: {api_keys: true}\n"
    (tmp_path / "churn.yaml").write_text(shop)
    monkeypatch.setenv("CHURN_HOME", str(tmp_path))
    monkeypatch.setenv("CHURN_CONFIG", str(tmp_path / "churn.yaml"))
    monkeypatch.setenv(KEYS_VARIABLE, "")
    monkeypatch.setattr("churn_assets.lifecycle.serving.serve_current", lambda *_, **__: None)
    CliRunner().invoke(cli, ["serve", "--port", "3001"], catch_exceptions=False)
    assert os.environ[KEYS_VARIABLE] == str(path)


@dataclass
class Guarded:
    """A service that asks for keys, run from its source, and all it has written."""

    url: str
    keys: Path
    scratch: Path
    said: list[bytes] = field(default_factory=list)

    def send(
        self, key: str | None = None, path: str = "/predict", body: object = VALID, **more: str
    ) -> http.client.HTTPResponse:
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=20)
        headers = {"content-type": "application/json", **more}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        method = "POST" if path.startswith("/predict") else "GET"
        connection.request(method, path, json.dumps(body), headers)
        response = connection.getresponse()
        self.said += [str(response.headers).encode(), response.read()]
        connection.close()
        return response

    def status(self, *arguments: object, **more: object) -> int:
        return self.send(*arguments, **more).status  # ty: ignore[invalid-argument-type]

    def health(self) -> dict:
        self.send(path="/health")
        return json.loads(self.said[-1])["api_keys"]

    def written(self) -> bytes:
        files = [path for path in self.scratch.rglob("*") if path.is_file()]
        assert any(path.name == "service.log" for path in files)
        return b"\n".join([*(path.read_bytes() for path in files), *self.said])


@pytest.fixture(scope="module")
def guarded(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Generator[Guarded]:
    keys, scratch = tmp_path_factory.mktemp("keys") / "keys.json", tmp_path_factory.mktemp("own")
    make(keys, "unused")
    environment = {KEYS_VARIABLE: str(keys)}
    with serve(SERVICE, release.directory, environment=environment, scratch=scratch) as url:
        yield Guarded(url, keys, scratch)


def test_a_service_lets_in_who_has_a_key_and_shows_it_to_nobody(guarded: Guarded) -> None:
    key, limited = make(guarded.keys, "crm"), make(guarded.keys, "trial", rate=0.01)
    until(lambda: guarded.status(key) == 200)
    assert guarded.status(key, "/predict_batch", {"rows": [VALID]}) == 200
    for path in ("/predict", "/predict_batch"):
        for wrong in (None, "churn", key[:-2], f"{key}x"):
            refused = guarded.send(wrong, path)
            assert refused.status == 401
            assert refused.headers["www-authenticate"] == 'Bearer realm="churn"'
            assert json.loads(guarded.said[-1])["error"]["field"] == "authorization"
    # Before the body is looked at, and from no other place.
    assert guarded.status(None, "/predict", {"customer_id": 1}) == 401
    assert guarded.status(None, f"/predict?authorization=Bearer%20{key}") == 401
    assert guarded.status(limited) == 200
    told = guarded.send(limited)
    assert told.status == 429
    assert 90 <= int(told.headers["retry-after"]) <= 100
    # What a probe and a scraper need is open.
    for path in ("/health", "/livez", "/readyz", "/healthz", "/metrics", "/openapi.json"):
        assert guarded.status(None, path) == 200, path
    assert guarded.health() == {"keys": 3, "reason": None}
    document = json.loads(guarded.said[-3])
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"

    written = guarded.written()
    for secret in (key, limited):
        assert secret.encode() not in written
        assert secret[15:].encode() not in written
        assert digest_of(secret).hex().encode() not in written
        assert secret.encode() not in guarded.keys.read_bytes()


def test_keys_come_and_go_without_a_restart(guarded: Guarded) -> None:
    old = make(guarded.keys, "rotated")
    until(lambda: guarded.status(old) == 200)
    new = make(guarded.keys, "rotated-anew")
    revoke_keys(guarded.keys, "rotated")
    until(lambda: (guarded.status(old), guarded.status(new)) == (401, 200))
    good = guarded.keys.read_bytes()
    guarded.keys.write_bytes(good[:50])
    until(lambda: guarded.health()["reason"])
    assert "is no file of API keys" in guarded.health()["reason"]
    assert (guarded.status(old), guarded.status(new)) == (401, 200)
    guarded.keys.write_bytes(good)
    until(lambda: guarded.health()["reason"] is None)
    assert guarded.written().count(b"API keys stay as they are") == 1


def test_a_service_without_its_keys_does_not_start(release: Release, tmp_path: Path) -> None:
    environment = {KEYS_VARIABLE: str(tmp_path / "none.json")}
    with (
        pytest.raises(UserError, match=r"none\.json cannot be read .*`churn keys add` makes one"),
        serve(SERVICE, release.directory, environment=environment),
    ):
        pass


def test_no_key_is_in_a_bento(
    release_of_three: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys.json"
    key = make(keys)
    monkeypatch.setenv(KEYS_VARIABLE, str(keys))
    bento = build_bento(release_of_three.directory, tmp_path / "store", project_root=PROJECT_ROOT)
    files = [path for path in bento.path.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        for secret in (key, digest_of(key).hex(), os.fspath(keys)):
            assert secret.encode() not in content, path
