"""When a release is taken back by itself: by its live metrics, or by labelled customers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pytest

from churn_assets.errors import UserError
from churn_assets.lifecycle.history import Evidence, Move, Step
from churn_assets.lifecycle.promotion import PromotionPolicy, paired_replay
from churn_assets.lifecycle.registry import POLICY
from churn_assets.monitoring.metric import Metric, Verdict
from churn_assets.monitoring.rollback import RollbackDecision, WatchPolicy, decide_rollback

NOW = datetime(2025, 6, 20, 5, 15, tzinfo=UTC)
DAY = timedelta(days=1)
WATCH = WatchPolicy()


def step(
    version: str, days_ago: float, kind: Any = "paired_replay", who: str = POLICY, **more: Any
) -> Step:
    """`version` comes into Production."""
    at = NOW - days_ago * DAY
    moves = (Move(version, "Staging", "Production"),)
    return Step(1, moves, {"production": version}, who, "better", at, Evidence(kind), **more)


TWO = (step("1", 60, "bootstrap"), step("2", 3))


def live(name: str = "p95_latency_ms", verdict: Verdict = "alert", rows: int = 500) -> list[Metric]:
    return [Metric(name, verdict, 180.0, 100.0, "180 ms, at most 100", NOW, NOW, rows, "v2-abc")]


def replayed(gap: float, *, rows: int = 2000, seed: int = 0) -> Evidence:
    """Version 2 against version 1, whose log odds are off by `gap` more."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0, 1.5, rows)
    y = rng.random(rows) < 1 / (1 + np.exp(-odds))
    candidate = 1 / (1 + np.exp(-(odds + gap * rng.choice([-1, 1], rows))))
    incumbent = 1 / (1 + np.exp(-odds))
    return paired_replay(y, candidate, incumbent, incumbent_version="1", policy=PromotionPolicy())


def decide(
    policy: WatchPolicy = WATCH,
    *,
    history: Sequence[Step] = TWO,
    live: Sequence[Metric] = (),
    replay: Evidence | str | None = None,
    endings: Mapping[str, str] | None = None,
    now: datetime = NOW,
) -> RollbackDecision:
    return decide_rollback(
        history, live, replay, policy, automatic=POLICY, endings=endings or {}, now=now
    )


def test_nothing_speaks_against_a_release() -> None:
    decision = decide(live=live(verdict="ok"), replay=replayed(0.0))
    assert (decision.verdict, decision.version, decision.to) == ("keep", "2", "1")
    assert not decision.alert
    unknown = decide(replay="no labelled day is untouched by faults of the feeds")
    assert unknown.verdict == "keep"
    assert "no labelled day is untouched" in unknown.reasons[0]


@pytest.mark.parametrize("name", ["p95_latency_ms", "error_rate"])
def test_a_slow_or_failing_release_is_taken_back(name: str) -> None:
    decision = decide(live=live(name))
    assert (decision.verdict, decision.version, decision.to) == ("rollback", "2", "1")
    assert decision.alert
    assert decision.reasons == (f"{name}: 180 ms, at most 100",)
    assert decision.evidence == tuple(live(name))
    assert decision.policy["watch_days"] == 14


@pytest.mark.parametrize(
    "metrics",
    [
        live(rows=99),
        live(verdict="insufficient"),
        live("volume_ratio"),
        live("ks/avg_order_value"),
    ],
)
def test_too_few_requests_and_metrics_of_the_customers_say_nothing(metrics: list[Metric]) -> None:
    assert decide(live=metrics).verdict == "keep"


@pytest.mark.parametrize(
    ("failed", "of", "taken_back"),
    [(3, 3, True), (10, 40, True), (2, 3, False), (2, 60, False)],
)
def test_few_requests_speak_where_chance_cannot_explain_their_failures(
    failed: int, of: int, taken_back: bool
) -> None:
    told = f"{failed} of {of} requests failed"
    errors = Metric("error_rate", "alert", failed / of, 0.01, told, NOW, NOW, of, "v2-abc")
    assert (decide(live=[errors]).verdict == "rollback") == taken_back


def test_a_release_that_is_surely_worse_on_labels_is_taken_back() -> None:
    replay = replayed(1.5)
    decision = decide(replay=replay)
    assert decision.verdict == "rollback"
    assert decision.replay == replay
    assert "above that of version 1 on 2,000 labelled customers" in decision.reasons[0]
    mean = replay.figures["log_loss_difference"]
    most = replay.figures["log_loss_difference_at_most"]
    assert isinstance(mean, float)
    assert isinstance(most, float)
    least = float(decision.reasons[0].split("at least ")[1].split()[0])
    assert 0.01 < least < mean < most
    assert most - mean == pytest.approx(mean - least, abs=1e-3)


