"""The Python client of docs/client.md, as it stands there."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import pytest
from online_cases import content, write
from serving_cases import NOON, SERVICE, VALID

from churn_assets.contract.keys import KEYS_VARIABLE
from churn_assets.contract.release import Release
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.keys import add_key
from churn_assets.lifecycle.serving import OnlineStore, free_port, serve


@pytest.fixture(scope="module")
def page() -> SimpleNamespace:
    """What the page's Python defines."""
    text = (PROJECT_ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    defined: dict = {}
    exec(compile(code, "docs/client.md", "exec"), defined)
    return SimpleNamespace(**{name: defined[name] for name in ("ChurnClient", "Refused")})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("client")


@pytest.fixture(scope="module")
def guarded(release: Release, folder: Path) -> Generator[tuple[str, str]]:
    """A service that asks for keys, and whose online store is not there yet; and a key."""
    _, key = add_key(folder / "keys.json", "docs", now=NOON, rate=4, days=None)
    environment = {KEYS_VARIABLE: str(folder / "keys.json")}
    online = OnlineStore(str(folder / "online.db"))
    with serve(SERVICE, release.directory, online=online, environment=environment) as url:
        yield url, key


def test_it_waits_where_the_service_asks_for_patience(
    page: SimpleNamespace, guarded: tuple[str, str], folder: Path
) -> None:
    url, key = guarded
    client = page.ChurnClient(url, key=key)
    features = {name: value for name, value in VALID.items() if name != "customer_id"}
    # More than the key may: those above are answered later.
    answers = [client.predict(f"c-{number}", **features) for number in range(6)]
    assert [answer["customer_id"] for answer in answers] == [f"c-{n}" for n in range(6)]
    # A store that cannot be read yet.
    later = threading.Timer(0.3, lambda: write(folder / "online.db", *content()))
    later.start()
    assert client.predict("c-3")["stale"] is False
    later.join()
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as response:
        counted = response.read().decode()
    for status in (200, 429, 503):
        assert f'churn_requests_total{{endpoint="/predict",status="{status}"}}' in counted
    known, unknown = client.predict_batch([{"customer_id": "c-4"}, {"customer_id": "nobody"}])
    assert known["customer_id"] == "c-4"
    assert unknown["error"]["status"] == 404
    with pytest.raises(page.Refused, match="422 avg_order_value: must be a number"):
        client.predict("c-1", **{**features, "avg_order_value": "49.9"})
    stranger = page.ChurnClient(url)
    with pytest.raises(page.Refused, match="401 authorization"):
        stranger.predict("c-1", **features)
    stranger.close()
    client.close()
    assert client.predict("c-5")["customer_id"] == "c-5"
    client.close()


def test_its_patience_ends(page: SimpleNamespace) -> None:
    client = page.ChurnClient(f"http://127.0.0.1:{free_port()}", patience=0.2)
    began = time.monotonic()
    with pytest.raises(OSError, match=r"no answer within 0\.2 s: .*refused"):
        client.predict("c-1")
    assert time.monotonic() - began < 10
