"""The registry's states and the one function that moves a version between them.

None -> Staging -> Production -> Archived. The tag `stage` and the aliases are the truth; MLflow's
own stages mirror them for as long as MLflow has them.

A transition is many writes and MLflow has no transactions, so the whole step is written down first,
as one tag of the registered model. From then on it has happened: readers see it applied, and should
the caller be killed, the next one carries it to its end. Steps that are done stay as tags
`history.000001` and so on, which are never written again.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from churn_assets.errors import UserError
from churn_assets.lifecycle.history import (
    CHALLENGER,
    COMPARISONS,
    Evidence,
    Move,
    RollbackPlan,
    Stage,
    Step,
    TrialRun,
    known_good,
    last_known_good,
    trials,
)
from churn_assets.lifecycle.lock import registry_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

# What a caller may ask for. Production is left by being replaced: something always serves.
LEGAL: dict[Stage, tuple[Stage, ...]] = {
    "None": ("Staging",),
    "Staging": ("Production", "Archived"),
    "Production": (),
    "Archived": ("Production", "Deleted"),
    "Deleted": (),
}
PIPELINE = "pipeline"
POLICY = "automatic policy"
RETENTION = "retention"
NOT_PERSONS = (PIPELINE, POLICY, RETENTION)

STAGE_TAG = "stage"
ARCHIVED_AT_TAG = "archived_at"
GATES_TAG = "gates"
# Features a version was trained without, by comma; empty for none.
WITHOUT_TAG = "without"
INTENT_TAG = "transition.intent"
HISTORY_PREFIX = "history."
# What PostgreSQL's column of a registered model's tag takes, in characters.
TAG_LIMIT = 5000
LOCK_WAIT_S = 20.0

LOGGED_MODEL = re.compile(r"models:/(m-\w+)")
_HISTORY_TAG = re.compile(r"history\.\d{6,}\Z")
_READS = 50


@dataclass(frozen=True)
class Version:
    """A registered version as it is now."""

    version: str
    stage: Stage
    tags: dict[str, str]
    registered_at: datetime
    run_id: str | None
    source: str

    @property
    def without(self) -> tuple[str, ...]:
        """The features it was trained without, because their feed was broken then."""
        return tuple(name for name in self.tags.get(WITHOUT_TAG, "").split(",") if name)


@dataclass(frozen=True)
class Registry:
    """One registered model at one moment: its versions by number, aliases and history.

    pending: a step that has been decided and is being written, or whose caller was killed. It is
    part of everything else here.
    """

    name: str
    versions: dict[str, Version]
    aliases: dict[str, str]
    history: tuple[Step, ...]
    pending: Step | None = None

    @property
    def production(self) -> str | None:
        """The version in Production."""
        return self.aliases.get("production")

    @property
    def trial(self) -> TrialRun | None:
        """The trial that is going on."""
        last = trials(self.history)[-1:]
        return last[0] if last and last[0].until is None else None

    def version(self, number: str) -> Version:
        """The version called `number`. Raises UserError when there is none."""
        if number not in self.versions:
            raise _no_version(self.name, number)
        return self.versions[number]

    def in_stage(self, stage: Stage) -> list[str]:
        """The versions in `stage`, newest first."""
        found = (v.version for v in self.versions.values() if v.stage == stage)
        return sorted(found, key=int, reverse=True)

    def faults(self) -> list[str]:
        """What contradicts itself here, a sentence each; nothing writes such a thing but by hand.

        MLflow's own stages are not looked at.
        """
        found = []
        if self.in_stage("Production") != [self.production] * bool(self.production):
            found.append(
                f"in Production are {', '.join(self.in_stage('Production')) or 'no versions'}, "
                f"the alias says {self.production}"
            )
        if (staged := self.aliases.get("staging")) and staged not in self.in_stage("Staging"):
            found.append(f"the alias staging points to version {staged}, which is not in Staging")
        if not staged and self.in_stage("Staging"):
            found.append(f"versions {', '.join(self.in_stage('Staging'))} in Staging, and no alias")
        on_trial = self.trial.challenger if self.trial else None
        if (challenger := self.aliases.get(CHALLENGER)) != on_trial:
            found.append(
                f"the alias {CHALLENGER} points to {challenger or 'nothing'}, on trial is "
                f"{on_trial or 'nothing'}"
            )
        if on_trial and on_trial not in self.in_stage("Staging"):
            found.append(f"version {on_trial} is on trial, and not in Staging")
        if (known_good(self.history)[-1:] or [None]) != [self.production]:
            found.append(
                f"the history says {(known_good(self.history) or ['nothing'])[-1]} is in "
                f"Production, the alias {self.production}"
            )
        if [step.number for step in self.history] != list(range(1, len(self.history) + 1)):
            found.append("a step of the history is missing")
        return found


def register_version(
    client: MlflowClient, name: str, *, model_uri: str, run_id: str, tags: Mapping[str, str]
) -> str:
    """Register the model logged at `model_uri` as a new version of `name`, in stage None.

    Returns the version number.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A server takes the URI of a logged model only beside the model's id.
    logged = LOGGED_MODEL.fullmatch(model_uri)
    version = client.create_model_version(
        name,
        source=model_uri,
        run_id=run_id,
        tags={**tags, STAGE_TAG: "None"},
        model_id=logged[1] if logged else None,
    )
    return str(version.version)


