"""A release, verified and ready to answer: its model, its contract, its answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime

import bentoml
import msgspec
import numpy as np
from numpy.typing import NDArray

from churn_assets.contract.holdout import Holdout
from churn_assets.contract.logged import Arm
from churn_assets.contract.lookup import Found
from churn_assets.contract.release import (
    MODEL,
    NO_OUTSIDE_WEIGHTS,
    Release,
    ReleaseError,
    check_golden,
)
from churn_assets.contract.request import PredictionRequest, RequestDecoder
from churn_assets.contract.response import (
    AccessHealth,
    Health,
    LaneHealth,
    LogHealth,
    OnlineHealth,
    Prediction,
    RefusedRelease,
    StoredPrediction,
    predict,
    predict_stored,
)
from churn_service.online import OnlineStore
from churn_service.trial import Scores, Trial


class OnnxModel:
    """A model of a release, on one thread: a row takes less time than a thread needs to wake."""

    def __init__(self, content: bytes, features: int, name: str = MODEL):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry(*NO_OUTSIDE_WEIGHTS)
        try:
            session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ReleaseError(f"{name} cannot be loaded: {reason}") from error
        self._session, self._name = session, name
        self._input = session.get_inputs()[0].name
        self._outputs = [session.get_outputs()[-1].name]
        shape = session.get_inputs()[0].shape
        if len(shape) != 2 or shape[1] != features:
            raise ReleaseError(f"{name} takes input {shape}, the release has {features} features")
        output = session.get_outputs()[-1]
        if output.type != "tensor(float)":
            raise ReleaseError(f"{name} must end in class probabilities, not {output.type}")
        # One row is scored where it lies: that halves the time a small model takes.
        self._row = np.zeros((1, features), dtype=np.float32)
        self._answer = np.zeros((1, 2), dtype=np.float32)
        self._bound = session.io_binding()
        for bind, end, place in (
            (self._bound.bind_input, self._input, self._row),
            (self._bound.bind_output, self._outputs[0], self._answer),
        ):
            bind(end, "cpu", 0, np.float32, place.shape, place.ctypes.data)

    def probability(self, values: Sequence[float] | NDArray[np.float32]) -> float:
        """P(churn) of one row, always from the same thread."""
        self._row[0] = values
        self._session.run_with_iobinding(self._bound)
        return self._answer.item(1)

    def one_by_one(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """As `probabilities`, by the way a single request takes."""
        return np.array([self.probability(row) for row in rows])

    def probabilities(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """P(churn) of each row; `rows` is float32 of shape (n, features)."""
        answer = self._session.run(self._outputs, {self._input: rows})[0]
        if not isinstance(answer, np.ndarray) or answer.ndim != 2 or answer.shape[1] != 2:
            raise ReleaseError(f"{self._name} must end in class probabilities of shape (rows, 2)")
        return answer[:, 1]


# A customer, their features, and where those come from the online store, what it said of them.
BatchRow = tuple[str, Sequence[float], Found | None]


class Scored(msgspec.Struct, frozen=True, gc=False):
    """An answer, and what it was computed from: what the prediction log keeps.

    values: the features, in the order of the release. champion, challenger: P(churn) by each model
    that scored, unrounded. arm: whose score was answered.
    """

    answer: Prediction | StoredPrediction
    values: Sequence[float]
    champion: float | None
    challenger: float | None = None
    arm: Arm = "champion"


class Served:
    """A verified release with everything made from it: replaced as one, or not at all.

    `online` is where its features are looked up: set before it answers anything.
    """

    def __init__(self, release: Release):
        self.online: OnlineStore | None = None
        self.manifest = release.manifest
        self.decoder = RequestDecoder(release.manifest.features)
        self.model = OnnxModel(release.model, len(release.manifest.features))
        check_golden(self.model.probabilities, release.golden)
        check_golden(self.model.one_by_one, release.golden)
        self.trial = self._trial(release)
        self.features = release.manifest.feature_names
        try:
            # Not the release's: who is held out stays so whatever is released or rolled back.
            self.held_out = Holdout.from_environment(os.environ).membership()
        except ValueError as error:
            raise ReleaseError(str(error)) from None
        context = bentoml.server_context
        built = context.bento_version not in ("", "not available")
        self.bento = f"{context.bento_name}:{context.bento_version}" if built else None

    def predict(self, request: PredictionRequest) -> Scored:
        """The answer to one request with its features."""
        return self._score(request.customer_id, msgspec.structs.astuple(request)[1:])

    def predict_stored(self, customer_id: str, found: Found) -> Scored:
        """The answer to one request by id."""
        scored = self._score(customer_id, found.values)
        return _of_stored(scored, found)

    def predict_rows(self, rows: Sequence[BatchRow]) -> list[Scored]:
        """The answers to one or more rows, computed in one call."""
        features = np.array([values for _, values, _ in rows], dtype=np.float32)
        scores = self._scores([customer_id for customer_id, _, _ in rows], features)
        answers = []
        for (customer_id, values, found), each in zip(rows, scores, strict=True):
            scored = self._scored(customer_id, values, each)
            answers.append(_of_stored(scored, found) if found else scored)
        return answers

    def _score(self, customer_id: str, values: Sequence[float]) -> Scored:
        if self.trial is not None:
            return self._scored(customer_id, values, self.trial.score(customer_id, values))
        scores = Scores(self.model.probability(values), None, "champion")
        return self._scored(customer_id, values, scores)

    def _scores(self, customer_ids: Sequence[str], rows: NDArray[np.float32]) -> list[Scores]:
        if self.trial is not None:
            return self.trial.scores(customer_ids, rows)
        return [Scores(p, None, "champion") for p in self.model.probabilities(rows).tolist()]

    def _scored(self, customer_id: str, values: Sequence[float], scores: Scores) -> Scored:
        champion, challenger, arm = scores
        if arm == "challenger" and self.trial is not None:
            probability, version = challenger, self.trial.model_version
        else:
            probability, version = champion, self.manifest.model_version
        assert probability is not None, "the arm that answers has scored"
        held_out = self.held_out(customer_id)
        answer = predict(customer_id, probability, version, self.manifest.risk, holdout=held_out)
        return Scored(answer, values, champion, challenger, arm)

    def _trial(self, release: Release) -> Trial | None:
        challenger = release.manifest.challenger
        if challenger is None or release.challenger is None:
            return None
        model = OnnxModel(release.challenger.model, len(challenger.features), challenger.file)
        for score in (model.probabilities, model.one_by_one):
            check_golden(score, release.challenger.golden, model=challenger.file)
        return Trial(challenger, release.manifest.feature_names, self.model, model)

    def health(
        self,
        started_at: datetime,
        *,
        refused: RefusedRelease | None,
        online: OnlineHealth | None,
        log: LogHealth,
        lane: LaneHealth,
        keys: AccessHealth | None,
    ) -> Health:
        """What is served here."""
        manifest = self.manifest
        return Health(
            status="degraded" if log.reason else "healthy",
            model=manifest.model_name,
            version=manifest.model_version,
            release_id=manifest.release_id,
            bento=self.bento,
            features=manifest.feature_names,
            started_at=started_at,
            worker=os.getpid(),
            release_refused=refused,
            online_store=online,
            api_keys=keys,
            lane=lane,
            prediction_log=log,
            trial=self.trial.health() if self.trial else None,
        )


def _of_stored(scored: Scored, found: Found) -> Scored:
    answer = scored.answer
    assert isinstance(answer, Prediction), "what was scored has not been stamped yet"
    return msgspec.structs.replace(scored, answer=predict_stored(answer, found.cutoff, found.stale))
