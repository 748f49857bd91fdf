"""The drill's report: a table for the terminal, report.json, and report.html for people."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from churn_assets.drill.outcome import HARM, Day, Outcome

_WIDTH, _HEIGHT = 760, 190
_LEFT, _BOTTOM, _TOP = 44, 26, 12


class Goal(NamedTuple):
    """Something the drill is to show, and whether it did."""

    met: bool
    text: str


def goals(outcomes: Sequence[Outcome]) -> list[Goal]:
    """What the drill is to show, of the cases that were run."""
    harmful = [one for one in outcomes if one.harmful]
    missed = [one.name for one in harmful if not one.detected]
    unhealed = [one.name for one in harmful if not one.healed]
    found = [
        Goal(not missed, f"every harmful case is detected ({_of(harmful, missed)})"),
        Goal(
            not unhealed,
            f"every harmful case is healed, within {HARM} AUC of the oracle "
            f"({_of(harmful, unhealed)})",
        ),
    ]
    for one in outcomes:
        if one.name == "stable_year":
            found.append(
                Goal(
                    one.false_retrains <= 1, f"{one.false_retrains} false retrains in a stable year"
                )
            )
    taken = [one for one in outcomes if one.sabotaged]
    kept = [one.name for one in taken if not one.rollbacks]
    if taken:
        found.append(Goal(not kept, f"every bad release is rolled back ({_of(taken, kept)})"))
    wrong = [one.name for one in outcomes if one.false_rollbacks]
    found.append(Goal(not wrong, f"no good release is rolled back ({_of(outcomes, wrong)})"))
    steps = sum(one.human_steps for one in outcomes)
    found.append(Goal(not steps, f"{steps} steps were taken by a person"))
    return found


def _of(all_of: Sequence[Outcome], missed: Sequence[str]) -> str:
    told = f"{len(all_of) - len(missed)} of {len(all_of)}"
    return f"{told}; not {', '.join(missed)}" if missed else told


def table(outcomes: Sequence[Outcome]) -> str:
    """The cases as lines of a table."""
    head = ("case", "harm", "detected", "false", "retrains", "rollbacks", "healed", "gap", "steps")
    lines = [head, *(_cells(one) for one in outcomes)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _cells(one: Outcome) -> tuple[str, ...]:
    healed = "-"
    if one.harmful:
        healed = f"day {one.days_to_heal}" if one.healed else "no"
        if one.days_after_labels is not None:
            healed += f" (labels {one.days_after_labels:+d})"
    detected = f"day {one.days_to_detect} by {one.detected_by}" if one.detected else "no"
    return (
        one.title,
        f"{one.harm:.3f}{' harmful' if one.harmful else ''}",
        detected,
        str(one.false_retrains + one.false_rollbacks),
        str(one.retrains),
        str(one.rollbacks),
        healed,
        "-" if one.auc_gap is None else f"{one.auc_gap:+.3f}",
        str(one.human_steps),
    )


def write_report(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Write report.json and report.html into `folder`."""
    document = {"scenarios": outcomes, "goals": [goal._asdict() for goal in goals(outcomes)]}
    encoded = msgspec.json.format(msgspec.json.encode(document))
    (folder / "report.json").write_bytes(encoded)
    (folder / "report.html").write_text(_page(outcomes), encoding="utf-8")


