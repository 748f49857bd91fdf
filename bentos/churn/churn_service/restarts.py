"""A worker that dies is started again after a second.

BentoML's supervisor looks after its workers every ten seconds, and has no setting for that: with
one worker, ten seconds in which nobody answers. The class it makes its supervisor of is not public,
so it is counted on for the versions in HOLDS_FOR alone; with any other one the ten seconds stay.
"""

from __future__ import annotations

import re
from typing import Any

import bentoml

SECONDS = 1.0

# From the first version, which is tested, up to the second, which is not.
HOLDS_FOR = ((1, 4, 39), (1, 5))


def restart_soon(version: str | None = None) -> bool:
    """Have the supervisor of this process look after its workers every second.

    To be called before BentoML makes it: in `on_deployment`. Returns whether it will with BentoML
    `version` (the installed one).
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version or bentoml.__version__))
    if not HOLDS_FOR[0] <= numbers[:3] < HOLDS_FOR[1]:
        return False
    from bentoml._internal.utils import circus

    class Supervisor(circus.Arbiter):
        """BentoML's, more attentive."""

        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **(options | {"check_delay": SECONDS}))

    vars(circus)["Arbiter"] = Supervisor
    return True
