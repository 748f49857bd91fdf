"""The request contract itself, without a server."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from serving_cases import BAD_BODIES, THREE, VALID, literal

from churn_assets.contract.features import FEATURES, features_named
from churn_assets.contract.request import (
    MAX_ROWS,
    CustomerRequest,
    PredictionRequest,
    Refusal,
    RequestDecoder,
)
from churn_assets.contract.response import predict
from churn_assets.contract.risk import RiskThresholds

DECODER = RequestDecoder(FEATURES)


@pytest.mark.parametrize(("body", "status", "field"), BAD_BODIES)
def test_refuses_and_names_the_field(body: bytes, status: int, field: str) -> None:
    with pytest.raises(Refusal) as refused:
        DECODER.decode(body)
    assert (refused.value.status, refused.value.field) == (status, field)
    assert refused.value.message


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_the_range_of_a_feature_is_inclusive_and_ends_there(feature) -> None:
    step = 1 if feature.dtype == "int" else 1e-3
    kind = int if feature.dtype == "int" else float
    for bound, beyond in ((feature.minimum, -step), (feature.maximum, step)):
        DECODER.decode(json.dumps(VALID | {feature.name: kind(bound)}).encode())
        with pytest.raises(Refusal, match=feature.name):
            DECODER.decode(json.dumps(VALID | {feature.name: kind(bound + beyond)}).encode())


def test_the_message_says_what_is_expected_and_what_came() -> None:
    with pytest.raises(Refusal) as refused:
        DECODER.decode(json.dumps(VALID | {"days_since_last_order": "12"}).encode())
    assert refused.value.message == "must be an integer from 0 to 365 (days), got str"


def test_a_long_unknown_key_is_not_echoed_whole() -> None:
    with pytest.raises(Refusal) as refused:
        DECODER.decode(json.dumps({"k" * 50_000: 1}).encode())
    assert len(str(refused.value)) < 400


def test_a_release_with_three_features_has_a_schema_of_three() -> None:
    three = RequestDecoder(features_named(THREE))
    (definition,) = three.schema()["$defs"].values()
    assert definition["required"] == ["customer_id", *THREE]
    assert definition["additionalProperties"] is False
    with pytest.raises(Refusal, match="support_tickets_90d: is not a field"):
        three.decode(json.dumps(VALID).encode())


def test_the_row_has_the_column_order_of_the_model_whatever_the_order_of_the_body() -> None:
    backwards = dict(reversed(VALID.items()))
    request = DECODER.decode(json.dumps(backwards).encode())
    assert isinstance(request, PredictionRequest)
    row = DECODER.row(request)
    assert row.dtype == np.float32
    assert row.tolist() == [[3.0, np.float32(49.9), 12.0, 0.0, 1.5]]


values = (
    st.integers(-1, 366)
    | st.floats(-1, 366)
    | st.sampled_from([0, 365, 10_000, 10_001, 0.0, -0.0, 1e7, 1e8, 5e-324])
    | st.none()
    | st.booleans()
    | st.text(max_size=10)
    | st.lists(st.integers(), max_size=2)
)


@given(st.dictionaries(st.sampled_from([*VALID, "other"]), values, max_size=3))
@settings(max_examples=300, deadline=None)
def test_whatever_is_decoded_keeps_the_contract(changes: dict[str, object]) -> None:
    document = VALID | changes
    try:
        request = DECODER.decode(json.dumps(document).encode())
    except Refusal as refusal:
        # One of the changed fields is at fault, whichever the parser met first.
        event("refused")
        blamed, status = refusal.field, refusal.status
    else:
        event("decoded")
        decoded = msgspec.structs.asdict(request)
        assert decoded == document
        for feature in FEATURES:
            value = decoded[feature.name]
            assert type(value) is (int if feature.dtype == "int" else float)
            assert feature.minimum <= value <= feature.maximum
        return
    assert blamed in changes
    assert status == 422


def test_a_body_with_the_id_alone_is_a_request_by_id() -> None:
    assert DECODER.decode(b'{"customer_id": "c-1"}') == CustomerRequest("c-1")
    refusal = DECODER.features_needed("there is no store")
    assert (refusal.status, refusal.field) == (422, FEATURES[0].name)
    assert refusal.message.endswith("; there is no store")


def batch(*rows: bytes) -> bytes:
    return b'{"rows": [' + b", ".join(rows) + b"]}"


GOOD = json.dumps(VALID).encode()


def test_a_batch_mixes_rows_and_ids_and_keeps_their_order() -> None:
    rows = DECODER.decode_batch(batch(b'{"customer_id": "a"}', GOOD, b'{"customer_id": "b"}'))
    assert rows == [CustomerRequest("a"), DECODER.decode(GOOD), CustomerRequest("b")]


ROWS_TO_REFUSE = [
    case
    for case in BAD_BODIES
    if case[1] == 422 and case[0].count(b"{") < 9 and case[0].count(b"[") < 9
]


@pytest.mark.parametrize(("row", "status", "field"), ROWS_TO_REFUSE)
def test_a_bad_row_is_refused_as_it_is_alone_and_costs_nobody_else(
    row: bytes, status: int, field: str
) -> None:
    first, refused, last = DECODER.decode_batch(batch(GOOD, row, GOOD))
    assert first == last == DECODER.decode(GOOD)
    assert isinstance(refused, Refusal)
    assert (refused.status, refused.field) == (status, "row" if field == "body" else field)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_what_json_has_no_word_for_costs_its_row_and_not_the_batch(text: str) -> None:
    shouted = {**VALID, "customer_id": f'is "{text}", {text}'}
    good = json.dumps(shouted).encode()
    for field in ("avg_order_value", "customer_id"):
        first, refused, last = DECODER.decode_batch(batch(good, literal(field, text), good))
        assert first == last == DECODER.decode(good)
        assert isinstance(refused, Refusal)
        assert (refused.status, refused.field) == (422, field)


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, "body"),
        (b"{", 400, "body"),
        (b'{"rows": [' + GOOD, 400, "body"),
        (batch(GOOD, b'{"customer_id": "\\ud800"}'), 400, "body"),
        (batch(GOOD, b'{"customer_id" "c"}'), 400, "body"),
        (b'{"rows": [' + b'"' * 100_001 + b"NaN", 400, "body"),
        (batch(GOOD, b"[" * 50_000 + b"]" * 50_000), 422, "rows"),
        (batch(), 422, "rows"),
        (batch(*[b"{}"] * (MAX_ROWS + 1)), 422, "rows"),
        (b"{}", 422, "rows"),
        (b'{"rows": {}}', 422, "rows"),
        (b'{"rows": null}', 422, "rows"),
        (b'{"rows": [1], "sort": true}', 422, "sort"),
        (b"[]", 422, "body"),
        (b"[" + GOOD + b"]", 422, "body"),
        (GOOD, 422, "customer_id"),
    ],
)
def test_a_body_that_is_no_batch_is_refused_whole(body: bytes, status: int, field: str) -> None:
    with pytest.raises(Refusal) as refused:
        DECODER.decode_batch(body)
    assert (refused.value.status, refused.value.field) == (status, field)


def test_a_row_that_is_not_utf8_costs_no_other() -> None:
    first, refused = DECODER.decode_batch(batch(GOOD, b'{"customer_id": "\xff"}'))
    assert first == DECODER.decode(GOOD)
    assert isinstance(refused, Refusal)
    assert (refused.status, refused.field) == (400, "row")


def test_as_many_rows_as_are_allowed_are_taken() -> None:
    rows = DECODER.decode_batch(batch(*[b"{}"] * MAX_ROWS))
    assert [row.field for row in rows if isinstance(row, Refusal)] == ["customer_id"] * MAX_ROWS


@pytest.mark.parametrize(
    ("probability", "rounded", "level"),
    [
        (0.0, 0.0, "low"),
        (0.4, 0.4, "low"),
        (0.40004, 0.4, "low"),
        (0.40006, 0.4001, "medium"),
        (0.7, 0.7, "medium"),
        (0.70004, 0.7, "medium"),
        (0.70006, 0.7001, "high"),
        (1.0000001, 1.0, "high"),
        (-1e-9, 0.0, "low"),
    ],
)
def test_risk_levels_agree_with_the_probability_that_is_shown(
    probability: float, rounded: float, level: str
) -> None:
    answer = predict("c", probability, "7", RiskThresholds(), holdout=False)
    assert (answer.churn_probability, answer.risk_level) == (rounded, level)


@pytest.mark.parametrize(("high", "medium"), [(0.3, 0.4), (1.1, 0.4), (0.7, -0.1)])
def test_thresholds_out_of_order_are_refused(high: float, medium: float) -> None:
    with pytest.raises(ValueError, match="risk thresholds need"):
        RiskThresholds(high, medium)
