from __future__ import annotations

import json
import math

import msgspec
import pytest

from churn_assets.errors import UserError
from churn_assets.modeling.gates import Gate, QualityPolicy, all_passed, judge_gates

GOOD = {
    "accuracy": 0.9,
    "auc": 0.95,
    "p95_latency_ms": 5.0,
    "calibration_error": 0.01,
    "segment_auc": 0.8,
    "auc_over_recency": 0.03,
    "log_loss_over_production": -0.01,
}


def by_name(evidence: dict[str, float | None], **policy: float) -> dict[str, Gate]:
    return {gate.name: gate for gate in judge_gates(QualityPolicy(**policy), evidence)}


def test_good_evidence_passes_every_gate() -> None:
    gates = judge_gates(QualityPolicy(), GOOD)
    assert [gate.name for gate in gates] == list(GOOD)
    assert all_passed(gates)


@pytest.mark.parametrize(
    ("name", "value", "passed"),
    [
        ("accuracy", 0.85, True),
        ("accuracy", 0.8499, False),
        ("auc", 0.90, True),
        ("auc", 0.8999, False),
        ("p95_latency_ms", 50.0, True),
        ("p95_latency_ms", 50.01, False),
        ("calibration_error", 0.05, True),
        ("calibration_error", 0.0501, False),
        ("segment_auc", 0.65, True),
        ("segment_auc", 0.6499, False),
        ("log_loss_over_production", 0.0, True),
        ("log_loss_over_production", 0.0001, False),
        ("auc_over_recency", 0.0001, True),
        ("auc_over_recency", 0.0, False),
        ("auc_over_recency", -0.02, False),
    ],
)
def test_the_limit_itself_passes(name: str, value: float, passed: bool) -> None:
    gates = by_name({**GOOD, name: value})
    assert gates[name].passed is passed
    assert gates[name].value == value
    assert all(gate.passed for gate in gates.values() if gate.name != name)


@pytest.mark.parametrize("name", list(GOOD))
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, -1.1])
def test_evidence_that_is_missing_or_impossible_fails_closed(
    name: str, value: float | None
) -> None:
    if name == "log_loss_over_production" and value == -1.1:
        return
    gate = by_name({**GOOD, name: value})[name]
    assert not gate.passed
    assert gate.value is None
    assert gate.reason.startswith("no evidence")


def test_no_evidence_at_all_fails_every_gate() -> None:
    assert not any(gate.passed for gate in judge_gates(QualityPolicy(), {}))
    assert not all_passed(())


def test_an_accuracy_above_one_is_no_evidence() -> None:
    assert not by_name({**GOOD, "accuracy": 1.2})["accuracy"].passed


def test_limits_are_configurable() -> None:
    evidence: dict[str, float | None] = {
        "accuracy": 0.6,
        "auc": 0.65,
        "p95_latency_ms": 80.0,
        "calibration_error": 0.2,
        "segment_auc": 0.5,
        "auc_over_recency": -0.1,
        "log_loss_over_production": 0.02,
    }
    assert not any(gate.passed for gate in by_name(evidence).values())
    limits = {
        "accuracy": 0.5,
        "auc": 0.6,
        "p95_latency_ms": 100,
        "calibration_error": 0.3,
        "segment_auc": 0.4,
        "auc_over_recency": -1,
        "log_loss_over_production": 0.03,
    }
    assert all(gate.passed for gate in by_name(evidence, **limits).values())


def test_no_production_model_is_a_fact_and_no_missing_evidence() -> None:
    without = {n: v for n, v in GOOD.items() if n != "log_loss_over_production"}
    closed = {g.name: g for g in judge_gates(QualityPolicy(), without)}
    assert not closed["log_loss_over_production"].passed
    why = {"log_loss_over_production": "version 3 cannot be loaded"}
    told = judge_gates(QualityPolicy(), without, missing=why)[-1]
    assert told.reason == "no evidence: version 3 cannot be loaded"
    gates = judge_gates(QualityPolicy(), without, no_production=True)
    assert all_passed(gates)
    assert gates[-1].value is None
    assert gates[-1].reason.startswith("no production model")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", -0.1),
        ("accuracy", 1.1),
        ("auc", 90.0),
        ("auc", math.nan),
        ("p95_latency_ms", 0.0),
        ("p95_latency_ms", -5.0),
        ("p95_latency_ms", math.inf),
        ("calibration_error", -0.01),
        ("calibration_error", 5.0),
        ("segment_auc", 65.0),
        ("auc_over_recency", math.nan),
        ("auc_over_recency", 2.0),
        ("log_loss_over_production", -0.1),
        ("log_loss_over_production", math.nan),
    ],
)
def test_nonsense_limits_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"quality_gates.{name}"):
        QualityPolicy(**{name: value})
    if math.isfinite(value):
        with pytest.raises(UserError, match=name):
            msgspec.convert({name: value}, QualityPolicy)


def test_a_verdict_says_why_and_is_json() -> None:
    gate = by_name({**GOOD, "auc": 0.65})["auc"]
    assert gate.reason == "auc 0.65 is below 0.9"
    assert json.loads(json.dumps(gate.to_dict()))["limit"] == 0.9
