"""What a case of the drill is said to have come to, from what was seen."""

from __future__ import annotations

import json
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import load_model_from_string
from sklearn.linear_model import LogisticRegression

from churn_assets.drill.cases import CASES, SHORT, Case, case_named, configuration
from churn_assets.drill.offer_desk import OfferDesk
from churn_assets.drill.outcome import (
    HARM,
    WINDOW_DAYS,
    Day,
    Event,
    Outcome,
    Treated,
    healed_on,
    outcome,
    rolling_auc,
    worst_gap,
)
from churn_assets.drill.report import goals, table, write_report
from churn_assets.drill.sabotage import spoiled
from churn_assets.errors import UserError
from churn_assets.modeling.onnx_export import export_onnx, predict_onnx
from churn_assets.settings import load_settings
from churn_assets.simulator import Offer

CASE = case_named("sudden_shift")
DAY = timedelta(days=1)


def days_of(gaps: list[float], nothing: float = 0.0) -> tuple[Day, ...]:
    """Days from the change on, each with the gap of what was served to an oracle of 0.9."""
    return tuple(
        Day(CASE.change + place * DAY, 0.9 - gap, 0.9 - nothing, 0.9)
        for place, gap in enumerate(gaps)
    )


def event(days: int, what: str, kind: str = "decision") -> Event:
    return Event(datetime.combine(CASE.change + days * DAY, time(5), UTC), kind, what, "because")


def ended(case: Case = CASE, days: tuple[Day, ...] = (), **given: Any) -> Outcome:
    known: dict[str, Any] = {
        "events": [], "lost": None, "human_steps": 0, "failed_runs": 0, "requests": 1000,
        "horizon_days": 14, "seconds": 1.0,
    }  # fmt: skip
    events = given.pop("events", known.pop("events"))
    return outcome(case, days, events, **(known | given))


def test_harm_is_what_doing_nothing_loses() -> None:
    assert worst_gap(days_of([0.0] * 5, nothing=HARM + 0.001), CASE.change) > HARM
    assert ended(days=days_of([0.0] * 5, nothing=HARM + 0.001)).harmful
    harmless = ended(days=days_of([0.05] * 5, nothing=HARM - 0.001))
    assert (harmless.harmful, harmless.healed, harmless.days_to_heal) == (False, None, None)


def test_healed_is_for_good() -> None:
    gaps = [0.0, 0.1, 0.1, 0.01, 0.05, 0.019, *([0.0] * 9), 0.01]
    assert healed_on(days_of(gaps), CASE.change) == CASE.change + 5 * DAY
    done = ended(days=days_of(gaps, nothing=0.1))
    assert (done.healed, done.days_to_heal, done.days_after_labels) == (True, 5, 5 - 14)
    assert done.auc_gap == pytest.approx(0.01)
    for unhealed in ([0.1] * 8, gaps[:-1]):
        never = ended(days=days_of(unhealed, nothing=0.1))
        assert (never.healed, never.days_to_heal) == (False, None)


def test_days_without_enough_requests_are_unknown() -> None:
    rng = np.random.default_rng(0)
    days = [CASE.change + n * DAY for n in range(WINDOW_DAYS + 3)]
    day_of = np.repeat(np.array(days[3:], "datetime64[D]"), 50)
    churned = rng.random(len(day_of)) < 0.3
    good = np.where(churned, 0.8, 0.2) + rng.normal(0, 0.1, len(day_of))
    scores = {"served": good, "nothing": rng.random(len(day_of)), "oracle": good}
    found = rolling_auc(days, day_of, churned, scores)
    assert found[3].served is None
    assert found[-1].oracle == found[-1].served
    assert found[-1].served is not None
    assert found[-1].nothing is not None
    assert found[-1].served > 0.95 > 0.65 > found[-1].nothing
    scores["oracle"] = np.full(len(day_of), np.nan)
    assert rolling_auc(days, day_of, churned, scores)[-1].served is None


def test_what_was_noticed_and_when() -> None:
    events = [
        event(-3, "ks/avg_order_value", "alert"),
        event(4, "retrain:new_labels"),
        event(6, "ks/login_frequency_7d", "alert"),
        event(8, "retrain:drift"),
        event(30, "retrain:concept_drift"),
    ]
    done = ended(days=days_of([0.0] * 5, nothing=0.1), events=events)
    assert (done.detected, done.days_to_detect) == (True, 6)
    assert (done.detected_by, done.alerts_before) == ("ks/login_frequency_7d", 1)
    assert (done.retrains, done.false_retrains) == (3, 0)
    harmless = ended(days=days_of([0.0] * 5), events=events)
    assert harmless.false_retrains == 2
    early = ended(days=days_of([0.0] * 5, nothing=0.1), events=[event(-2, "retrain:drift")])
    assert early.false_retrains == 1
    assert not early.detected


def test_a_bad_release_is_mended_by_a_rollback() -> None:
    slow = case_named("slow_release")
    at = datetime.combine(slow.change + 2 * DAY, time(5), UTC)
    taken_back = [Event(at, "decision", "rollback", "slow")]
    done = ended(slow, lost=0.3, events=taken_back)
    assert (done.harmful, done.healed, done.days_to_heal) == (True, True, 2)
    assert done.false_rollbacks == 0
    assert not ended(slow, lost=0.3).healed
    assert not ended(slow, lost=0.001).harmful
    assert ended(days=days_of([0.0] * 3), events=[event(1, "rollback")]).false_rollbacks == 1