@pytest.mark.parametrize(
    ("population", "says"),
    [
        ({"population": "held out", "offered": 90, "held_out": 400}, "customers of the hold-out,"),
        (
            {"population": "everyone", "offered": 90, "held_out": 20},
            "customers of everyone, of whom 90 were served an offer and only 20 are held out,",
        ),
    ],
)
def test_a_rollback_says_on_whom_it_rests_where_offers_were_served(
    population: Mapping[str, float | str], says: str
) -> None:
    replay = replayed(1.5)
    replay = msgspec.structs.replace(replay, figures={**replay.figures, **population})
    assert says in decide(replay=replay).reasons[0]


def told(mean: float, most: float) -> Evidence:
    figures: dict[str, float | str] = {
        "log_loss_difference": mean,
        "log_loss_difference_at_most": most,
    }
    return Evidence("paired_replay", figures, False, "1", 2000)


@pytest.mark.parametrize(
    "replay",
    [
        # Better.
        told(-0.2, -0.1),
        # Worse, but not surely so.
        told(0.05, 0.1),
        # Surely worse, by no more than is allowed.
        told(0.008, 0.009),
        # Too few customers.
        replayed(1.5, rows=299),
        # Nothing was measured.
        Evidence("paired_replay", {}, False, "1", 2000),
        Evidence("paired_replay", {"log_loss_difference": 0.5}, False, "1", 1),
    ],
)
def test_a_release_that_is_not_surely_worse_stays(replay: Evidence) -> None:
    assert decide(replay=replay).verdict == "keep"


def test_a_release_is_watched_for_some_time() -> None:
    for days_ago, verdict in [(13.9, "rollback"), (14.1, "keep")]:
        history = (TWO[0], step("2", days_ago))
        assert decide(history=history, live=live()).verdict == verdict
    assert decide(WatchPolicy(watch_days=2), live=live()).verdict == "keep"


BACK = (*TWO, step("1", 2, "rollback"), step("3", 1))


def test_after_a_rollback_by_itself_a_person_decides_for_a_while() -> None:
    decision = decide(history=BACK, live=live())
    assert (decision.verdict, decision.to, decision.alert) == ("wait", "1", True)
    assert "for 7 days none is done by itself" in decision.reasons[-1]
    assert "churn rollback" in decision.action
    assert decide(WatchPolicy(hold_off_days=1), history=BACK, live=live()).verdict == "rollback"
    # What a person took back is not the policy flapping.
    by_person = (*TWO, step("1", 2, "rollback", "ada"), step("3", 1))
    assert decide(history=by_person, live=live()).verdict == "rollback"


def test_the_version_that_came_back_does_not_go_to_the_one_that_was_taken_back() -> None:
    back = (*TWO, step("1", 2, "rollback"))
    decision = decide(WatchPolicy(hold_off_days=1), history=back, live=live())
    assert (decision.verdict, decision.version, decision.to) == ("wait", "1", None)


def test_a_clock_set_back_does_not_end_the_hold_off() -> None:
    assert decide(history=BACK, live=live(), now=NOW - 5 * DAY).verdict == "wait"


def test_the_first_version_has_no_way_back() -> None:
    decision = decide(history=(step("1", 2, "bootstrap"),), live=live())
    assert (decision.verdict, decision.to, decision.alert) == ("wait", None, True)
    assert "there is no version to go back to" in decision.reasons


def test_nothing_is_in_production() -> None:
    decision = decide(history=(), live=live())
    assert (decision.verdict, decision.version, decision.alert) == ("keep", None, False)


def test_a_person_decides_where_that_is_set() -> None:
    decision = decide(WatchPolicy(mode="manual"), live=live())
    assert (decision.verdict, decision.to, decision.alert) == ("wait", "1", True)
    assert decision.reasons[-1] == "rollback.mode is manual"
    assert decide(WatchPolicy(mode="manual")).verdict == "keep"
    off = decide(WatchPolicy(mode="off"), live=live())
    assert (off.verdict, off.alert) == ("keep", False)


def test_a_rollback_has_one_id_until_it_fails_and_is_tried_three_times() -> None:
    first = decide(live=live())
    assert first.id.startswith("rollback-2-")
    for ending in ("running", "succeeded"):
        later = decide(live=live("error_rate"), endings={first.id: ending}, now=NOW + DAY)
        assert later.id == first.id
    endings: dict[str, str] = {}
    for _ in range(3):
        decision = decide(live=live(), endings=endings)
        assert decision.verdict == "rollback"
        assert decision.id not in endings
        endings[decision.id] = "failed"
    given_up = decide(live=live(), endings=endings)
    assert (given_up.verdict, given_up.alert) == ("wait", True)
    assert "the rollback to version 1 failed 3 times" in given_up.reasons
    # Another time in Production is another decision.
    again = (*TWO, step("1", 2, "rollback", "ada"), step("2", 1))
    assert decide(history=again, live=live(), endings=endings).verdict == "rollback"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"mode": "perhaps"}, "mode"), ({"watch_days": 0}, "watch_days"), ({"margin": 2}, "margin")],
)
def test_nonsense_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"rollback\.{named}"):
        WatchPolicy(**wrong)
