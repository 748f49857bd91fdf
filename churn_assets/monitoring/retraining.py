"""Whether to retrain: a decision with its triggers, its evidence and the policy it was made by.

Five things ask for it: the schedule, drift of what comes in, a drop of the accuracy, new labels,
and concept drift (decay on matured labels without a fault of the data). A trigger fires on evidence
that has persisted; whether anything is done about it then is a matter of faults of the data, the
time since the last training, new labels, the budget, and of what a person has reserved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, timedelta
from typing import Any, Literal

import msgspec

from churn_assets.errors import UserError
from churn_assets.monitoring.feeds import LABELLED_BY, Fault
from churn_assets.monitoring.metric import Metric

TriggerName = Literal["scheduled", "drift", "performance", "new_labels", "concept_drift"]
Mode = Literal["automatic", "manual", "off"]
Plan = Literal["history", "recent"]
Ending = Literal["running", "succeeded", "failed"]

ACTIONS: dict[TriggerName, str] = {
    "scheduled": "retrain",
    "drift": "alert and retrain",
    "performance": "alert and investigate",
    "new_labels": "retrain on more data",
    "concept_drift": "alert, propose wider features, and retrain",
}
# The one that asks for the most comes first.
_ORDER: tuple[TriggerName, ...] = (
    "concept_drift",
    "drift",
    "new_labels",
    "scheduled",
    "performance",
)
_DAY = timedelta(days=1)
_CLOCK_TOLERANCE = timedelta(hours=1)
# A weekly report, and some days for it to be late: an older one says nothing of today.
_FRESH = timedelta(days=10)
_WIDEN = (
    "the features explain less of churn than they did: look for what customers do now that none of "
    "them sees, and add it to churn_assets/contract/features.py"
)


@dataclass(frozen=True)
class Modes:
    """What a trigger may do: act (`automatic`), ask a person (`manual`), or nothing (`off`)."""

    scheduled: Mode = "automatic"
    drift: Mode = "automatic"
    performance: Mode = "automatic"
    new_labels: Mode = "automatic"
    concept_drift: Mode = "automatic"
    data_fault: Mode = "automatic"

    def __post_init__(self) -> None:
        for name, mode in asdict(self).items():
            if mode not in ("automatic", "manual", "off"):
                raise UserError(
                    f"retraining.modes.{name} is {mode!r}; set automatic, manual or off"
                )


@dataclass(frozen=True)
class RetrainingPolicy:
    """When to retrain without being told to. Days are of operational time.

    max_age_days: the schedule has missed a training when the last one is older. persistence: so
    many daily reports in a row must tell of drift. performance_persistence: the same of decay on
    matured labels. new_label_days: so many newer labelled days are more data worth training on.
    follow_up_days: that, after a training on recent labels, of which there were few yet.
    follow_ups: trainings of that kind after one that a drift asked for. min_new_label_days: fewer
    labelled days newer than the last training of the same plan teach nothing new. cool_down_days:
    after a training that a decision asked for; the weekly one delays none. attempts, retry_hours:
    how often a training that failed is tried, and when. budget: trainings that decisions may ask
    for in 30 days. fallback_after_days: that a feed must have been broken before a version trained
    without it takes over.
    """

    modes: Modes = field(default_factory=Modes)
    max_age_days: int = 9
    persistence: int = 3
    performance_persistence: int = 2
    new_label_days: int = 28
    follow_up_days: int = 14
    follow_ups: int = 3
    min_new_label_days: int = 5
    cool_down_days: int = 7
    attempts: int = 3
    retry_hours: int = 20
    budget: int = 6
    fallback_after_days: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "modes" and value < (0 if name in _MAY_BE_NONE else 1):
                raise UserError(f"retraining.{name} is {value}; set at least 1")


_MAY_BE_NONE = ("follow_ups", "min_new_label_days", "cool_down_days")


class Training(msgspec.Struct, frozen=True):
    """A training that came to a model, or goes on: when, on labels up to which day, by which plan.

    without: features it had to do without. decision: what asked for it, None for a schedule or a
    person.
    """

    at: datetime
    newest: date
    plan: Plan = "history"
    without: tuple[str, ...] = ()
    decision: str | None = None


class Trigger(msgspec.Struct, frozen=True):
    """One of the five: whether it fired, what it asks for, and what may be done about it."""

    name: TriggerName
    fired: bool
    mode: Mode
    action: str
    reason: str


class RetrainingDecision(msgspec.Struct, frozen=True):
    """Whether to train, and all that was seen when it was decided.

    verdict: `retrain`; `fall_back` to a version trained without the features of a broken feed;
    `restore` the version before that; `suppress` what would have learned from the fault;
    `investigate`, for a person; or `wait`. plan: train on the long `history`, or on the `recent`
    labels. until: the last feature day to learn from, None for the newest. policy: values in force.
    """

    id: str
    verdict: Literal["retrain", "fall_back", "restore", "suppress", "investigate", "wait"]
    trigger: TriggerName | Literal["data_fault"] | None
    reasons: tuple[str, ...]
    action: str
    alert: bool
    triggers: tuple[Trigger, ...]
    at: datetime
    plan: Plan = "history"
    without: tuple[str, ...] = ()
    until: date | None = None
    proposal: str | None = None
    faults: tuple[Fault, ...] = ()
    evidence: tuple[Metric, ...] = ()
    policy: dict[str, Any] = {}


@dataclass(frozen=True)
class RetrainingEvidence:
    """What a decision is made from.

    metrics: the series, as measured. faults: of the feeds, open or past. trainings: every one that
    came to a model, or goes on. labelled_days: feature days with matured labels that no fault has
    touched. production, since: the version in Production, and since when. without: the features it
    was trained without. earlier: decisions made before. endings: of the runs that carried them out,
    by the decision's id. spoiled: features of the newest drift report that look like a fault of the
    data, with why: every value is missing, or all are the same.
    """

    metrics: Sequence[Metric]
    faults: Sequence[Fault]
    trainings: Sequence[Training]
    labelled_days: Sequence[date]
    production: str | None
    since: datetime | None
    without: tuple[str, ...]
    earlier: Sequence[RetrainingDecision]
    endings: Mapping[str, Ending]
    spoiled: Mapping[str, str] = field(default_factory=dict)


def decide_retraining(
    seen: RetrainingEvidence,
    policy: RetrainingPolicy,
    *,
    data_day: date,
    horizon_days: int,
    now: datetime,
) -> RetrainingDecision:
    """Decide by `policy` on what was `seen`. `data_day` is the newest complete partition."""
    decide = _Decision(seen, policy, data_day, horizon_days, now)
    for look in (
        decide.clock_set_back,
        decide.nothing_to_watch,
        decide.restore,
        decide.data_fault,
        decide.spoiled_features,
        decide.retrain,
        decide.investigate,
    ):
        decision = look()
        if decision is not None:
            return decision
    return decide.made("wait", None, ("no trigger has fired",), "nothing", alert=False)


@dataclass(frozen=True)
class _Decision:
    seen: RetrainingEvidence
    policy: RetrainingPolicy
    data_day: date
    horizon_days: int
    now: datetime

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        """All five, those that ask for the most first."""
        looks: dict[TriggerName, Callable[[], tuple[bool, str]]] = {
            "concept_drift": self._decayed,
            "drift": self._drifted,
            "new_labels": self._new_labels,
            "scheduled": self._overdue,
            "performance": self._inaccurate,
        }
        found = []
        for name in _ORDER:
            mode = getattr(self.policy.modes, name)
            fired, reason = (False, "it is off") if mode == "off" else looks[name]()
            found.append(Trigger(name, fired, mode, ACTIONS[name], reason))
        return tuple(found)

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The faults that are going on, then those whose traces features still see."""
        touched = [f for f in self.seen.faults if f.open or self.data_day < f.sound_from]
        return tuple(sorted(touched, key=lambda fault: not fault.open))

    @property
    def last(self) -> Training | None:
        """The newest training."""
        return _last_of(self.seen.trainings)

    def clock_set_back(self) -> RetrainingDecision | None:
        """Time that has not come yet is in the records: nothing said of ages would be true."""
        known = [
            *(decision.at for decision in self.seen.earlier),
            *(training.at for training in self.seen.trainings),
        ]
        newest = max(known, default=self.now)
        if newest <= self.now + _CLOCK_TOLERANCE:
            return None
        reason = (
            f"the clock says {self.now:%Y-%m-%d %H:%M}, and there are records of "
            f"{newest:%Y-%m-%d %H:%M}: it was set back; nothing is decided until then"
        )
        return self.made("wait", None, (reason,), "put the clock right", alert=True)

    def nothing_to_watch(self) -> RetrainingDecision | None:
        """Without a version in Production a first training is a person's or the schedule's."""
        if self.seen.production is not None:
            return None
        return self.made("wait", None, ("nothing is in Production",), "nothing", alert=False)

    def restore(self) -> RetrainingDecision | None:
        """The feed is repaired and no feature sees the fault any more."""
        by_fault = any(d.verdict == "fall_back" for d in self.seen.earlier)
        if not self.seen.without or not by_fault or self.policy.modes.data_fault == "off":
            return None
        if any(set(fault.features) & set(self.seen.without) for fault in self.faults):
            return None
        reason = f"the feed of {', '.join(self.seen.without)} is sound again"
        if self.policy.modes.data_fault != "automatic":
            return self.made(
                "wait",
                "data_fault",
                (reason, _by_person("data_fault", "rollback")),
                "a person decides",
                alert=True,
            )
        return self.made(
            "restore", "data_fault", (reason,), "the version before comes back", alert=True
        )

    def data_fault(self) -> RetrainingDecision | None:
        """A broken feed: nothing is learned from it, and a version that needs it steps aside."""
        faults = self.faults
        if not faults or self.policy.modes.data_fault == "off":
            return None
        reasons = [
            fault.line()
            if fault.open
            else f"{fault.line()}; its features are sound again from {fault.sound_from} on"
            for fault in faults
        ]
        kept = [t.name for t in self.triggers if t.fired and t.mode == "automatic"]
        if kept:
            reasons.append(f"suppressed: {', '.join(kept)}")
        broken = [f for f in faults if f.open and self._lasts(f)]
        fallback = self._fallback_of(broken)
        if isinstance(fallback, tuple):
            if self.policy.modes.data_fault == "manual":
                reasons.append(_by_person("data_fault", "train --reason"))
            else:
                return self.made(
                    "fall_back",
                    "data_fault",
                    tuple(reasons),
                    f"train and serve a version without {', '.join(fallback)}",
                    alert=True,
                    without=fallback,
                    until=min(fault.first for fault in broken) - _DAY,
                    faults=tuple(broken),
                )
        elif isinstance(fallback, str):
            reasons.append(fallback)
        tables = ", ".join(sorted({fault.table for fault in faults}))
        action = f"learn nothing from {tables} until the feed is repaired"
        told = any(d.verdict == "suppress" and d.action == action for d in self._recent(2))
        return self.made(
            "suppress", "data_fault", tuple(reasons), action, alert=not told, faults=faults
        )

    def spoiled_features(self) -> RetrainingDecision | None:
        """A feature without values, or with one only, is no news of the customers."""
        spoiled = {n: why for n, why in self.seen.spoiled.items() if n not in self.seen.without}
        if not spoiled or self.policy.modes.data_fault == "off":
            return None
        reasons = tuple(f"{name}: {why}" for name, why in spoiled.items())
        action = f"learn nothing from {', '.join(spoiled)}"
        told = any(d.verdict == "suppress" and d.action == action for d in self._recent(2))
        return self.made("suppress", "data_fault", reasons, action, alert=not told)

    def retrain(self) -> RetrainingDecision | None:
        """What asks for a training, and whether there is to be one."""
        fired = [t for t in self.triggers if t.fired and t.name != "performance"]
        if not fired:
            return None
        automatic = [t for t in fired if t.mode == "automatic"]
        first = (automatic or fired)[0]
        reasons = tuple(f"{t.name}: {t.reason}" for t in self.triggers if t.fired)
        inaccurate = any(t.name == "performance" and t.fired for t in self.triggers)
        concept = any(t.name == "concept_drift" for t in fired)
        alert = inaccurate or any(t.name in ("concept_drift", "drift") for t in fired)
        if not automatic:
            why = _by_person(first.name, "train --reason")
            return self.made("wait", first.name, (*reasons, why), "a person decides", alert=True)
        plan = self._plan(first.name)
        if held := self._held_back(plan):
            if inaccurate:
                return self._look_into((*reasons, held))
            return self.made("wait", first.name, (*reasons, held), "nothing yet", alert=False)
        return self.made(
            "retrain",
            first.name,
            reasons,
            f"train on the {'recent labels' if plan == 'recent' else 'history'}",
            alert=alert,
            plan=plan,
            proposal=_WIDEN if concept else None,
        )

    def investigate(self) -> RetrainingDecision | None:
        """Accuracy is down, and nothing says that a training would mend it."""
        found = next(t for t in self.triggers if t.name == "performance")
        return self._look_into((f"performance: {found.reason}",)) if found.fired else None

    def _look_into(self, reasons: tuple[str, ...]) -> RetrainingDecision:
        return self.made(
            "investigate", "performance", reasons, "a person looks into it", alert=True
        )

    def made(
        self,
        verdict: Literal["retrain", "fall_back", "restore", "suppress", "investigate", "wait"],
        trigger: TriggerName | Literal["data_fault"] | None,
        reasons: tuple[str, ...],
        action: str,
        *,
        alert: bool,
        plan: Plan = "history",
        without: tuple[str, ...] = (),
        until: date | None = None,
        proposal: str | None = None,
        faults: tuple[Fault, ...] = (),
    ) -> RetrainingDecision:
        """The decision, under an id that the same evidence on the same day gives again."""
        last = self.last
        attempts = sorted(d for d, ending in self.seen.endings.items() if ending == "failed")
        content = msgspec.json.encode(
            [verdict, trigger, self.now.date(), last and last.at, attempts, without]
        )
        return RetrainingDecision(
            id=f"{verdict.replace('_', '-')}-{self.now:%Y%m%d}-"
            f"{hashlib.sha256(content).hexdigest()[:10]}",
            verdict=verdict,
            trigger=trigger,
            reasons=reasons,
            action=action,
            alert=alert,
            triggers=self.triggers,
            at=self.now,
            plan=plan,
            without=without,
            until=until,
            proposal=proposal,
            faults=faults,
            evidence=tuple(self._newest().values()),
            policy=asdict(self.policy),
        )

    def _decayed(self) -> tuple[bool, str]:
        return self._persisted(("matured_auc",), self.policy.performance_persistence)

    def _drifted(self) -> tuple[bool, str]:
        names = sorted(
            {m.name for m in self.seen.metrics if m.name.startswith("ks/")} | {"prediction_shift"}
        )
        return self._persisted(names, self.policy.persistence)

    def _inaccurate(self) -> tuple[bool, str]:
        return self._persisted(("accuracy",), 1)

    def _persisted(self, names: Sequence[str], reports: int) -> tuple[bool, str]:
        """Whether the last so many reports of one of the metrics told of an alert."""
        seen = False
        for name in names:
            series = [m for m in self._current() if m.name == name]
            judged = [m for m in series if m.verdict != "insufficient"]
            seen |= bool(judged)
            days = {m.until.date(): m for m in judged}
            last = [days[day] for day in sorted(days)][-reports:]
            if not last or self.now - last[-1].at > _FRESH:
                continue
            if len(last) == reports and all(m.verdict == "alert" for m in last):
                times = f" ({reports} reports in a row)" if reports > 1 else ""
                return True, f"{name} {last[-1].reason}{times}"
        if not seen:
            return False, "there is too little evidence"
        return False, f"not in {reports} report{'s' if reports > 1 else ''} in a row"

    def _current(self) -> list[Metric]:
        """What was measured of the version in Production, up to now."""
        since = self.seen.since
        return [
            m for m in self.seen.metrics if (since is None or m.at > since) and m.at <= self.now
        ]

    def _newest(self) -> dict[str, Metric]:
        return {metric.name: metric for metric in self._current()}

    def _new_label_days(self, plan: Plan) -> int:
        """Labelled days since the last training; one on the history learns little from the newest,
        so that to a training on recent labels only those like it count."""
        recent = [training for training in self.seen.trainings if training.plan == "recent"]
        last = _last_of(recent) if plan == "recent" else self.last
        newest = max(self.seen.labelled_days, default=None)
        if newest is None:
            return 0
        return len(self.seen.labelled_days) if last is None else (newest - last.newest).days

    def _new_labels(self) -> tuple[bool, str]:
        wanted = self.policy.new_label_days
        if self._follows_up():
            wanted = min(wanted, self.policy.follow_up_days)
        new = self._new_label_days(self._plan("new_labels"))
        told = f"{new} days of labels are newer than what was trained on, {wanted} are asked for"
        return new >= wanted, told

    def _follows_up(self) -> bool:
        """Whether the last training asked for was on recent labels, of which there were few yet."""
        ordered = sorted(self._asked_for, key=lambda training: training.at)
        recent = 0
        while ordered and ordered[-1].plan == "recent":
            recent += 1
            ordered.pop()
        return 0 < recent <= self.policy.follow_ups

    def _overdue(self) -> tuple[bool, str]:
        last = self.last
        if last is None:
            return True, "there has been no training"
        age = (self.now - last.at) / _DAY
        told = f"the last training is {age:.0f} days old, {self.policy.max_age_days} are allowed"
        return age > self.policy.max_age_days, told

    def _plan(self, trigger: TriggerName) -> Plan:
        if trigger in ("concept_drift", "drift"):
            return "recent"
        return "recent" if trigger == "new_labels" and self._follows_up() else "history"

    @property
    def _asked_for(self) -> list[Training]:
        return [training for training in self.seen.trainings if training.decision is not None]

    def _held_back(self, plan: Plan) -> str | None:
        """Why there is to be no training now, whatever asks for it."""
        last, policy = _last_of(self._asked_for), self.policy
        carried = self._carried_out("retrain")
        running = [d.id for d in carried if self.seen.endings[d.id] == "running"]
        if running:
            return f"{running[-1]} is being carried out"
        if last is not None and (age := (self.now - last.at) / _DAY) < policy.cool_down_days:
            return (
                f"the last training asked for was {age:.1f} days ago, {policy.cool_down_days} must "
                "pass"
            )
        failed = self._failed_in_a_row(carried)
        if failed:
            hours = (self.now - failed[-1].at) / timedelta(hours=1)
            if len(failed) >= policy.attempts and hours < 24 * policy.cool_down_days:
                return f"{len(failed)} trainings in a row failed; {policy.attempts} are tried"
            if hours < policy.retry_hours:
                return (
                    f"a training failed {hours:.0f} hours ago; it is tried again after "
                    f"{policy.retry_hours}"
                )
        spent = sum(self.now - d.at < 30 * _DAY for d in carried)
        if spent >= policy.budget:
            return (
                f"decisions asked for {spent} trainings in 30 days, the budget is {policy.budget}"
            )
        new = self._new_label_days(plan)
        if new < policy.min_new_label_days:
            return (
                f"{new} days of labels are newer than what was trained on, at least "
                f"{policy.min_new_label_days} must be to learn anything new"
            )
        return None

    def _carried_out(self, verdict: str) -> list[RetrainingDecision]:
        """The decisions of that kind that a run carried out, each once, oldest first."""
        found = {
            d.id: d for d in self.seen.earlier if d.verdict == verdict and d.id in self.seen.endings
        }
        return sorted(found.values(), key=lambda decision: decision.at)

    def _failed_in_a_row(self, carried: Sequence[RetrainingDecision]) -> list[RetrainingDecision]:
        failed: list[RetrainingDecision] = []
        for decision in reversed(carried):
            if self.seen.endings[decision.id] != "failed":
                break
            failed.insert(0, decision)
        return failed

    def _lasts(self, fault: Fault) -> bool:
        return (fault.last - fault.first).days + 1 >= self.policy.fallback_after_days

    def _fallback_of(self, broken: Sequence[Fault]) -> tuple[str, ...] | str | None:
        """The features to do without; why that cannot be done; or None when it has been done."""
        names = {name for fault in broken for name in fault.features}
        if names <= set(self.seen.without):
            return None
        if any(fault.table == LABELLED_BY for fault in broken):
            return f"no model does without {LABELLED_BY}"
        # What the version in Production does without stays out until its feed is sound again.
        tainted = {name for fault in self.faults for name in fault.features}
        names |= tainted & set(self.seen.without)
        wanted, known = ", ".join(sorted(names)), {(f.table, f.first) for f in broken}
        tried = [
            d
            for d in self._carried_out("fall_back")
            if known <= {(f.table, f.first) for f in d.faults}
        ]
        if tried and self.seen.endings[tried[-1].id] != "failed":
            return f"{tried[-1].id} asked for a version without {wanted}"
        if len(tried) >= self.policy.attempts:
            return f"a version without {wanted} failed {len(tried)} times"
        return tuple(sorted(names))

    def _recent(self, days: int) -> list[RetrainingDecision]:
        return [d for d in self.seen.earlier if timedelta() <= self.now - d.at < days * _DAY]


def _last_of(trainings: Sequence[Training]) -> Training | None:
    return max(trainings, key=lambda training: training.at, default=None)


def _by_person(name: str, command: str) -> str:
    return f"retraining.modes.{name} is manual: a person decides, with `churn {command}`"
