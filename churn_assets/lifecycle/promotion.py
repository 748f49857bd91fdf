"""Whether a version goes to Production: a decision with its reasons, evidence and policy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from churn_assets.errors import UserError
from churn_assets.lifecycle.history import Evidence, RollbackPlan
from churn_assets.lifecycle.registry import NOT_PERSONS, POLICY, Registry, rollback_plan
from churn_assets.modeling.metrics import score

# One-sided 95 % of the normal distribution.
Z_95 = 1.6449
# float32 has no probability closer to 0 or 1.
TINY = 1e-7


@dataclass(frozen=True)
class PromotionPolicy:
    """Who promotes, and what the policy asks of the comparison with the version in Production.

    mode: `manual` waits for a person's approval, `automatic` promotes what passes. bootstrap:
    whether the very first version, which there is nothing to compare with, goes to Production
    without a person. margin: by how much the log loss may be worse than the incumbent's on the
    same rows, with 95 % confidence. min_rows: fewer rows are no evidence. evidence: the comparison
    is a `replay` of both on held-out rows, or a `trial` on live requests, which has a policy of its
    own. Raises UserError for a value that says nothing.
    """

    mode: Literal["manual", "automatic"] = "manual"
    evidence: Literal["replay", "trial"] = "replay"
    bootstrap: bool = True
    margin: float = 0.005
    min_rows: int = 500

    def __post_init__(self) -> None:
        if self.mode not in ("manual", "automatic"):
            raise UserError(f"promotion.mode is {self.mode!r}; set manual or automatic")
        if self.evidence not in ("replay", "trial"):
            raise UserError(f"promotion.evidence is {self.evidence!r}; set replay or trial")
        if not (math.isfinite(self.margin) and 0 <= self.margin <= 1):
            raise UserError(f"promotion.margin is {self.margin}; set a log loss from 0 to 1")
        if self.min_rows < 1:
            raise UserError(f"promotion.min_rows is {self.min_rows}; set at least 1")


class Approval(msgspec.Struct, frozen=True):
    """A person's word. Raises UserError for one without a name or a reason."""

    who: str
    why: str

    def __post_init__(self) -> None:
        if not self.who.strip():
            raise UserError("an approval needs the name of the person who gives it; set who")
        if self.who.strip() in NOT_PERSONS:
            raise UserError(f"{self.who.strip()!r} is not a person; set who to a name")
        if not self.why.strip():
            raise UserError("an approval needs a reason; set why")


class PromotionDecision(msgspec.Struct, frozen=True):
    """Whether `version` goes to Production, and all that was seen when it was decided.

    verdict: `promote`, `wait` for a person, or `refuse`. policy: the values in force.
    """

    id: str
    name: str
    version: str
    verdict: Literal["promote", "wait", "refuse"]
    reasons: tuple[str, ...]
    who: str
    why: str
    incumbent: str | None
    evidence: Evidence | None
    plan: RollbackPlan
    policy: dict[str, str | float | bool]
    at: datetime

    @property
    def by_person(self) -> bool:
        """Whether a person decided."""
        return self.who != POLICY


def paired_replay(
    y: NDArray[np.bool_],
    candidate: NDArray[np.float64],
    incumbent: NDArray[np.float64],
    *,
    incumbent_version: str,
    policy: PromotionPolicy,
    population: Mapping[str, float | str] | None = None,
) -> Evidence:
    """Both models on the same rows neither was fitted on.

    y: outcomes [rows], true where churned; candidate, incumbent: P(churn) [rows]. population: whose
    rows they are, as figures, where there is something to say of it. It passes when the candidate's
    mean log loss is at most `policy.margin` above the incumbent's with 95 % confidence (paired
    differences, normal approximation).
    """
    rows = len(y)
    difference = _log_losses(y, candidate) - _log_losses(y, incumbent)
    mean = float(difference.mean()) if rows else math.nan
    spread = float(difference.std(ddof=1)) / math.sqrt(rows) if rows > 1 else math.inf
    bound = mean + Z_95 * spread
    figures: dict[str, float | str] = dict(population or {})
    for of, p in (("candidate", candidate), ("incumbent", incumbent)) if rows else ():
        scores = score(y, p)
        known = {"auc": scores.auc, "log_loss": scores.log_loss, "brier": scores.brier}
        figures |= {f"{of}_{name}": value for name, value in known.items() if value is not None}
    differences = {"log_loss_difference": mean, "log_loss_difference_at_most": bound}
    # JSON has no NaN and no infinity: a figure that is neither measured nor written is missing.
    figures |= {name: value for name, value in differences.items() if math.isfinite(value)}
    return Evidence(
        "paired_replay",
        figures,
        # Written so that a NaN, which compares false, does not pass.
        passed=rows >= policy.min_rows and bound <= policy.margin,
        incumbent=incumbent_version,
        rows=rows,
    )


