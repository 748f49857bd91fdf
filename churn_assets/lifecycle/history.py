"""What happened in the registry: its steps, and what they say of any moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal

import msgspec

from churn_assets.errors import UserError

Stage = Literal["None", "Staging", "Production", "Archived", "Deleted"]

# gates: what let a version into Staging. bootstrap, trial, paired_replay: what may put one into
# Production. rollback: why the former one came back. retired, retention: why one went.
# trial_begins, trial_ends: a version in Staging is tried beside the one in Production.
EvidenceKind = Literal[
    "gates",
    "bootstrap",
    "trial",
    "paired_replay",
    "rollback",
    "retired",
    "retention",
    "trial_begins",
    "trial_ends",
]
# The alias of the version on trial.
CHALLENGER = "challenger"
COMPARISONS: tuple[EvidenceKind, ...] = ("trial", "paired_replay")


class Evidence(msgspec.Struct, frozen=True):
    """What a step was taken on.

    figures: by name. incumbent: the version a candidate was compared with, on the same `rows` rows.
    passed: whether the gates, or the policy the comparison was held against, let it pass.
    """

    kind: EvidenceKind
    figures: dict[str, float | str] = {}
    passed: bool = True
    incumbent: str | None = None
    rows: int | None = None

    def line(self) -> str:
        """The evidence in a line, for a person."""
        compared = f" against version {self.incumbent}" if self.incumbent else ""
        rows = f" on {self.rows:,} rows" if self.rows else ""
        figures = ", ".join(_figure(name, value) for name, value in self.figures.items())
        return f"{self.kind}{compared}{rows}" + (f": {figures}" if figures else "")


class RollbackPlan(msgspec.Struct, frozen=True):
    """Where to go back to when a version in Production turns out bad.

    `to` is the version in Production before it, with its release; null when it is the first.
    """

    to: str | None
    release_id: str | None
    how: str


class Move(msgspec.Struct, frozen=True):
    """One version from stage to stage, and the tags it gets with it."""

    version: str
    source: Stage
    target: Stage
    tags: dict[str, str] = {}


class Step(msgspec.Struct, frozen=True):
    """One transition, with everything it changes: the version's own move first.

    aliases: where they point afterwards; null removes one. decision: the id of the stored decision
    it carries out.
    """

    number: int
    moves: tuple[Move, ...]
    aliases: dict[str, str | None]
    who: str
    why: str
    at: datetime
    evidence: Evidence
    plan: RollbackPlan | None = None
    decision: str | None = None

    @property
    def version(self) -> str:
        """The version that was asked to move."""
        return self.moves[0].version

    @property
    def source(self) -> Stage:
        """Where it came from."""
        return self.moves[0].source

    @property
    def target(self) -> Stage:
        """Where it went."""
        return self.moves[0].target

    @property
    def ends_trial(self) -> bool:
        """Whether a trial that was going on is over with it."""
        return CHALLENGER in self.aliases and self.aliases[CHALLENGER] is None

    def line(self) -> str:
        """The step in a line, for a person."""
        more = [f"version {m.version} -> {m.target}" for m in self.moves[1:]]
        if self.ends_trial and self.evidence.kind != "trial_ends":
            more.append("the trial ends")
        also = f" ({'; '.join(more)})" if more else ""
        return (
            f"{self.at:%Y-%m-%d %H:%M:%S}  version {self.version}  {self.source} -> {self.target}"
            f"{also}  by {self.who}: {self.why}  [{self.evidence.line()}]"
        )


@dataclass(frozen=True)
class Tenure:
    """A time a version was in Production, from `since` up to `until` (None: it still is)."""

    version: str
    since: datetime
    until: datetime | None
    step: Step

    def lines(self) -> list[str]:
        """What was there, who put it there and on what, for a person."""
        step = self.step
        until = f"until {self.until:%Y-%m-%d %H:%M:%S} UTC" if self.until else "still there"
        told = [
            f"version {self.version} in Production since {self.since:%Y-%m-%d %H:%M:%S}, {until}",
            f"  from      {step.source}",
            f"  put there {step.who}: {step.why}",
            f"  evidence  {step.evidence.line()}",
        ]
        if step.plan:
            told.append(f"  way back  {step.plan.how}")
        if step.decision:
            told.append(f"  decision  {step.decision}")
        return told


def tenures(history: Sequence[Step]) -> list[Tenure]:
    """Every time a version was in Production, oldest first."""
    entered = [step for step in history if step.target == "Production"]
    left = [*(step.at for step in entered[1:]), None]
    return [Tenure(step.version, step.at, left[place], step) for place, step in enumerate(entered)]


@dataclass(frozen=True)
class TrialRun:
    """A trial of `challenger` beside `champion`, the version in Production, since `since`.

    share: of the customers, whom the challenger answers. shadow: whether both score everybody.
    release_id: the release that has both. until: when it ended, None while it goes on.
    """

    id: str
    challenger: str
    champion: str
    share: float
    shadow: bool
    release_id: str
    since: datetime
    until: datetime | None
    step: Step

    def line(self) -> str:
        """The trial in a line, for a person."""
        until = f"until {self.until:%Y-%m-%d %H:%M}" if self.until else "going on"
        return (
            f"{self.id}: version {self.challenger} beside version {self.champion} since "
            f"{self.since:%Y-%m-%d %H:%M} UTC, {until}; it answers {self.share:.1%} of the "
            f"customers, {'both score everybody' if self.shadow else 'each scores its own'}"
        )


def trial_figures(
    trial: str, share: float, shadow: bool, release_id: str
) -> dict[str, float | str]:
    """What the step that begins a trial keeps of it."""
    scoring = "both" if shadow else "one"
    return {"trial": trial, "share": share, "scoring": scoring, "release_id": release_id}


def trials(history: Sequence[Step]) -> list[TrialRun]:
    """Every trial there was, oldest first; the last one may be going on."""
    found: list[TrialRun] = []
    for step in history:
        if step.ends_trial and found and found[-1].until is None:
            found[-1] = replace(found[-1], until=step.at)
        if step.evidence.kind == "trial_begins":
            figures = step.evidence.figures
            begun = TrialRun(
                id=str(figures["trial"]),
                challenger=step.version,
                champion=str(step.evidence.incumbent),
                share=float(figures["share"]),
                shadow=figures["scoring"] == "both",
                release_id=str(figures["release_id"]),
                since=step.at,
                until=None,
                step=step,
            )
            found.append(begun)
    return found


def in_production(history: Sequence[Step], on: date | datetime) -> list[Tenure]:
    """What was in Production at a moment, or at any time of a day (UTC), oldest first."""
    if isinstance(on, datetime):
        first, end = on, on + timedelta(microseconds=1)
    else:
        first = datetime.combine(on, time(), UTC)
        end = first + timedelta(days=1)
    return [
        tenure
        for tenure in tenures(history)
        if tenure.since < end and (tenure.until is None or tenure.until > first)
    ]


def moment(text: str) -> date | datetime:
    """A day, or a moment (UTC unless it says otherwise). Raises UserError for anything else."""
    try:
        if len(text) <= len("2026-03-03"):
            return date.fromisoformat(text)
        told = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"{text!r} is no day; give one such as 2026-03-03, or a moment, 2026-03-03T14:00"
        ) from None
    return told.replace(tzinfo=told.tzinfo or UTC).astimezone(UTC)


def known_good(history: Sequence[Step]) -> list[str]:
    """The versions Production could go back to in turn, the one in Production last.

    A version that was rolled back from is none of them, unless a person put it back: then it stands
    above the one that was there meanwhile.
    """
    good: list[str] = []
    for step in history:
        if step.target == "Production":
            if step.version in good:
                good = good[: good.index(step.version)]
            good.append(step.version)
        elif step.target == "Deleted" and step.version in good:
            good.remove(step.version)
    return good


def last_known_good(history: Sequence[Step]) -> str | None:
    """The version a rollback goes to unless told otherwise, or None when there is none."""
    good = known_good(history)
    return good[-2] if len(good) > 1 else None


def _figure(name: str, value: float | str) -> str:
    if isinstance(value, str):
        # A gate's reason begins with its name.
        return value if value.startswith(name) else f"{name} {value}"
    return f"{name} {value:.4g}"
