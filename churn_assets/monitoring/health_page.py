"""One page on the health of what serves: every metric over time, and what was done about it.

A file of its own, without scripts and without the network: it opens wherever it is copied to.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from churn_assets.monitoring.metric import Metric

MarkKind = Literal["promotion", "rollback", "trial", "decision"]

_SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Service", ("p95_latency_ms", "error_rate", "volume_ratio")),
    ("Model", ("accuracy", "matured_auc", "prediction_shift")),
)
_EXPECTED = "expected_accuracy"
# Named even where nobody has measured them: a metric that is not there is no sign of health.
_ALWAYS = (
    "p95_latency_ms",
    "error_rate",
    "volume_ratio",
    "accuracy",
    _EXPECTED,
    "prediction_shift",
    "ks/*",
)
_AT_LEAST = ("volume_ratio", "accuracy", _EXPECTED, "matured_auc", "feed/")
_AT_MOST = (
    "p95_latency_ms",
    "error_rate",
    "prediction_shift",
    "expected_accuracy_error",
    "matured_log_loss",
    "ks/",
)
_WORDS = {
    "ok": "ok",
    "alert": "ALERT",
    "insufficient": "insufficient",
    "stale": "out of date",
    "none": "not measured",
}
_RANK = {"ok": 0, "none": 1, "insufficient": 1, "stale": 1, "alert": 2}
_LETTERS: dict[MarkKind, str] = {"promotion": "P", "rollback": "R", "trial": "T", "decision": "D"}

_YEAR = timedelta(days=365)
_WEEK = timedelta(days=7)
# These bound the page: points of a line, charts of features, marks of a chart, rows of the table.
_BUCKETS = 120
_MOST_FEATURES = 12
_MARK_DISTANCE = 4.0
_MOST_ROWS = 150
_LONGEST_TEXT = 300
_LONGEST_LABEL = 80

# What is older says nothing of now, unless it usually takes as long; as in deploy/prometheus.
_FRESH = {
    **dict.fromkeys(
        ("p95_latency_ms", "error_rate", "volume_ratio", "service_up"), timedelta(hours=3)
    ),
    **dict.fromkeys(("offer_effect", "holdout_balance"), timedelta(days=9)),
}
_FRESH_DAILY = timedelta(hours=50)
# A feature that was not measured for so long while others were is none of the model's any more.
_FEATURE_GONE = timedelta(days=3)
# A longer silence than so many usual steps is a gap.
_STEPS_TO_GAP = 4
_WIDTH, _HEIGHT, _STRIP = 1000, 100, 8


@dataclass(frozen=True)
class Mark:
    """Something that happened at a moment of operational time, as it is marked on the time axis.

    label: a few words. text: the whole of it, for the table.
    """

    at: datetime
    kind: MarkKind
    label: str
    text: str


class _Span(NamedTuple):
    """A view of the time axis."""

    name: str
    title: str
    since: datetime
    until: datetime

    def position(self, at: datetime) -> float:
        """From 0 to 1 within the span."""
        return (at - self.since) / (self.until - self.since)

    def holds(self, at: datetime) -> bool:
        return self.since <= at <= self.until


class _Point(NamedTuple):
    """A value at a position from 0 to 1 of the time axis; None where there is a gap."""

    x: float
    value: float | None
    limit: float | None
    alert: bool


def write_health_page(
    path: Path,
    metrics: Sequence[Metric],
    marks: Sequence[Mark],
    *,
    now: datetime,
    links: Mapping[str, str],
    open_alerts: Sequence[str] = (),
) -> None:
    """Write the page to `path`; a reader sees the old page or the new one, never half of one.

    metrics: as `read_metrics` gives them; drawn at the moment they were measured, for a year back.
    now: operational time. links: URLs by what they are called. open_alerts: a line each.
    """
    content = health_page(metrics, marks, now=now, links=links, open_alerts=open_alerts)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".tmp")
    written.write_text(content, encoding="utf-8")
    written.replace(path)


def health_page(
    metrics: Sequence[Metric],
    marks: Sequence[Mark],
    *,
    now: datetime,
    links: Mapping[str, str],
    open_alerts: Sequence[str] = (),
) -> str:
    """The page as HTML, in well under 500 KB for a year of hourly points."""
    series = _without_gone_features(_series(metrics))
    spans = _spans(series, marks, now)
    parts = [
        _header(series, open_alerts, now),
        _alerts(open_alerts),
        _newest(series, now),
        _switch(spans),
        *_charts(series, marks, spans, now),
        _table(marks),
        _links(links),
    ]
    inputs = "".join(
        f'<input type="radio" name="span" id="{span.name}"{" checked" if not n else ""}>'
        for n, span in enumerate(spans)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_overall(series, open_alerts, now)[1]} - health</title>"
        f"<style>{_STYLE}</style></head><body>{inputs}<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _series(metrics: Iterable[Metric]) -> dict[str, list[Metric]]:
    """The metrics of each name in the order they were measured, names in the page's order."""
    found: dict[str, list[Metric]] = {}
    for metric in sorted(metrics, key=lambda m: (m.at, m.until)):
        found.setdefault(metric.name, []).append(metric)
    known = [name for _, names in _SECTIONS for name in names]
    known.insert(known.index("accuracy") + 1, _EXPECTED)

    def place(name: str) -> tuple[int, str]:
        if name in known:
            return known.index(name), name
        others = 0 if name.startswith("ks/") else 1 if name.startswith("feed/") else 2
        return len(known) + others, name

    return {name: found[name] for name in sorted(found, key=place)}


