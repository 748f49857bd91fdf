"""The newest of every metric as a page that Prometheus reads.

Format: Prometheus text exposition, version 0.0.4. Daily and hourly figures have no server of their
own that could be scraped; the page stays as it is between two runs, and says how old it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

from churn_assets.monitoring.metric import Metric, Verdict

VALUE, LIMIT, VERDICT, AT = (
    "churn_metric",
    "churn_metric_limit",
    "churn_metric_verdict",
    "churn_metric_timestamp_seconds",
)
HELP = {
    VALUE: "Newest value of a watched metric; absent where there was too little to measure",
    LIMIT: "What the value is held against",
    VERDICT: "1 for the verdict of the newest measurement, else 0: ok, alert or insufficient",
    AT: "When it was measured, operational time in seconds since the epoch",
}
# Prometheus 3 refuses a page whose type it does not know.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def newest(metrics: Iterable[Metric]) -> dict[str, Metric]:
    """The last measurement of each name, in the order of the names."""
    found: dict[str, Metric] = {}
    for metric in metrics:
        if metric.name not in found or metric.at >= found[metric.name].at:
            found[metric.name] = metric
    return dict(sorted(found.items()))


def exposition(metrics: Iterable[Metric]) -> str:
    """The page of `metrics`, a series in the order it was measured in."""
    last = newest(metrics)
    samples: dict[str, list[str]] = {name: [] for name in HELP}
    for metric in last.values():
        of = {"name": metric.name}
        if metric.value is not None:
            samples[VALUE].append(_sample(VALUE, of, metric.value))
        samples[LIMIT].append(_sample(LIMIT, of, metric.limit))
        for verdict in get_args(Verdict):
            is_it = float(verdict == metric.verdict)
            samples[VERDICT].append(_sample(VERDICT, of | {"verdict": verdict}, is_it))
        samples[AT].append(_sample(AT, of, metric.at.timestamp()))
    return "".join(
        f"# HELP {name} {HELP[name]}\n# TYPE {name} gauge\n" + "".join(lines)
        for name, lines in samples.items()
        if lines
    )


def write_exposition(metrics: Iterable[Metric], path: Path) -> None:
    """Write the page of `metrics` to `path`; whoever reads it meanwhile has the former one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}-{os.getpid()}")
    written.write_text(exposition(metrics), encoding="utf-8")
    written.replace(path)


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    told = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{told}}} {value!r}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