def get_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    """Version `version` of `name`. Raises UserError when there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise _no_version(name, version) from error


def stage_of(version: ModelVersion) -> Stage:
    """The stage a version's tag says. Raises UserError for a tag that is no stage."""
    stage = version.tags.get(STAGE_TAG, "None")
    if stage not in LEGAL:
        raise UserError(
            f"version {version.version} of {version.name} has the tag {STAGE_TAG}={stage!r}, which "
            f"is no stage; set it to one of {', '.join(LEGAL)}"
        )
    return stage


def read_registry(client: MlflowClient, name: str) -> Registry:
    """Everything the registry says of `name`, as of one moment, also while a step is written.

    A model that is not there has no versions. Raises UserError when the registry does not answer.
    """
    with _answering(f"{name} could not be read"):
        for _ in range(_READS):
            before = _model_of(client, name)
            found = client.search_model_versions(f"name = '{name}'")
            if before == _model_of(client, name):
                return _as_one(name, *before, found)
    raise UserError(f"the registry of {name} changes all the time; try again")


def transition(
    client: MlflowClient,
    name: str,
    version: str,
    target: Stage,
    *,
    who: str,
    why: str,
    evidence: Evidence,
    now: datetime,
    plan: RollbackPlan | None = None,
    decision: str | None = None,
    tags: Mapping[str, str] | None = None,
    wait_s: float = LOCK_WAIT_S,
) -> Step:
    """Move a version to `target`, with all that goes with it, and append to the history.

    plan: where to go back to, needed on the way to Production. tags: put on the version in the same
    step. A step that another caller left unfinished is finished first. Of two callers at once one
    goes first, and the other is judged by what it finds then. Raises UserError for a transition
    that is not legal, for a guard rail that is not met, when another caller keeps the lock for
    more than `wait_s` seconds, and when the registry does not answer.
    """

    def planned(registry: Registry) -> Step:
        return plan_step(
            registry,
            version,
            target,
            who=who,
            why=why,
            evidence=evidence,
            now=now,
            plan=plan,
            decision=decision,
            tags=tags or {},
        )

    doing = f"version {version} of {name} was asked to go to {target}"
    return take_step(client, name, planned, doing=doing, wait_s=wait_s)


def take_step(
    client: MlflowClient,
    name: str,
    planned: Callable[[Registry], Step],
    *,
    doing: str,
    wait_s: float = LOCK_WAIT_S,
) -> Step:
    """Take the step that `planned` makes of the registry as it is then, and append it.

    doing: what was asked, should the registry not answer. Raises UserError as `transition` does,
    and what `planned` raises; then nothing has changed.
    """
    with (
        _answering(f"{doing}; `churn history` shows whether it did"),
        registry_lock(client, name, wait_s=wait_s) as check,
    ):
        _finish(client, name, check)
        step = planned(read_registry(client, name))
        encoded = msgspec.json.encode(step).decode()
        if len(encoded) > TAG_LIMIT:
            raise UserError(
                f"the reason and the evidence take {len(encoded)} characters and the registry "
                f"keeps {TAG_LIMIT}; shorten the reason"
            )
        check()
        client.set_registered_model_tag(name, INTENT_TAG, encoded)
        _carry_out(client, name, step, check)
    return step


