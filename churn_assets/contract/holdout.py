"""The hold-out: customers nobody treats, so that outcomes without treatment can be seen.

Who is in it is a function of a salt and the customer alone: the same in every worker and release,
on every machine, and in an analysis years later. It has nothing to do with any trial's assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from churn_assets.contract.trial import position

SHARE_VARIABLE = "CHURN_HOLDOUT_SHARE"
SALT_VARIABLE = "CHURN_HOLDOUT_SALT"

# No trial's id begins so: they are independent of one another whatever the salt.
_PREFIX = "holdout/"
_LARGEST_SHARE = 0.5
_LONGEST_SALT = 100


class Holdout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which customers are never treated.

    share: of the customers, from 0 (nobody) to 0.5. A larger one adds customers and lets none go.
    salt: another one draws another hold-out, of customers who may have been treated before.
    """

    share: float = 0.05
    salt: str = "retention"

    def __post_init__(self) -> None:
        """Raises ValueError naming the key."""
        # Written so that a NaN, which compares false, is refused as well.
        if not 0 <= self.share <= _LARGEST_SHARE:
            raise ValueError(
                f"holdout.share is {self.share}; give a share from 0 to {_LARGEST_SHARE:g}"
            )
        if not 0 < len(self.salt) <= _LONGEST_SALT or not self.salt.isprintable():
            raise ValueError(
                f"holdout.salt is {self.salt!r}; give 1 to {_LONGEST_SALT} printable characters"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Holdout:
        """The hold-out the environment sets, by default this class's. Raises ValueError."""
        default = cls()
        share = environment.get(SHARE_VARIABLE) or str(default.share)
        try:
            number = float(share)
        except ValueError:
            number = float("nan")
        try:
            return cls(number, environment.get(SALT_VARIABLE) or default.salt)
        except ValueError as error:
            raise ValueError(f"{SHARE_VARIABLE} or {SALT_VARIABLE}: {error}") from None

    def environment(self) -> dict[str, str]:
        """The hold-out as a service reads it."""
        return {SHARE_VARIABLE: str(self.share), SALT_VARIABLE: self.salt}

    def membership(self) -> Callable[[str], bool]:
        """The function that says whether the customer of an id is in the hold-out."""
        place, share = position(f"{_PREFIX}{self.salt}"), self.share

        def of(customer_id: str) -> bool:
            return place(customer_id) < share

        return of