def _without_gone_features(series: Mapping[str, list[Metric]]) -> dict[str, list[Metric]]:
    features = [found[-1].at for name, found in series.items() if name.startswith("ks/")]
    return {
        name: found
        for name, found in series.items()
        if not name.startswith("ks/") or max(features) - found[-1].at <= _FEATURE_GONE
    }


def _verdict(found: Sequence[Metric], now: datetime) -> str:
    """The newest verdict of a metric; `stale` where it is too old to say that all is well."""
    newest = found[-1]
    usual = _usual_step(found) or timedelta()
    fresh = max(_FRESH.get(newest.name, _FRESH_DAILY), 2 * usual)
    return "stale" if newest.verdict != "alert" and now - newest.at > fresh else newest.verdict


def _spans(
    series: Mapping[str, Sequence[Metric]], marks: Sequence[Mark], now: datetime
) -> list[_Span]:
    """The views: all there is, up to a year, and the last week where that is less."""
    moments = [one.at for found in series.values() for one in found] + [m.at for m in marks]
    until = max([now, *moments])
    first = max(min([now, *moments]), until - _YEAR)
    since = min(first, until - timedelta(days=1))
    days = (until - since) / timedelta(days=1)
    spans = [_Span("all", f"{days:.0f} days", since, until)]
    if until - since > _WEEK:
        spans.append(_Span("week", "Last 7 days", until - _WEEK, until))
    return spans


def _overall(
    series: Mapping[str, Sequence[Metric]], open_alerts: Sequence[str], now: datetime
) -> tuple[str, str]:
    """The verdict on everything, and a line of it: what is not known is not well."""
    newest = {name: _verdict(found, now) for name, found in series.items()}
    alert = [name for name, verdict in newest.items() if verdict == "alert"]
    unknown = [name for name, verdict in newest.items() if verdict in ("insufficient", "stale")]
    unknown += _missing(series)
    if alert or open_alerts:
        told = [_count(len(alert), "metric") + " in alert"] if alert else []
        told += [_count(len(open_alerts), "open alert")] if open_alerts else []
        return "alert", "ALERT: " + ", ".join(told)
    if unknown:
        return "insufficient", f"no alert, but {_count(len(unknown), 'metric')} cannot be judged"
    return "ok", "ok: every metric is within its limit"


