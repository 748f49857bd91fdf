"""The OpenAPI document: that it says what the service does, as a generator of requests finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path

import jsonschema_rs
import pytest
from click.testing import CliRunner
from online_cases import STORED, content, write
from serving_cases import BAD_BODIES, SERVICE, VALID

from churn_assets.cli import cli
from churn_assets.contract.keys import KEYS_VARIABLE
from churn_assets.contract.openapi import openapi
from churn_assets.contract.release import Release
from churn_assets.contract.request import CustomerRequest, Refusal, RequestDecoder
from churn_assets.errors import UserError
from churn_assets.home import PROJECT_ROOT
from churn_assets.lifecycle.keys import add_key
from churn_assets.lifecycle.serving import OnlineStore, serve

# So many requests an endpoint; a longer run sets more.
EXAMPLES = os.environ.get("CHURN_SCHEMATHESIS_EXAMPLES", "60")


def validator(document: dict, name: str) -> jsonschema_rs.Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return jsonschema_rs.Draft202012Validator(schema)


# A schema sees values, and 3.0 is the value 3.
NO_SCHEMA_SAYS = {b'"total_orders_30d": 3.0', b'"total_orders_30d": 3e0'}


def test_the_schema_refuses_what_the_contract_refuses(release: Release) -> None:
    schema = validator(openapi(release.manifest, by_id=True, keys=False), "Request")
    decoder = RequestDecoder(release.manifest.features)
    seen = 0
    for body, status, _ in BAD_BODIES:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            continue
        if status == 422 and len(body) < 1000:
            assert schema.is_valid(value) == any(text in body for text in NO_SCHEMA_SAYS), body
            seen += 1
    assert seen > 30
    for good in (VALID, {"customer_id": "c-1"}):
        assert schema.is_valid(good)
        decoder.decode(json.dumps(good).encode())


def test_a_blank_customer_id_is_blank_to_both(release: Release) -> None:
    schema = validator(openapi(release.manifest, by_id=True, keys=False), "CustomerRequest")
    decoder = RequestDecoder(release.manifest.features)
    for code in [*range(0x3100), 0xFEFF, 0x1F600]:
        body = {"customer_id": chr(code)}
        try:
            taken = isinstance(decoder.decode(json.dumps(body).encode()), CustomerRequest)
        except Refusal:
            taken = False
        assert schema.is_valid(body) == taken, hex(code)
        # To Python the byte order mark is not white space, to ECMAScript it is.
        assert taken == (not chr(code).isspace() and code != 0xFEFF), hex(code)


def test_without_a_store_the_id_alone_is_no_request(release: Release) -> None:
    document = openapi(release.manifest, by_id=False, keys=False)
    assert not validator(document, "Request").is_valid({"customer_id": "c-1"})
    assert validator(document, "Request").is_valid(VALID)
    assert "404" not in document["paths"]["/predict"]["post"]["responses"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def key(keys: Path) -> str:
    return add_key(keys, "schemathesis", now=datetime.now(UTC), rate=None, days=None)[1]


@pytest.fixture(scope="module")
def url(
    release: Release, keys: Path, key: str, tmp_path_factory: pytest.TempPathFactory
) -> Generator[str]:
    """A service with all there is to describe: an online store and API keys."""
    store = tmp_path_factory.mktemp("feast") / "online.db"
    # "0" is what generators of text begin with.
    write(store, *content({"0": STORED["c-1"], **STORED}))
    environment = {KEYS_VARIABLE: str(keys)}
    online = OnlineStore(str(store))
    with serve(SERVICE, release.directory, online=online, environment=environment) as base_url:
        yield base_url


def test_the_service_publishes_the_document_of_its_release(url: str, release: Release) -> None:
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=20) as response:
        assert response.headers["content-type"] == "application/json"
        assert json.load(response) == openapi(release.manifest, by_id=True, keys=True)


def test_the_document_of_a_release_can_be_printed(
    release: Release, release_of_three: Release, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    printed = CliRunner().invoke(cli, ["openapi", str(release.directory)], catch_exceptions=False)
    assert json.loads(printed.output) == openapi(release.manifest, by_id=True, keys=False)
    arguments = ["openapi", str(release_of_three.directory), "--features-only", "--keys"]
    printed = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert json.loads(printed.output) == openapi(release_of_three.manifest, by_id=False, keys=True)
    monkeypatch.setenv("CHURN_HOME", str(tmp_path))
    with pytest.raises(UserError, match="nothing is in Production yet"):
        CliRunner().invoke(cli, ["openapi"], catch_exceptions=False)


def schemathesis(url: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    config = folder / "schemathesis.toml"
    config.write_text("")
    own = {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "DO_NOT_TRACK": "1"}
    own |= {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{PROJECT_ROOT}"}
    return subprocess.run(
        [
            str(Path(sys.executable).with_name("st")), "--config-file", str(config), "run",
            f"{url}/openapi.json", "--checks", "all", "--continue-on-failure", "--no-color",
            "--suppress-health-check", "all", "--seed", "1", "--max-examples", EXAMPLES, *options,
        ],
        cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def test_the_service_does_what_the_document_says(url: str, key: str, tmp_path: Path) -> None:
    done = schemathesis(url, tmp_path, "--header", f"Authorization: Bearer {key}")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "5 selected / 5 total" in done.stdout
    assert "No issues found" in done.stdout
