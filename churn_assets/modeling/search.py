"""Search for the family and the hyper-parameters with the best backtest, within trials and time.

Method: the tree-structured Parzen estimator (Bergstra, Bardenet, Bengio, Kegl, NeurIPS 2011) of
Optuna, with the median rule giving up on a trial that falls behind after a fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from churn_assets.modeling.backtest import CandidateResult, FoldResult, judge_fold
from churn_assets.modeling.candidates import STARTS, Family
from churn_assets.modeling.rows import Parts
from churn_assets.modeling.split import Fold

if TYPE_CHECKING:
    from optuna.trial import Trial

# Trials drawn at random, after the start of each family, before the estimator takes over.
_AT_RANDOM = 3


@dataclass(frozen=True)
class Searched:
    """The candidates tried, best first, those given up after the others.

    trials: how many were finished or given up. wanted: how many there should have been;
    fewer when the time ran out, and then the same seed may give another model on another machine.
    """

    candidates: tuple[CandidateResult, ...]
    trials: int
    wanted: int

    @property
    def out_of_time(self) -> bool:
        """Whether the time budget ended the search."""
        return self.trials < self.wanted


@dataclass(frozen=True)
class Effort:
    """How long to search. families: in the order that breaks ties. seconds: an upper bound."""

    families: tuple[Family, ...]
    trials: int
    seconds: float
    select_by: str
    n_jobs: int
    threshold: float

    @property
    def sign(self) -> int:
        """What makes a smaller figure the better one."""
        return -1 if self.select_by == "auc" else 1


def search(
    parts: Parts,
    folds: Sequence[Fold],
    features: Sequence[str],
    effort: Effort,
    *,
    seed: int,
    on_trial: Callable[[int, CandidateResult], None],
    clock: Callable[[], float] = perf_counter,
) -> Searched:
    """Try candidates over `folds`, the families' starts first.

    The same seed and number of trials give the same candidates. A trial under way when the time is
    up is dropped, the first one excepted. on_trial is told the number of each trial and its result.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    deadline = clock() + effort.seconds
    study = optuna.create_study(
        direction="minimize",
        sampler=optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=len(effort.families) + _AT_RANDOM
        ),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=len(effort.families)),
    )
    for family in effort.families:
        study.enqueue_trial({"family": family, **_start(family)})
    found: list[CandidateResult] = []
    for number in range(effort.trials):
        if found and clock() >= deadline:
            break
        trial = study.ask()
        family = cast("Family", trial.suggest_categorical("family", effort.families))
        params = {**STARTS[family], **_suggested(trial, family)}
        results: list[FoldResult] = []
        pruned = False
        for step, fold in enumerate(folds):
            if found and clock() >= deadline:
                break
            results.append(
                judge_fold(
                    parts,
                    fold,
                    family,
                    params,
                    features=features,
                    seed=seed,
                    n_jobs=effort.n_jobs,
                    threshold=effort.threshold,
                )
            )
            so_far = CandidateResult(family, params, tuple(results))
            trial.report(effort.sign * so_far.figure(effort.select_by), step)
            if step + 1 < len(folds) and trial.should_prune():
                pruned = True
                break
        if not pruned and len(results) < len(folds):
            break
        candidate = CandidateResult(family, params, tuple(results), pruned)
        if pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, effort.sign * candidate.figure(effort.select_by))
        found.append(candidate)
        on_trial(number, candidate)
    ranked = sorted(found, key=lambda one: (one.pruned, effort.sign * one.figure(effort.select_by)))
    return Searched(tuple(ranked), len(found), effort.trials)


def _suggested(trial: Trial, family: Family) -> dict[str, Any]:
    def real(name: str, low: float, high: float, log: bool = False) -> float:
        return trial.suggest_float(f"{family}.{name}", low, high, log=log)

    def whole(name: str, low: int, high: int, log: bool = False) -> int:
        return trial.suggest_int(f"{family}.{name}", low, high, log=log)

    if family == "logistic_regression":
        return {"C": real("C", 1e-3, 1e2, log=True)}
    if family == "random_forest":
        return {
            "max_depth": whole("max_depth", 4, 12),
            "min_samples_leaf": whole("min_samples_leaf", 2, 100, log=True),
            "max_samples": real("max_samples", 0.2, 0.6),
        }
    return {
        "learning_rate": real("learning_rate", 0.02, 0.2, log=True),
        "max_iter": whole("max_iter", 50, 200),
        "max_leaf_nodes": whole("max_leaf_nodes", 4, 31, log=True),
        "min_samples_leaf": whole("min_samples_leaf", 10, 200, log=True),
        "l2_regularization": real("l2_regularization", 1e-2, 1e2, log=True),
    }


def _start(family: Family) -> Mapping[str, Any]:
    """The start of a family among what is searched; what is not is the same in every trial."""
    searched = {
        "logistic_regression": ("C",),
        "random_forest": ("max_depth", "min_samples_leaf", "max_samples"),
        "hist_gradient_boosting": tuple(STARTS["hist_gradient_boosting"]),
    }[family]
    return {f"{family}.{name}": STARTS[family][name] for name in searched}