def _missing(series: Mapping[str, Sequence[Metric]]) -> list[str]:
    has_features = any(name.startswith("ks/") for name in series)
    return [n for n in _ALWAYS if n not in series and not (n == "ks/*" and has_features)]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _header(
    series: Mapping[str, Sequence[Metric]], open_alerts: Sequence[str], now: datetime
) -> str:
    verdict, line = _overall(series, open_alerts, now)
    return (
        f'<header><h1>Health</h1><p class="overall {verdict}">{line}</p>'
        f'<p class="made">made {_moment(now)} UTC</p></header>'
    )


def _alerts(open_alerts: Sequence[str]) -> str:
    if not open_alerts:
        return "<h2>Open alerts</h2><p>none</p>"
    rows = "".join(f"<li>{_text(alert, _LONGEST_TEXT)}</li>" for alert in open_alerts)
    return f'<h2>Open alerts</h2><ul class="alerts">{rows}</ul>'


def _newest(series: Mapping[str, Sequence[Metric]], now: datetime) -> str:
    """A card for each metric, what is wrong first."""
    cards: list[tuple[str, str, str]] = [
        (name, _verdict(found, now), _card(found, now)) for name, found in series.items()
    ]
    cards += [
        (name, "none", _card_of(name, "none", "-", "", "nobody has measured it yet"))
        for name in _missing(series)
    ]
    ordered = sorted(cards, key=lambda card: -_RANK[card[1]])
    return f'<h2>Newest values</h2><div class="cards">{"".join(c for *_, c in ordered)}</div>'


def _card(found: Sequence[Metric], now: datetime) -> str:
    newest, verdict = found[-1], _verdict(found, now)
    since = newest.at
    for metric in reversed(found):
        if metric.verdict != newest.verdict:
            break
        since = metric.at
    measured = f"measured {_ago(now - newest.at)}"
    if since != newest.at and verdict == newest.verdict:
        measured += f"; {_WORDS[newest.verdict]} since {_moment(since)}"
    reason = newest.reason if newest.verdict != "ok" or newest.value is None else ""
    return _card_of(
        newest.name,
        verdict,
        _figure(newest.name, newest.value),
        _limit_text(newest),
        measured,
        reason,
    )


def _card_of(
    name: str, verdict: str, value: str, limit: str, measured: str, reason: str = ""
) -> str:
    why = f'<p class="why">{_text(reason, _LONGEST_TEXT)}</p>' if reason else ""
    return (
        f'<div class="card {verdict}"><div class="name">{_text(name)}{_badge(verdict)}</div>'
        f'<div><b>{value}</b> <span class="quiet">{limit}</span></div>'
        f'<div class="quiet">{measured}</div>{why}</div>'
    )


def _badge(verdict: str) -> str:
    return f'<span class="badge {verdict}">{_WORDS[verdict]}</span>'


def _switch(spans: Sequence[_Span]) -> str:
    buttons = "".join(f'<label for="{span.name}">{span.title}</label>' for span in spans)
    switch = f'<nav class="switch">{buttons}</nav>' if len(spans) > 1 else ""
    kinds = "".join(
        f'<span><i class="mark {kind}">{letter}</i> {kind}</span>'
        for kind, letter in _LETTERS.items()
    )
    strip = "".join(
        f'<span><i class="swatch {verdict}"></i> {_WORDS[verdict]}</span>'
        for verdict in ("ok", "alert", "insufficient")
    )
    return (
        f'<h2>Over time</h2>{switch}<p class="legend">{kinds}{strip}'
        '<span><i class="dashes"></i> limit</span></p>'
        '<p class="quiet">By when it was measured, UTC. The strip under a chart is the verdict; '
        "the line has a gap where there was too little to measure.</p>"
    )