def finish_pending(client: MlflowClient, name: str, wait_s: float = LOCK_WAIT_S) -> Step | None:
    """Carry a step whose caller was killed to its end; returns it, or None when there is none."""
    with (
        _answering("the transition that was begun could not be finished"),
        registry_lock(client, name, wait_s=wait_s) as check,
    ):
        return _finish(client, name, check)


def rollback_plan(registry: Registry) -> RollbackPlan:
    """The way back from a promotion made now."""
    incumbent = registry.production
    if incumbent is None:
        return RollbackPlan(
            None, None, "nothing was in Production before: stop the service, or promote another"
        )
    release = registry.version(incumbent).tags.get("release_id")
    return RollbackPlan(incumbent, release, f"the job rollback goes back to version {incumbent}")


def rollback_target(registry: Registry, wanted: str | None = None) -> str:
    """The version to go back to: `wanted`, or else the last known good one.

    Raises UserError when there is none.
    """
    if registry.production is None:
        raise UserError(f"{registry.name} has nothing in Production; there is nothing to roll back")
    target = wanted or last_known_good(registry.history)
    if target is None:
        raise UserError(
            f"version {registry.production} is the only one of {registry.name} that has been in "
            "Production and is still good; there is nothing to roll back to"
        )
    return target


def plan_step(
    registry: Registry,
    version: str,
    target: Stage,
    *,
    who: str,
    why: str,
    evidence: Evidence,
    now: datetime,
    plan: RollbackPlan | None,
    decision: str | None,
    tags: Mapping[str, str],
) -> Step:
    """The step that moves `version` to `target`. Raises UserError where the rules say no."""
    current = registry.version(version)
    _check_legal(registry, current, target)
    if not who.strip() or not why.strip():
        raise UserError(
            f"moving version {version} to {target} needs a name and a reason; give both"
        )
    _check_figures(evidence)
    check_agrees(registry)
    _GUARD_RAILS[target](registry, current, who.strip(), evidence, plan)
    at = max([now.astimezone(UTC), *(step.at for step in registry.history[-1:])])
    # Archived_at is part of the step, so that keeping begins with it.
    marked = {ARCHIVED_AT_TAG: at.isoformat()}
    moves = [
        Move(
            version,
            current.stage,
            target,
            {**tags, **(marked if target == "Archived" else {})},
        )
    ]
    if target == "Production" and registry.production is not None:
        moves.append(Move(registry.production, "Production", "Archived", marked))
    return Step(
        number=len(registry.history) + 1,
        moves=tuple(moves),
        aliases=_aliases_after(registry, version, current.stage, target),
        who=who.strip(),
        why=why.strip(),
        at=at,
        evidence=evidence,
        plan=plan,
        decision=decision,
    )


def check_agrees(registry: Registry) -> None:
    """Raise UserError when the registry contradicts itself."""
    if faults := registry.faults():
        raise UserError(
            f"the registry of {registry.name} contradicts itself ({faults[0]}); someone changed it "
            "by hand: set the tag stage and the aliases to what the history says"
        )


def _check_legal(registry: Registry, current: Version, target: Stage) -> None:
    if target in LEGAL[current.stage]:
        return
    if current.stage == "Production":
        raise UserError(
            f"version {current.version} of {registry.name} is in Production and leaves it only "
            "when another takes its place; promote one, or roll back"
        )
    raise UserError(
        f"version {current.version} of {registry.name} is in {current.stage} and may go to "
        f"{', '.join(LEGAL[current.stage])}, not to {target}"
    )


def _check_figures(evidence: Evidence) -> None:
    for name, value in evidence.figures.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"the evidence is no evidence: {name} is {value}; measure it again")


def _guard_staging(
    registry: Registry, current: Version, who: str, evidence: Evidence, plan: RollbackPlan | None
) -> None:
    if evidence.kind != "gates" or not evidence.figures:
        raise UserError(
            f"moving version {current.version} to Staging needs evidence: what the gates found; "
            "evaluate it first"
        )
    if not evidence.passed or current.tags.get(GATES_TAG) == "refused":
        raise UserError(f"the gates refused version {current.version}; it stays in None")