def _log_losses(y: NDArray[np.bool_], p: NDArray[np.float64]) -> NDArray[np.float64]:
    clipped = np.clip(p, TINY, 1 - TINY)
    return -np.where(y, np.log(clipped), np.log1p(-clipped))


def decide(
    registry: Registry,
    version: str,
    *,
    figures: Mapping[str, float],
    comparison: Evidence | str | None,
    policy: PromotionPolicy,
    approval: Approval | None,
    now: datetime,
) -> PromotionDecision:
    """Decide on `version`: by `approval`, or else by `policy`.

    figures: of the version's own evaluation. comparison: with the version in Production, or why
    there is none. Raises UserError for a version that is not in Staging.
    """
    staged = registry.version(version)
    if staged.stage != "Staging":
        raise UserError(
            f"version {version} is in {staged.stage}; only one in Staging can be promoted"
        )
    incumbent = registry.production
    evidence = comparison if isinstance(comparison, Evidence) else None
    if incumbent is None:
        evidence = Evidence("bootstrap", dict(figures))
        reasons = ("there is nothing in Production to compare it with",)
    elif evidence is None:
        reasons = (f"it could not be compared with version {incumbent}: {comparison}",)
    else:
        reasons = (_compared(evidence, policy),)
    verdict, more = _verdict(incumbent, evidence, policy, approval)
    plan = rollback_plan(registry)
    content = msgspec.json.encode([registry.name, version, verdict, evidence, approval, now])
    return PromotionDecision(
        id=f"promotion-{version}-{hashlib.sha256(content).hexdigest()[:12]}",
        name=registry.name,
        version=version,
        verdict=verdict,
        reasons=(*reasons, more),
        who=approval.who.strip() if approval else POLICY,
        why=approval.why.strip() if approval else "; ".join((*reasons, more)),
        incumbent=incumbent,
        evidence=evidence,
        plan=plan,
        policy=asdict(policy),
        at=now,
    )


def _verdict(
    incumbent: str | None,
    evidence: Evidence | None,
    policy: PromotionPolicy,
    approval: Approval | None,
) -> tuple[Literal["promote", "wait", "refuse"], str]:
    if evidence is None:
        return "refuse", "without evidence nobody may promote it"
    if approval:
        return "promote", f"{approval.who.strip()} approved it"
    if incumbent is None:
        if policy.bootstrap:
            return "promote", "promotion.bootstrap lets the first version serve"
        return "wait", "promotion.bootstrap is off: the first version waits for an approval"
    if policy.mode == "manual":
        return "wait", "promotion.mode is manual: it waits for an approval"
    if evidence.passed:
        return "promote", "promotion.mode is automatic and the comparison passed"
    return "refuse", "promotion.mode is automatic and the comparison did not pass"


def _compared(evidence: Evidence, policy: PromotionPolicy) -> str:
    if "log_loss_difference_at_most" not in evidence.figures:
        return f"{evidence.rows} rows are too few to compare it on"
    bound = evidence.figures["log_loss_difference_at_most"]
    if evidence.kind == "trial":
        return (
            f"on trial beside version {evidence.incumbent}: {evidence.figures['verdict']}, its log "
            f"loss at most {bound:+.4f} of that version's on {evidence.rows:,} outcomes"
        )
    relation = "within" if evidence.passed else "not within"
    return (
        f"its log loss is at most {bound:+.4f} of version {evidence.incumbent}'s on "
        f"{evidence.rows:,} rows{population_of(evidence)}, {relation} the margin {policy.margin:g} "
        f"(at least {policy.min_rows:,} rows)"
    )


def population_of(evidence: Evidence) -> str:
    """Whose rows the evidence is of where offers were served, for a sentence; else nothing."""
    figures = evidence.figures
    if "population" not in figures:
        return ""
    if figures["population"] == "held out":
        return " of the hold-out"
    return (
        f" of everyone, of whom {figures['offered']:,.0f} were served an offer and only "
        f"{figures['held_out']:,.0f} are held out"
    )
