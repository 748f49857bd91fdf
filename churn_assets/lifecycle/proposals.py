"""Proposals: what a decision thinks a person should do, and what that person made of it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec

from churn_assets.errors import UserError
from churn_assets.lifecycle.promotion import Approval


class Answer(msgspec.Struct, frozen=True):
    """A person's word on a proposal."""

    verdict: Literal["accepted", "declined"]
    who: str
    why: str
    at: datetime


class Proposal(msgspec.Struct, frozen=True):
    """What a decision proposed. answer: None while it is open."""

    id: str
    text: str
    at: datetime
    answer: Answer | None = None

    def line(self) -> str:
        """The proposal in a line, for a person."""
        state = "open"
        if self.answer is not None:
            state = f"{self.answer.verdict} by {self.answer.who}: {self.answer.why}"
        return f"{self.id}  {self.at:%Y-%m-%d}  {state}\n  {self.text}"


def open_proposals(folder: Path, proposed: Iterable[Proposal]) -> list[Proposal]:
    """All of `proposed`, each with the answer `folder` has of it, oldest first; the same text that
    is open already is not proposed again."""
    found: list[Proposal] = []
    for one in sorted(proposed, key=lambda proposal: proposal.at):
        path = folder / f"{one.id}.json"
        if path.exists():
            found.append(msgspec.json.decode(path.read_bytes(), type=Proposal))
        elif not any(p.answer is None and p.text == one.text for p in found):
            found.append(one)
    return found


def answer(
    folder: Path,
    proposals: Iterable[Proposal],
    identity: str,
    verdict: Literal["accepted", "declined"],
    *,
    who: str,
    why: str,
    now: datetime,
) -> Proposal:
    """Keep a person's word on the proposal `identity`, once.

    Raises UserError for a proposal that is none or has been answered, and for a word without a
    name or a reason.
    """
    found = next((one for one in proposals if one.id == identity), None)
    if found is None:
        raise UserError(f"there is no proposal {identity}; `churn proposals` lists them")
    if found.answer is not None:
        raise UserError(f"{identity} has been {found.answer.verdict} by {found.answer.who}")
    word = Approval(who, why)
    answered = msgspec.structs.replace(
        found, answer=Answer(verdict, word.who.strip(), word.why.strip(), now)
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f".{identity}.tmp"
    written.write_bytes(msgspec.json.encode(answered))
    written.replace(folder / f"{identity}.json")
    return answered
