from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.data.windows import days_between
from churn_assets.modeling.backtest import CandidateResult, judge_fold
from churn_assets.modeling.candidates import FAMILIES, STARTS
from churn_assets.modeling.rows import parts_of
from churn_assets.modeling.search import Effort, Searched, search
from churn_assets.modeling.split import Split, rolling_origins, temporal_split
from churn_assets.modeling.training import TrainingPolicy, fit
from tests.model.conftest import HORIZON, LAST_DAY, customers

FAST = Effort(
    families=("logistic_regression", "hist_gradient_boosting"),
    trials=7,
    seconds=1e9,
    select_by="log_loss",
    n_jobs=1,
    threshold=0.5,
)


@pytest.fixture(scope="module")
def long_split() -> Split:
    first = LAST_DAY.replace(year=LAST_DAY.year - 1)
    return temporal_split(days_between(first, LAST_DAY), HORIZON, max_train_cutoffs=5)


@pytest.fixture(scope="module")
def long_frame(long_split: Split) -> pd.DataFrame:
    rng = np.random.default_rng(11)
    return pd.concat([customers(day, 300, rng) for day in long_split.days], ignore_index=True)


@pytest.fixture(scope="module")
def searching(long_split: Split, long_frame: pd.DataFrame) -> Callable[..., Searched]:
    parts = parts_of(long_frame, long_split.train, FEATURE_NAMES)
    folds = rolling_origins(long_split, 3)

    def run(effort: Effort = FAST, seed: int = 3, told: list | None = None, clock=None) -> Searched:
        def tell(number: int, result: CandidateResult) -> None:
            if told is not None:
                told.append((number, result))

        more = {} if clock is None else {"clock": clock}
        return search(parts, folds, FEATURE_NAMES, effort, seed=seed, on_trial=tell, **more)

    return run


def outcome(searched: Searched) -> list[tuple]:
    return [(c.family, c.params, c.pruned, c.figure("log_loss")) for c in searched.candidates]


def test_the_same_seed_and_trials_give_the_same_search(searching: Callable[..., Searched]) -> None:
    first = outcome(searching())
    assert outcome(searching()) == first
    assert outcome(searching(seed=4)) != first


def test_every_family_starts_where_it_is_known_to_be_good(
    searching: Callable[..., Searched],
) -> None:
    told: list[tuple[int, CandidateResult]] = []
    found = searching(told=told)
    assert [number for number, _ in told] == list(range(FAST.trials))
    assert [r.family for _, r in told[:2]] == list(FAST.families)
    for _, result in told[:2]:
        assert result.params == pytest.approx(dict(STARTS[result.family]))
    assert found.trials == found.wanted == FAST.trials
    assert not found.out_of_time
    assert len({str(c.params) for c in found.candidates}) == FAST.trials


def test_the_best_that_was_finished_comes_first(searching: Callable[..., Searched]) -> None:
    found = searching()
    finished = [c for c in found.candidates if not c.pruned]
    given_up = [c for c in found.candidates if c.pruned]
    assert list(found.candidates) == finished + given_up
    losses = [c.figure("log_loss") for c in finished]
    assert losses == sorted(losses)
    assert all(len(c.folds) == 3 for c in finished)
    assert all(0 < len(c.folds) < 3 for c in given_up)
    assert given_up
    starts = [c for c in finished if c.params == dict(STARTS[c.family])]
    assert starts
    assert losses[0] <= min(c.figure("log_loss") for c in starts)


def test_auc_is_searched_upwards(searching: Callable[..., Searched]) -> None:
    finished = [
        c.figure("auc")
        for c in searching(replace(FAST, select_by="auc")).candidates
        if not c.pruned
    ]
    assert finished == sorted(finished, reverse=True)
    assert finished[0] > finished[-1]


def ticking(step: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += step


@pytest.mark.parametrize(("seconds", "trials"), [(0.5, 1), (3.5, 1), (4.5, 2)])
def test_time_is_an_upper_bound_and_one_trial_the_least(
    seconds: float, trials: int, searching: Callable[..., Searched]
) -> None:
    # A second at every look at the clock: one before each trial, one before each fold.
    ticks = ticking(1.0)
    found = searching(replace(FAST, seconds=seconds), clock=lambda: next(ticks))
    assert found.trials == trials
    assert found.out_of_time
    assert all(len(c.folds) == 3 for c in found.candidates)


def test_a_model_says_how_far_the_search_went(long_frame: pd.DataFrame, long_split: Split) -> None:
    policy = TrainingPolicy(families=FAST.families, trials=4, n_jobs=1)
    lines: list[str] = []
    seen: list[int] = []

    def note(number: int, result: CandidateResult) -> None:
        seen.append(number)

    model = fit(
        long_frame, long_split, FEATURE_NAMES, seed=1, policy=policy, progress=lines.append,
        on_trial=note,
    )  # fmt: skip
    assert (model.trials, model.trials_wanted) == (4, 4)
    assert seen == [0, 1, 2, 3]
    assert model.params == model.candidates[0].params
    ticks = ticking(40.0)
    short = fit(
        long_frame, long_split, FEATURE_NAMES, seed=1, policy=policy, progress=lines.append,
        clock=lambda: next(ticks),
    )  # fmt: skip
    assert short.trials < 4
    assert any("the time budget of 60 s was used up" in line for line in lines)


def test_the_search_covers_every_family() -> None:
    assert TrainingPolicy().effort.families == FAMILIES


def test_a_fold_is_judged_on_rows_nothing_was_learned_from(
    long_frame: pd.DataFrame, long_split: Split
) -> None:
    """Outcomes drawn by chance at the judged cutoff: who has seen them would rank them well."""
    fold = rolling_origins(long_split, 1)[0]
    parts = parts_of(long_frame, long_split.train, FEATURE_NAMES)
    judged = parts[fold.judged]
    by_chance = np.random.default_rng(5).random(len(judged.y)) < 0.5
    parts[fold.judged] = judged._replace(y=by_chance)
    memory = {"n_estimators": 50, "max_depth": None, "min_samples_leaf": 1, "max_samples": None}
    found = judge_fold(
        parts, fold, "random_forest", memory, features=FEATURE_NAMES, seed=1, n_jobs=1
    )
    assert found.scores.auc == pytest.approx(0.5, abs=0.12)
    assert found.scores.rows == len(judged.y)
    assert found.recency_auc == pytest.approx(0.5, abs=0.12)
