"""What the trials' tests share: a trial, and the log and labels a world of customers leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd

from churn_assets.contract.trial import assignment
from churn_assets.lifecycle.history import Evidence, Move, Step, TrialRun
from churn_assets.lifecycle.trials import TrialPolicy
from churn_assets.monitoring.outcomes import outcomes_of
from churn_assets.monitoring.trial import (
    TrialReport,
    judge,
    predictions_of,
    traffic_of,
)

SINCE = datetime(2026, 1, 1, 9, tzinfo=UTC)
DAY = timedelta(days=1)
HORIZON = 30
CUTOFFS = tuple(datetime(2026, 1, 2, tzinfo=UTC) + n * DAY for n in range(5))
POLICY = TrialPolicy(min_rows=500)

STEP = Step(
    1,
    (Move("2", "Staging", "Staging"),),
    {"challenger": "2"},
    "ada",
    "so",
    SINCE,
    Evidence("trial_begins", incumbent="1"),
)
TRIAL = TrialRun("trial-2-beside-1", "2", "1", 0.2, True, "v1-both", SINCE, None, STEP)
BY_ARM = replace(TRIAL, shadow=False, share=0.5)


@dataclass(frozen=True)
class World:
    """A log and the labels of it. `customers` have their own chance to churn, at every cutoff."""

    log: pd.DataFrame
    labels: pd.DataFrame

    def judged(
        self,
        trial: TrialRun = TRIAL,
        policy: TrialPolicy = POLICY,
        *,
        days: float = 40.0,
        matured: tuple[datetime, ...] = CUTOFFS,
        **changes: Any,
    ) -> TrialReport:
        predictions = predictions_of(self.log, trial, horizon_days=HORIZON, **changes)
        outcomes = outcomes_of(predictions, self.labels, matured)
        now = SINCE + timedelta(days=days)
        traffic = traffic_of(self.log, trial)
        return judge(trial, predictions, outcomes, traffic, policy, now=now)


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


def expit(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def world(
    customers: int = 4000,
    *,
    champion_noise: float = 0.5,
    challenger_noise: float = 0.5,
    trial: TrialRun = TRIAL,
    seed: int = 0,
) -> World:
    """Each customer asked about once, at one of CUTOFFS, from stored features.

    A model knows the logit of a customer's chance up to a normal error of its noise.
    """
    rng = np.random.default_rng(seed)
    truth = expit(rng.normal(-1, 1.5, customers))
    ids = np.array([f"c-{number:06}" for number in range(customers)])
    scores = {
        model: expit(logit(truth) + rng.normal(0, noise, customers)) if noise else truth
        for model, noise in (("champion", champion_noise), ("challenger", challenger_noise))
    }
    cutoffs = pd.Series(rng.choice(np.array(CUTOFFS), customers))
    arm_of = assignment(trial.id, trial.share)
    arms = np.array([arm_of(i) for i in ids])
    log = pd.DataFrame(
        {
            "request_id": [f"r-{number}" for number in range(customers)],
            "at": cutoffs + pd.to_timedelta(rng.integers(60, 86_000, customers), unit="s"),
            "customer_id": ids,
            **scores,
            "arm": arms,
            "release_id": trial.release_id,
            "cutoff": cutoffs,
            "latency_us": rng.integers(400, 600, customers),
        }
    )
    if not trial.shadow:
        log.loc[log["arm"] == "champion", "challenger"] = np.nan
        log.loc[log["arm"] == "challenger", "champion"] = np.nan
    labels = pd.DataFrame(
        {"customer_id": ids, "cutoff": cutoffs, "churned": rng.random(customers) < truth}
    )
    return World(log, labels)
