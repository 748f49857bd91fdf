from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from churn_assets.data.gate import GatePolicy
from churn_assets.errors import UserError
from churn_assets.modeling.plausibility import judge_single_features

CUTOFFS = pd.to_datetime(["2024-05-01", "2024-06-01"], utc=True)


def rows(each: int = 800) -> pd.DataFrame:
    """Two cutoffs; `weak` knows a little of the outcome, `noise` nothing."""
    draw = np.random.default_rng(1)
    churned = draw.random(2 * each) < 0.3
    return pd.DataFrame(
        {
            "cutoff": CUTOFFS.repeat(each),
            "churned": churned,
            "weak": churned * 0.8 + draw.normal(size=2 * each),
            "noise": draw.normal(size=2 * each),
        }
    )


def test_features_that_know_little_pass() -> None:
    found = judge_single_features(rows(), ["weak", "noise"], 0.97)
    assert found.passed, found.reason
    assert 0.6 < float(found.figures["auc weak"]) < 0.8
    assert 0.5 <= float(found.figures["auc noise"]) < 0.55
    assert found.figures["cutoffs"] == 2
    assert "weak has the highest" in found.reason


@pytest.mark.parametrize("sign", [1, -1])
def test_one_that_knows_the_outcome_does_not_whichever_way_round(sign: int) -> None:
    frame = rows()
    frame["oracle"] = sign * (frame["churned"] + 0.01 * frame["noise"])
    found = judge_single_features(frame, ["weak", "oracle"], 0.97)
    assert not found.passed
    assert "oracle 1.000" in found.reason
    assert "weak" not in found.reason


def test_a_leak_into_one_cutoff_does_not_drown_among_the_others() -> None:
    frame = rows()
    leaky = frame["cutoff"] == CUTOFFS[1]
    frame["some"] = np.where(leaky, frame["churned"], frame["noise"])
    found = judge_single_features(frame, ["some"], 0.97)
    assert not found.passed
    assert float(found.figures["auc some"]) < 0.97
    assert "some 1.000 (2024-06-01)" in found.reason


def test_a_cutoff_of_few_rows_is_not_judged_by_itself() -> None:
    frame = rows(each=400)
    frame["some"] = np.where(frame["cutoff"] == CUTOFFS[1], frame["churned"], frame["noise"])
    found = judge_single_features(frame, ["some"], 0.97)
    assert found.passed
    assert found.figures["cutoffs"] == 0


@pytest.mark.parametrize(
    ("frame", "features", "reason"),
    [
        (rows().iloc[:0], ["weak"], "has no rows"),
        (rows(), [], "has no features"),
        (rows(), ["gone"], "has no gone"),
        (rows().drop(columns="churned"), ["weak"], "has no churned"),
        (rows().assign(churned=False), ["weak"], "not both outcomes"),
        (rows().assign(churned=None), ["weak"], "not both outcomes"),
        (rows().assign(weak=np.nan), ["weak"], "weak is not given"),
    ],
)
def test_without_evidence_it_does_not_pass(frame, features, reason: str) -> None:
    found = judge_single_features(frame, features, 0.97)
    assert not found.passed
    assert "no evidence" in found.reason
    assert reason in found.reason


@pytest.mark.parametrize("limit", [0.5, 1.0, -1, float("nan")])
def test_a_limit_that_judges_nothing_is_refused(limit: float) -> None:
    with pytest.raises(UserError, match="max_feature_auc"):
        GatePolicy(max_feature_auc=limit)
