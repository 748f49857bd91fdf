"""The service over HTTP: what it answers, and that nothing bad in is a 5xx out."""

from __future__ import annotations

import http.client
import json
import socket
from datetime import UTC, datetime
from urllib.parse import urlsplit

import numpy as np
import pytest
from serving_cases import BAD_BODIES, VALID, Model

from churn_assets.contract.features import FEATURES
from churn_assets.contract.release import Release
from churn_assets.contract.request import MAX_BODY_BYTES

JSON = {"content-type": "application/json"}


class Client:
    """One kept connection, opened anew when the service closed it."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self.connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=20)

    def send(
        self, body: bytes, method: str = "POST", path: str = "/predict", headers: dict = JSON
    ) -> tuple[int, dict, http.client.HTTPResponse]:
        self.connection.request(method, path, body, headers)
        response = self.connection.getresponse()
        content = response.read()
        assert response.headers["content-type"] == "application/json"
        return response.status, json.loads(content) if content else {}, response


@pytest.fixture(scope="module")
def client(url: str):
    client = Client(url)
    yield client
    client.connection.close()


def test_answers_as_the_model_does(client: Client, model: Model) -> None:
    kinds = [int if feature.dtype == "int" else float for feature in FEATURES]
    for number, (row, expected) in enumerate(
        zip(model.x[100:200], model.predict(model.x[100:200]), strict=True)
    ):
        body = {"customer_id": f"ć-{number}"} | {
            feature.name: kind(value)
            for feature, kind, value in zip(FEATURES, kinds, row, strict=True)
        }
        status, answer, _ = client.send(json.dumps(body).encode())
        assert status == 200
        assert list(answer) == [
            "customer_id", "churn_probability", "risk_level", "model_version", "holdout"
        ]  # fmt: skip
        assert answer["customer_id"] == f"ć-{number}"
        assert answer["model_version"] == "7"
        probability = answer["churn_probability"]
        assert probability == round(probability, 4)
        assert probability == pytest.approx(expected, abs=6e-5)
        level = "high" if probability > 0.7 else "medium" if probability > 0.4 else "low"
        assert answer["risk_level"] == level


def test_the_answers_are_not_all_alike(client: Client, model: Model) -> None:
    p = model.predict(model.x)
    assert {np.select([p > 0.7, p > 0.4], ["high", "medium"], "low")[i] for i in range(200)} == {
        "high",
        "medium",
        "low",
    }


def test_health_says_what_is_served(client: Client, release: Release) -> None:
    status, health, _ = client.send(b"", "GET", "/health", {})
    assert status == 200
    started_at = datetime.fromisoformat(health.pop("started_at"))
    assert started_at.tzinfo is not None
    assert started_at <= datetime.now(UTC)
    assert health.pop("worker") > 0
    assert health.pop("prediction_log")["usable"]
    assert health == {
        "status": "healthy",
        "model": "churn",
        "version": "7",
        "release_id": release.manifest.release_id,
        "bento": None,
        "features": [feature.name for feature in FEATURES],
        "release_refused": None,
        "online_store": None,
        "api_keys": None,
        "trial": None,
        "lane": {"fast": True, "reason": None},
    }
    assert client.send(b"", "HEAD", "/health", {})[:2] == (200, {})


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthz", "/metrics"])
def test_the_probes_and_metrics_of_bentoml_work(client: Client, path: str) -> None:
    client.connection.request("GET", path)
    response = client.connection.getresponse()
    content = response.read()
    assert response.status == 200
    if path == "/metrics":
        assert b'churn_requests_total{endpoint="/predict",status="200"}' in content


@pytest.mark.parametrize(("body", "status", "field"), BAD_BODIES)
def test_a_bad_body_is_refused(client: Client, body: bytes, status: int, field: str) -> None:
    answered, answer, _ = client.send(body)
    assert (answered, answer["error"]["field"]) == (status, field)
    assert set(answer["error"]) == {"field", "message"}
    assert answer["error"]["message"]


GOOD = json.dumps(VALID).encode()


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "field"),
    [
        ("GET", "/predict", {}, 405, "method"),
        ("PUT", "/predict", JSON, 405, "method"),
        ("DELETE", "/predict", {}, 405, "method"),
        ("HEAD", "/predict", {}, 405, None),
        ("POST", "/health", JSON, 405, "method"),
        ("GET", "/predict_batch", {}, 405, "method"),
        ("POST", "/predict/", JSON, 404, "path"),
        ("POST", "/Predict", JSON, 404, "path"),
        ("POST", "/v1/predict", JSON, 404, "path"),
        ("GET", "/", {}, 404, "path"),
        ("POST", "/livez", JSON, 404, "path"),
        ("GET", "/%2e%2e/release/model.onnx", {}, 404, "path"),
        ("POST", "/predict", {}, 415, "content-type"),
        ("POST", "/predict", {"content-type": "text/plain"}, 415, "content-type"),
        ("POST", "/predict", {"content-type": "application/jsonx"}, 415, "content-type"),
        ("POST", "/predict", {"content-type": "application/json; charset=latin-1"}, 415,
         "content-type"),
        ("POST", "/predict", JSON | {"content-encoding": "gzip"}, 415, "content-encoding"),
    ],
)  # fmt: skip
def test_what_is_not_the_contract_is_refused(
    client: Client, method: str, path: str, headers: dict, status: int, field: str | None
) -> None:
    answered, answer, response = client.send(GOOD, method, path, headers)
    assert answered == status
    if field:
        assert answer["error"]["field"] == field
    if status == 405:
        assert response.headers["allow"] == ("GET, HEAD" if path == "/health" else "POST")


@pytest.mark.parametrize(
    "content_type",
    ["Application/JSON", "application/json;charset=UTF-8", 'application/json; charset="utf-8"'],
)
def test_json_by_another_spelling_is_json(client: Client, content_type: str) -> None:
    assert client.send(GOOD, headers={"content-type": content_type})[0] == 200


def test_a_query_string_is_ignored(client: Client) -> None:
    assert client.send(GOOD, path="/predict?debug=1")[0] == 200


def padded(size: int) -> bytes:
    return GOOD[:-1] + b" " * (size - len(GOOD)) + b"}"


def test_a_body_of_the_limit_is_read_and_a_byte_more_refused(client: Client) -> None:
    assert client.send(padded(MAX_BODY_BYTES))[0] == 200
    status, answer, _ = client.send(padded(MAX_BODY_BYTES + 1))
    assert (status, answer["error"]["field"]) == (413, "body")


def test_a_chunked_body_is_held_to_the_limit(client: Client) -> None:
    pieces = [GOOD[:20], GOOD[20:]]
    client.connection.request("POST", "/predict", iter(pieces), JSON, encode_chunked=True)
    assert json.loads(client.connection.getresponse().read())["customer_id"] == "c-1"
    client.connection.request("POST", "/predict", iter([b" " * 9000] * 8), JSON)
    response = client.connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["field"]) == (413, "body")


def raw(url: str, request: bytes) -> bytes:
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        connection.sendall(request)
        return connection.makefile("rb").read()


def test_a_huge_body_is_refused_before_it_is_sent(url: str) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    answer = raw(url, head + b"content-length: 99999999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_client_that_leaves_disturbs_nobody(url: str, client: Client) -> None:
    parts = urlsplit(url)
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    for _ in range(20):
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            connection.sendall(head + b"content-length: 50\r\n\r\n{")
    assert client.send(GOOD)[0] == 200