def _charts(
    series: Mapping[str, Sequence[Metric]],
    marks: Sequence[Mark],
    spans: Sequence[_Span],
    now: datetime,
) -> list[str]:
    shown = []
    pictured = {_EXPECTED} if "accuracy" in series else set()
    for title, names in _SECTIONS:
        there = [
            name
            for name in (*names, *([_EXPECTED] if "accuracy" in names else []))
            if name in series and name not in pictured
        ]
        shown.append(_section(title, there, series, marks, spans, now))
        pictured |= set(there)
    features = [name for name in series if name.startswith("ks/")]
    worst = sorted(features, key=lambda name: _urgency(series[name][-1]), reverse=True)
    drawn = set(worst[:_MOST_FEATURES])
    note = f"the {len(drawn)} nearest to their limit" if len(drawn) < len(features) else ""
    title = "Drift of the features"
    shown.append(
        _section(title, [n for n in features if n in drawn], series, marks, spans, now, note)
    )
    feeds = [name for name in series if name.startswith("feed/")]
    shown.append(_section("Feeds", feeds, series, marks, spans, now))
    pictured |= {*features, *feeds}
    others = [name for name in series if name not in pictured]
    shown.append(_section("Others", others, series, marks, spans, now))
    return shown


def _urgency(metric: Metric) -> tuple[int, float]:
    """How near a metric is to its limit; what alerts comes first."""
    known = metric.value is not None and metric.limit > 0
    return _RANK[metric.verdict], (metric.value or 0.0) / metric.limit if known else 0.0


def _section(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[Metric]],
    marks: Sequence[Mark],
    spans: Sequence[_Span],
    now: datetime,
    note: str = "",
) -> str:
    if not names:
        return ""
    figures = "".join(
        _panel(name, series[name], series.get(_EXPECTED, ()) if name == "accuracy" else (),
               marks, spans, now)
        for name in names
    )  # fmt: skip
    said = f' <span class="quiet">{note}</span>' if note else ""
    return f'<h3>{title}{said}</h3><div class="charts">{figures}</div>'


def _panel(
    name: str,
    found: Sequence[Metric],
    beside: Sequence[Metric],
    marks: Sequence[Mark],
    spans: Sequence[_Span],
    now: datetime,
) -> str:
    """The charts of a metric, one for each view, under its newest value."""
    newest = found[-1]
    expected = ""
    if beside:
        last = beside[-1]
        expected = (
            f'<span class="quiet"><i class="second"></i> {_EXPECTED} '
            f"{_figure(_EXPECTED, last.value)}</span>{_badge(_verdict(beside, now))}"
        )
    caption = (
        f"<figcaption>{_text(name)} <b>{_figure(name, newest.value)}</b>"
        f'{_badge(_verdict(found, now))}<span class="quiet">{_limit_text(newest)}</span>{expected}'
        "</figcaption>"
    )
    charts = "".join(_chart(name, found, beside, marks, span) for span in spans)
    return f"<figure>{caption}{charts}</figure>"


def _chart(
    name: str,
    found: Sequence[Metric],
    beside: Sequence[Metric],
    marks: Sequence[Mark],
    span: _Span,
) -> str:
    points, second = _downsample(found, span), _downsample(beside, span)
    values = [p.value for p in (*points, *second) if p.value is not None]
    limits = [p.limit for p in points if p.limit is not None]
    newest = found[-1].limit if math.isfinite(found[-1].limit) else None
    limits += [newest] if newest is not None and not limits else []
    low, high = _range(name, [*values, *limits])

    def y(value: float) -> float:
        return _HEIGHT * (1 - (value - low) / (high - low))

    drawn = _strip(found, span)
    drawn += _path(_limit_line(points, y, newest), "limit")
    drawn += _path(_line(second, y), "beside")
    drawn += _path(_line(points, y), "line")
    drawn += _path(_dots((p for p in points if p.alert), y), "dots")
    inside = [mark for mark in marks if span.holds(mark.at)]
    groups = _grouped(inside, span)
    rows = {mark: row for row, mark in enumerate(_listed(marks))}
    lines = "".join(
        _path(
            "".join(f"M{_WIDTH * x:.0f} 0V{_HEIGHT}" for x, of in groups if _kind(of) == kind),
            f"at {kind}",
        )
        for kind in _LETTERS
    )
    labels = "".join(_flag(x, of, rows) for x, of in groups)
    empty = "" if values else '<span class="empty">no value in this time</span>'
    return (
        f'<div class="chart {span.name}"><div class="plot">'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _STRIP + 4}" preserveAspectRatio="none" role="img" '
        f'aria-label="{_text(name)}, {span.title}">{lines}{drawn}</svg>{labels}{empty}</div>'
        f'<div class="y"><span>{_figure(name, high)}</span><span>{_figure(name, low)}</span></div>'
        f'<div class="x">{_ticks(span)}</div></div>'
    )


