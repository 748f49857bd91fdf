"""The drift report as a page: Evidently draws the distributions, `drift.py` has judged them."""

from __future__ import annotations

import html
import math
import os
import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from churn_assets.monitoring.drift import DriftReport, finite_values

if TYPE_CHECKING:
    import pandas as pd

    from churn_assets.monitoring.drift import Rows

STATTEST = "ks_statistic"
PROJECT = "drift"

_judged: ContextVar[DriftReport] = ContextVar("judged")


@dataclass(frozen=True)
class EvidentlyPage:
    """The page written. drifted and scores are what Evidently announces on it."""

    path: Path
    drifted: tuple[str, ...]
    scores: dict[str, float]
    reference_rows: int
    current_rows: int
    bytes: int


@dataclass(frozen=True)
class Shelf:
    """Evidently's workspace in `folder`, and the moment a report is put there as."""

    folder: Path
    at: datetime


def evidently_report(
    report: DriftReport,
    reference: Rows,
    current: Rows,
    path: Path,
    *,
    seed: int = 42,
    shelf: Shelf | None = None,
) -> EvidentlyPage:
    """Write Evidently's page of the judged features to `path`, one self-contained HTML file.

    It draws a random sample of `policy.report_rows` rows of each side, because Evidently takes
    seconds and hundreds of megabytes for what scipy does in an instant; the statistics and
    verdicts on it are those of `report`, over all rows, so that the two can never disagree.
    Insufficient features are left out; if none is left, a short page says why. With a `shelf`, what
    is drawn also goes to its workspace, where it takes the place of a report by the same name of
    page; the newest `policy.workspace_runs` stay. Works offline.
    """
    # Evidently reports its use over the network unless this is set.
    os.environ["DO_NOT_TRACK"] = "1"
    columns = [f.feature for f in report.features if f.statistic is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    if not columns:
        partial.write_text(_insufficient_page(report), encoding="utf-8")
        partial.replace(path)
        return EvidentlyPage(path, (), {}, 0, 0, path.stat().st_size)

    rng = np.random.default_rng(seed)
    then = _sample(reference, columns, report.policy.report_rows, rng)
    now = _sample(current, columns, report.policy.report_rows, rng)
    token = _judged.set(report)
    try:
        at = shelf.at if shelf else None
        snapshot = _run(then, now, columns, report.policy.alert_above, at)
        snapshot.save_html(str(partial))
        partial.replace(path)
        if shelf:
            _put_on(shelf, snapshot, path.stem, report.policy.workspace_runs)
    finally:
        _judged.reset(token)
        partial.unlink(missing_ok=True)
    scores, drifted = _announced(snapshot, columns)
    return EvidentlyPage(path, drifted, scores, len(then), len(now), path.stat().st_size)


def _put_on(shelf: Shelf, snapshot: Any, name: str, keep: int) -> None:
    """Add a report to a workspace, and take out those it replaces and the oldest beyond `keep`."""
    with warnings.catch_warnings():
        # As in _register.
        warnings.simplefilter("ignore", DeprecationWarning)
        from evidently.ui.workspace import Workspace

    shelf.folder.mkdir(parents=True, exist_ok=True)
    workspace = Workspace.create(str(shelf.folder))
    found = workspace.search_project(PROJECT)
    project = found[0] if found else workspace.create_project(PROJECT)
    runs = {run: workspace.get_run(project.id, run) for run in workspace.list_runs(project.id)}
    workspace.add_run(project.id, snapshot, name=name)
    there = {run: stored for run, stored in runs.items() if stored is not None}
    replaced = [run for run, stored in there.items() if stored.name == name]
    others = sorted(there.keys() - set(replaced), key=lambda run: str(there[run].timestamp))
    for run in [*replaced, *others[: max(0, len(others) + 1 - keep)]]:
        workspace.delete_run(project.id, run)


def _run(
    then: pd.DataFrame,
    now: pd.DataFrame,
    columns: list[str],
    threshold: float,
    at: datetime | None,
) -> Any:
    _register()
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    # Without a definition an integer feature with few values is taken for a category.
    definition = DataDefinition(numerical_columns=columns)
    preset = DataDriftPreset(
        columns=columns,
        num_method=STATTEST,
        num_threshold=threshold,
        # One drifted feature is drift, here as in the report. Rounded down: the page shows it.
        drift_share=math.floor(1000 / len(columns)) / 1000,
    )
    return Report([preset], include_tests=True).run(
        Dataset.from_pandas(now, data_definition=definition),
        Dataset.from_pandas(then, data_definition=definition),
        timestamp=at,
    )


@cache
def _register() -> None:
    """Teach Evidently the KS statistic; its own `ks` compares the p-value with the threshold."""
    with warnings.catch_warnings():
        # Importing Evidently touches names that numpy and litestar have deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        import evidently  # noqa: F401
        from evidently.legacy.calculations.stattests.registry import StatTest, register_stattest
        from evidently.legacy.core import ColumnType

    def judged(
        reference: pd.Series, current: pd.Series, feature_type: ColumnType, threshold: float
    ) -> tuple[float, bool]:
        feature = next(f for f in _judged.get().features if f.feature == reference.name)
        assert feature.statistic is not None, f"{feature.feature} was not judged"
        return feature.statistic, feature.alert

    register_stattest(
        StatTest(
            name=STATTEST,
            display_name="K-S statistic",
            allowed_feature_types=[ColumnType.Numerical],
            default_threshold=0.15,
        ),
        judged,
    )


def _announced(snapshot: Any, columns: list[str]) -> tuple[dict[str, float], tuple[str, ...]]:
    """What the page says: the score of each feature, and which failed Evidently's drift test."""
    told = snapshot.dict()
    scores = {
        metric["config"]["column"]: float(metric["value"])
        for metric in told["metrics"]
        if metric["config"]["type"].endswith(":ValueDrift")
    }
    failed = {
        test["metric_config"]["params"].get("column")
        for test in told["tests"]
        if test["status"] == "FAIL"
    }
    return scores, tuple(column for column in columns if column in failed)


def _sample(rows: Rows, columns: list[str], size: int, rng: np.random.Generator) -> pd.DataFrame:
    """At most `size` finite values of each column, drawn without replacement."""
    import pandas as pd

    drawn = {}
    for column in columns:
        values, _ = finite_values(rows, column)
        assert values is not None
        drawn[column] = pd.Series(values[rng.permutation(len(values))[:size]])
    return pd.DataFrame(drawn)


def _insufficient_page(report: DriftReport) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(f.feature)}</td><td>{html.escape(f.reason)}</td></tr>"
        for f in report.features
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Drift: insufficient</title>"
        "<body style='font:16px/1.5 system-ui,sans-serif;max-width:44rem;margin:3rem auto'>"
        "<h1>Drift: insufficient</h1><p>There are too few rows to judge any feature. This is "
        "neither drift nor its absence.</p><table cellpadding='6'>"
        f"<tr><th align='left'>Feature</th><th align='left'>Reason</th></tr>{rows}</table>"
        "</body></html>"
    )
