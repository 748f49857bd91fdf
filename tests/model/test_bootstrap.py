from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from churn_assets.errors import UserError
from churn_assets.modeling.bootstrap import (
    FIGURES,
    Interval,
    Resampling,
    Scored,
    differences,
    interval_text,
    intervals,
)
from churn_assets.modeling.metrics import score


def drawn(rows: int, seed: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-rng.normal(-1, spread, rows)))
    return rng.random(rows) < p, p


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=60))
def test_the_figures_are_those_of_the_metrics_also_with_ties(rows: list[tuple[bool, int]]) -> None:
    y, p = np.array([r[0] for r in rows]), np.array([r[1] for r in rows]) / 6
    found, known = intervals(Scored(y, p), Resampling(50), seed=1), score(y, p)
    for name in FIGURES:
        value, expected = found[name].value, getattr(known, name)
        if expected is None:
            assert value is None
        else:
            assert value == pytest.approx(expected, abs=1e-9), name


def test_a_weight_of_two_is_the_row_twice() -> None:
    y, p = drawn(40, 1)
    counts = np.random.default_rng(2).integers(0, 4, 40)
    weighted = Scored(y, p).figures(counts[None, :].astype(float))
    repeated = score(np.repeat(y, counts), np.repeat(p, counts))
    for name in set(FIGURES) - {"calibration_error"}:
        assert weighted[name][0] == pytest.approx(getattr(repeated, name), abs=1e-9), name


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    truth = score(*drawn(400_000, 99))
    hits = {"auc": 0, "log_loss": 0, "brier": 0}
    runs = 120
    for seed in range(runs):
        found = intervals(Scored(*drawn(600, seed)), Resampling(200), seed=seed)
        for name in hits:
            one = found[name]
            assert one.low is not None
            assert one.high is not None
            assert one.value is not None
            assert one.low < one.value < one.high
            hits[name] += one.low <= getattr(truth, name) <= one.high
    for name, count in hits.items():
        assert 0.87 <= count / runs <= 1.0, name


def test_the_same_seed_gives_the_same_interval_however_the_weights_are_cut(monkeypatch) -> None:
    scored = Scored(*drawn(300, 5))
    first = intervals(scored, Resampling(60), seed=3)
    monkeypatch.setattr("churn_assets.modeling.bootstrap._WEIGHTS", 900)
    again = intervals(scored, Resampling(60), seed=3)
    for name, one in first.items():
        assert again[name].low == pytest.approx(one.low, abs=1e-12)
        assert again[name].high == pytest.approx(one.high, abs=1e-12)
    assert intervals(scored, Resampling(60), seed=4)["auc"] != first["auc"]


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    y, p = drawn(3000, 8)
    noisy = 1 / (1 + np.exp(-(np.log(p / (1 - p)) + np.random.default_rng(1).normal(0, 0.6, 3000))))
    paired = differences(Scored(y, p), Scored(y, noisy), Resampling(), seed=1)["log_loss"]
    alone = intervals(Scored(y, p), Resampling(), seed=1)["log_loss"]
    assert paired.value == pytest.approx(score(y, p).log_loss - score(y, noisy).log_loss)
    assert paired.high is not None
    assert paired.low is not None
    assert alone.high is not None
    assert alone.low is not None
    assert paired.high < 0
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)
    nothing = differences(Scored(y, p), Scored(y, p), Resampling(), seed=1)
    assert set(nothing.values()) == {Interval(0.0, 0.0, 0.0)}


def test_other_rows_are_no_pair() -> None:
    y, p = drawn(50, 1)
    with pytest.raises(ValueError, match="same rows"):
        differences(Scored(y, p), Scored(~y, p), Resampling(), seed=1)


def test_rows_of_a_customer_are_drawn_together() -> None:
    y, p = drawn(200, 6)
    many = np.repeat(np.arange(200), 10)
    alone = intervals(Scored(np.repeat(y, 10), np.repeat(p, 10)), Resampling(), seed=1)["auc"]
    together = intervals(
        Scored(np.repeat(y, 10), np.repeat(p, 10)), Resampling(), seed=1, customers=many
    )["auc"]
    once = intervals(Scored(y, p), Resampling(), seed=1)["auc"]
    assert together == once
    assert alone.high is not None
    assert alone.low is not None
    assert once.high is not None
    assert once.low is not None
    assert alone.high - alone.low < 0.6 * (once.high - once.low)


def test_a_figure_without_a_value_has_no_interval() -> None:
    found = intervals(Scored([True, True], [0.4, 0.9]), Resampling(50), seed=1)
    assert found["auc"] == Interval(None, None, None)
    assert interval_text(found["auc"]) == "-"
    rare = intervals(Scored([True] + [False] * 9, np.linspace(0, 1, 10)), Resampling(200), seed=1)
    assert rare["auc"].value == 0.0
    assert rare["auc"].low is None
    assert interval_text(rare["auc"]) == "0.0000"


@pytest.mark.parametrize(
    ("change", "named"),
    [({"resamples": 0}, "resamples"), ({"confidence": 1.0}, "confidence"),
     ({"confidence": float("nan")}, "confidence")],
)  # fmt: skip
def test_nonsense_is_refused(change: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=f"evaluation.{named}"):
        Resampling(**change)  # ty: ignore