def test_goals_and_report(tmp_path: Path) -> None:
    bad = ended(days=days_of([0.1] * 8, nothing=0.1), human_steps=2)
    good = ended(
        case_named("new_market"), days=days_of([0.0] * 8), events=[event(1, "<b>", "alert")]
    )
    missed = [goal.text for goal in goals([bad, good]) if not goal.met]
    assert len(missed) == 3
    assert "not sudden_shift" in missed[0]
    assert all(goal.met for goal in goals([good]))
    write_report(tmp_path, [bad, good])
    report = json.loads((tmp_path / "report.json").read_text())
    assert [one["name"] for one in report["scenarios"]] == ["sudden_shift", "new_market"]
    assert {"harmful", "detected", "days_to_detect", "false_retrains", "healed", "days_to_heal",
            "auc_gap", "human_steps"} <= report["scenarios"][0].keys()  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "sudden concept shift" in page
    assert "&lt;b&gt;" in page
    assert "<b>because" not in page
    assert "sudden concept shift" in table([bad])


TREATED = Treated(
    verdict="offers keep customers",
    effect=0.05,
    lower=0.012,
    upper=0.088,
    true_effect=0.041,
    held_out=700,
    others=1100,
    offers=2100,
    scores={"held_out": {"accuracy": 0.91}, "others": {"rows": 20.0}},
    intact="ok",
)


def test_what_offers_did_is_told_beside_the_truth(tmp_path: Path) -> None:
    done = ended(case_named("offers"), days=days_of([0.0] * 8), treated=TREATED)
    told = (
        "offers keep customers, +5.0% [+1.2%, +8.8%], in truth +4.1%; 2,100 offers, outcomes of "
        "700 held out and 1,100 others; accuracy 0.910 and unknown"
    )
    assert done.treated is not None
    assert done.treated.line() == told
    write_report(tmp_path, [done, ended()])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["scenarios"][0]["treated"]["true_effect"] == 0.041
    assert report["scenarios"][1]["treated"] is None
    assert f"Offers: {told}." in (tmp_path / "report.html").read_text()
    unknown = msgspec.structs.replace(TREATED, effect=None, true_effect=None, scores={})
    assert unknown.line().startswith("offers keep customers; 2,100 offers")


def test_offers_go_to_those_above_the_threshold_once_a_horizon() -> None:
    desk = OfferDesk(0.3, 14 * DAY)
    at = datetime.combine(CASE.change, time(9), UTC)

    def answer(customer: str, p: float, *, holdout: bool = False) -> dict[str, Any]:
        return {"customer_id": customer, "churn_probability": p, "holdout": holdout}

    answers = [
        answer("a", 0.31),
        answer("at the threshold", 0.3),
        answer("held out", 0.9, holdout=True),
        answer("a", 0.8),
        {"error": {"status": 404, "field": "customer_id", "message": "unknown"}},
        answer("b", 1.0),
    ]
    assert desk.serve(answers, at) == [Offer("a", at), Offer("b", at)]
    later = at + 13 * DAY
    assert desk.serve([answer("a", 0.9), answer("c", 0.9)], later) == [Offer("c", later)]
    again = at + 14 * DAY
    assert desk.serve([answer("a", 0.9), answer("c", 0.9)], again) == [Offer("a", again)]


def test_a_case_with_offers_has_a_large_hold_out_and_looks_at_it(tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "case.yaml"
    case = case_named("offers")
    assert case.offers
    path.write_text(yaml.safe_dump(configuration(case)))
    settings = load_settings(path)
    other = configuration(case_named("stable_year"))
    assert settings.holdout.share >= 0.3
    # What is not asked for otherwise is as in other cases.
    assert settings.schedules.drift_report == "0 3 1-31/3 * *"
    assert settings.schedules.treatment_report == "0 4 1-31/3 * *"
    assert other["schedules"]["treatment_report"] == "0 4 1 1 *"
    assert "holdout" not in other


@pytest.mark.parametrize("case", [*CASES, *SHORT], ids=lambda case: f"{case.name}-{case.days}")
def test_every_case_has_a_valid_configuration(case: Case, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump(configuration(case)))
    settings = load_settings(path)
    assert settings.promotion.mode == "automatic"
    assert case.days > case.change_after + 5


def test_a_case_that_is_none_is_told() -> None:
    with pytest.raises(UserError, match="there is no case meteor; there are stable_year"):
        case_named("meteor")


@pytest.fixture(scope="module")
def onnx() -> tuple[bytes, np.ndarray]:
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 40, (300, 3)).astype(np.float32)
    model = LogisticRegression(max_iter=500).fit(rows, rows[:, 1] > rows[:, 0])
    return export_onnx(model, 3), rows


def test_a_backwards_model_has_it_backwards(onnx: tuple[bytes, np.ndarray]) -> None:
    good, rows = onnx
    bad = spoiled(good, "backwards", 1)
    assert predict_onnx(bad, rows) == pytest.approx(1 - predict_onnx(good, rows), abs=1e-6)


def test_a_slow_model_is_right_and_depends_on_the_request(
    onnx: tuple[bytes, np.ndarray],
) -> None:
    good, rows = onnx
    bad = spoiled(good, "slow", 1)
    assert predict_onnx(bad, rows[:5]) == pytest.approx(predict_onnx(good, rows[:5]), abs=1e-6)
    multiplied = [
        node for node in load_model_from_string(bad).graph.node if node.op_type == "MatMul"
    ]
    assert len(multiplied) >= 8


def test_a_failing_model_fails_on_some(onnx: tuple[bytes, np.ndarray]) -> None:
    good, rows = onnx
    bad = spoiled(good, "failing", 1)
    fine = rows[rows[:, 1] <= 20]
    assert predict_onnx(bad, fine) == pytest.approx(predict_onnx(good, fine), abs=1e-6)
    with pytest.raises(Exception, match="indices element out of data bounds"):
        predict_onnx(bad, rows[rows[:, 1] > 20])
