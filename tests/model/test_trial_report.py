"""Which outcome a logged prediction has, and what the outcomes of a trial lead to."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from trial_cases import BY_ARM, CUTOFFS, DAY, POLICY, SINCE, TRIAL, World, world

from churn_assets.contract.trial import assignment
from churn_assets.data.lake import Lake
from churn_assets.data.tables import TIMESTAMP
from churn_assets.errors import UserError
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.trials import TrialPolicy
from churn_assets.monitoring.outcomes import EMPTY_LABELS
from churn_assets.monitoring.trial import (
    EMPTY_LOG,
    TrialReport,
    judge_trial,
    last_report,
    outcomes_of,
    predictions_of,
)

FIRST = CUTOFFS[0]


def row(customer: str, at: Any, cutoff: Any = None, **changes: Any) -> dict[str, Any]:
    given = {"customer_id": customer, "at": at, "cutoff": cutoff, "request_id": f"{customer}-{at}"}
    more = {"champion": 0.2, "challenger": 0.3, "release_id": TRIAL.release_id, "latency_us": 500}
    return given | more | {"arm": assignment(TRIAL.id, TRIAL.share)(customer)} | changes


def log_of(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(rows).astype(EMPTY_LOG.dtypes.to_dict())[EMPTY_LOG.columns]


def counted(*rows: dict[str, Any], **changes: Any) -> list[tuple[str, Any]]:
    found = predictions_of(log_of(*rows), TRIAL, horizon_days=30, **changes).rows
    return list(zip(found["customer_id"], found["cutoff"], strict=True))


# Which outcome.


def test_stored_features_have_the_outcome_of_their_own_cutoff() -> None:
    assert counted(row("a", FIRST + 5 * DAY, FIRST)) == [("a", FIRST)]


@pytest.mark.parametrize(
    ("at", "cutoff"),
    [
        (FIRST + timedelta(hours=15), FIRST + DAY),
        (FIRST + timedelta(microseconds=1), FIRST + DAY),
        (FIRST + DAY - timedelta(microseconds=1), FIRST + DAY),
        (FIRST, FIRST + DAY),
    ],
)
def test_features_of_the_request_have_the_outcome_from_the_next_midnight_on(
    at: Any, cutoff: Any
) -> None:
    """An order later on that day is not yet an outcome, one before the request never is."""
    assert counted(row("a", at)) == [("a", cutoff)]
    behind = timedelta(days=400)
    assert counted(row("a", at), behind=behind) == [("a", cutoff - behind)]
    assert counted(row("a", at, FIRST), behind=behind) == [("a", FIRST)]


def test_a_customer_counts_once_at_a_cutoff_and_not_again_within_a_horizon() -> None:
    rows = [row("a", FIRST + n * timedelta(hours=1), FIRST, champion=0.1 * n) for n in (3, 1, 2)]
    rows += [row("a", FIRST + n * DAY, FIRST + n * DAY) for n in (1, 29, 30, 45, 60)]
    rows += [row("b", FIRST + 2 * DAY)]
    found = predictions_of(log_of(*rows), TRIAL, horizon_days=30)
    assert [(c, (t - FIRST) / DAY) for c, t in zip(*(found.rows[n] for n in KEY), strict=True)] == [
        ("a", 0),
        ("b", 3),
        ("a", 30),
        ("a", 60),
    ]
    assert found.rows["champion"][0] == pytest.approx(0.1), "the first request of the cutoff"
    assert (found.logged, found.repeated, found.overlapping) == (9, 2, 3)


KEY = ("customer_id", "cutoff")


def test_what_counts_does_not_depend_on_the_order_of_the_log() -> None:
    log = world(300).log
    log = pd.concat([log, log.assign(at=log["at"] + DAY, request_id="x")], ignore_index=True)
    shuffled = log.sample(frac=1, random_state=1)
    first, again = (predictions_of(of, TRIAL, horizon_days=30).rows for of in (log, shuffled))
    pd.testing.assert_frame_equal(first, again)
    assert len(first) == 300


def test_outcomes_are_those_of_matured_labels_of_the_population() -> None:
    predictions = predictions_of(
        log_of(
            row("churned", FIRST, FIRST),
            row("stayed", FIRST, FIRST),
            row("not-a-customer", FIRST, FIRST),
            row("too-new", FIRST + DAY, FIRST + DAY),
        ),
        TRIAL,
        horizon_days=30,
    )
    labels = pd.DataFrame(
        {
            "customer_id": ["stayed", "churned", "too-new", "somebody", "churned"],
            "cutoff": [FIRST, FIRST, FIRST, FIRST, FIRST + DAY],
            "churned": [False, True, True, True, False],
        }
    ).astype(EMPTY_LABELS.dtypes.to_dict())
    outcomes = outcomes_of(predictions, labels, [FIRST])
    assert dict(zip(outcomes.rows["customer_id"], outcomes.rows["churned"], strict=True)) == {
        "churned": True,
        "stayed": False,
    }
    assert (outcomes.waiting, outcomes.unlabelled) == (1, 1)


# Verdicts.


def test_a_better_challenger_is_found_better() -> None:
    report = world(champion_noise=1.5, challenger_noise=0.2).judged()
    assert report.verdict == "challenger better"
    assert report.figures["log_loss_difference_at_most"] < 0
    assert report.figures["challenger_log_loss"] < report.figures["champion_log_loss"]
    assert report.rows == report.looks[-1].rows == 4000
    assert [look.rows for look in report.looks] == sorted(look.rows for look in report.looks)
    assert [look.cutoff for look in report.looks] == list(CUTOFFS)
    evidence = report.evidence()
    assert isinstance(evidence, Evidence)
    assert (evidence.kind, evidence.passed, evidence.incumbent, evidence.rows) == (
        "trial",
        True,
        "1",
        4000,
    )


def test_a_worse_challenger_is_found_worse() -> None:
    report = world(champion_noise=0.2, challenger_noise=2.0).judged()
    assert report.verdict == "worse"
    assert report.figures["log_loss_difference_at_least"] > POLICY.margin
    evidence = report.evidence()
    assert isinstance(evidence, Evidence)
    assert not evidence.passed


def test_the_same_model_is_no_worse_within_the_margin() -> None:
    here = world(20_000, champion_noise=0.05, challenger_noise=0.05)
    report = here.judged(policy=replace(POLICY, margin=0.005))
    assert report.verdict == "no worse within margin"
    assert here.judged(policy=replace(POLICY, margin=0.0)).verdict == "not yet"


def test_the_figures_are_those_of_the_log_losses() -> None:
    here = world(700)
    report = here.judged()
    both = here.log.merge(here.labels, on=["customer_id", "cutoff"])
    truth = both["churned"].to_numpy()
    losses = [
        -np.where(truth, np.log(both[of]), np.log(1 - both[of]))
        for of in ("champion", "challenger")
    ]
    assert report.figures["champion_log_loss"] == pytest.approx(losses[0].mean())
    difference = np.clip(losses[1] - losses[0], -1, 1)
    assert report.figures["log_loss_difference"] == pytest.approx(difference.mean())
    assert report.figures["log_loss_difference_unclipped"] == pytest.approx(
        (losses[1] - losses[0]).mean()
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policy": replace(POLICY, min_rows=5000)}, "4,000 outcomes are known, 5,000 are needed"),
        ({"matured": ()}, "0 outcomes are known"),
        ({"matured": CUTOFFS[:0]}, "0 outcomes are known"),
    ],
)
def test_too_little_is_no_verdict(changes: dict[str, Any], says: str) -> None:
    report = world(champion_noise=1.5, challenger_noise=0.2).judged(**changes)
    assert report.verdict == "not yet"
    assert says in report.reason
    assert not report.passed


def test_a_trial_without_predictions_has_no_verdict_and_no_evidence() -> None:
    report = World(EMPTY_LOG, EMPTY_LABELS).judged()
    assert (report.verdict, report.rows) == ("not yet", 0)
    assert {guard.state for guard in report.guards} == {"unknown"}
    assert "has no verdict" in str(report.evidence())


def test_what_is_rare_and_very_wrong_is_not_clipped_away() -> None:
    here = world(20_000, champion_noise=0.05, challenger_noise=0.0)
    stayed = here.log.merge(here.labels, on=["customer_id", "cutoff"])["churned"].to_numpy()
    rare = np.flatnonzero(stayed)[:60]
    here.log.loc[rare, "challenger"] = 1e-6
    report = here.judged(policy=replace(POLICY, margin=0.01))
    assert report.figures["log_loss_difference_at_most"] < 0.01
    assert report.figures["clipped_share"] == pytest.approx(60 / 20_000)
    assert report.verdict == "not yet"
    assert "in full" in report.reason


def test_without_shadow_the_arms_are_compared() -> None:
    here = world(8_000, champion_noise=2.5, challenger_noise=0.1, trial=BY_ARM)
    report = here.judged(BY_ARM)
    assert report.verdict == "challenger better"
    assert report.rows == 8_000
    assert report.figures["challenger_rows"] == pytest.approx(4000, rel=0.05)
    turned = world(8_000, champion_noise=0.1, challenger_noise=2.5, trial=BY_ARM)
    assert turned.judged(BY_ARM).verdict == "worse"
    alike = world(8_000, trial=BY_ARM).judged(BY_ARM)
    assert alike.verdict == "not yet"
    # A tenth of the customers tells less than their half.
    width = alike.looks[-1].upper - alike.looks[-1].lower
    tenth = replace(BY_ARM, share=0.1)
    narrow = world(8_000, trial=tenth).judged(tenth)
    assert narrow.looks[-1].upper - narrow.looks[-1].lower > 1.5 * width
    # With shadow the same customers tell much more.
    paired = world(8_000).judged()
    assert paired.looks[-1].upper - paired.looks[-1].lower < width / 2


def test_without_shadow_a_challenger_that_nobody_was_asked_about_says_nothing() -> None:
    here = world(2000, trial=BY_ARM)
    only = here.log[here.log["arm"] == "champion"].reset_index(drop=True)
    report = World(only, here.labels).judged(BY_ARM)
    assert (report.verdict, report.rows) == ("not yet", 0)


@pytest.mark.parametrize("trial", [TRIAL, BY_ARM])
def test_the_chance_of_a_wrong_verdict_is_kept_through_the_whole_evaluation(trial: Any) -> None:
    """Two models of the same quality, looked at after every cutoff, in 40 worlds."""
    policy = replace(POLICY, min_rows=1, margin=0.0)
    wrong = 0
    for seed in range(40):
        here = world(600, champion_noise=1.0, challenger_noise=1.0, trial=trial, seed=seed)
        report = here.judged(trial, policy)
        wrong += any(look.lower > 0 or look.upper < 0 for look in report.looks)
    assert wrong <= 2


# Guard rails.


def guarded(name: str, here: World, trial: Any = TRIAL, **changes: Any) -> TrialReport:
    report = here.judged(trial, **changes)
    assert [guard.name for guard in report.guards if guard.state == "hit"] == [name]
    assert report.verdict == "stopped by a guard rail"
    assert name in report.reason
    return report


def test_a_challenger_that_fails_is_stopped_however_good_it_is() -> None:
    here = world(champion_noise=1.5, challenger_noise=0.2)
    failed = here.log.index[:60]
    here.log.loc[failed, "challenger"] = np.nan
    here.log.loc[failed, "arm"] = "champion"
    report = guarded("error_rate", here)
    assert report.counts["challenger_failed"] == 60
    assert report.rows == 3940
    few = here.judged(policy=replace(POLICY, max_error_rate=0.02))
    assert few.verdict == "challenger better"


def test_failures_without_shadow_are_known_by_the_assignment() -> None:
    here = world(2000, trial=BY_ARM)
    failed = here.log.index[here.log["arm"] == "challenger"][:50]
    here.log.loc[failed, ["challenger", "champion"]] = [np.nan, 0.3]
    here.log.loc[failed, "arm"] = "champion"
    report = guarded("error_rate", here, BY_ARM)
    assert report.counts["challenger_failed"] == 50
    # They still count for the arm they were assigned to: by the answer they got.
    assert report.rows == 2000


def test_one_failure_among_the_first_requests_is_no_rate() -> None:
    here = world(10)
    here.log.loc[0, "challenger"] = np.nan
    here.log.loc[0, "arm"] = "champion"
    assert here.judged().verdict == "not yet"


def test_a_slow_challenger_is_stopped() -> None:
    here = world(trial=BY_ARM)
    slow = here.log["arm"] == "challenger"
    here.log.loc[slow, "latency_us"] = 900
    assert here.judged(BY_ARM).verdict == "not yet", "below a millisecond a ratio says nothing"
    here.log.loc[slow, "latency_us"] = 2500
    guarded("latency_ratio", here, BY_ARM)
    here.log["latency_us"] = 60_000
    guarded("latency_ms", here, BY_ARM)


def test_latency_of_few_requests_is_unknown_and_keeps_a_trial_from_a_verdict() -> None:
    here = world(champion_noise=1.5, challenger_noise=0.0)
    tiny = replace(TRIAL, share=0.01)
    here.log["arm"] = [assignment(tiny.id, tiny.share)(i) for i in here.log["customer_id"]]
    report = here.judged(tiny)
    assert report.verdict == "not yet"
    assert "latency_ratio, latency_ms" in report.reason


def test_answers_of_the_wrong_arm_stop_a_trial() -> None:
    here = world()
    here.log.loc[5, "arm"] = "champion" if here.log.loc[5, "arm"] == "challenger" else "challenger"
    guarded("assignment", here)


def test_a_trial_has_an_end() -> None:
    here = world()
    policy = replace(POLICY, min_rows=5000)
    assert here.judged(policy=policy, days=90).verdict == "not yet"
    over = here.judged(policy=policy, days=90.5)
    assert over.verdict == "stopped by a guard rail"
    assert "90 are allowed" in over.reason
    better = world(champion_noise=1.5, challenger_noise=0.2)
    assert better.judged(days=200).verdict == "challenger better"


# From the lake, and kept.


def stored(lake: Lake, here: World) -> None:
    def table_of(frame: pd.DataFrame, **more: Any) -> pa.Table:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        for name, column in more.items():
            table = table.append_column(name, column)
        return table

    for day in sorted(set(here.log["at"].dt.date)):
        rows = here.log[here.log["at"].dt.date == day]
        at = pa.array(rows["at"], TIMESTAMP)
        lake.write(
            "prediction_log", day, day, table_of(rows.drop(columns="at"), at=at), day_of="at"
        )
    for cutoff in CUTOFFS:
        rows = here.labels[here.labels["cutoff"] == cutoff]
        day = cutoff.date() + timedelta(days=29)
        days = pa.array([day] * len(rows), pa.date32())
        lake.write("churn_labels", day, day, table_of(rows, day=days), day_of="day")


def from_lake(lake: Lake, trial: Any = TRIAL) -> TrialReport:
    return judge_trial(
        lake, trial, POLICY, horizon_days=30, behind=timedelta(), now=SINCE + 40 * DAY
    )


def test_a_trial_is_judged_from_the_lake(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    assert from_lake(lake).verdict == "not yet"
    here = world(champion_noise=1.5, challenger_noise=0.2)
    foreign = here.log.assign(release_id="v1-alone", challenger=np.nan, request_id="alone")
    stored(lake, World(pd.concat([here.log, foreign], ignore_index=True), here.labels))
    report = from_lake(lake)
    assert report == here.judged()
    assert lake.days("churn_labels")[0] == date(2026, 1, 31)
    # One that began later has nothing of it, one that ended keeps what was said before.
    later = replace(TRIAL, since=SINCE + 30 * DAY)
    assert from_lake(lake, later).rows == 0
    ended = replace(TRIAL, until=SINCE + 10 * DAY)
    assert from_lake(lake, ended).rows == report.rows


def test_a_report_is_kept_and_found_by_its_trial(tmp_path: Path) -> None:
    report = world(600).judged()
    folder = tmp_path / "trial_report"
    folder.mkdir()
    (folder / "latest.json").write_bytes(msgspec.json.encode(report))
    assert last_report(tmp_path, TRIAL.id) == report
    assert any(report.reason in line for line in report.lines())
    assert last_report(tmp_path, "another") is None
    (folder / "latest.json").write_bytes(b"{")
    assert last_report(tmp_path, TRIAL.id) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("share", value) for value in (0, 1, -1, 1e-9, float("nan"))),
        *(("alpha", value) for value in (0, 0.6, float("nan"))),
        *(("margin", value) for value in (-0.1, 2, float("nan"))),
        ("min_rows", 0),
        ("max_days", 0),
        *((name, value) for name in ("clip_difference", "clip_loss") for value in (0, 17)),
        *(("max_error_rate", value) for value in (-0.1, 1, float("nan"))),
        *(("max_latency_ratio", value) for value in (0, float("inf"))),
        *(("max_latency_ms", value) for value in (-1, float("nan"))),
    ],
)
def test_a_setting_that_says_nothing_is_refused(name: str, value: float) -> None:
    given: dict[str, Any] = {name: value}
    with pytest.raises(UserError, match=rf"trial\.{name} is .*; set "):
        TrialPolicy(**given)
