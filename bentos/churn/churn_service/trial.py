"""A challenger beside the champion: who scores a request, and whose score is its answer."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from churn_assets.contract.logged import Arm
from churn_assets.contract.release import Challenger
from churn_assets.contract.response import TrialHealth
from churn_assets.contract.trial import assignment

Score = Callable[[NDArray[np.float32]], NDArray[np.float32]]

logger = logging.getLogger("bentoml.churn")


class Scores(NamedTuple):
    """P(churn) by each model that scored, and whose is answered."""

    champion: float | None
    challenger: float | None
    arm: Arm


class Trial:
    """The two models of a trial.

    A challenger that fails costs no request: the champion answers, and the failure is counted here
    and, as a score that is missing, in the prediction log.
    """

    def __init__(
        self,
        challenger: Challenger,
        features: Sequence[str],
        champion_score: Score,
        challenger_score: Score,
    ):
        """`features` are the columns of the rows both are asked about, each by its own score."""
        self.model_version = challenger.model_version
        self._challenger = challenger
        self._arm_of = assignment(challenger.trial, challenger.share)
        names = tuple(features)
        fewer = challenger.features != names
        self._columns = [names.index(name) for name in challenger.features] if fewer else None
        self._champion_score, self._challenger_score = champion_score, challenger_score
        # The event loop and the thread of the batches both score.
        self._counting = threading.Lock()
        self._asked = self._failed = 0

    def scores(self, customer_ids: Sequence[str], rows: NDArray[np.float32]) -> list[Scores]:
        """The scores of `rows`, float32 of shape (n, features), of the n customers.

        With shadow scoring both models score every row, else each those it answers.
        """
        arms = [self._arm_of(customer_id) for customer_id in customer_ids]
        everybody = range(len(arms))
        shadow = self._challenger.shadow
        asked = [i for i in everybody if shadow or arms[i] == "challenger"]
        challenger = dict(zip(asked, self._ask_challenger(_only(rows, asked)), strict=True))
        left = [i for i in everybody if shadow or challenger.get(i) is None]
        answers = self._champion_score(_only(rows, left)).tolist() if left else []
        champion = dict(zip(left, answers, strict=True))
        failed = {i for i in asked if challenger[i] is None}
        return [
            Scores(champion.get(i), challenger.get(i), "champion" if i in failed else arms[i])
            for i in everybody
        ]

    def health(self) -> TrialHealth:
        """The trial as this process has seen it."""
        challenger = self._challenger
        return TrialHealth(
            trial=challenger.trial,
            challenger=challenger.model_version,
            share=challenger.share,
            shadow=challenger.shadow,
            asked=self._asked,
            failed=self._failed,
        )

    def _ask_challenger(self, rows: NDArray[np.float32]) -> list[float | None]:
        if not len(rows):
            return []
        try:
            taken = rows if self._columns is None else rows[:, self._columns]
            found = self._challenger_score(taken).tolist()
            answers = [p if math.isfinite(p) else None for p in found]
            if len(answers) != len(rows):
                raise ValueError(f"{len(answers)} answers to {len(rows)} rows")
        except Exception:
            if not self._failed:
                logger.exception("the challenger failed, the champion answers; told only once")
            answers = [None] * len(rows)
        with self._counting:
            self._asked += len(rows)
            self._failed += answers.count(None)
        return answers


def _only(rows: NDArray[np.float32], places: Sequence[int]) -> NDArray[np.float32]:
    return rows if len(places) == len(rows) else rows[places]
