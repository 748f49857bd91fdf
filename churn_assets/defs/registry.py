"""Registry: Staging, the decision to promote, what is in Production, and all that happened."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import dagster as dg
import msgspec

from churn_assets.contract.release import read_release
from churn_assets.defs.metadata import steps_table, tenures_table
from churn_assets.defs.partitions import SETTINGS
from churn_assets.defs.resources import Project, read_record
from churn_assets.defs.trial import tried_beside_incumbent
from churn_assets.errors import UserError
from churn_assets.lifecycle.history import CHALLENGER, Evidence, tenures
from churn_assets.lifecycle.production import carry_out, figures_of, in_production_now, roll_back
from churn_assets.lifecycle.promotion import Approval, PromotionDecision, decide
from churn_assets.lifecycle.records import EvaluationRecord, HistoryRecord, RegisteredModel
from churn_assets.lifecycle.registry import (
    PIPELINE,
    POLICY,
    finish_pending,
    read_registry,
    transition,
)
from churn_assets.lifecycle.release import store_release
from churn_assets.lifecycle.trials import start_trial, stop_trial

if TYPE_CHECKING:
    from mlflow import MlflowClient

GROUP = "registry"
OWNERS = [f"team:{SETTINGS.team}"]


@dg.asset(group_name=GROUP, kinds={"mlflow"}, owners=OWNERS)
def registered_model(
    context: dg.AssetExecutionContext,
    project: dg.ResourceParam[Project],
    evaluation_report: EvaluationRecord,
):
    """The version the gates let into Staging. A refused version stays in None, with the reasons."""
    if not evaluation_report.passed:
        refused = "; ".join(g.reason for g in evaluation_report.gates if not g.passed)
        raise dg.Failure(f"the gates did not pass: {refused or 'there is no evidence'}")
    model = evaluation_report.model
    client = project.mlflow_client()
    source = read_registry(client, model.name).version(model.version).source
    release = read_release(Path(evaluation_report.release_dir))
    step = transition(
        client,
        model.name,
        model.version,
        "Staging",
        who=PIPELINE,
        why="every quality gate passed",
        evidence=Evidence("gates", {gate.name: gate.reason for gate in evaluation_report.gates}),
        now=project.now(),
        tags=store_release(client, model.mlflow_run, source, release),
    )
    record = RegisteredModel(
        name=model.name,
        version=model.version,
        stage=step.target,
        release_dir=evaluation_report.release_dir,
        release_id=evaluation_report.release_id,
    )
    return dg.MaterializeResult(
        value=record,
        metadata={
            "version": record.version,
            "stage": record.stage,
            "evidence": step.evidence.line(),
            "mlflow_run": dg.MetadataValue.url(project.mlflow_run_url(model.mlflow_run)),
        },
    )


class Approve(dg.Config):
    """Who approves a promotion, and why. Without `who` the configured policy decides.

    version: the one to promote; without it, the newest in Staging.
    """

    who: str | None = None
    why: str = ""
    version: str | None = None


@dg.asset(
    group_name=GROUP,
    kinds={"mlflow"},
    owners=OWNERS,
    deps=["registered_model"],
)
def promotion_decision(
    context: dg.AssetExecutionContext, config: Approve, project: dg.ResourceParam[Project]
):
    """Whether the version in Staging goes to Production: verdict, reasons, evidence, policy.

    The evidence is a replay of both models on the newest labelled customers, or a trial on live
    requests, by promotion.evidence. Nothing is moved here.
    """
    client, name = project.mlflow_client(), SETTINGS.model_name
    approval = Approval(config.who, config.why) if config.who is not None else None
    registry = read_registry(client, name)
    by_trial = SETTINGS.promotion.evidence == "trial"
    version = (
        config.version
        or (registry.aliases.get(CHALLENGER) if by_trial else None)
        or registry.aliases.get("staging")
    )
    if version is None:
        raise UserError("no version is in Staging; train one that passes the gates")
    if by_trial:
        comparison = tried_beside_incumbent(project, registry, version)
    else:
        comparison = project.comparison(registry).with_incumbent(version)
    decision = decide(
        registry,
        version,
        figures=figures_of(client, registry.version(version)),
        comparison=comparison,
        policy=SETTINGS.promotion,
        approval=approval,
        now=project.now(),
    )
    context.log.info("%s: %s", decision.verdict, "; ".join(decision.reasons))
    if approval and decision.verdict != "promote":
        raise UserError(f"version {version} is not promoted: {'; '.join(decision.reasons)}")
    return dg.MaterializeResult(
        value=decision,
        metadata={
            "verdict": decision.verdict,
            "version": decision.version,
            "reasons": "; ".join(decision.reasons),
            "decided_by": f"{decision.who}: {decision.why}",
            "evidence": decision.evidence.line() if decision.evidence else "none",
            "way_back": decision.plan.how,
            "policy": dict(decision.policy),
            "id": decision.id,
        },
    )


class Change(dg.Config):
    """Who changes what serves, and why. Without `who` the latest decision is carried out.

    what: `rollback` takes the version in Production back, `start_trial` puts a version in Staging
    on trial beside it, `stop_trial` ends that. to: the version to go back to; without it, the last
    known good one. version: the one to try; without it, the newest in Staging. share, shadow: of
    the trial; without them those of the settings. decision: the stored one that is carried out,
    where the policy decided.
    """

    what: Literal["rollback", "start_trial", "stop_trial"] = "rollback"
    who: str | None = None
    why: str = ""
    to: str | None = None
    version: str | None = None
    share: float | None = None
    shadow: bool | None = None
    decision: str | None = None


@dg.asset(
    group_name=GROUP,
    kinds={"mlflow", "onnx"},
    owners=OWNERS,
    deps=["promotion_decision"],
)
def production_release(
    context: dg.AssetExecutionContext, config: Change, project: dg.ResourceParam[Project]
):
    """The release of the version in Production, from the registry, its digests and answers proven.

    A decision to promote, a rollback, or the beginning or end of a trial is carried out first; a
    decision only once. What cannot be proven is not put into Production. During a trial the release
    has both models.
    """
    client, name, releases = project.mlflow_client(), SETTINGS.model_name, project.home.releases
    finish_pending(client, name)
    if config.who is not None:
        change_what_serves(client, config, releases, project.now())
    else:
        found = read_record(project.home.records, "promotion_decision", context.run_id)
        decision = msgspec.json.decode(found, type=PromotionDecision)
        carry_out(client, decision, releases, now=project.now())
    record = in_production_now(client, name, releases)
    return dg.MaterializeResult(
        value=record,
        metadata={
            "version": record.version,
            "release": record.release_id,
            "put_there_by": f"{record.step.who}: {record.step.why}",
            "since": record.step.at.isoformat(),
            "evidence": record.step.evidence.line(),
            "way_back": f"version {record.way_back}" if record.way_back else "none",
            "on_trial": f"version {record.challenger}" if record.challenger else "none",
            "path": dg.MetadataValue.path(record.release_dir),
        },
    )


def change_what_serves(
    client: "MlflowClient", config: Change, releases: Path, now: datetime
) -> None:
    """Carry out a person's word, or what the policy may do alone: to end a trial, and to roll back
    where a decision says so. Raises UserError.
    """
    name, by_policy = SETTINGS.model_name, config.who == POLICY
    if config.what == "stop_trial":
        who = POLICY if by_policy else Approval(str(config.who), config.why).who
        stop_trial(client, name, who=who, why=config.why, now=now)
        return
    if config.what == "rollback":
        # The policy may do it alone, and only to carry out a decision that is stored.
        by_decision = by_policy and config.decision is not None
        roll_back(
            client,
            name,
            releases,
            who=POLICY if by_decision else Approval(str(config.who), config.why).who.strip(),
            why=config.why,
            to=config.to,
            now=now,
            decision=config.decision,
        )
        return
    word = Approval(str(config.who), config.why)
    version = config.version or read_registry(client, name).aliases.get("staging")
    if version is None:
        raise UserError("no version is in Staging; train one that passes the gates")
    policy = SETTINGS.trial
    start_trial(
        client,
        name,
        version,
        releases,
        share=policy.share if config.share is None else config.share,
        shadow=policy.shadow if config.shadow is None else config.shadow,
        who=word.who,
        why=word.why,
        now=now,
    )


@dg.asset(
    group_name=GROUP,
    kinds={"mlflow"},
    owners=OWNERS,
    deps=["registered_model", "promotion_decision", "production_release"],
    check_specs=[
        dg.AssetCheckSpec(
            "registry_consistent",
            asset="registry_history",
            description="Tags, aliases and history say the same of every version.",
        )
    ],
)
def registry_history(context: dg.AssetExecutionContext, project: dg.ResourceParam[Project]):
    """Every transition there was: who made it, when, why, and on what evidence.

    A step that a killed caller left unfinished is finished first.
    """
    client = project.mlflow_client()
    finish_pending(client, SETTINGS.model_name)
    registry = read_registry(client, SETTINGS.model_name)
    faults = registry.faults()
    return dg.MaterializeResult(
        value=HistoryRecord(SETTINGS.model_name, registry.production, registry.history),
        metadata={
            "production": registry.production or "none",
            "steps": len(registry.history),
            "history": steps_table(registry.history),
            "in_production": tenures_table(tenures(registry.history)),
        },
        check_results=[
            dg.AssetCheckResult(
                check_name="registry_consistent",
                passed=not faults,
                description="; ".join(faults) or "tags, aliases and history agree",
            )
        ],
    )