def _downsample(found: Sequence[Metric], span: _Span) -> list[_Point]:
    """At most three points for each bucket of time: the lowest, the highest, and a gap."""
    longest = _longest_step(found)
    buckets: dict[int, list[tuple[datetime, Metric | None]]] = {}
    before: Metric | None = None
    for metric in found:
        if not span.holds(metric.at):
            continue
        if before is not None and metric.at - before.at > longest:
            _put(buckets, span, before.at + longest, None)
        _put(buckets, span, metric.at, metric if _is_known(metric.value) else None)
        before = metric
    points = []
    for _, inside in sorted(buckets.items()):
        known = [(at, metric) for at, metric in inside if metric is not None]
        kept: list[tuple[datetime, Metric | None]] = []
        if known:
            kept += {
                id(one[1]): one
                for one in (
                    min(known, key=lambda one: _value(one[1])),
                    max(known, key=lambda one: _value(one[1])),
                )
            }.values()
        kept += [one for one in inside if one[1] is None][:1]
        points += [_point(at, metric, span) for at, metric in sorted(kept, key=lambda one: one[0])]
    return points


def _put(
    buckets: dict[int, list[tuple[datetime, Metric | None]]],
    span: _Span,
    at: datetime,
    metric: Metric | None,
) -> None:
    bucket = min(int(span.position(at) * _BUCKETS), _BUCKETS - 1)
    buckets.setdefault(bucket, []).append((at, metric))


def _point(at: datetime, metric: Metric | None, span: _Span) -> _Point:
    x = span.position(at)
    if metric is None:
        return _Point(x, None, None, False)
    limit = metric.limit if _is_known(metric.limit) else None
    return _Point(x, metric.value, limit, metric.verdict == "alert")


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _value(metric: Metric) -> float:
    return metric.value or 0.0


def _longest_step(found: Sequence[Metric]) -> timedelta:
    """The longest time between two measurements that is no gap."""
    usual = _usual_step(found)
    return _YEAR if usual is None else _STEPS_TO_GAP * usual


def _usual_step(found: Sequence[Metric]) -> timedelta | None:
    """The time between two measurements; None where there are too few to say."""
    steps = [(after.at - before.at).total_seconds() for before, after in pairwise(found)]
    steps = [step for step in steps if step > 0]
    return timedelta(seconds=median(steps)) if len(steps) > 1 else None


