from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.data.windows import cutoff_of
from churn_assets.errors import UserError
from churn_assets.modeling.candidates import FAMILIES, build_estimator
from churn_assets.modeling.gates import QualityPolicy, all_passed, judge_gates
from churn_assets.modeling.metrics import evaluate, permutation_importance, score
from churn_assets.modeling.rows import feature_matrix, outcomes, rows_of
from churn_assets.modeling.split import Split
from churn_assets.modeling.training import TrainedModel, TrainingPolicy, fit

ONE = TrainingPolicy(families=("hist_gradient_boosting",), trials=1)


def test_every_family_competes_and_the_best_in_the_backtest_wins(trained: TrainedModel) -> None:
    assert {candidate.family for candidate in trained.candidates} == set(FAMILIES)
    losses = [candidate.figure("log_loss") for candidate in trained.candidates]
    assert losses == sorted(losses)
    assert trained.family == trained.candidates[0].family
    assert trained.family in trained.reason
    for result in trained.chosen.folds:
        assert str(result.fold.judged) in trained.reason
        assert result.scores.auc is not None
        assert result.recency_auc is not None
        assert result.scores.auc > result.recency_auc


def test_selection_follows_the_policy(frame: pd.DataFrame, split: Split) -> None:
    policy = TrainingPolicy(
        families=("logistic_regression", "hist_gradient_boosting"), select_by="auc", trials=2
    )
    best, other = fit(frame, split, FEATURE_NAMES, seed=1, policy=policy).candidates
    assert best.figure("auc") > other.figure("auc")


def test_a_trained_model_passes_on_the_test_cutoff_and_a_shuffled_one_is_refused(
    frame: pd.DataFrame, split: Split, trained: TrainedModel
) -> None:
    test = rows_of(frame, [split.test])
    x, y = feature_matrix(test, FEATURE_NAMES), outcomes(test)
    shuffled_frame = frame.copy()
    shuffled_frame["churned"] = np.random.default_rng(3).permutation(frame["churned"].to_numpy())
    shuffled = fit(shuffled_frame, split, FEATURE_NAMES, seed=42, policy=ONE)

    def passes(model: TrainedModel) -> dict[str, bool]:
        figures = score(y, model.predict(x))
        evidence = {"accuracy": figures.accuracy, "auc": figures.auc, "p95_latency_ms": 1.0}
        gates = judge_gates(QualityPolicy(), evidence)[:3]
        return {gate.name: gate.passed for gate in gates} | {"all": all_passed(gates)}

    assert passes(trained)["all"]
    refused = passes(shuffled)
    assert refused == {"accuracy": False, "auc": False, "p95_latency_ms": True, "all": False}


def test_the_test_cutoff_is_never_looked_at(
    frame: pd.DataFrame, split: Split, trained: TrainedModel
) -> None:
    other = frame[frame["cutoff"] != pd.Timestamp(cutoff_of(split.test))]
    again = fit(other, split, FEATURE_NAMES, seed=42, policy=TrainingPolicy(n_jobs=2, trials=3))
    x = feature_matrix(rows_of(frame, [split.test]), FEATURE_NAMES)
    np.testing.assert_array_equal(again.predict(x), trained.predict(x))


