"""Carrying out what was decided: promotion and rollback, each only with a release that is proven.

The release is fetched and proven before the registry changes, so that what cannot serve never
comes into Production and what serves goes on serving.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from churn_assets.errors import UserError
from churn_assets.lifecycle.history import Evidence, Step, last_known_good
from churn_assets.lifecycle.promotion import PromotionDecision
from churn_assets.lifecycle.records import ProductionRelease
from churn_assets.lifecycle.registry import (
    Version,
    read_registry,
    rollback_target,
    transition,
)
from churn_assets.lifecycle.release import fetch_release
from churn_assets.lifecycle.trials import release_of_trial
from churn_assets.modeling.bootstrap import Interval

if TYPE_CHECKING:
    from mlflow import MlflowClient

FIGURES = ("auc", "accuracy", "log_loss", "brier", "p95_latency_ms")


def figures_of(client: MlflowClient, version: Version) -> dict[str, float]:
    """What the evaluation of a version measured, as far as it did."""
    metrics = client.get_run(version.run_id).data.metrics if version.run_id else {}
    return {name: metrics[name] for name in FIGURES if name in metrics}


def promised_auc(client: MlflowClient, version: Version) -> Interval | None:
    """The AUC the evaluation of a version measured, with its interval where that was tracked."""
    metrics = client.get_run(version.run_id).data.metrics if version.run_id else {}
    if "auc" not in metrics:
        return None
    return Interval(metrics["auc"], metrics.get("auc_low"), metrics.get("auc_high"))


def carry_out(
    client: MlflowClient, decision: PromotionDecision, releases: Path, *, now: datetime
) -> Step | None:
    """Promote what `decision` says, once; None when it says no or has been carried out.

    Raises UserError when the release cannot be proven or the registry's rules say no.
    """
    registry = read_registry(client, decision.name)
    done = any(step.decision == decision.id for step in registry.history)
    if decision.verdict != "promote" or decision.evidence is None or done:
        return None
    fetch_release(client, registry.version(decision.version), releases)
    return transition(
        client,
        decision.name,
        decision.version,
        "Production",
        who=decision.who,
        why=decision.why,
        evidence=decision.evidence,
        now=now,
        plan=decision.plan,
        decision=decision.id,
    )


def roll_back(
    client: MlflowClient,
    name: str,
    releases: Path,
    *,
    who: str,
    why: str,
    to: str | None,
    now: datetime,
    decision: str | None = None,
) -> Step | None:
    """Put `to`, or else the last known good version, back into Production.

    decision: the id of the stored decision it carries out, once: None when that has been done.
    Raises UserError when there is nothing to go back to, or when its release cannot be proven.
    """
    registry = read_registry(client, name)
    if decision is not None and any(step.decision == decision for step in registry.history):
        return None
    target = rollback_target(registry, to)
    if target == registry.production:
        raise UserError(f"version {target} is in Production already; name another to go back to")
    fetch_release(client, registry.version(target), releases, kept=True)
    return transition(
        client,
        name,
        target,
        "Production",
        who=who,
        why=why,
        evidence=Evidence("rollback", {"from_version": str(registry.production)}),
        now=now,
        decision=decision,
    )


def in_production_now(client: MlflowClient, name: str, releases: Path) -> ProductionRelease:
    """The version in Production with its proven release, and the version on trial beside it.

    Raises UserError when there is none.
    """
    registry = read_registry(client, name)
    if registry.production is None:
        raise UserError(f"nothing of {name} is in Production yet; approve a version in Staging")
    trial = registry.trial
    if trial is not None:
        release = release_of_trial(client, registry, trial, releases)
    else:
        release = fetch_release(client, registry.version(registry.production), releases, kept=True)
    return ProductionRelease(
        name=name,
        version=registry.production,
        release_dir=str(release.directory),
        release_id=release.manifest.release_id,
        way_back=last_known_good(registry.history),
        step=next(step for step in reversed(registry.history) if step.target == "Production"),
        trial=trial.id if trial else None,
        challenger=trial.challenger if trial else None,
    )