def _range(name: str, values: Sequence[float]) -> tuple[float, float]:
    """The ends of the vertical axis: from zero, but for what is never near it."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if low >= 0 and not name.startswith(("accuracy", _EXPECTED, "matured_auc")):
        low = 0.0
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - room), high + room


def _line(points: Sequence[_Point], y: Callable[[float], float]) -> str:
    drawn, pen, alone = [], False, False
    for point in points:
        if point.value is None:
            drawn.append("h.1" if alone else "")
            pen = alone = False
            continue
        drawn.append(f"{'L' if pen else 'M'}{_WIDTH * point.x:.0f} {y(point.value):.1f}")
        alone, pen = not pen, True
    return "".join([*drawn, "h.1" if alone else ""])


def _limit_line(points: Sequence[_Point], y: Callable[[float], float], newest: float | None) -> str:
    """A line over the whole width, with a step wherever the limit was changed.

    newest: the limit where no point has a value.
    """
    drawn, last = "", None
    for point in points:
        if point.limit is None or point.limit == last:
            continue
        at = f"H{_WIDTH * point.x:.0f}V{y(point.limit):.1f}"
        drawn += at if drawn else f"M0 {y(point.limit):.1f}"
        last = point.limit
    if not drawn and newest is not None:
        drawn = f"M0 {y(newest):.1f}"
    return f"{drawn}H{_WIDTH}" if drawn else ""


def _dots(points: Iterable[_Point], y: Callable[[float], float]) -> str:
    return "".join(
        f"M{_WIDTH * point.x:.0f} {y(point.value):.1f}h.1"
        for point in points
        if point.value is not None
    )


def _path(drawn: str, kind: str) -> str:
    return f'<path class="{kind}" d="{drawn}"/>' if drawn else ""


def _strip(found: Sequence[Metric], span: _Span) -> str:
    """The verdicts along the time axis; the worst of those that share a bucket."""
    longest = _longest_step(found)
    cells: list[str | None] = [None] * _BUCKETS
    for metric, after in zip(found, (*found[1:], None), strict=True):
        until = min(after.at if after else span.until, metric.at + longest)
        if until < span.since or metric.at > span.until:
            continue
        first = max(int(span.position(metric.at) * _BUCKETS), 0)
        last = max(math.ceil(span.position(until) * _BUCKETS), first + 1)
        for cell in range(min(first, _BUCKETS - 1), min(last, _BUCKETS)):
            if _RANK[metric.verdict] >= _RANK[cells[cell] or "ok"]:
                cells[cell] = metric.verdict
    drawn, start = "", 0
    for cell in range(1, _BUCKETS + 1):
        if cell == _BUCKETS or cells[cell] != cells[start]:
            if verdict := cells[start]:
                x, end = _WIDTH * start / _BUCKETS, _WIDTH * cell / _BUCKETS
                drawn += (
                    f'<rect class="{verdict}" x="{x:.0f}" y="{_HEIGHT + 4}" '
                    f'width="{end - x:.0f}" height="{_STRIP}"/>'
                )
            start = cell
    return drawn


def _grouped(marks: Sequence[Mark], span: _Span) -> list[tuple[float, list[Mark]]]:
    """The marks by their place, those too near to be told apart together."""
    groups: list[tuple[float, list[Mark]]] = []
    for mark in sorted(marks, key=lambda mark: mark.at):
        x = span.position(mark.at)
        if groups and (x - groups[-1][0]) * 100 < _MARK_DISTANCE:
            groups[-1][1].append(mark)
        else:
            groups.append((x, [mark]))
    return groups


def _kind(marks: Sequence[Mark]) -> MarkKind:
    """What a group shows: what has changed most for those who are served."""
    order: tuple[MarkKind, ...] = ("rollback", "promotion", "trial", "decision")
    return min((mark.kind for mark in marks), key=order.index)


def _listed(marks: Sequence[Mark]) -> list[Mark]:
    """What the table lists, newest first."""
    return sorted(marks, key=lambda mark: mark.at, reverse=True)[:_MOST_ROWS]


def _flag(x: float, marks: Sequence[Mark], rows: Mapping[Mark, int]) -> str:
    """A flag on the time axis. It leads to its line in the table: a phone cannot hover."""
    kind, first = _kind(marks), marks[0]
    shown = next(mark for mark in marks if mark.kind == kind)
    more = f" and {len(marks) - 1} more from {_moment(first.at)} on" if len(marks) > 1 else ""
    href = f' href="#m{rows[shown]}"' if shown in rows else ""
    title = f"{_moment(shown.at)} {_text(shown.label, _LONGEST_LABEL)}{more}"
    return (
        f'<a class="mark {kind}"{href} style="left:{100 * x:.1f}%" title="{title}">'
        f"{_LETTERS[kind]}{'+' if len(marks) > 1 else ''}</a>"
    )


def _ticks(span: _Span) -> str:
    """The moments at the ends and in between."""
    shape = "%b %d" if span.until - span.since > timedelta(days=2) else "%b %d %H:%M"
    moments = [span.since + (span.until - span.since) * n / 3 for n in range(4)]
    return "".join(f"<span>{at.astimezone(UTC).strftime(shape)}</span>" for at in moments)


def _table(marks: Sequence[Mark]) -> str:
    title = "<h2>Promotions, rollbacks, trials and decisions</h2>"
    if not marks:
        return f"{title}<p>none</p>"
    rows = "".join(
        f'<tr id="m{row}"><td class="when">{_moment(mark.at)}</td>'
        f'<td><i class="mark {mark.kind}">{_LETTERS[mark.kind]}</i> {mark.kind}</td>'
        f"<td><b>{_text(mark.label, _LONGEST_LABEL)}</b><br>{_text(mark.text, _LONGEST_TEXT)}</td>"
        "</tr>"
        for row, mark in enumerate(_listed(marks))
    )
    older = len(marks) - _MOST_ROWS
    more = f"<p>{older:,} older ones are not listed.</p>" if older > 0 else ""
    return (
        f"{title}<table><thead><tr><th>UTC</th><th>what</th><th></th></tr></thead>"
        f"<tbody>{rows}</tbody></table>{more}"
    )


def _links(links: Mapping[str, str]) -> str:
    shown = "".join(f'<a href="{_text(url)}">{_text(name)}</a>' for name, url in links.items())
    return f'<footer class="links">{shown}</footer>' if shown else ""


def _text(text: str, longest: int | None = None) -> str:
    """`text` for HTML, also for an attribute; cut when it is longer than `longest`."""
    cut = text if longest is None or len(text) <= longest else f"{text[: longest - 3]}..."
    return html.escape(cut)


def _moment(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M}"


def _ago(age: timedelta) -> str:
    minutes = age.total_seconds() / 60
    if minutes < 1:
        return "now"
    if minutes < 120:
        return f"{minutes:.0f} min ago"
    return f"{minutes / 60:.0f} h ago" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days ago"


def _figure(name: str, value: float | None) -> str:
    """A value in the unit of its metric."""
    if value is None or not math.isfinite(value):
        return "-"
    if name.endswith("_ms"):
        return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"
    return f"{value:.2%}" if name == "error_rate" else f"{value:.3f}"


def _limit_text(metric: Metric) -> str:
    side = "limit"
    if metric.name.startswith(_AT_MOST):
        side = "at most"
    elif metric.name.startswith(_AT_LEAST):
        side = "at least"
    return f"{side} {_figure(metric.name, metric.limit)}"


_STYLE = """
:root{--bg:#fff;--ink:#1c2126;--quiet:#5b6670;--line:#d9dee2;--card:#f6f8f9;--blue:#1f5f99;
--second:#8a5a00;--ok:#1a7f4b;--alert:#c4281c;--insufficient:#76808a;--on:#fff}
@media (prefers-color-scheme:dark){:root{--bg:#12161a;--ink:#e4e8eb;--quiet:#9aa5ae;--line:#333b42;
--card:#1b2127;--blue:#6cb2f0;--second:#e0b04c;--ok:#4cc38a;--alert:#ff7b72;
--insufficient:#8b959e;--on:#12161a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
main{max-width:1000px;margin:0 auto;padding:12px}
h1{font-size:22px;margin:0}h2{font-size:18px;margin:26px 0 8px}h3{font-size:15px;margin:20px 0 6px}
p{margin:4px 0}.quiet,.made,.x,.y{color:var(--quiet);font-size:13px}
.overall{font-size:18px;font-weight:600;padding:8px 12px;border-radius:6px;color:var(--on)}
.overall.ok,.badge.ok{background:var(--ok)}.overall.alert,.badge.alert{background:var(--alert)}
.overall.insufficient,.badge.insufficient,.badge.stale,.badge.none{background:var(--insufficient)}
.badge{color:var(--on);border-radius:4px;padding:1px 7px;font-size:13px;font-weight:600;
margin-left:6px;white-space:nowrap}
.alerts{padding-left:0;margin:0;list-style:none}
.alerts li{border-left:4px solid var(--alert);background:var(--card);padding:6px 10px;margin:4px 0;
overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:8px}
.card{background:var(--card);border-left:4px solid var(--insufficient);border-radius:4px;
padding:6px 10px;overflow-wrap:anywhere}
.card.ok{border-color:var(--ok)}.card.alert{border-color:var(--alert)}
.card b{font-size:18px}.name{display:flex;flex-wrap:wrap;justify-content:space-between;
align-items:baseline}
.why{font-size:13px}
input[name=span]{position:absolute;opacity:0;pointer-events:none}
.switch{display:flex;gap:8px;margin-bottom:8px}
.switch label{border:1px solid var(--line);border-radius:6px;padding:8px 14px;cursor:pointer}
#all:checked~main label[for=all],#week:checked~main label[for=week]{background:var(--blue);
color:var(--on)}
#all:focus-visible~main label[for=all],#week:focus-visible~main label[for=week]{outline:2px solid
var(--ink)}
#all:checked~main .week,#week:checked~main .chart.all{display:none}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:13px}
.mark{font:600 11px/15px system-ui,sans-serif;display:inline-block;min-width:15px;padding:0 2px;
text-align:center;border-radius:3px;background:var(--quiet);color:var(--on)}
.mark.promotion{background:var(--blue)}.mark.rollback{background:var(--alert)}
.mark.trial{background:var(--second)}
.swatch{display:inline-block;width:16px;height:8px}.swatch.ok{background:var(--ok)}
.swatch.alert{background:var(--alert)}.swatch.insufficient{background:var(--insufficient)}
.dashes,.second{display:inline-block;width:20px;border-top:2px dashed var(--alert);
vertical-align:middle}.second{border-top:2px solid var(--second)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:16px}
figure{margin:0;min-width:0}
figcaption{display:flex;flex-wrap:wrap;gap:2px 8px;align-items:baseline;overflow-wrap:anywhere}
figcaption .badge{margin-left:0}
.chart{display:grid;grid-template-columns:1fr auto;column-gap:6px}
.plot{position:relative;padding-top:18px}
.plot svg{display:block;width:100%;height:112px;background:var(--card);overflow:visible}
.plot .mark{position:absolute;top:0;transform:translateX(-50%);text-decoration:none}
tr:target{background:var(--card);outline:2px solid var(--blue)}
.empty{position:absolute;left:10px;top:60px;color:var(--quiet);font-size:13px}
.y{display:flex;flex-direction:column;justify-content:space-between;padding:18px 0 10px;
min-width:52px;line-height:1}
.x{display:flex;justify-content:space-between}
path{fill:none;stroke-width:1.6;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.line{stroke:var(--blue)}.beside{stroke:var(--second)}
.line,.beside,.dots{stroke-linecap:round}
.limit{stroke:var(--alert);stroke-dasharray:6 4;stroke-width:1.3}
.dots{stroke:var(--alert);stroke-width:4.5}
.at{stroke:var(--quiet);stroke-width:1;stroke-dasharray:2 3}.at.promotion{stroke:var(--blue)}
.at.rollback{stroke:var(--alert)}.at.trial{stroke:var(--second)}
rect.ok{fill:var(--ok)}rect.alert{fill:var(--alert)}rect.insufficient{fill:var(--insufficient)}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:6px 8px 6px 0;border-top:1px solid var(--line);
overflow-wrap:anywhere}
th{font-size:13px;color:var(--quiet)}td:nth-child(2){white-space:nowrap}.when{min-width:82px}
.links{display:flex;flex-wrap:wrap;gap:8px 18px;margin:26px 0}
a{color:var(--blue)}
"""
