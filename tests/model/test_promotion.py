"""Who promotes what, on which evidence, and what the policy may not say."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from churn_assets.errors import UserError
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.promotion import (
    Approval,
    PromotionPolicy,
    decide,
    paired_replay,
)
from churn_assets.lifecycle.registry import POLICY, Registry, Version
from churn_assets.settings import load_settings

NOW = datetime(2026, 1, 2, tzinfo=UTC)
MANUAL, AUTOMATIC = PromotionPolicy(), PromotionPolicy(mode="automatic")
ADA = Approval("ada", "it is better")
PASSED = Evidence("paired_replay", {"log_loss_difference_at_most": 0.001}, True, "1", 900)
FAILED = Evidence("paired_replay", {"log_loss_difference_at_most": 0.1}, False, "1", 900)


def registry(production: bool = True, stage: Any = "Staging") -> Registry:
    versions = {
        "1": Version("1", "Production", {"release_id": "v1-a"}, NOW, None, ""),
        "2": Version("2", stage, {}, NOW, None, ""),
    }
    if not production:
        del versions["1"]
    return Registry("churn", versions, {"production": "1"} if production else {}, ())


def verdict(
    policy: PromotionPolicy,
    comparison: Evidence | str | None,
    approval: Approval | None = None,
    production: bool = True,
) -> Any:
    return decide(
        registry(production),
        "2",
        figures={"auc": 0.9},
        comparison=comparison,
        policy=policy,
        approval=approval,
        now=NOW,
    )


@pytest.mark.parametrize(
    ("policy", "comparison", "approval", "expected", "says"),
    [
        (MANUAL, PASSED, None, "wait", "mode is manual: it waits for an approval"),
        (MANUAL, FAILED, None, "wait", "not within the margin"),
        (MANUAL, PASSED, ADA, "promote", "ada approved it"),
        (MANUAL, FAILED, ADA, "promote", "not within the margin"),
        (MANUAL, "the training set is gone", ADA, "refuse", "the training set is gone"),
        (AUTOMATIC, PASSED, None, "promote", "the comparison passed"),
        (AUTOMATIC, FAILED, None, "refuse", "the comparison did not pass"),
        (AUTOMATIC, "the training set is gone", None, "refuse", "without evidence nobody may"),
    ],
)
def test_a_later_version_is_judged_beside_the_one_in_production(
    policy: PromotionPolicy,
    comparison: Evidence | str,
    approval: Approval | None,
    expected: str,
    says: str,
) -> None:
    decision = verdict(policy, comparison, approval)
    assert decision.verdict == expected
    assert says in "; ".join(decision.reasons)
    assert decision.incumbent == decision.plan.to == "1"
    assert decision.plan.release_id == "v1-a"
    assert decision.policy["mode"] == policy.mode
    assert decision.who == ("ada" if approval else POLICY)
    assert decision.evidence == (comparison if isinstance(comparison, Evidence) else None)


@pytest.mark.parametrize(
    ("policy", "approval", "expected"),
    [
        (MANUAL, None, "promote"),
        (AUTOMATIC, None, "promote"),
        (PromotionPolicy(bootstrap=False), None, "wait"),
        (PromotionPolicy(bootstrap=False), ADA, "promote"),
    ],
)
def test_the_first_version_has_nothing_to_be_compared_with(
    policy: PromotionPolicy, approval: Approval | None, expected: str
) -> None:
    decision = verdict(policy, None, approval, production=False)
    assert decision.verdict == expected
    assert decision.evidence == Evidence("bootstrap", {"auc": 0.9})
    assert decision.plan.to is None
    assert "nothing was in Production before" in decision.plan.how


def test_only_what_is_in_staging_is_decided_on() -> None:
    with pytest.raises(UserError, match="version 2 is in Archived; only one in Staging"):
        decide(
            registry(stage="Archived"), "2", figures={}, comparison=PASSED, policy=MANUAL,
            approval=ADA, now=NOW,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("who", "why", "says"),
    [
        ("", "fine", "needs the name of the person"),
        (" \t", "fine", "needs the name of the person"),
        ("automatic policy", "fine", "is not a person"),
        ("pipeline", "fine", "is not a person"),
        ("ada", " ", "needs a reason"),
    ],
)
def test_an_approval_is_a_person_and_a_reason(who: str, why: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Approval(who, why)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{mode: sometimes}", "sometimes"),
        ("{margin: .nan}", "promotion.margin is nan; set a log loss from 0 to 1"),
        ("{margin: -1}", "promotion.margin is -1"),
        ("{min_rows: 0}", "promotion.min_rows is 0; set at least 1"),
        ("{min_rows: many}", "min_rows"),
        ("{bootstrap: perhaps}", "bootstrap"),
        ("{moed: manual}", "did you mean mode?"),
        ("always", "promotion"),
    ],
)
def test_a_policy_of_nonsense_is_refused_with_its_key(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "churn.yaml"
    path.write_text(f"source: {{kind: shop}}\ncalendar: {{start: 2024-01-01}}\npromotion: {line}\n")
    with pytest.raises(UserError) as refused:
        load_settings(path)
    assert says in str(refused.value)


def replay(candidate: float, rows: int = 2000, **changes: Any) -> Evidence:
    """Both see the truth through noise; `candidate` is how much noise there is more."""
    rng = np.random.default_rng(3)
    p = rng.uniform(0.02, 0.98, rows)
    y = rng.random(rows) < p
    blurred = np.clip(p + rng.normal(0, 1, rows) * candidate, 0.01, 0.99)
    return paired_replay(y, blurred, p, incumbent_version="1", policy=PromotionPolicy(**changes))


def test_a_replay_passes_when_it_is_not_worse_than_the_margin() -> None:
    same = replay(0.0)
    assert same.passed
    assert same.figures["log_loss_difference"] == 0
    assert same.figures["candidate_auc"] == same.figures["incumbent_auc"]
    assert (same.kind, same.incumbent, same.rows) == ("paired_replay", "1", 2000)
    worse = replay(0.2)
    assert not worse.passed
    mean, bound = (float(worse.figures[f"log_loss_difference{part}"]) for part in ("", "_at_most"))
    assert bound > mean > 0
    assert replay(0.2, margin=1.0).passed


def test_few_rows_are_no_evidence() -> None:
    assert not replay(0.0, rows=499).passed
    assert replay(0.0, rows=499, min_rows=499).passed
    assert not replay(0.0, rows=1, min_rows=1).passed
    nothing = np.array([])
    none = paired_replay(
        nothing.astype(bool), nothing, nothing, incumbent_version="1", policy=MANUAL
    )
    assert not none.passed
    assert none.figures == {}
    # JSON would turn what is not finite into nothing.
    assert (
        msgspec.json.decode(msgspec.json.encode(one := replay(0.0, rows=1)), type=Evidence) == one
    )
    assert "too few" in verdict(MANUAL, one).reasons[0]
