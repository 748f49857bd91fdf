"""Beginning and ending a trial: a version in Staging answers some customers beside Production's.

A trial is a step of the history like a transition, though no version leaves its stage: the alias
`challenger` points to the version on trial, and the step keeps the terms. There is one at a time. A
version that comes into Production, by promotion or rollback, ends it in the same step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from churn_assets.contract.release import Release, ReleaseError
from churn_assets.errors import UserError
from churn_assets.lifecycle.history import (
    CHALLENGER,
    Evidence,
    Move,
    Step,
    TrialRun,
    trial_figures,
)
from churn_assets.lifecycle.registry import Registry, check_agrees, read_registry, take_step
from churn_assets.lifecycle.release import build_trial_release, fetch_release

if TYPE_CHECKING:
    from mlflow import MlflowClient

# A smaller arm would never tell anything.
SHARES = (0.001, 0.999)


@dataclass(frozen=True)
class TrialPolicy:
    """How two models are tried, and what is asked of the challenger.

    share: of the customers, whom the challenger answers. shadow: both models score every request,
    so that every outcome counts for both. alpha: the chance of a wrong verdict, however often one
    looks. margin: by how much the log loss may be worse. min_rows: fewer outcomes are no evidence.
    max_days: of operational time, after which a trial without a verdict stops. clip_difference,
    clip_loss: differences of log loss, and log losses, count up to these. max_error_rate: of
    requests the challenger has no score for. max_latency_ratio, max_latency_ms: of the 95th
    percentile of its requests, against the champion's and at all. Raises UserError for a value that
    says nothing.
    """

    share: float = 0.1
    shadow: bool = True
    alpha: float = 0.05
    margin: float = 0.005
    min_rows: int = 1000
    max_days: int = 90
    clip_difference: float = 1.0
    clip_loss: float = 4.0
    max_error_rate: float = 0.01
    max_latency_ratio: float = 2.0
    max_latency_ms: float = 50.0

    def __post_init__(self) -> None:
        if not SHARES[0] <= self.share <= SHARES[1]:
            raise UserError(
                f"trial.share is {self.share}; set a share from {SHARES[0]} to {SHARES[1]}"
            )
        if not 0 < self.alpha <= 0.5:
            raise UserError(f"trial.alpha is {self.alpha}; set a chance above 0, up to 0.5")
        if not 0 <= self.margin <= 1:
            raise UserError(f"trial.margin is {self.margin}; set a log loss from 0 to 1")
        for name in ("min_rows", "max_days"):
            if getattr(self, name) < 1:
                raise UserError(f"trial.{name} is {getattr(self, name)}; set at least 1")
        for name in ("clip_difference", "clip_loss"):
            if not 0.1 <= getattr(self, name) <= 16:
                raise UserError(
                    f"trial.{name} is {getattr(self, name)}; set a log loss from 0.1 to 16"
                )
        if not 0 <= self.max_error_rate < 1:
            raise UserError(f"trial.max_error_rate is {self.max_error_rate}; set a share below 1")
        for name in ("max_latency_ratio", "max_latency_ms"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"trial.{name} is {value}; set a number above 0")


def start_trial(
    client: MlflowClient,
    name: str,
    version: str,
    releases: Path,
    *,
    share: float,
    shadow: bool,
    who: str,
    why: str,
    now: datetime,
) -> TrialRun:
    """Put `version` on trial beside the version in Production; its release is proven first.

    share: of the customers, whom it answers, within SHARES. shadow: whether both models score every
    request. Raises UserError when `version` is not in Staging, nothing is in Production, a trial is
    going on, or the release of both cannot be made.
    """
    if not SHARES[0] <= share <= SHARES[1]:
        raise UserError(
            f"the share of a trial is {share}; give one from {SHARES[0]} to {SHARES[1]}"
        )
    registry = read_registry(client, name)
    _check_may_start(registry, version)
    champion = str(registry.production)
    trial = f"trial-{version}-beside-{champion}-{now.astimezone(UTC):%Y%m%dT%H%M%S}"
    release = _build(
        client, registry, releases, champion, version, trial, share=share, shadow=shadow, now=now
    )
    figures = trial_figures(trial, share, shadow, release.manifest.release_id)

    def planned(registry: Registry) -> Step:
        _check_may_start(registry, version)
        if registry.production != champion:
            raise UserError(f"version {registry.production} has come into Production; try again")
        evidence = Evidence("trial_begins", figures, incumbent=champion)
        return trial_step(registry, version, version, who=who, why=why, evidence=evidence, now=now)

    take_step(client, name, planned, doing=f"a trial of version {version} of {name} was begun")
    begun = read_registry(client, name).trial
    if begun is None or begun.id != trial:
        raise UserError(f"the trial of version {version} was ended by somebody else at once")
    return begun


def stop_trial(client: MlflowClient, name: str, *, who: str, why: str, now: datetime) -> TrialRun:
    """End the trial that is going on; the version stays in Staging. Returns the trial.

    Raises UserError when there is none.
    """
    going_on = running_trial(read_registry(client, name))

    def planned(registry: Registry) -> Step:
        trial = running_trial(registry)
        if trial.id != going_on.id:
            raise UserError(f"another trial has begun: {trial.line()}; try again")
        evidence = Evidence("trial_ends", {"trial": trial.id}, incumbent=trial.champion)
        return trial_step(
            registry, trial.challenger, None, who=who, why=why, evidence=evidence, now=now
        )

    take_step(client, name, planned, doing=f"the trial {going_on.id} was ended")
    return going_on


def running_trial(registry: Registry) -> TrialRun:
    """The trial that is going on. Raises UserError when there is none."""
    if registry.trial is None:
        raise UserError(
            f"no version of {registry.name} is on trial; `churn trial start` begins a trial"
        )
    return registry.trial


def release_of_trial(
    client: MlflowClient, registry: Registry, trial: TrialRun, releases: Path
) -> Release:
    """The release of both models of `trial`, both proven, in `releases / <its id>`.

    Raises UserError when one cannot be proven, or together they are not what the trial began with.
    """
    release = _build(
        client,
        registry,
        releases,
        trial.champion,
        trial.challenger,
        trial.id,
        share=trial.share,
        shadow=trial.shadow,
        now=trial.since,
    )
    if release.manifest.release_id != trial.release_id:
        raise UserError(
            f"the release of {trial.id} is {release.manifest.release_id} now, and it began as "
            f"{trial.release_id}; end it with `churn trial stop`, and begin another"
        )
    return release


def _build(
    client: MlflowClient,
    registry: Registry,
    releases: Path,
    champion: str,
    challenger: str,
    trial: str,
    *,
    share: float,
    shadow: bool,
    now: datetime,
) -> Release:
    both = [
        fetch_release(client, registry.version(version), releases, kept=True)
        for version in (champion, challenger)
    ]
    try:
        return build_trial_release(
            releases, *both, trial=trial, share=share, shadow=shadow, created_at=now
        )
    except ReleaseError as error:
        raise UserError(
            f"version {challenger} cannot be tried beside version {champion}: {error}"
        ) from error


def _check_may_start(registry: Registry, version: str) -> None:
    stage = registry.version(version).stage
    if stage != "Staging":
        raise UserError(f"version {version} is in {stage}; only one in Staging can be on trial")
    if registry.production is None:
        raise UserError(
            f"nothing of {registry.name} is in Production to try version {version} beside; "
            "promote a first version"
        )
    if registry.trial is not None:
        raise UserError(
            f"there is one trial at a time, and one is going on: {registry.trial.line()}; end it "
            "with `churn trial stop`"
        )


def trial_step(
    registry: Registry,
    version: str,
    challenger: str | None,
    *,
    who: str,
    why: str,
    evidence: Evidence,
    now: datetime,
) -> Step:
    """The step after which the alias points to `challenger`; `version` stays in Staging.

    Raises UserError without a name or a reason, and for a registry that contradicts itself.
    """
    if not who.strip() or not why.strip():
        raise UserError("a trial begins and ends with a name and a reason; give both")
    check_agrees(registry)
    return Step(
        number=len(registry.history) + 1,
        moves=(Move(version, "Staging", "Staging"),),
        aliases={CHALLENGER: challenger},
        who=who.strip(),
        why=why.strip(),
        at=max([now.astimezone(UTC), *(step.at for step in registry.history[-1:])]),
        evidence=evidence,
    )
