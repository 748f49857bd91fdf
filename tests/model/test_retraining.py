"""When a training is asked for, and when not: a decision a day, from what was seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from churn_assets.errors import UserError
from churn_assets.monitoring.feeds import Fault
from churn_assets.monitoring.metric import Metric, Verdict
from churn_assets.monitoring.retraining import (
    ACTIONS,
    Modes,
    Plan,
    RetrainingDecision,
    RetrainingEvidence,
    RetrainingPolicy,
    Training,
    decide_retraining,
)

NOW = datetime(2025, 6, 1, 5, 15, tzinfo=UTC)
TODAY = date(2025, 5, 31)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
HORIZON = 30
POLICY = RetrainingPolicy()
LOGINS, TICKETS = "login_frequency_7d", "support_tickets_90d"


def metric(name: str, days_ago: float, verdict: Verdict = "alert", **changes: Any) -> Metric:
    at = NOW - days_ago * DAY
    made = Metric(name, verdict, 0.2, 0.15, "is 0.2, at most 0.15", at, at, rows=1000)
    return msgspec.structs.replace(made, **changes)


def drifted(reports: int = 3, name: str = "ks/avg_order_value") -> list[Metric]:
    return [metric(name, place) for place in reversed(range(reports))]


def decayed(reports: int = 2) -> list[Metric]:
    return [metric("matured_auc", 7 * place) for place in reversed(range(reports))]


def training(
    days_ago: float, *, newest: int = 30, plan: Plan = "history", decision: str | None = None
) -> Training:
    """newest: how many days ago the newest feature day was that it had labels of."""
    return Training(NOW - days_ago * DAY, TODAY - newest * DAY, plan, (), decision)


# The weekly one, of a week in which nothing happened.
WEEKLY = training(6, newest=36)
QUIET = RetrainingEvidence(
    metrics=[],
    faults=[],
    trainings=[WEEKLY],
    labelled_days=[TODAY - number * DAY for number in range(200, 29, -1)],
    production="3",
    since=NOW - 40 * DAY,
    without=(),
    earlier=[],
    endings={},
)


def decide(
    policy: RetrainingPolicy = POLICY, *, now: datetime = NOW, data_day: date = TODAY, **seen: Any
) -> RetrainingDecision:
    evidence = replace(QUIET, **seen)
    return decide_retraining(evidence, policy, data_day=data_day, horizon_days=HORIZON, now=now)


def modes(**given: Any) -> RetrainingPolicy:
    return RetrainingPolicy(modes=Modes(**given))


def fired(decision: RetrainingDecision) -> list[str]:
    return [trigger.name for trigger in decision.triggers if trigger.fired]


# What fires each trigger, with the plan of the training it asks for, and whether it alerts.
SCHEDULED: dict[str, Any] = {"trainings": [training(10, newest=40)]}
DRIFT: dict[str, Any] = {"metrics": drifted()}
NEW_LABELS: dict[str, Any] = {"trainings": [training(8, newest=58)]}
CONCEPT: dict[str, Any] = {"metrics": decayed()}
CASES = [
    ("scheduled", SCHEDULED, "history", False),
    ("drift", DRIFT, "recent", True),
    ("new_labels", NEW_LABELS, "history", False),
    ("concept_drift", CONCEPT, "recent", True),
]


def test_nothing_happened() -> None:
    decision = decide()
    assert (decision.verdict, decision.trigger, decision.alert) == ("wait", None, False)
    assert fired(decision) == []
    assert {t.name: t.action for t in decision.triggers} == ACTIONS
    assert decision.policy["cool_down_days"] == 7


@pytest.mark.parametrize(("name", "seen", "plan", "alert"), CASES)
def test_each_trigger_asks_for_a_training(
    name: str, seen: dict[str, Any], plan: str, alert: bool
) -> None:
    decision = decide(**seen)
    assert fired(decision) == [name]
    assert (decision.verdict, decision.trigger) == ("retrain", name)
    assert (decision.plan, decision.alert) == (plan, alert)
    assert (decision.proposal is not None) == (name == "concept_drift")
    assert decision.reasons[0].startswith(f"{name}: ")
    assert list(decision.evidence) == seen.get("metrics", [])[-1:]


def test_a_drop_of_the_accuracy_is_for_a_person() -> None:
    decision = decide(metrics=[metric("accuracy", 1)])
    assert (decision.verdict, decision.trigger) == ("investigate", "performance")
    assert decision.alert


@pytest.mark.parametrize(("name", "seen", "plan", "alert"), CASES)
def test_a_trigger_set_to_manual_asks_a_person(
    name: str, seen: dict[str, Any], plan: str, alert: bool
) -> None:
    decision = decide(modes(**{name: "manual"}), **seen)
    assert fired(decision) == [name]
    assert (decision.verdict, decision.trigger, decision.alert) == ("wait", name, True)
    assert f"retraining.modes.{name} is manual" in decision.reasons[-1]
    assert "churn train" in decision.reasons[-1]


@pytest.mark.parametrize(
    ("name", "seen"),
    [(name, seen) for name, seen, _, _ in CASES]
    + [("performance", {"metrics": [metric("accuracy", 1)]})],
)
def test_a_trigger_that_is_off_does_nothing(name: str, seen: dict[str, Any]) -> None:
    decision = decide(modes(**{name: "off"}), **seen)
    assert (decision.verdict, decision.alert, fired(decision)) == ("wait", False, [])


def test_a_manual_trigger_does_not_keep_an_automatic_one() -> None:
    decision = decide(modes(concept_drift="manual"), metrics=[*drifted(), *decayed()])
    assert (decision.verdict, decision.trigger) == ("retrain", "drift")
    assert decision.proposal is not None


def test_two_triggers_at_once_are_one_decision() -> None:
    seen: dict[str, Any] = {"metrics": [*drifted(), *decayed()], **SCHEDULED}
    decision = decide(**seen)
    assert fired(decision) == ["concept_drift", "drift", "scheduled"]
    assert (decision.verdict, decision.trigger) == ("retrain", "concept_drift")
    assert [reason.split(":")[0] for reason in decision.reasons] == fired(decision)


def test_an_accuracy_alert_is_not_hidden_by_another_trigger() -> None:
    inaccurate = [metric("accuracy", 1)]
    retrained = decide(metrics=inaccurate, **SCHEDULED)
    assert (retrained.verdict, retrained.alert) == ("retrain", True)
    assert any(reason.startswith("performance: ") for reason in retrained.reasons)
    held = decide(metrics=[*drifted(), *inaccurate], labelled_days=[])
    assert (held.verdict, held.trigger, held.alert) == ("investigate", "performance", True)
    assert "at least 5" in held.reasons[-1]


# Persistence.


@pytest.mark.parametrize(("name", "needed"), [("prediction_shift", 3), ("matured_auc", 2)])
def test_evidence_has_to_persist(name: str, needed: int) -> None:
    for reports in range(1, needed + 2):
        decision = decide(metrics=drifted(reports, name))
        assert bool(fired(decision)) == (reports >= needed)


def test_a_report_without_an_alert_begins_the_count_anew() -> None:
    quiet = metric("ks/avg_order_value", 1, "ok")
    alerts = [metric("ks/avg_order_value", ago) for ago in (4, 3, 2)]
    assert fired(decide(metrics=[*alerts, quiet, metric("ks/avg_order_value", 0)])) == []
    # One with too little evidence says nothing either way.
    short = msgspec.structs.replace(quiet, verdict="insufficient", value=None)
    assert fired(decide(metrics=[*alerts[1:], short, metric("ks/avg_order_value", 0)])) == ["drift"]


def test_alerts_of_different_features_do_not_add_up() -> None:
    mixed = [metric(f"ks/{name}", ago) for name, ago in [("a", 2), ("b", 1), ("c", 0)]]
    assert fired(decide(metrics=mixed)) == []


def test_reports_of_one_day_are_one() -> None:
    again = [metric("prediction_shift", 0.01 * place) for place in range(3)]
    assert fired(decide(metrics=again)) == []


def test_too_little_evidence_is_no_drift() -> None:
    short = [metric(n, a, "insufficient") for n in ("ks/a", "matured_auc") for a in (3, 2, 1, 0)]
    decision = decide(metrics=short)
    assert fired(decision) == []
    told = {trigger.name: trigger.reason for trigger in decision.triggers}
    assert told["drift"] == told["concept_drift"] == "there is too little evidence"


def test_reports_that_have_stopped_coming_say_nothing_of_today() -> None:
    at = NOW + 9 * DAY
    assert fired(decide(now=at, metrics=drifted(), trainings=[training(-8)])) == ["drift"]
    at = NOW + 11 * DAY
    assert fired(decide(now=at, metrics=drifted(), trainings=[training(-8)])) == []


def test_what_was_measured_of_an_earlier_version_does_not_count() -> None:
    for days_ago, expected in [(2.5, ["drift"]), (1.5, [])]:
        assert fired(decide(metrics=drifted(), since=NOW - days_ago * DAY)) == expected
    # Nor does what a clock that was ahead has measured.
    ahead = [metric("prediction_shift", -place) for place in (1, 2, 3)]
    assert fired(decide(metrics=ahead)) == []


# What holds a training back.


def asked(days_ago: float, verdict: Any = "retrain", **changes: Any) -> RetrainingDecision:
    """An earlier decision, by its own id."""
    made = decide(**DRIFT)
    at = NOW - days_ago * DAY
    given = {"id": f"{verdict}-{days_ago}", "verdict": verdict, "at": at, **changes}
    return msgspec.structs.replace(made, **given)


def held(decision: RetrainingDecision) -> str:
    assert (decision.verdict, decision.alert) == ("wait", False), decision
    return decision.reasons[-1]


def test_trainings_asked_for_lie_a_cool_down_apart() -> None:
    for days_ago, verdict in [(6.9, "wait"), (7.0, "retrain")]:
        recent = training(days_ago, newest=45, plan="recent", decision="retrain-1")
        decision = decide(trainings=[recent], **DRIFT)
        assert decision.verdict == verdict
    assert "6.9 days ago, 7 must pass" in held(
        decide(trainings=[training(6.9, plan="recent", decision="retrain-1")], **DRIFT)
    )


@pytest.mark.parametrize("days_ago", [0.1, 1, 3, 6.9])
def test_the_weekly_training_delays_none(days_ago: float) -> None:
    """It learns from labels two horizons old: it heals nothing that has just changed."""
    weekly = training(days_ago, newest=30 + round(days_ago))
    assert decide(trainings=[weekly], **DRIFT).verdict == "retrain"


def test_with_too_few_new_labels_there_is_nothing_to_learn() -> None:
    for newest, verdict in [(34, "wait"), (35, "retrain")]:
        last = training(8, newest=newest, plan="recent", decision="retrain-1")
        decision = decide(trainings=[last], **DRIFT)
        assert decision.verdict == verdict
    assert "4 days of labels" in held(
        decide(trainings=[training(8, newest=34, plan="recent", decision="retrain-1")], **DRIFT)
    )


def test_no_labels_ever_arrive() -> None:
    for seen in (DRIFT, SCHEDULED):
        assert "0 days of labels" in held(decide(labelled_days=[], **seen))
    # After a first training nor: it is the same labels again.
    last = training(20, newest=30)
    assert "0 days of labels" in held(decide(trainings=[last], metrics=[]))


def test_the_budget_of_thirty_days() -> None:
    earlier = [asked(5 * place + 2) for place in range(7)]
    done: Any = {decision.id: "succeeded" for decision in earlier}
    long_ago = training(40, newest=80)
    # Those of 2, 7, ..., 27 days ago are six; the one of 32 days ago counts no more.
    decision = decide(earlier=earlier, endings=done, trainings=[long_ago], **DRIFT)
    assert "6 trainings in 30 days, the budget is 6" in held(decision)
    # What was decided, and never got to a run, has spent nothing; nor has the same one twice.
    del done[earlier[0].id]
    twice = [*earlier, *earlier]
    assert decide(earlier=twice, endings=done, trainings=[long_ago], **DRIFT).verdict == "retrain"


def test_one_that_is_being_carried_out_is_not_asked_for_again() -> None:
    running = asked(1)
    decision = decide(earlier=[running], endings={running.id: "running"}, **DRIFT)
    assert f"{running.id} is being carried out" in held(decision)


# MLflow was down, or something else broke the training off.


def test_a_training_that_failed_is_tried_again_some_hours_later() -> None:
    failed = asked(0)
    for hours, verdict in [(19, "wait"), (21, "retrain")]:
        decision = decide(
            now=NOW + hours * HOUR, earlier=[failed], endings={failed.id: "failed"}, **DRIFT
        )
        assert decision.verdict == verdict
    # Its own run is asked for by a decision of its own.
    assert decision.id != failed.id


def test_a_training_that_fails_is_tried_three_times_and_then_after_the_cool_down() -> None:
    earlier = [asked(5), asked(4), asked(3)]
    # Twice in the records, as of a decision made again before its run began.
    earlier.insert(1, earlier[0])
    endings: Any = {decision.id: "failed" for decision in earlier}
    assert decide(earlier=earlier[:3], endings=endings, **DRIFT).verdict == "retrain"
    assert "3 trainings in a row failed" in held(decide(earlier=earlier, endings=endings, **DRIFT))
    later = decide(
        now=NOW + 4 * DAY,
        earlier=earlier,
        endings=endings,
        metrics=[metric("prediction_shift", -ago) for ago in (2, 3, 4)],
    )
    assert later.verdict == "retrain"
    # One that succeeded in between ends the row.
    endings[earlier[-2].id] = "succeeded"
    assert decide(earlier=earlier, endings=endings, **DRIFT).verdict == "retrain"


def test_the_same_evidence_gives_the_same_id_on_the_same_day_only() -> None:
    first = decide(**DRIFT)
    assert first.id.startswith("retrain-20250601-")
    assert decide(now=NOW + 2 * HOUR, **DRIFT).id == first.id
    assert decide(earlier=[first], **DRIFT).id == first.id
    assert decide(now=NOW + DAY, **DRIFT).id != first.id
    assert decide(trainings=[training(8, newest=40)], **DRIFT).id != first.id
    tried = decide(
        RetrainingPolicy(retry_hours=1),
        now=NOW + 2 * HOUR,
        earlier=[first],
        endings={first.id: "failed"},
        **DRIFT,
    )
    assert tried.verdict == "retrain"
    assert tried.id != first.id
    assert decide(**CONCEPT).id != first.id


# Follow-ups.


def trained_on_recent(times: int) -> list[Training]:
    """The last 15 days ago, on labels up to the day 45 days ago; the weekly ones go on."""
    return [
        *(
            training(15 * place, newest=30 + 15 * place, plan="recent", decision=f"retrain-{place}")
            for place in range(times, 0, -1)
        ),
        WEEKLY,
    ]


@pytest.mark.parametrize(("times", "follows"), [(1, True), (3, True), (4, False)])
def test_a_training_on_recent_labels_is_followed_up(times: int, follows: bool) -> None:
    decision = decide(trainings=trained_on_recent(times))
    assert (decision.verdict == "retrain") == follows
    if follows:
        assert (decision.trigger, decision.plan) == ("new_labels", "recent")


def test_a_follow_up_waits_for_its_labels() -> None:
    policy = RetrainingPolicy(follow_up_days=16)
    assert decide(policy, trainings=trained_on_recent(1)).verdict == "wait"
    assert decide(RetrainingPolicy(follow_ups=0), trainings=trained_on_recent(1)).verdict == "wait"


# Where nothing is decided.


def test_a_clock_set_back_decides_nothing_and_alerts() -> None:
    for seen in ({"earlier": [asked(-2)]}, {"trainings": [training(-2)]}):
        decision = decide(**DRIFT, **seen)
        assert (decision.verdict, decision.alert) == ("wait", True)
        assert "it was set back" in decision.reasons[0]
    # An hour is no more than two machines may differ by.
    assert decide(**DRIFT, earlier=[asked(-0.04)]).verdict == "retrain"


def test_nothing_is_in_production() -> None:
    decision = decide(production=None, since=None, trainings=[], **DRIFT)
    assert (decision.verdict, decision.alert) == ("wait", False)
    assert decision.reasons == ("nothing is in Production",)


def test_there_has_been_no_training() -> None:
    """A version somebody else has put there."""
    decision = decide(trainings=[])
    assert (decision.verdict, decision.trigger) == ("retrain", "new_labels")
    assert fired(decision) == ["new_labels", "scheduled"]


# A broken feed.


def fault(table: str, first: int, last: int = 0, *, still: bool = True) -> Fault:
    """Between so many days before the newest and so many."""
    return Fault(table, TODAY - first * DAY, TODAY - last * DAY, 0.0, still)


OUTAGE = fault("logins", 2)


def test_a_broken_feed_suppresses_what_would_learn_from_it_and_the_model_steps_aside() -> None:
    decision = decide(faults=[OUTAGE], metrics=[*drifted(), *decayed()])
    assert (decision.verdict, decision.trigger, decision.alert) == ("fall_back", "data_fault", True)
    assert (decision.without, decision.until) == ((LOGINS,), OUTAGE.first - DAY)
    assert decision.plan == "history"
    assert decision.faults == (OUTAGE,)
    assert "suppressed: concept_drift, drift" in decision.reasons


def fell_back(days_ago: float = 1, **changes: Any) -> RetrainingDecision:
    return asked(days_ago, "fall_back", **{"without": (LOGINS,), "faults": (OUTAGE,), **changes})


@pytest.mark.parametrize("ending", ["running", "succeeded"])
def test_a_version_without_the_feature_is_asked_for_once(ending: Any) -> None:
    done = fell_back()
    decision = decide(faults=[OUTAGE], earlier=[done], endings={done.id: ending}, **DRIFT)
    assert decision.verdict == "suppress"
    assert f"{done.id} asked for a version without {LOGINS}" in decision.reasons
    # The next outage is another.
    later = fault("logins", 0)
    again = decide(faults=[later], earlier=[done], endings={done.id: ending})
    assert again.verdict == "fall_back"


def test_a_decision_whose_run_never_began_is_made_again() -> None:
    """Under the same id on the same day, which asks for no second run."""
    first = decide(faults=[OUTAGE])
    assert decide(faults=[OUTAGE], earlier=[first]).id == first.id


def test_a_version_without_the_feature_that_failed_is_tried_three_times() -> None:
    tries = [fell_back(3), fell_back(2), fell_back(2), fell_back(1)]
    endings: Any = {decision.id: "failed" for decision in tries}
    assert decide(faults=[OUTAGE], earlier=tries[:3], endings=endings).verdict == "fall_back"
    decision = decide(faults=[OUTAGE], earlier=tries, endings=endings)
    assert decision.verdict == "suppress"
    assert f"a version without {LOGINS} failed 3 times" in decision.reasons


def test_no_model_does_without_orders() -> None:
    decision = decide(faults=[fault("orders", 3)], **DRIFT)
    assert decision.verdict == "suppress"
    assert "no model does without orders" in decision.reasons


def test_a_version_that_does_without_the_feature_stays_while_the_feed_is_broken() -> None:
    decision = decide(faults=[OUTAGE], without=(LOGINS,), earlier=[fell_back()], **DRIFT)
    assert (decision.verdict, decision.alert) == ("suppress", True)
    # That is told once and not every day.
    told = asked(1, "suppress", action=decision.action)
    again = decide(faults=[OUTAGE], without=(LOGINS,), earlier=[fell_back(), told], **DRIFT)
    assert (again.verdict, again.alert) == ("suppress", False)


def test_a_fault_has_to_last_before_a_version_steps_aside() -> None:
    policy = RetrainingPolicy(fallback_after_days=4)
    assert decide(policy, faults=[OUTAGE]).verdict == "suppress"
    assert decide(policy, faults=[fault("logins", 3)]).verdict == "fall_back"


def test_two_feeds_break_one_after_the_other() -> None:
    tickets, done = fault("support_tickets", 0), fell_back()
    endings: Any = {done.id: "succeeded"}
    decision = decide(faults=[OUTAGE, tickets], without=(LOGINS,), earlier=[done], endings=endings)
    assert (decision.verdict, decision.without) == ("fall_back", (LOGINS, TICKETS))
    assert decision.until == OUTAGE.first - DAY
    # Also when the first one is repaired, and its feature still sees it.
    repaired = fault("logins", 4, 2, still=False)
    decision = decide(
        faults=[repaired, tickets], without=(LOGINS,), earlier=[done], endings=endings
    )
    assert (decision.verdict, decision.without) == ("fall_back", (LOGINS, TICKETS))
    both = decide(
        faults=[OUTAGE, tickets], without=(LOGINS, TICKETS), earlier=[done], endings=endings
    )
    assert both.verdict == "suppress"


def test_the_version_before_comes_back_once_no_feature_sees_the_fault() -> None:
    """A feature of seven days sees a fault that ended 6 days ago, and not one of 7 days ago."""
    seen: dict[str, Any] = {"without": (LOGINS,), "earlier": [fell_back()], **DRIFT}
    for ended, verdict in [(6, "suppress"), (7, "restore")]:
        decision = decide(faults=[fault("logins", 9, ended, still=False)], **seen)
        assert decision.verdict == verdict
    assert (decision.trigger, decision.alert) == ("data_fault", True)
    assert f"the feed of {LOGINS} is sound again" in decision.reasons
    # Whatever became of another feed meanwhile, but not while its own traces are there.
    tickets = fault("support_tickets", 3)
    sound, traces = fault("logins", 9, 7, still=False), fault("logins", 9, 2, still=False)
    assert decide(faults=[sound, tickets], **seen).verdict == "restore"
    assert decide(faults=[traces, tickets], **seen).verdict == "fall_back"


def test_a_version_a_person_trained_without_a_feature_stays() -> None:
    assert decide(without=(LOGINS,)).verdict == "wait"


def test_traces_of_a_repaired_fault_still_suppress() -> None:
    decision = decide(faults=[fault("logins", 9, 3, still=False)], **DRIFT)
    assert decision.verdict == "suppress"
    assert "sound again from 2025-06-04 on" in decision.reasons[0]
    assert decide(faults=[fault("logins", 19, 13, still=False)], **DRIFT).verdict == "retrain"


def test_a_person_decides_on_faults_where_that_is_set() -> None:
    policy = modes(data_fault="manual")
    decision = decide(policy, faults=[OUTAGE], **DRIFT)
    assert (decision.verdict, decision.alert) == ("suppress", True)
    assert "retraining.modes.data_fault is manual" in decision.reasons[-1]
    back = decide(policy, without=(LOGINS,), earlier=[fell_back()])
    assert (back.verdict, back.alert) == ("wait", True)
    assert "churn rollback" in back.reasons[-1]


def test_faults_that_are_off_change_nothing() -> None:
    policy = modes(data_fault="off")
    assert decide(policy, faults=[OUTAGE], **DRIFT).verdict == "retrain"
    assert decide(policy, without=(LOGINS,), earlier=[fell_back()], **DRIFT).verdict == "retrain"


# A month, decided day by day as the pipeline does.


def month(
    days: int, reports: Sequence[Metric] = (), *, fails: bool = False
) -> Iterator[RetrainingDecision]:
    """A decision each day; what it asks for is done in the hour, and the weekly training goes on.

    Each training is promoted, so that reports of an earlier day no longer count.
    """
    trainings, earlier, endings = [WEEKLY], [], {}
    for number in range(days):
        now, newest = NOW + number * DAY, TODAY + (number - 30) * DAY
        decision = decide(
            now=now,
            data_day=TODAY + number * DAY,
            metrics=[m for m in reports if m.at <= now],
            trainings=list(trainings),
            labelled_days=[newest - place * DAY for place in range(170, -1, -1)],
            earlier=list(earlier),
            endings=dict(endings),
        )
        yield decision
        earlier.append(decision)
        if decision.verdict == "retrain":
            endings[decision.id] = "failed" if fails else "succeeded"
            if not fails:
                at = now + HOUR
                trainings.append(Training(at, newest, decision.plan, (), decision.id))
        if number % 7 == 1:
            trainings.append(Training(now + HOUR, newest))


def test_a_quiet_month_asks_for_nothing() -> None:
    assert {decision.verdict for decision in month(60)} == {"wait"}


def test_a_drift_that_never_ends_keeps_within_cool_down_and_budget() -> None:
    reports = [metric("prediction_shift", -number) for number in range(-3, 60)]
    asked_on = [n for n, d in enumerate(month(60, reports)) if d.verdict == "retrain"]
    assert asked_on[0] == 0
    assert all(later - sooner >= 8 for sooner, later in pairwise(asked_on))
    assert len([number for number in asked_on if number < 30]) <= POLICY.budget


def test_trainings_that_keep_failing_are_few() -> None:
    reports = [metric("prediction_shift", -number) for number in range(-3, 30)]
    asked_on = [n for n, d in enumerate(month(30, reports, fails=True)) if d.verdict == "retrain"]
    assert asked_on[:3] == [0, 1, 2]
    assert asked_on[3] == 9
    assert len(asked_on) <= POLICY.budget


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"budget": 0}, "budget"),
        ({"persistence": 0}, "persistence"),
        ({"follow_ups": -1}, "follow"),
    ],
)
def test_nonsense_is_refused(wrong: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=rf"retraining\.{named}"):
        RetrainingPolicy(**wrong)  # ty: ignore[invalid-argument-type]
    with pytest.raises(UserError, match=r"retraining\.modes\.drift is 'maybe'"):
        Modes(drift="maybe")  # ty: ignore[invalid-argument-type]


def test_a_feature_without_values_suppresses_what_would_learn_from_it() -> None:
    spoiled = {LOGINS: "all 4,000 values are 0"}
    decision = decide(metrics=drifted(), spoiled=spoiled)
    assert (decision.verdict, decision.trigger, decision.alert) == ("suppress", "data_fault", True)
    assert LOGINS in decision.action
    assert spoiled[LOGINS] in decision.reasons[0]
    again = decide(metrics=drifted(), spoiled=spoiled, earlier=[decision])
    assert (again.verdict, again.alert) == ("suppress", False)
    assert decide(metrics=drifted(), spoiled=spoiled, without=(LOGINS,)).verdict == "retrain"
    off = decide(modes(data_fault="off"), metrics=drifted(), spoiled=spoiled)
    assert off.verdict == "retrain"
