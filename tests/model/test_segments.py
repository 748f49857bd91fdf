from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from churn_assets.modeling.bootstrap import Resampling
from churn_assets.modeling.metrics import auc
from churn_assets.modeling.segments import judge_segments, lowest_auc, segment_masks


def rows(count: int) -> pd.DataFrame:
    rng = np.random.default_rng(4)
    return pd.DataFrame(
        {
            "total_orders_30d": rng.integers(0, 4, count),
            "avg_order_value": rng.lognormal(3, 1, count),
        }
    )


def judged(masks, y, p, least: int = 50):
    return judge_segments(
        masks, y, p, Resampling(50), threshold=0.5, least_rows=least, seed=1
    )  # fmt: skip


def test_every_row_is_in_one_segment_of_each_kind() -> None:
    test, tenure = rows(500), np.arange(500)
    masks = segment_masks(test, rows(900), tenure)
    for by in ("tenure", "value", "activity"):
        kind = np.stack([mask for (what, _), mask in masks.items() if what == by])
        assert (kind.sum(axis=0) == 1).all()
    assert masks["tenure", "under 90 days"].sum() == 90
    assert masks["tenure", "365 days or more"].sum() == 135
    assert masks["activity", "no order in 30 days"].sum() == (test.total_orders_30d == 0).sum()


def test_edges_come_from_the_training_rows() -> None:
    train, test = rows(900), rows(500)
    before = segment_masks(test, train, None)
    after = segment_masks(test.assign(avg_order_value=test.avg_order_value * 10), train, None)
    assert list(before) == list(after)
    assert ("tenure", "under 90 days") not in before


def test_what_a_source_does_not_have_is_no_segment() -> None:
    only = rows(50)[["total_orders_30d"]]
    assert {by for by, _ in segment_masks(only, only, None)} == {"activity"}
    unknown = np.full(50, np.nan)
    found = segment_masks(only, only, unknown)
    assert not any(mask.any() for (by, _), mask in found.items() if by == "tenure")


def test_a_segment_that_collapses_is_found() -> None:
    rng = np.random.default_rng(1)
    y = rng.random(600) < 0.4
    p = np.where(y, 0.7, 0.3) + rng.normal(0, 0.1, 600)
    lost = np.arange(600) < 200
    p[lost] = rng.random(200)
    p = p.clip(0, 1)
    segments = judged({("activity", "lost"): lost, ("activity", "kept"): ~lost}, y, p)
    weakest = lowest_auc(segments)
    assert weakest is not None
    assert weakest[1].name == "lost"
    assert weakest[0] == pytest.approx(auc(y[lost], p[lost]))
    assert weakest[0] < 0.6
    low, high = (segments[0].figures["auc"].low, segments[0].figures["auc"].high)
    assert low is not None
    assert high is not None
    assert low < weakest[0] < high


def test_a_segment_too_small_is_shown_but_not_judged_by() -> None:
    y = np.arange(400) % 2 == 0
    p = np.where(y, 0.9, 0.1)
    few, one_sided = np.arange(400) < 20, y | (np.arange(400) < 9)
    segments = judged({("a", "few"): few, ("a", "one"): one_sided}, y, 1 - p)
    assert [s.too_small for s in segments] == [
        "20 rows, fewer than 50",
        "4 customers stayed, fewer than 10",
    ]
    assert lowest_auc(segments) is None
    assert judged({("a", "none"): np.zeros(400, dtype=bool)}, y, p) == ()
