"""A challenger beside the champion: who scores a request, and whose score is its answer."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from churn_assets.contract.logged import Arm
from churn_assets.contract.release import Challenger
from churn_assets.contract.response import TrialHealth
from churn_assets.contract.trial import assignment

logger = logging.getLogger("bentoml.churn")


class Model(Protocol):
    """What a trial needs of a model."""

    def probability(self, values: Sequence[float]) -> float:
        """P(churn) of one row."""
        ...

    def probabilities(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """P(churn) of each row; `rows` is float32 of shape (n, features)."""
        ...


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
        self, challenger: Challenger, features: Sequence[str], champion: Model, model: Model
    ):
        """`features` are those of the rows that come; `model` is the challenger's."""
        self.model_version = challenger.model_version
        self._terms = challenger
        self._arm_of = assignment(challenger.trial, challenger.share)
        self._champion, self._model = champion, model
        names = tuple(features)
        fewer = challenger.features != names
        self._columns = [names.index(name) for name in challenger.features] if fewer else None
        # The event loop and the thread of the batches both score.
        self._counting = threading.Lock()
        self._asked = self._failed = 0

    def score(self, customer_id: str, values: Sequence[float]) -> Scores:
        """The scores of one row, `values`, always from the same thread."""
        arm, challenger = self._arm_of(customer_id), None
        if self._terms.shadow or arm == "challenger":
            columns = self._columns
            taken = values if columns is None else [values[column] for column in columns]
            (challenger,) = self._ask(1, lambda: [self._model.probability(taken)])
            if challenger is None:
                arm = "champion"
        if not self._terms.shadow and arm == "challenger":
            return Scores(None, challenger, arm)
        return Scores(self._champion.probability(values), challenger, arm)

    def scores(self, customer_ids: Sequence[str], rows: NDArray[np.float32]) -> list[Scores]:
        """The scores of `rows`, float32 of shape (n, features), of the n customers.

        With shadow scoring both models score every row, else each those it answers.
        """
        arms = [self._arm_of(customer_id) for customer_id in customer_ids]
        everybody, shadow = range(len(arms)), self._terms.shadow
        asked = [i for i in everybody if shadow or arms[i] == "challenger"]
        found: list[float | None] = []
        if asked:
            taken = _only(rows, asked)
            taken = taken if self._columns is None else taken[:, self._columns]
            found = self._ask(len(asked), lambda: self._model.probabilities(taken).tolist())
        challenger = dict(zip(asked, found, strict=True))
        failed = {i for i in asked if challenger[i] is None}
        left = [i for i in everybody if shadow or i in failed or i not in challenger]
        answers = self._champion.probabilities(_only(rows, left)).tolist() if left else []
        champion = dict(zip(left, answers, strict=True))
        return [
            Scores(champion.get(i), challenger.get(i), "champion" if i in failed else arms[i])
            for i in everybody
        ]

    def health(self) -> TrialHealth:
        """The trial as this process has seen it."""
        terms = self._terms
        return TrialHealth(
            trial=terms.trial,
            challenger=terms.model_version,
            share=terms.share,
            shadow=terms.shadow,
            asked=self._asked,
            failed=self._failed,
        )

    def _ask(self, rows: int, ask: Callable[[], list[float]]) -> list[float | None]:
        """What the challenger answers for so many rows; None for one it has no score for."""
        try:
            answers = [p if math.isfinite(p) else None for p in ask()]
            if len(answers) != rows:
                raise ValueError(f"{len(answers)} answers to {rows} rows")
        except Exception:
            if not self._failed:
                logger.exception("the challenger failed, the champion answers; told only once")
            answers = [None] * rows
        with self._counting:
            self._asked += rows
            self._failed += answers.count(None)
        return answers


def _only(rows: NDArray[np.float32], places: Sequence[int]) -> NDArray[np.float32]:
    return rows if len(places) == len(rows) else rows[places]
