"""Which model answers whom while two are on trial.

An assignment is a function of the trial and the customer alone, so that every worker, process and
machine agrees on it, and an analysis can compute it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from churn_assets.contract.logged import Arm

_STEPS = 1 << 53


def position(trial: str) -> Callable[[str], float]:
    """The function that places customers in `trial`: an id to a number in [0, 1).

    The numbers are those of a uniform distribution, independent from trial to trial (BLAKE2b of the
    trial's id and the customer's, the first 53 bits).
    """
    # The id's length before it, so that no two pairs of ids are the same bytes.
    salt = trial.encode()
    begun = hashlib.blake2b(b"%d:%b" % (len(salt), salt), digest_size=8)

    def of(customer_id: str) -> float:
        digest = begun.copy()
        digest.update(customer_id.encode())
        return (int.from_bytes(digest.digest(), "big") >> 11) / _STEPS

    return of


def assignment(trial: str, share: float) -> Callable[[str], Arm]:
    """The function that says which arm of `trial` a customer is in.

    share: of the customers, whom the challenger answers, in (0, 1).
    """
    place = position(trial)

    def of(customer_id: str) -> Arm:
        return "challenger" if place(customer_id) < share else "champion"

    return of
