"""The model card: what a version is, what it was shown to do and where it came from, for a person.

After Mitchell et al., Model Cards for Model Reporting (FAT* 2019). Everything on it is written from
the evidence of the judgement, which is kept beside it, so that it can be written again when a bento
has been made of the version.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

from churn_assets.contract.features import features_named
from churn_assets.errors import UserError
from churn_assets.lifecycle.records import EvaluationRecord
from churn_assets.modeling.bootstrap import interval_text
from churn_assets.modeling.calibration import MARGIN

EVIDENCE, MARKDOWN, PAGE = "evidence.json", "card.md", "card.html"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #22272b; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #e3e6e8; }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e3e6e8; }
img { max-width: 100%; } code { overflow-wrap: anywhere; }
"""


class About(msgspec.Struct, frozen=True):
    """What the settings say that a card needs.

    mlflow_url: of the run that trained the version. commit: of the code, as that run has it.
    """

    team: str
    use_case: str
    source: str
    activity_days: int
    horizon_days: int
    decision_threshold: float
    confidence: float
    offer: float
    customer_value: float
    success_rate: float
    mlflow_url: str
    commit: str


class Evidence(msgspec.Struct, frozen=True):
    """All a card is written from."""

    record: EvaluationRecord
    about: About
    bento: str | None = None


@dataclass(frozen=True)
class Card:
    """A written card: its folder with card.md, card.html, the plots and the evidence."""

    folder: Path
    markdown: str

    @property
    def page(self) -> Path:
        """The card as one HTML file."""
        return self.folder / PAGE