def _guard_production(
    registry: Registry, current: Version, who: str, evidence: Evidence, plan: RollbackPlan | None
) -> None:
    number, incumbent = current.version, registry.production
    if current.stage == "Archived":
        _guard_rollback(registry, current, who, evidence)
        return
    if evidence.kind == "bootstrap":
        if incumbent is not None:
            raise UserError(
                f"version {incumbent} is in Production: version {number} must be compared with it "
                "(a trial or a paired replay); `bootstrap` is for the first one"
            )
    elif evidence.kind not in COMPARISONS:
        raise UserError(
            f"moving version {number} to Production needs evidence against the version there: a "
            f"trial or a paired replay, not {evidence.kind}"
        )
    elif incumbent is None or evidence.incumbent != incumbent:
        raise UserError(
            f"version {number} was compared with version {evidence.incumbent}, and in Production "
            f"is {incumbent or 'none'}; compare it with that"
        )
    elif not evidence.figures or not evidence.rows or evidence.rows < 1:
        raise UserError(
            f"the {evidence.kind} of version {number} has no figures or no rows both models "
            "answered; compare again"
        )
    if who == POLICY and not evidence.passed:
        raise UserError(
            f"the evidence for version {number} does not pass the policy; a person may approve it"
        )
    if plan is None or not plan.how.strip() or plan.to != incumbent:
        raise UserError(
            f"moving version {number} to Production needs a rollback plan that goes back to "
            f"{f'version {incumbent}' if incumbent else 'none'}; make one"
        )


def _guard_rollback(registry: Registry, current: Version, who: str, evidence: Evidence) -> None:
    if evidence.kind != "rollback":
        raise UserError(
            f"version {current.version} of {registry.name} is in Archived and comes back to "
            "Production only by a rollback"
        )
    if not any(
        move.version == current.version and move.target == "Production"
        for step in registry.history
        for move in step.moves
    ):
        raise UserError(
            f"version {current.version} of {registry.name} has never been in Production; a "
            "rollback goes back to one that has"
        )


def _guard_archived(
    registry: Registry, current: Version, who: str, evidence: Evidence, plan: RollbackPlan | None
) -> None:
    if evidence.kind != "retired":
        raise UserError(
            f"moving version {current.version} to Archived needs evidence of the kind retired"
        )


def _guard_deleted(
    registry: Registry, current: Version, who: str, evidence: Evidence, plan: RollbackPlan | None
) -> None:
    if evidence.kind != "retention":
        raise UserError(f"deleting version {current.version} needs evidence of the kind retention")
    if evidence.figures.get(ARCHIVED_AT_TAG) != current.tags.get(ARCHIVED_AT_TAG):
        raise UserError(f"version {current.version} was archived at another time than was seen")
    if use := in_use(registry).get(current.version):
        raise UserError(f"version {current.version} is kept: {use}")


_GuardRail = Callable[[Registry, Version, str, Evidence, RollbackPlan | None], None]
_GUARD_RAILS: dict[Stage, _GuardRail] = {
    "Staging": _guard_staging,
    "Production": _guard_production,
    "Archived": _guard_archived,
    "Deleted": _guard_deleted,
}


def in_use(registry: Registry) -> dict[str, str]:
    """The versions that must not go, each with why."""
    used = {
        version: f"the alias {alias} points to it" for alias, version in registry.aliases.items()
    }
    used |= dict.fromkeys(registry.in_stage("Staging"), "it is in Staging")
    if (target := last_known_good(registry.history)) is not None:
        used[target] = "a rollback would go back to it"
    return used


def _aliases_after(
    registry: Registry, version: str, source: Stage, target: Stage
) -> dict[str, str | None]:
    """The aliases that change when `version` goes from `source` to `target`."""
    changed: dict[str, str | None] = {}
    if target == "Staging":
        changed["staging"] = version
    elif source == "Staging":
        others = [other for other in registry.in_stage("Staging") if other != version]
        if registry.aliases.get("staging") == version:
            changed["staging"] = others[0] if others else None
        if registry.aliases.get(CHALLENGER) == version:
            changed[CHALLENGER] = None
    if target == "Production":
        changed["production"] = version
        # A trial compares with the version that was there.
        if CHALLENGER in registry.aliases:
            changed[CHALLENGER] = None
    return changed