def test_the_calibration_cutoff_moves_the_calibration_and_nothing_else(
    frame: pd.DataFrame, split: Split
) -> None:
    model = fit(frame, split, FEATURE_NAMES, seed=1, policy=ONE)
    assert model.fitted_on == split.train
    assert model.fitted_rows == len(rows_of(frame, split.train))
    assert model.calibration.rows == len(rows_of(frame, [split.calibration]))
    fewer = frame.copy()
    there = fewer["cutoff"] == pd.Timestamp(cutoff_of(split.calibration))
    lucky = np.random.default_rng(1).random(len(fewer)) < 0.7
    fewer.loc[there & lucky, "churned"] = False
    other = fit(fewer, split, FEATURE_NAMES, seed=1, policy=ONE)
    x = feature_matrix(rows_of(frame, [split.test]), FEATURE_NAMES)
    plain, again = (m.estimator.estimator.predict_proba(x) for m in (model, other))
    np.testing.assert_array_equal(plain, again)
    assert other.predict(x).mean() < model.predict(x).mean() - 0.1
    np.testing.assert_array_equal(np.argsort(other.predict(x)), np.argsort(model.predict(x)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_model(family: str, frame: pd.DataFrame, split: Split) -> None:
    policy = TrainingPolicy(families=(family,), n_jobs=2, trials=2)  # ty: ignore
    x = feature_matrix(rows_of(frame, [split.test]), FEATURE_NAMES)
    first, second = (
        fit(frame, split, FEATURE_NAMES, seed=5, policy=policy).predict(x) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_the_forest_is_the_baseline_one() -> None:
    forest = build_estimator("random_forest", seed=42, n_jobs=2).get_params()
    assert forest["n_estimators"] == 200
    assert forest["max_depth"] == 15
    assert forest["min_samples_split"] == 5
    assert forest["class_weight"] == "balanced"
    assert forest["random_state"] == 42


def test_parameters_can_be_given_over_the_defaults() -> None:
    forest = build_estimator("random_forest", seed=1, params={"max_depth": 3}).get_params()
    assert forest["max_depth"] == 3
    assert forest["n_estimators"] == 200
    with pytest.raises(UserError, match="no model family 'svm'"):
        build_estimator("svm", seed=1)  # ty: ignore


def test_fewer_features_train_a_model_of_fewer_features(frame: pd.DataFrame, split: Split) -> None:
    names = FEATURE_NAMES[:3]
    model = fit(frame, split, names, seed=1, policy=ONE)
    assert model.features == names
    assert model.estimator.n_features_in_ == 3


def test_progress_is_told_for_every_candidate(frame: pd.DataFrame, split: Split) -> None:
    lines: list[str] = []
    fit(frame, split, FEATURE_NAMES, seed=1, policy=ONE, progress=lines.append)
    told = [line.split(":")[0] for line in lines]
    assert told[0].startswith("the history has room for 1 of 3 folds")
    assert told[1:] == ["trial 1 of 1, hist_gradient_boosting", "hist_gradient_boosting"]


def test_a_cutoff_without_rows_is_named(frame: pd.DataFrame, split: Split) -> None:
    lost = frame[frame["cutoff"] != pd.Timestamp(cutoff_of(split.train[0]))]
    with pytest.raises(UserError, match=f"no customer was active on {split.train[0]}"):
        fit(lost, split, FEATURE_NAMES, seed=1, policy=ONE)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_a_value_that_is_not_finite_is_refused_by_name(
    value: float, frame: pd.DataFrame, split: Split
) -> None:
    broken = frame.copy()
    broken.loc[:2, "avg_order_value"] = value
    with pytest.raises(UserError, match="3 rows have no finite avg_order_value"):
        fit(broken, split, FEATURE_NAMES, seed=1, policy=ONE)


def test_a_missing_label_or_column_is_refused(frame: pd.DataFrame, split: Split) -> None:
    unlabelled = frame.astype({"churned": "boolean"})
    unlabelled.loc[0, "churned"] = pd.NA
    with pytest.raises(UserError, match="no label"):
        fit(unlabelled, split, FEATURE_NAMES, seed=1, policy=ONE)
    with pytest.raises(UserError, match="no column login_frequency_7d"):
        fit(frame.drop(columns="login_frequency_7d"), split, FEATURE_NAMES, seed=1, policy=ONE)
    with pytest.raises(UserError, match="no features"):
        fit(frame, split, (), seed=1, policy=ONE)


def test_one_class_is_refused(frame: pd.DataFrame, split: Split) -> None:
    kept = frame.assign(churned=False)
    with pytest.raises(UserError, match="every customer of the training cutoffs is retained"):
        fit(kept, split, FEATURE_NAMES, seed=1, policy=ONE)
    gone = frame.copy()
    gone.loc[gone["cutoff"] == pd.Timestamp(cutoff_of(split.calibration)), "churned"] = True
    with pytest.raises(UserError, match="every customer of the calibration cutoffs is churned"):
        fit(gone, split, FEATURE_NAMES, seed=1, policy=ONE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_train_cutoffs": 0}, "max_train_cutoffs"),
        ({"folds": 0}, "folds"),
        ({"trials": 2}, "trials"),
        ({"time_budget_s": 0.0}, "time_budget_s"),
        ({"time_budget_s": float("nan")}, "time_budget_s"),
        ({"families": ()}, "families"),
        ({"families": ("random_forest", "random_forest")}, "families"),
        ({"decision_threshold": 1.5}, "decision_threshold"),
        ({"n_jobs": 0}, "n_jobs"),
        ({"select_by": "accuracy"}, "select_by"),
        ({"families": ("svm",)}, "families"),
    ],
)
def test_a_nonsense_policy_is_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        TrainingPolicy(**change)  # ty: ignore


def test_importance_finds_what_matters(
    frame: pd.DataFrame, split: Split, trained: TrainedModel
) -> None:
    test = rows_of(frame, [split.test])
    found = permutation_importance(
        trained.estimator, feature_matrix(test, FEATURE_NAMES), outcomes(test), FEATURE_NAMES,
        seed=1, repeats=2, max_rows=500,
    )  # fmt: skip
    assert found[0].feature == "days_since_last_order"
    assert found[0].mean > 0.1
    assert [f.mean for f in found] == sorted((f.mean for f in found), reverse=True)
    by_name = {f.feature: f.mean for f in found}
    assert abs(by_name["avg_order_value"]) < 0.02


def test_the_model_is_judged_beside_recency(
    frame: pd.DataFrame, split: Split, trained: TrainedModel
) -> None:
    train, test = rows_of(frame, trained.fitted_on), rows_of(frame, [split.test])
    found = evaluate(
        outcomes(test),
        trained.predict(feature_matrix(test, FEATURE_NAMES)),
        train_y=outcomes(train),
        recency=test["days_since_last_order"],
        train_recency=train["days_since_last_order"],
    )
    assert found.recency is not None
    assert found.model.brier < found.recency.brier < found.majority.brier
    assert found.model.auc is not None
    assert found.recency.auc is not None
    assert found.model.auc > found.recency.auc > 0.8