def write_card(folder: Path, evidence: Evidence, plots: Mapping[str, bytes]) -> Card:
    """Write the card of a version into `folder`; `plots` are PNG by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in plots.items():
        (folder / f"{name}.png").write_bytes(png)
    return _write(folder, evidence)


def add_bento(folder: Path, bento: str) -> Card | None:
    """Write the card in `folder` again, with the bento that was made of the version.

    None when there is no card. Raises UserError when its evidence cannot be read.
    """
    path = folder / EVIDENCE
    if not path.exists():
        return None
    try:
        evidence = msgspec.json.decode(path.read_bytes(), type=Evidence)
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate the version again") from error
    return _write(folder, msgspec.structs.replace(evidence, bento=bento))


def _write(folder: Path, evidence: Evidence) -> Card:
    shown = [name for name in _PLOTS if (folder / f"{name}.png").exists()]
    markdown = card_markdown(evidence, shown)
    for name, content in (
        (EVIDENCE, msgspec.json.format(msgspec.json.encode(evidence))),
        (MARKDOWN, markdown.encode()),
        (PAGE, _page(markdown, folder, evidence).encode()),
    ):
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(content)
        temporary.replace(folder / name)
    return Card(folder, markdown)


def _page(markdown: str, folder: Path, evidence: Evidence) -> str:
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for path in folder.glob("*.png"):
        inline = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="{path.name}"', f'src="data:image/png;base64,{inline}"')
    model = evidence.record.model
    title = html.escape(f"{model.name}, version {model.version}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


def card_markdown(evidence: Evidence, plots: Sequence[str] = ()) -> str:
    """The card as Markdown; `plots` names the PNG files that lie beside it."""
    sections = (_heading, _use, _data, _choice, _figures, _segments, _offers, _limits, _lineage)
    parts = [line for section in sections for line in (*section(evidence, plots), "")]
    return "\n".join(parts).rstrip() + "\n"


def _heading(evidence: Evidence, plots: Sequence[str]) -> Iterable[str]:
    record = evidence.record
    model = record.model
    yield f"# {model.name}, version {model.version}"
    yield ""
    verdict = "passed every gate" if record.passed else "**was refused by the gates**"
    judged = f"{record.at:%Y-%m-%d %H:%M} UTC" if record.at else "an unknown time"
    yield f"A {model.family.replace('_', ' ')}, judged at {judged}. It {verdict}."
    yield ""
    yield from _table(
        [
            {"gate": gate.name, "passed": "yes" if gate.passed else "**no**", "why": gate.reason}
            for gate in record.gates
        ]
    )


def _use(evidence: Evidence, plots: Sequence[str]) -> Iterable[str]:
    about = evidence.about
    yield "## What it is for"
    yield f"Use case: {about.use_case}. Owner: team {about.team}."
    yield ""
    yield (
        f"It gives the probability that a customer who ordered within the last "
        f"{about.activity_days} days places no order in the next {about.horizon_days}. It says "
        "nothing about customers who have not ordered for longer, nor why anybody leaves, nor whom "
        "an offer would keep."
    )


def _data(evidence: Evidence, plots: Sequence[str]) -> Iterable[str]:
    data = evidence.record.model.training_set
    horizon = timedelta(days=evidence.about.horizon_days)
    yield "## Data"
    yield (
        f"{evidence.about.source}; {data.rows:,} rows, {data.churn_rate:.1%} churned. Every row is "
        "a customer as known at the end of a day; parts lie at least one horizon apart, so that no "
        "outcome of one reaches into the next."
    )
    yield ""
    yield from _table(
        [
            {"part": part, "days": days, "outcomes known by": str(last + horizon)}
            for part, days, last in (
                ("training", ", ".join(map(str, data.train)), data.train[-1]),
                ("calibration", str(data.calibration), data.calibration),
                ("held out", str(data.test), data.test),
            )
        ]
    )
    yield ""
    yield from _table(
        [
            {"feature": f.name, "meaning": f.meaning, "unit": f.unit}
            for f in features_named(data.features)
        ]
    )


def _choice(evidence: Evidence, plots: Sequence[str]) -> Iterable[str]:
    chosen = evidence.record.model.choice
    yield "## How it was chosen"
    if chosen is None:
        yield "The record does not say."
        return
    yield (
        f"{chosen.reason}. Candidates compared: {chosen.candidates}. The backtest repeated the "
        "whole procedure on earlier days:"
    )
    yield ""
    yield from _table(
        [
            {
                "judged on": str(fold.judged),
                "calibrated on": str(fold.calibrated or "-"),
                "trained on": f"{fold.trained_first} to {fold.trained_last}",
                "rows": f"{fold.rows:,}",
                "log loss": _number(fold.log_loss),
                "AUC": _number(fold.auc),
                "AUC of recency alone": _number(fold.recency_auc),
            }
            for fold in chosen.backtest
        ]
    )
    yield ""
    line = chosen.calibration
    yield (
        f"Calibrated on {line.rows:,} customers: log-odds x {line.slope:.3f} "
        f"{line.intercept:+.3f}; log loss there {line.log_loss_before:.4f} before, "
        f"{line.log_loss_after:.4f} after."
    )
    parameters = ", ".join(f"{name} {_number(value)}" for name, value in chosen.params.items())
    yield ""
    difference = _number(evidence.record.model.parity_max_difference)
    yield (
        f"Parameters: {parameters}. ONNX and scikit-learn differ by at most {difference} on the "
        "held-out rows."
    )


_TITLES = {
    "auc": "AUC",
    "pr_auc": "average precision",
    "accuracy": "accuracy",
    "f1": "F1",
    "log_loss": "log loss",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "top_decile_lift": "lift of the top tenth",
}
_PLOTS = ("reliability", "roc", "scores", "confusion_matrix", "importance", "profit")


def _figures(evidence: Evidence, plots: Sequence[str]) -> Iterable[str]:
    record, about = evidence.record, evidence.about
    metrics = record.metrics
    yield "## How good it is"
    yield (
        f"On {metrics['rows']:,.0f} held-out customers of {record.model.training_set.test}, "
        f"{metrics['churn_rate']:.1%} of whom churned; intervals of {about.confidence:.0%}. "
        f"Accuracy and F1 at P(churn) > {about.decision_threshold:g}."
    )
    yield ""
    yield from _table(
        [
            {
                "figure": title,
                "model": interval_text(record.intervals[name]),
                "recency alone": _number(metrics.get(f"recency_{name}")),
                "majority": _number(metrics.get(f"majority_{name}")),
            }
            for name, title in _TITLES.items()
            if name in record.intervals
        ]
    )
    yield ""
    if "oracle_auc" in metrics:
        yield (
            f"An oracle that knows what the simulator knows has an AUC of "
            f"{metrics['oracle_auc']:.4f}."
        )
        yield ""
    yield "The model minus others, on the same customers (below 0 is better for losses):"
    yield ""
    yield from _table(
        [
            {"minus": other}
            | {_TITLES[name]: interval_text(found) for name, found in differences.items()}
            for other, differences in record.against.items()
        ]
    )
    yield ""
    if record.paired_replay is None:
        yield "There was no model in production to compare with, or it could not be asked."
        yield ""
    times = [
        f"{title} p50 {metrics[p50]:.3g}, p95 {metrics[p95]:.3g}, p99 {metrics[p99]:.3g} ms"
        for title, p50, p95, p99 in (
            ("over HTTP", "p50_latency_ms", "p95_latency_ms", "p99_latency_ms"),
            ("in the ONNX session", "session_p50_ms", "session_p95_ms", "session_p99_ms"),
        )
        if p50 in metrics
    ]
    yield f"Latency of one prediction: {'; '.join(times) or 'not measured'}."
    for name in plots:
        if name != "profit":
            yield ""
            yield f"![{name}]({name}.png)"


def _segments(evidence: Evidence, plots: Sequence[str]) -> Iterable[str]:
    yield "## For whom"
    yield from _table(
        [
            {
                "by": segment.by,
                "segment": segment.name,
                "customers": f"{segment.rows:,}",
                "churned": f"{segment.churn_rate:.1%}",
                "AUC": interval_text(segment.figures["auc"]),
                "accuracy": interval_text(segment.figures["accuracy"]),
                "log loss": interval_text(segment.figures["log_loss"]),
                "calibration error": interval_text(segment.figures["calibration_error"]),
                "judged by": segment.too_small or "yes",
            }
            for segment in evidence.record.segments
        ]
    )


def _offers(evidence: Evidence, plots: Sequence[str]) -> Iterable[str]:
    about, profit = evidence.about, evidence.record.profit
    yield "## Whom to make an offer"
    if profit is None:
        yield "The record does not say."
        return
    yield (
        f"An offer costs {about.offer:g}, a customer who stays is worth {about.customer_value:g}, "
        f"and an offer keeps {about.success_rate:.0%} of those about to leave; so it pays above "
        f"P(churn) = {profit.threshold:.3f}, which is {profit.offered:.1%} of the customers. "
        f"Profit a customer: {interval_text(profit.profit)}; the best threshold in hindsight, "
        f"{profit.best_threshold:.2f}, {profit.best_profit:.4f}; an offer to everyone "
        f"{profit.everyone:.4f}; knowing who leaves {profit.perfect:.4f}."
    )
    if "profit" in plots:
        yield ""
        yield "![profit](profit.png)"


def _limits(evidence: Evidence, plots: Sequence[str]) -> Iterable[str]:
    yield "## Limits"
    yield from (f"- {limit}" for limit in limits_of(evidence))


def limits_of(evidence: Evidence) -> list[str]:
    """What the evidence does not show, a sentence each."""
    record, about = evidence.record, evidence.about
    found = []
    if record.held_out_use is not None:
        found.append(_sentence(record.held_out_use.sentence))
    found += [_sentence(f"gate {g.name}: {g.reason}") for g in record.gates if not g.passed]
    chosen = record.model.choice
    if chosen is not None and len(chosen.backtest) < chosen.folds_wanted:
        found.append(
            f"The history had room for {len(chosen.backtest)} of {chosen.folds_wanted} folds of "
            "the backtest."
        )
    if chosen is not None and any(fold.calibrated is None for fold in chosen.backtest):
        found.append("The backtest was too short to calibrate within it.")
    if chosen is not None and chosen.candidates < chosen.trials_wanted:
        found.append(
            f"The search ended by its time budget after {chosen.candidates} of "
            f"{chosen.trials_wanted} trials."
        )
    small = [f"{s.by}: {s.name} ({s.too_small})" for s in record.segments if s.too_small]
    if small:
        found.append(f"Too small to judge by: {'; '.join(small)}.")
    if not any(segment.by == "tenure" for segment in record.segments):
        found.append("Nothing is known by tenure.")
    rate = record.metrics["churn_rate"] - record.metrics["mean_prediction"]
    found.append(
        f"Judged on one window: on it P(churn) was {abs(rate):.3f} too "
        f"{'low' if rate > 0 else 'high'} on average; another season may differ."
    )
    found.append(
        "Profits assume that offers work as the settings say; nothing here was measured on offers."
    )
    found.append(
        f"Probabilities are of the next {about.horizon_days} days, and kept between {MARGIN:g} and "
        f"{1 - MARGIN:g} before they are calibrated."
    )
    return found


def _lineage(evidence: Evidence, plots: Sequence[str]) -> Iterable[str]:
    model = evidence.record.model
    yield "## Where it comes from"
    yield from _table(
        [
            {"step": step, "id": f"`{found}`" if found else "none yet"}
            for step, found in (
                ("data hash", model.training_set.data_hash),
                ("Dagster run", model.dagster_run),
                ("MLflow run", model.mlflow_run),
                ("code", evidence.about.commit),
                ("version", f"{model.name} {model.version}"),
                ("release", evidence.record.release_id),
                ("bento", evidence.bento),
            )
        ]
    )
    yield ""
    yield f"`churn lineage {model.version}` says the same. MLflow: <{evidence.about.mlflow_url}>"


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """A Markdown table of rows that have the same keys."""
    if not rows:
        yield "Nothing."
        return
    yield f"| {' | '.join(rows[0])} |"
    yield f"|{'---|' * len(rows[0])}"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row.values())} |"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
