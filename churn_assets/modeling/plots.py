"""Pictures of a model and its data, as PNG bytes. No global state: every figure is its own."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from churn_assets.modeling.costs import ProfitCurve
from churn_assets.modeling.metrics import Importance, auc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by lightness too, so they survive print and colour blindness.
CHURNED = "#c8553d"
RETAINED = "#2a6f97"
MODEL = "#1d3557"
REFERENCE = "#8a939c"
INK = "#22272b"
GRID = "#e3e6e8"

WIDTH_INCHES = 7.0
DPI = 144


def importance_plot(importance: Sequence[Importance]) -> bytes:
    """The AUC each feature is worth, largest on top, with the spread over the shuffles."""
    ordered = list(reversed(importance))
    figure = _figure(1.4 + 0.42 * len(ordered))
    axes = figure.add_subplot()
    means = [item.mean for item in ordered]
    axes.barh(
        [item.feature for item in ordered],
        means,
        xerr=[item.std for item in ordered],
        color=MODEL,
        error_kw={"ecolor": REFERENCE, "capsize": 3},
        height=0.62,
    )
    reach = max([item.mean + item.std for item in ordered] + [1e-3])
    for row, item in enumerate(ordered):
        end = max(item.mean + item.std, 0.0)
        axes.text(end + 0.015 * reach, row, f"{item.mean:.3f}", va="center", color=INK, fontsize=9)
    axes.set_xlim(min(0.0, *means) * 1.05, reach * 1.14)
    axes.axvline(0, color=INK, linewidth=0.8)
    _style(axes, "Permutation importance", "AUC lost when the feature is shuffled", "", grid="x")
    return _png(figure)


def confusion_matrix_plot(y: ArrayLike, p: ArrayLike, *, threshold: float = 0.5) -> bytes:
    """Predicted against actual outcome, in customers and in share of each actual outcome."""
    truth = np.asarray(y, dtype=np.bool_)
    predicted = np.asarray(p, dtype=np.float64) > threshold
    counts = np.array(
        [
            [np.sum(~truth & ~predicted), np.sum(~truth & predicted)],
            [np.sum(truth & ~predicted), np.sum(truth & predicted)],
        ]
    )
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = _figure(4.4)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for row in range(2):
        for column in range(2):
            share = shares[row, column]
            axes.text(
                column,
                row,
                f"{counts[row, column]:,}\n{share:.1%}",
                ha="center",
                va="center",
                fontsize=14,
                color="white" if share > 0.6 else INK,
            )
    axes.set_xticks([0, 1], ["retained", "churned"])
    axes.set_yticks([0, 1], ["retained", "churned"], rotation=90, va="center")
    accuracy = float((truth == predicted).mean()) if truth.size else float("nan")
    _style(
        axes,
        f"Confusion matrix at P(churn) > {threshold:g}: accuracy {accuracy:.3f}",
        "Predicted",
        "Actual",
        grid=None,
    )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _png(figure)


def roc_plot(y: ArrayLike, p: ArrayLike, *, recency: ArrayLike | None = None) -> bytes:
    """ROC of the model, beside days since the last order alone and chance."""
    from sklearn.metrics import roc_curve

    truth = np.asarray(y, dtype=np.bool_)
    figure = _figure(5.0)
    axes = figure.add_subplot()
    lines = [("Model", p, MODEL, "-")]
    if recency is not None:
        lines.append(("Recency alone", recency, CHURNED, "-"))
    for name, ranking, colour, style in lines:
        area = auc(truth, ranking)
        if area is None:
            continue
        false_positive, true_positive, _ = roc_curve(truth, np.asarray(ranking, dtype=np.float64))
        label = f"{name}, AUC {area:.3f}"
        axes.plot(false_positive, true_positive, style, color=colour, linewidth=2, label=label)
    axes.plot([0, 1], [0, 1], ":", color=REFERENCE, linewidth=1.5, label="Chance, AUC 0.500")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    _style(
        axes,
        "ROC on the held-out window",
        "Retained customers flagged (false positive rate)",
        "Churned customers flagged\n(true positive rate)",
    )
    axes.legend(loc="lower right", frameon=False, fontsize=10)
    return _png(figure)


def reliability_plot(y: ArrayLike, p: ArrayLike, *, bins: int = 10) -> bytes:
    """Predicted probability against the share that churned, in bins of equally many customers.

    The bars are 95 % Wilson intervals; a calibrated model lies on the diagonal.
    """
    truth, probability = np.asarray(y, dtype=np.float64), np.asarray(p, dtype=np.float64)
    order = np.argsort(probability, kind="stable")
    groups = [g for g in np.array_split(order, min(bins, len(order))) if len(g)]
    predicted = np.array([probability[g].mean() for g in groups])
    observed = np.array([truth[g].mean() for g in groups])
    sizes = np.array([len(g) for g in groups])
    low, high = _wilson(observed, sizes)

    figure = _figure(5.0)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], ":", color=REFERENCE, linewidth=1.5, label="Perfectly calibrated")
    axes.errorbar(
        predicted,
        observed,
        yerr=[observed - low, high - observed],
        color=MODEL,
        ecolor=REFERENCE,
        marker="o",
        markersize=6,
        linewidth=1.2,
        capsize=3,
        label="Model, with 95 % interval",
    )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    gap = abs(probability.mean() - truth.mean())
    _style(
        axes,
        f"Reliability: mean P {probability.mean():.3f}, churned {truth.mean():.3f} (gap {gap:.3f})",
        "Predicted P(churn)",
        "Share that churned",
    )
    axes.legend(loc="upper left", frameon=False, fontsize=10)
    return _png(figure)


def score_histogram(y: ArrayLike, p: ArrayLike, *, threshold: float = 0.5) -> bytes:
    """How P(churn) is spread over those who churned and those who stayed."""
    truth, probability = np.asarray(y, dtype=np.bool_), np.asarray(p, dtype=np.float64)
    figure = _figure(4.0)
    axes = figure.add_subplot()
    edges = np.linspace(0, 1, 41).tolist()
    for chosen, colour, name in ((~truth, RETAINED, "Retained"), (truth, CHURNED, "Churned")):
        axes.hist(
            np.clip(probability[chosen], 0, 1),
            bins=edges,
            color=colour,
            alpha=0.62,
            label=f"{name} ({int(chosen.sum()):,})",
        )
    axes.axvline(threshold, color=INK, linewidth=1.2, linestyle="--", label=f"P = {threshold:g}")
    axes.set_xlim(0, 1)
    _style(axes, "Predicted P(churn) by outcome", "Predicted P(churn)", "Customers", grid="y")
    _thousands(axes)
    axes.legend(loc="upper center", framealpha=1, edgecolor="white", fontsize=10)
    return _png(figure)


def profit_plot(curve: ProfitCurve) -> bytes:
    """What an offer to everyone above a P(churn) would have earned, a customer."""
    figure = _figure(4.2)
    axes = figure.add_subplot()
    axes.plot(curve.thresholds, curve.profits, color=MODEL, linewidth=2, label="Model")
    axes.axhline(curve.perfect, color=REFERENCE, linestyle=":", label="Knowing who leaves")
    axes.axhline(curve.everyone, color=CHURNED, linestyle=":", label="An offer to everyone")
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(
        curve.threshold,
        color=INK,
        linestyle="--",
        linewidth=1.2,
        label=f"The cost matrix: P = {curve.threshold:.3f}",
    )
    low = min(0.0, curve.everyone, *(p for p in curve.profits if p > -curve.perfect))
    span = curve.perfect - low
    axes.set_ylim(low - 0.05 * span, curve.perfect + 0.08 * span)
    axes.set_xlim(0, 1)
    _style(axes, "Profit of offers", "Offer to customers with P(churn) above", "Profit a customer")
    axes.legend(loc="lower right", framealpha=1, edgecolor="white", fontsize=9.5)
    return _png(figure)


def feature_distributions(
    rows: Mapping[str, Any] | Any, features: Sequence[str], *, title: str = "Features"
) -> bytes:
    """A histogram of each feature, with its median, for the rows of one or more partitions.

    rows: anything that gives a column by name. The axis ends at the 99.5th percentile, and says
    how many customers lie beyond it.
    """
    columns = 2 if len(features) > 1 else 1
    height = -(-len(features) // columns)
    figure = _figure(0.7 + 2.25 * height)
    for position, feature in enumerate(features):
        axes = figure.add_subplot(height, columns, position + 1)
        values = np.asarray(rows[feature], dtype=np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            axes.text(0.5, 0.5, "no values", ha="center", va="center", color=REFERENCE)
            _style(axes, feature, "", "", grid=None)
            continue
        median = float(np.median(values))
        top = float(np.percentile(values, 99.5))
        shown = values[values <= top]
        axes.hist(shown, bins=_bins(shown), color=RETAINED, rwidth=0.94)
        axes.axvline(median, color=INK, linewidth=1.2, linestyle="--")
        beyond = len(values) - len(shown)
        note = f"median {median:,.4g}" + (f"\n{beyond:,} beyond {top:,.4g}" if beyond else "")
        axes.text(
            0.97,
            0.94,
            note,
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=8.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )
        _style(axes, feature, "", "Customers" if position % columns == 0 else "", grid="y")
        axes.title.set_fontsize(10.5)
        _thousands(axes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    return _png(figure)


def _bins(values: np.ndarray) -> list[float]:
    """About thirty bins; values on a grid (counts, sevenths) get equally many grid points each."""
    low, high = float(values.min()), float(values.max())
    distinct = np.unique(values)
    step = float(np.diff(distinct).min()) if len(distinct) > 1 else 1.0
    points = (high - low) / step + 1
    if points > 1000:
        return np.linspace(low, high, 31).tolist()
    width = step * max(1, round(points / 30))
    return np.arange(low - step / 2, high + width, width).tolist()


def _wilson(share: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a proportion (JASA 22, 1927), never outside of [0, 1]."""
    z = 1.959964
    centre = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z * np.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2)) / (1 + z**2 / rows)
    return np.minimum(centre - half, share), np.maximum(centre + half, share)


