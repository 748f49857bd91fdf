"""The health page: what it shows of metrics and marks, and what it never shows as well."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

from churn_assets.monitoring.health_page import Mark, health_page, write_health_page
from churn_assets.monitoring.metric import Metric, Verdict

NOW = datetime(2025, 7, 1, 3, tzinfo=UTC)
HOUR = timedelta(hours=1)
SIX = (
    "p95_latency_ms", "error_rate", "volume_ratio", "ks/recency_days", "prediction_shift",
    "accuracy", "expected_accuracy",
)  # fmt: skip


def metric(
    name: str, ago: int, value: float | None = 0.5, verdict: Verdict = "ok", limit: float = 0.8
) -> Metric:
    at = NOW - ago * HOUR
    return Metric(name, verdict, value, limit, f"{name} was measured", at, at, 10)


def page(metrics: list[Metric], marks: tuple[Mark, ...] = (), *alerts: str) -> str:
    return health_page(metrics, marks, now=NOW, links={}, open_alerts=alerts)


def paths(html: str, kind: str) -> list[str]:
    return re.findall(rf'<path class="{kind}" d="([^"]*)"', html)


def overall(html: str) -> str:
    found = re.search(r'<p class="overall (\w+)">', html)
    assert found
    return found[1]


def cards(html: str) -> list[tuple[str, str]]:
    return re.findall(r'<div class="card \w+"><div class="name">([^<]*)<span[^>]*>([^<]*)<', html)


def test_what_nobody_measured_is_named_and_is_not_well() -> None:
    html = page([])
    assert overall(html) == "insufficient"
    assert dict(cards(html)) == {name.replace("recency_days", "*"): "not measured" for name in SIX}
    assert "<svg" not in html
    assert "2025-07-01 03:00" in html


def test_the_worst_newest_verdict_is_that_of_the_page() -> None:
    well = [metric(name, 1) for name in SIX]
    assert overall(page(well)) == "ok"
    assert overall(page([*well, metric("accuracy", 0, None, "insufficient")])) == "insufficient"
    assert overall(page([*well, metric("accuracy", 2, 0.1, "alert")])) == "ok"
    assert overall(page(well, (), "the service is gone")) == "alert"
    html = page([*well, metric("error_rate", 0, 0.9, "alert")])
    assert overall(html) == "alert"
    assert cards(html)[0] == ("error_rate", "ALERT")
    assert "error_rate was measured" in html


def test_what_is_out_of_date_is_not_well() -> None:
    well = [metric(name, 1) for name in SIX]
    old = [m for m in well if m.name != "error_rate"] + [metric("error_rate", 4)]
    assert overall(page(old)) == "insufficient"
    assert cards(page(old))[0] == ("error_rate", "out of date")
    alert = [metric("error_rate", 400, 0.9, "alert")]
    assert overall(page([*well[2:], *alert])) == "alert"
    # Daily ones have more time, and so has what is usually measured less often.
    accuracy = [metric("accuracy", n) for n in (49, 51)]
    assert dict(cards(page(accuracy[:1])))["accuracy"] == "ok"
    assert dict(cards(page(accuracy[1:])))["accuracy"] == "out of date"
    weekly = [metric("accuracy", 51 + 168 * n) for n in range(4)]
    assert dict(cards(page(weekly)))["accuracy"] == "ok"


def test_a_feature_the_model_no_longer_has_is_no_alert_for_ever() -> None:
    well = [metric(name, 1) for name in SIX]
    assert overall(page([*well, metric("ks/gone", 70, 0.9, "alert")])) == "alert"
    html = page([*well, metric("ks/gone", 80, 0.9, "alert")])
    assert overall(html) == "ok"
    assert "ks/gone" not in html


def test_an_alert_says_since_when() -> None:
    verdicts: list[Verdict] = ["alert", "ok", "alert", "alert", "alert"]
    html = page([metric("error_rate", 5 - n, 0.1, v) for n, v in enumerate(verdicts)])
    assert "ALERT since 2025-07-01 00:00" in html


def test_a_line_has_a_gap_where_there_was_too_little_to_measure() -> None:
    whole = [metric("error_rate", n) for n in range(24)]
    (line,) = paths(page(whole), "line")
    assert line.count("M") == 1
    whole[12] = metric("error_rate", 12, None, "insufficient")
    html = page(whole)
    assert paths(html, "line")[0].count("M") == 2
    assert '<rect class="insufficient"' in html
    assert '<rect class="alert"' not in html


def test_silence_is_a_gap_too_and_has_no_verdict() -> None:
    html = page([metric("error_rate", n) for n in range(48) if not 10 < n < 30])
    assert paths(html, "line")[0].count("M") == 2
    assert html.count('<rect class="ok"') == 2


def test_a_value_that_is_no_number_is_a_gap() -> None:
    html = page([metric("error_rate", 2, float("nan"), "insufficient"), metric("error_rate", 1)])
    assert "nan" not in html.replace("finance", "")
    assert paths(html, "line")[0].count("M") == 1


def test_the_limit_is_drawn_with_a_step_where_it_was_changed() -> None:
    html = page([metric("error_rate", n, limit=0.4 if n > 5 else 0.8) for n in range(12)])
    (line,) = paths(html, "limit")
    assert line.count("V") == 1
    assert line.endswith("H1000")


def test_a_feed_that_is_sound_has_a_verdict_and_a_limit_without_a_value() -> None:
    html = page([metric("feed/orders", n, None) for n in range(3)])
    assert paths(html, "limit")
    assert not paths(html, "line")
    assert '<rect class="ok"' in html


def test_accuracy_has_what_was_expected_beside_it() -> None:
    html = page([metric("accuracy", 1), metric("expected_accuracy", 1, 0.6, "alert")])
    assert len(paths(html, "beside")) == html.count("<figure>") == 1
    assert page([metric("expected_accuracy", 1)]).count("<figure>") == 1


def test_a_year_of_hourly_points_keeps_its_extremes_and_stays_small(tmp_path: Path) -> None:
    names = [*SIX, "matured_auc", *(f"ks/f{n}" for n in range(3)), "feed/orders"]
    metrics = [
        metric(name, n, 0.25 + 0.01 * (n % 7)) for name in names for n in range(1, 365 * 24, 4)
    ]
    metrics += [metric("error_rate", 4000, 0.99, "alert"), metric("error_rate", 6000, 0.0)]
    marks = [
        Mark(NOW - n * 5 * HOUR, "decision", "retraining: investigate " * 9, "because " * 200)
        for n in range(1000)
    ]
    file = tmp_path / "health" / "index.html"
    write_health_page(file, metrics, marks, now=NOW, links={"Dagster": "http://127.0.0.1:3000/"})
    html = file.read_text()
    assert len(html) < 500_000
    assert [p.name for p in file.parent.iterdir()] == ["index.html"]
    assert len(paths(html, "dots")) == 1
    chart = html[html.index('aria-label="error_rate, 365 days"') :]
    line = paths(chart, "line")[0]
    heights = [float(y) for y in re.findall(r"[ML]\d+ ([\d.]+)", line)]
    assert max(heights) == 100.0
    assert min(heights) < 10
    assert len(heights) <= 3 * 120
    assert "850 older ones are not listed" in html


def test_marks_stand_on_the_axis_and_in_the_table_newest_first() -> None:
    marks = (
        Mark(NOW - 40 * HOUR, "promotion", "version 2 to Production", "by ada"),
        Mark(NOW - 20 * HOUR, "rollback", "back to version 1", "errors"),
        Mark(NOW - 20 * HOUR, "decision", "rollback: rollback", "errors"),
    )
    html = page([metric("error_rate", n) for n in range(41)], marks)
    assert 'title="2025-06-29 11:00 version 2 to Production">P<' in html
    assert 'back to version 1 and 1 more from 2025-06-30 07:00 on">R+<' in html
    assert len(paths(html, "at promotion")) == len(paths(html, "at rollback")) == 1
    assert not paths(html, "at decision")
    table = html[html.index("<table>") :]
    (row,) = re.findall(
        r'href="#(m\d+)"[^>]*version 2 to Production', html[: html.index("<table>")]
    )
    (told,) = re.findall(rf'<tr id="{row}">.*?</tr>', table)
    assert "by ada" in told
    assert table.index("back to version 1") < table.index("version 2 to Production")


def test_what_comes_from_outside_is_text() -> None:
    bad = '<script>"&'
    html = health_page(
        [metric(f"ks/{bad}", 1, None, "insufficient")],
        [Mark(NOW, "promotion", bad, bad)],
        now=NOW,
        links={bad: f"http://127.0.0.1/{bad}"},
        open_alerts=[bad],
    )
    assert "<script" not in html
    assert html.count("&lt;script&gt;&quot;&amp;") >= 6


@pytest.mark.parametrize("metrics", [[], [metric(name, 1) for name in SIX]])
def test_the_page_needs_nothing_else_and_is_closed(metrics: list[Metric]) -> None:
    html = page(metrics, (Mark(NOW, "trial", "trial of version 2 begins", "by ada"),), "one")
    assert not re.search(r"https?:|src=|@import|url\(", html)
    opened: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "input", "br"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

    Tags().feed(html)
    assert opened == []
