"""The OpenAPI document of the service, made of the types it decodes and encodes with.

What no JSON schema can say stands in the descriptions: an integer is written without fraction and
exponent (3, not 3.0, which a schema cannot tell from 3), a key given twice counts with its last
value, and a body may not be longer than its limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from churn_assets.contract.features import Feature
from churn_assets.contract.release import Manifest
from churn_assets.contract.request import (
    MAX_BATCH_BYTES,
    MAX_BODY_BYTES,
    MAX_ROWS,
    ROWS,
    CustomerRequest,
    request_type,
)
from churn_assets.contract.response import (
    ErrorAnswer,
    Health,
    Prediction,
    RowError,
    StoredPrediction,
)

PATH = "/openapi.json"
KEY_SCHEME = "key"

Schema = dict[str, Any]

_REF = "#/components/schemas/{name}"

_REFUSED = {
    400: "The body is not JSON in UTF-8 (NaN and Infinity are not).",
    401: "There is no API key, or one that is not known here, revoked or expired.",
    404: "The customer is not in the online store.",
    405: "The path is not asked by this method; `Allow` says by which.",
    408: "The body took too long to arrive; the connection is closed.",
    409: "The customer's stored features are too old, or ahead of data time.",
    413: "The body is longer than its limit; the connection is closed.",
    415: "The body is not declared to be `application/json` in UTF-8, or it is compressed.",
    422: "The body is JSON that breaks the contract.",
    429: "Too many requests, of this key or of all; `Retry-After` says when to come back.",
    500: "The service failed; its log says why.",
    503: "The online store or the prediction log cannot be used; `Retry-After` says when again.",
    504: "The answer took too long.",
}
_READING = (400, 405, 408, 413, 415, 422, 429, 500, 503, 504)
_STORED = (404, 409)

_SECONDS = {"type": "integer", "minimum": 0}
_REQUEST_ID = {
    "description": "The request's, as its answer is found in the prediction log",
    "schema": {"type": "string"},
}
_HEADERS: dict[int, dict[str, Schema]] = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}},
    405: {"Allow": {"required": True, "schema": {"type": "string"}}},
    429: {"Retry-After": {"required": True, "description": "Seconds", "schema": _SECONDS}},
    503: {"Retry-After": {"description": "Seconds", "schema": _SECONDS}},
}


def openapi(manifest: Manifest, *, by_id: bool, keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a service that serves `manifest`.

    `by_id` is whether it has an online store, so that a customer's id alone is a request. `keys` is
    whether predictions need an API key.
    """
    types: list[type[msgspec.Struct]] = [request_type(manifest.features), Prediction]
    types += [CustomerRequest, StoredPrediction] if by_id else []
    _, schemas = msgspec.json.schema_components(
        [*types, RowError, Health, ErrorAnswer], ref_template=_REF
    )
    schemas |= _bodies(by_id)
    schemas["PredictionRequest"] |= {
        "description": "A customer with every feature of the release.",
        "examples": [_example(manifest)],
    }
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = " ".join(schema["description"].split())
    reading = (*_READING, *(_STORED if by_id else ()), *((401,) if keys else ()))
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": f"{manifest.model_name}: churn probability",
            "version": manifest.release_id,
            "description": (
                f"Model version {manifest.model_version}. Integers are written without fraction "
                "and exponent: 3, not 3.0, though JSON Schema knows no difference. Of a key that "
                "is given twice the last value counts. Every error names the field at fault."
            ),
        },
        "paths": {
            "/predict": {"post": _predict(by_id, reading, keys)},
            "/predict_batch": {"post": _predict_batch(reading, keys)},
            "/health": _read_only("health", "What is served here, and since when", _ref("Health")),
            PATH: _read_only("openapi", "This document", {"type": "object"}),
        },
        "components": {"schemas": schemas},
    }
    if keys:
        document["components"]["securitySchemes"] = {
            KEY_SCHEME: {
                "type": "http",
                "scheme": "bearer",
                "description": "An API key, as `churn keys add` prints it once.",
            }
        }
    return document


