from __future__ import annotations

import io
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.modeling import plots
from churn_assets.modeling.bootstrap import Resampling
from churn_assets.modeling.costs import CostPolicy, profit_curve
from churn_assets.modeling.metrics import Importance
from churn_assets.modeling.rows import rows_of
from churn_assets.modeling.split import Split

RNG = np.random.default_rng(1)
Y = RNG.random(400) < 0.4
P = np.clip(RNG.normal(np.where(Y, 0.7, 0.3), 0.15), 0, 1)


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def drawn_in(image: np.ndarray, colour: str) -> int:
    """How many pixels are exactly of a colour."""
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return int((image == wanted).all(axis=2).sum())


def test_every_plot_is_wide_enough_to_read_at_700_pixels(frame: pd.DataFrame, split: Split) -> None:
    importance = [Importance(name, 0.1 / (i + 1), 0.01) for i, name in enumerate(FEATURE_NAMES)]
    made = [
        plots.importance_plot(importance),
        plots.confusion_matrix_plot(Y, P),
        plots.roc_plot(Y, P, recency=P * 90),
        plots.reliability_plot(Y, P),
        plots.score_histogram(Y, P),
        plots.profit_plot(profit_curve(Y, P, CostPolicy(), Resampling(50), seed=1)),
        plots.feature_distributions(rows_of(frame, [split.test]), FEATURE_NAMES),
    ]
    for png in made:
        image = pixels(png)
        assert image.shape[1] == round(plots.WIDTH_INCHES * plots.DPI)
        assert image.std() > 5
        assert len(png) < 200_000
    assert len(set(made)) == len(made)


def test_figures_over_time_are_drawn_with_their_limit() -> None:
    day = datetime(2026, 3, 1, tzinfo=UTC)
    points = [(day + timedelta(days=n), 0.9 - n / 100) for n in range(5)]
    png = plots.over_time_plot({"accuracy": points, "nothing": []}, "So", "", limit=0.8)
    image = pixels(png)
    assert drawn_in(image, plots.MODEL) > 100
    assert drawn_in(image, plots.CHURNED) == 0
    assert pixels(plots.over_time_plot({}, "Nothing yet", "")).shape[1] > 700


def test_the_recency_baseline_is_drawn_when_given() -> None:
    assert drawn_in(pixels(plots.roc_plot(Y, P)), plots.CHURNED) == 0
    assert drawn_in(pixels(plots.roc_plot(Y, P, recency=P)), plots.CHURNED) > 50


def test_plots_leave_no_global_state() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.score_histogram(Y, P)
    assert dict(matplotlib.rcParams) == before
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def test_the_same_figures_give_the_same_bytes() -> None:
    assert plots.reliability_plot(Y, P) == plots.reliability_plot(Y, P)


@pytest.mark.parametrize("only", [True, False])
def test_one_class_can_still_be_drawn(only: bool) -> None:
    y = np.full(20, only)
    p = np.linspace(0, 1, 20)
    for png in (
        plots.roc_plot(y, p, recency=p),
        plots.reliability_plot(y, p),
        plots.confusion_matrix_plot(y, p),
        plots.score_histogram(y, p),
    ):
        pixels(png)


@pytest.mark.parametrize(
    "values", [[], [np.nan, np.nan], [3.0], [0.0] * 50, [0.0, 1e9], list(range(5000))]
)
def test_features_of_any_shape_can_be_drawn(values: list[float]) -> None:
    pixels(
        plots.feature_distributions({"total_orders_30d": np.array(values)}, ["total_orders_30d"])
    )


def test_importance_below_zero_is_drawn() -> None:
    pixels(plots.importance_plot([Importance("a", -0.01, 0.001), Importance("b", 0.0, 0.0)]))
