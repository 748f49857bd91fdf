from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from churn_assets.modeling.metrics import (
    auc,
    calibration_bins,
    calibration_error,
    evaluate,
    score,
    top_decile_lift,
)

Y = np.array([False, False, True, True])
P = np.array([0.1, 0.6, 0.4, 0.9])


def test_figures_by_hand() -> None:
    found = score(Y, P)
    assert found.rows == 4
    assert found.churn_rate == 0.5
    assert found.mean_prediction == pytest.approx(0.5)
    assert found.accuracy == 0.5
    assert found.f1 == pytest.approx(0.5)
    assert found.auc == pytest.approx(0.75)
    assert found.pr_auc == pytest.approx(1 * 0.5 + (2 / 3) * 0.5)
    assert found.brier == pytest.approx((0.01 + 0.36 + 0.36 + 0.01) / 4)
    assert found.log_loss == pytest.approx(-(math.log(0.9) * 2 + math.log(0.4) * 2) / 4)
    assert found.undefined == {}


def test_the_threshold_is_exclusive() -> None:
    assert score(Y, np.full(4, 0.5), threshold=0.5).accuracy == 0.5
    assert score([True], [0.4], threshold=0.4).accuracy == 0.0
    assert score([True], [0.41], threshold=0.4).accuracy == 1.0


@pytest.mark.parametrize("only", [True, False])
def test_one_class_has_no_auc_and_says_so(only: bool) -> None:
    found = score([only, only], [0.3, 0.6])
    assert found.auc is None
    assert found.pr_auc is None
    assert "ranking needs both" in found.undefined["auc"]
    assert found.log_loss > 0
    assert auc([only, only], [1.0, 2.0]) is None


def test_f1_without_a_churner_anywhere_is_undefined() -> None:
    found = score([False, False], [0.1, 0.2])
    assert found.f1 is None
    assert "f1" in found.undefined
    assert score([False, True], [0.1, 0.2]).f1 == 0.0


@pytest.mark.parametrize(
    ("y", "p", "said"),
    [
        ([], [], "at least one row"),
        ([0, 1], [0.5], "shape"),
        ([0, 2], [0.5, 0.5], "0 or 1"),
        ([0, 1], [0.5, math.nan], "finite"),
        ([0, 1], [0.5, 1.1], "between 0 and 1"),
        ([0, 1], [-0.1, 0.5], "between 0 and 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(y: list[int], p: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        score(y, p)


def test_a_rounding_error_of_float32_is_forgiven() -> None:
    assert score([True, False], [1.0000002, 0.0]).brier == 0.0


def test_baselines_learn_from_training_rows_only() -> None:
    train_y = np.array([True] * 3 + [False] * 7)
    days = np.array([80, 70, 60, 5, 4, 3, 2, 1, 0, 0])
    found = evaluate(Y, P, train_y=train_y, recency=[5, 10, 75, 90], train_recency=days)
    assert found.majority.mean_prediction == pytest.approx(0.3)
    assert found.majority.accuracy == 0.5
    assert found.majority.brier == pytest.approx((0.09 + 0.09 + 0.49 + 0.49) / 4)
    assert found.majority.auc == 0.5
    assert found.recency is not None
    assert found.recency.auc == 1.0
    assert found.recency.accuracy == 1.0
    assert found.recency.brier < 0.05
    assert found.oracle_auc is None


def test_recency_is_ranked_by_the_number_not_by_its_fit() -> None:
    # The fit knows two levels only, so it would tie the last two rows.
    found = evaluate(
        [False, False, True],
        [0.1, 0.1, 0.9],
        train_y=[False, True],
        recency=[1, 50, 60],
        train_recency=[1, 40],
    )
    assert found.recency is not None
    assert found.recency.auc == 1.0
    assert found.recency.mean_prediction < 1.0


def test_the_oracle_is_ranked_on_the_same_rows() -> None:
    found = evaluate(Y, P, train_y=Y, oracle=[0.2, 0.1, 0.8, 0.9])
    assert found.oracle_auc == 1.0
    assert found.figures()["oracle_auc"] == 1.0


def test_recency_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="recency"):
        evaluate(Y, P, train_y=Y, recency=[1, 2, 3, 4])


def test_figures_are_flat_numbers_and_the_record_is_json() -> None:
    found = evaluate([True, True], [0.4, 0.9], train_y=Y)
    assert "auc" not in found.figures()
    assert {"accuracy", "brier", "majority_accuracy"} <= set(found.figures())
    assert json.loads(json.dumps(found.to_dict()))["model"]["auc"] is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_auc_is_the_chance_to_rank_a_churner_higher(rows: list[tuple[bool, int]]) -> None:
    gone = [value for churned, value in rows if churned]
    kept = [value for churned, value in rows if not churned]
    found = auc([churned for churned, _ in rows], [value for _, value in rows])
    if not gone or not kept:
        assert found is None
        return
    wins = sum((g > k) + (g == k) / 2 for g in gone for k in kept)
    assert found == pytest.approx(wins / (len(gone) * len(kept)))


def test_the_calibration_error_by_hand() -> None:
    y = np.repeat([False, True], [60, 40])
    assert calibration_error(y, np.full(100, 0.4)) == pytest.approx(0.0)
    assert calibration_error(y, np.full(100, 0.5)) == pytest.approx(0.1)
    two = np.repeat([0.1, 0.8], [60, 40])
    assert calibration_error(y, two) == pytest.approx(0.6 * 0.1 + 0.4 * 0.2)
    # Gaps of bins do not cancel: half is too high, half too low.
    assert calibration_error([False, False, True, True], [0.3, 0.3, 0.7, 0.7]) == pytest.approx(0.3)


def test_calibration_bins_are_of_equal_size_and_keep_ties_together() -> None:
    p = np.random.default_rng(1).permutation(np.linspace(0, 1, 1000))
    assert np.bincount(calibration_bins(p)).tolist() == [100] * 10
    tied = np.r_[np.zeros(850), np.linspace(0.5, 1, 150)]
    bins = calibration_bins(tied)
    assert len(set(bins[:850])) == 1
    order = np.random.default_rng(2).permutation(1000)
    np.testing.assert_array_equal(calibration_bins(tied[order]), bins[order])


def test_the_lift_of_the_top_tenth_by_hand() -> None:
    y = np.arange(100) < 20
    assert top_decile_lift(y, -np.arange(100)) == pytest.approx(5.0)
    assert top_decile_lift(y, np.arange(100)) == 0.0
    assert top_decile_lift(y, np.zeros(100)) == pytest.approx(1.0)
    half = np.where(np.arange(100) < 5, 2.0, 0.0)
    expected = (5 + 5 * 15 / 95) / 10 / 0.2
    assert top_decile_lift(y, half) == pytest.approx(expected)
    assert top_decile_lift([False, False], [0.1, 0.2]) is None