def _finish(client: MlflowClient, name: str, check: Callable[[], None]) -> Step | None:
    model = _model_of(client, name)[0]
    if INTENT_TAG not in model:
        return None
    step = _decode(name, INTENT_TAG, model[INTENT_TAG])
    _carry_out(client, name, step, check)
    return step


def _carry_out(client: MlflowClient, name: str, step: Step, check: Callable[[], None]) -> None:
    """Write everything a step says; what was written before is written again, which is the same.

    Aliases first: they are what others follow, and each changes in one write.
    """
    for alias, version in step.aliases.items():
        check()
        if version is None:
            client.delete_registered_model_alias(name, alias)
        else:
            client.set_registered_model_alias(name, alias, version)
    for move in step.moves:
        if move.target == "Deleted":
            check()
            _delete(client, name, move.version)
            continue
        if move.source == move.target:
            continue
        for key, value in {**move.tags, STAGE_TAG: move.target}.items():
            check()
            client.set_model_version_tag(name, move.version, key, value)
        check()
        _mirror(client, name, move)
    check()
    done = msgspec.json.encode(step).decode()
    client.set_registered_model_tag(name, f"{HISTORY_PREFIX}{step.number:06d}", done)
    check()
    client.delete_registered_model_tag(name, INTENT_TAG)


def _delete(client: MlflowClient, name: str, version: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _mirror(client: MlflowClient, name: str, move: Move) -> None:
    if not hasattr(client, "transition_model_version_stage"):
        return
    with warnings.catch_warnings():
        # Stages are deprecated in MLflow; they are a mirror here, not the truth.
        warnings.simplefilter("ignore", FutureWarning)
        client.transition_model_version_stage(name, move.version, move.target)


def _model_of(client: MlflowClient, name: str) -> tuple[dict[str, str], dict[str, str]]:
    """The tags that hold steps, and the aliases, of a model; nothing of one that is not there."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}, {}
    tags = {k: v for k, v in model.tags.items() if k == INTENT_TAG or _HISTORY_TAG.match(k)}
    return tags, {alias: str(version) for alias, version in model.aliases.items()}


def _as_one(
    name: str, tags: Mapping[str, str], aliases: Mapping[str, str], found: list[ModelVersion]
) -> Registry:
    steps = [_decode(name, key, tags[key]) for key in sorted(tags.keys() - {INTENT_TAG})]
    pending = _decode(name, INTENT_TAG, tags[INTENT_TAG]) if INTENT_TAG in tags else None
    versions = {
        str(v.version): Version(
            version=str(v.version),
            stage=stage_of(v),
            tags=dict(v.tags),
            registered_at=datetime.fromtimestamp(v.creation_timestamp / 1000, UTC),
            run_id=v.run_id or None,
            source=v.source or "",
        )
        for v in found
    }
    if pending is None:
        return Registry(name, versions, dict(aliases), tuple(steps))
    for move in pending.moves:
        if move.target == "Deleted":
            versions.pop(move.version, None)
        elif old := versions.get(move.version):
            tagged = {**old.tags, **move.tags, STAGE_TAG: move.target}
            versions[move.version] = replace(old, stage=move.target, tags=tagged)
    after = {**aliases, **pending.aliases}
    if not steps or steps[-1].number < pending.number:
        steps.append(pending)
    return Registry(
        name,
        versions,
        {alias: version for alias, version in after.items() if version is not None},
        tuple(steps),
        pending,
    )


def _decode(name: str, key: str, value: str) -> Step:
    try:
        return msgspec.json.decode(value, type=Step)
    except msgspec.DecodeError as error:
        raise UserError(
            f"the tag {key} of the registered model {name} is not a step ({error}); someone "
            "changed it by hand: restore it from a backup of the registry"
        ) from error


def _no_version(name: str, version: str) -> UserError:
    return UserError(
        f"the registry has no version {version} of {name}; `churn versions` lists what it has"
    )


@contextmanager
def _answering(doing: str) -> Generator[None]:
    """A registry that does not answer is something a person can mend."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the registry did not answer ({reason}): {doing}. What was begun is finished by the "
            "next transition, and what serves goes on serving"
        ) from error
