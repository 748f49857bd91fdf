"""What a check finds: the one shape every pure check of the data rooms returns."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check: whether it passed, why, and the figures it looked at."""

    passed: bool
    reason: str
    figures: dict[str, float | int | str] = field(default_factory=dict)