def _bodies(by_id: bool) -> dict[str, Schema]:
    requests = [_ref("PredictionRequest"), *([_ref("CustomerRequest")] if by_id else [])]
    answers = [_ref("Prediction"), *([_ref("StoredPrediction")] if by_id else [])]
    return {
        "Request": {"anyOf": requests},
        "Answer": {"anyOf": answers},
        "AnyRow": {"description": "Whatever else a row is, it gets an error in its place."},
        "Batch": _list_of(ROWS, [*requests, _ref("AnyRow")]) | {"additionalProperties": False},
        "BatchAnswer": _list_of("predictions", [*answers, _ref("RowError")])
        | {"description": "As many as there were rows, in their order."},
    }


def _list_of(name: str, kinds: list[Schema]) -> Schema:
    rows = {"type": "array", "minItems": 1, "maxItems": MAX_ROWS, "items": {"anyOf": kinds}}
    return {"type": "object", "properties": {name: rows}, "required": [name]}


def _ref(name: str) -> Schema:
    return {"$ref": _REF.format(name=name)}


def _predict(by_id: bool, statuses: tuple[int, ...], keys: bool) -> Schema:
    needed = "every feature, or `customer_id` alone" if by_id else "every feature"
    return _operation(
        "predict",
        f"The churn probability of one customer, from a body of at most {MAX_BODY_BYTES} bytes "
        f"with {needed}",
        "Request",
        "Answer",
        statuses,
        keys,
    )


def _predict_batch(statuses: tuple[int, ...], keys: bool) -> Schema:
    return _operation(
        "predictBatch",
        f"Up to {MAX_ROWS} rows in a body of at most {MAX_BATCH_BYTES} bytes, each as a body of "
        "`/predict`; a row that is refused costs the others nothing",
        "Batch",
        "BatchAnswer",
        statuses,
        keys,
    )


def _operation(
    name: str, summary: str, body: str, answer: str, statuses: tuple[int, ...], keys: bool
) -> Schema:
    operation: Schema = {
        "operationId": name,
        "summary": summary,
        "parameters": [
            {
                "name": "X-Request-Id",
                "in": "header",
                "description": "1 to 128 printable ASCII characters; of anything else, and of "
                "nothing, the service makes one",
                "schema": {"type": "string"},
            }
        ],
        "requestBody": {"required": True, "content": _json(_ref(body))},
        "responses": {"200": {"description": "Answered", "content": _json(_ref(answer))}}
        | _refusals(statuses),
    }
    if keys:
        operation["security"] = [{KEY_SCHEME: []}]
    return operation


def _read_only(name: str, summary: str, schema: Schema) -> Schema:
    refusals = _refusals((405, 500))
    return {
        "get": {
            "operationId": name,
            "summary": summary,
            "responses": {"200": {"description": summary, "content": _json(schema)}} | refusals,
        },
        "head": {
            "operationId": f"{name}Head",
            "summary": f"{summary}, without the body",
            "responses": {"200": {"description": "It can be had"}, "500": {"description": "Not"}},
        },
    }


def _refusals(statuses: tuple[int, ...]) -> Schema:
    return {
        str(status): {
            "description": _REFUSED[status],
            "headers": _headers(status),
            "content": _json(_ref("ErrorAnswer")),
        }
        for status in sorted(statuses)
    }


def _headers(status: int) -> dict[str, Schema]:
    # A service that is starting answers 503 before it knows what it was asked.
    identity = _REQUEST_ID | {"required": status != 503}
    return {"X-Request-Id": identity, **_HEADERS.get(status, {})}


def _json(schema: Mapping[str, Any]) -> Schema:
    return {"application/json": {"schema": schema}}


def _example(manifest: Manifest) -> Schema:
    return {"customer_id": "c-1"} | {
        feature.name: _plain_value(feature) for feature in manifest.features
    }


def _plain_value(feature: Feature) -> int | float:
    kind: type[int] | type[float] = int if feature.dtype == "int" else float
    return kind(min(max(1, feature.minimum), feature.maximum))