def _page(outcomes: Sequence[Outcome]) -> str:
    listed = "".join(
        f"<li class={'met' if goal.met else 'missed'}>{'met' if goal.met else 'missed'}: "
        f"{html.escape(goal.text)}</li>"
        for goal in goals(outcomes)
    )
    head = "".join(
        f"<th>{name}</th>"
        for name in (
            "case",
            "AUC or requests lost",
            "detected",
            "false alarms acted on",
            "retrains",
            "rollbacks",
            "healed",
            "gap at the end",
            "human steps",
        )
    )
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(one)) + "</tr>"
        for one in outcomes
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>The drill</title><style>{_STYLE}</style>
<h1>The drill</h1><ul>{listed}</ul>
<div class="wide"><table><tr>{head}</tr>{rows}</table></div>
{"".join(_section(one) for one in outcomes)}</html>"""


def _section(one: Outcome) -> str:
    events = "".join(
        f"<tr><td>{event.at:%Y-%m-%d %H:%M}</td><td>{html.escape(event.kind)}</td>"
        f"<td>{html.escape(event.what)}</td><td>{html.escape(event.why)}</td></tr>"
        for event in one.events
    )
    lost = ""
    if one.auc_lost is not None and one.auc_lost_doing_nothing is not None:
        lost = (
            f"<p>AUC lost against the oracle from the change on: {one.auc_lost:+.4f}; by doing "
            f"nothing {one.auc_lost_doing_nothing:+.4f}. {one.requests:,} requests, "
            f"{one.seconds:.0f} s, {one.failed_runs} failed runs and looks of sensors.</p>"
        )
    if one.treated is not None:
        lost += f"<p>Offers: {html.escape(one.treated.line())}.</p>"
    return (
        f"<h2>{html.escape(one.title)}</h2>{lost}{_plot(one)}"
        f"<details><summary>{len(one.events)} events</summary><table>{events}</table></details>"
    )


def _plot(one: Outcome) -> str:
    """The AUC of the three by day, the change, and what was done, as SVG."""
    known = [day for day in one.days if day.oracle is not None]
    if len(known) < 2:
        return ""
    values = [v for d in known for v in (d.served, d.nothing, d.oracle) if v is not None]
    low, high = min(values) - 0.01, max(values) + 0.01
    first, last = known[0].day, known[-1].day
    span = max(1, (last - first).days)

    def x(day) -> float:
        return _LEFT + (day - first).days / span * (_WIDTH - _LEFT - 8)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    lines = "".join(_line(known, name, x, y) for name in ("nothing", "oracle", "served"))
    change = x(one.change)
    marks = "".join(
        f'<line class="mark" x1="{x(e.at.date()):.1f}" x2="{x(e.at.date()):.1f}" y1="{_TOP}" '
        f'y2="{_HEIGHT - _BOTTOM}"><title>{html.escape(f"{e.at:%Y-%m-%d} {e.what}: {e.why}")}'
        "</title></line>"
        for e in one.events
        if e.kind in ("decision", "step") and first <= e.at.date() <= last
    )
    ticks = "".join(
        f'<text x="4" y="{y(value) + 4:.1f}">{value:.2f}</text>' for value in (low, high)
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="AUC by day">'
        f'<line class="change" x1="{change:.1f}" x2="{change:.1f}" y1="{_TOP}" '
        f'y2="{_HEIGHT - _BOTTOM}"/>{marks}{lines}{ticks}'
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{first}</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 8}" text-anchor="end">{last}</text></svg>'
        '<p class="key"><b class="served">served</b> <b class="oracle">oracle, trained daily</b> '
        '<b class="nothing">doing nothing</b>; thick line: the change; thin: decisions and steps'
        "</p>"
    )


def _line(days: Sequence[Day], name: str, x, y) -> str:
    points = " ".join(
        f"{x(day.day):.1f},{y(value):.1f}"
        for day in days
        if (value := getattr(day, name)) is not None
    )
    return f'<polyline class="{name}" points="{points}"/>'


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#1d2733;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;font-size:.86rem}td,th{padding:.25rem .6rem;text-align:left;
border-bottom:1px solid #d9dee4;vertical-align:top}.wide{overflow-x:auto}
.met{color:#1b6e3c}.missed{color:#a4262c;font-weight:600}
svg{width:100%;height:auto;font-size:11px}polyline{fill:none;stroke-width:2}
.served{stroke:#1f5fa8;color:#1f5fa8}.oracle{stroke:#2c8a57;color:#2c8a57;stroke-dasharray:5 3}
.nothing{stroke:#b4561b;color:#b4561b;stroke-width:1.5}
.change{stroke:#1d2733;stroke-width:2.5}.mark{stroke:#8a94a0;stroke-width:1}
svg text{fill:#5b6672;stroke:none}.key{font-size:.82rem;color:#5b6672}
@media(prefers-color-scheme:dark){body{background:#14181d;color:#d6dde5}td,th{border-color:#333c46}
.change{stroke:#d6dde5}.met{color:#6fcf97}.missed{color:#ff8a80}}
"""