def over_time_plot(
    series: Mapping[str, Sequence[tuple[datetime, float]]],
    title: str,
    y: str,
    *,
    limit: float | None = None,
) -> bytes:
    """Figures over time, a line each, oldest first, and the limit they are held against."""
    figure = _figure(4.2)
    axes = figure.add_subplot()
    for (name, points), colour in zip(
        series.items(), itertools.cycle((MODEL, CHURNED, RETAINED)), strict=False
    ):
        if not points:
            continue
        times, values = zip(*points, strict=True)
        axes.plot(times, values, color=colour, linewidth=1.8, marker="o", markersize=4, label=name)
    if limit is not None:
        axes.axhline(
            limit, color=REFERENCE, linewidth=1.2, linestyle="--", label=f"limit {limit:g}"
        )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9.5)
    _style(axes, title, "", y)
    figure.autofmt_xdate()
    return _png(figure)


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, title: str, x: str, y: str, *, grid: str | None = "both") -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(x, fontsize=10.5, color=INK)
    axes.set_ylabel(y, fontsize=10.5, color=INK)
    axes.tick_params(colors=INK, labelsize=9.5)
    axes.set_axisbelow(True)
    if grid == "both":
        axes.grid(visible=True, color=GRID, linewidth=0.8)
    elif grid is not None:
        axes.grid(visible=True, axis="x" if grid == "x" else "y", color=GRID, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(REFERENCE)


def _thousands(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
