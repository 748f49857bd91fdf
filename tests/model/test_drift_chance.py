"""False alarms of drift: how often chance alone raises one, where customers come again and again.

`python -m tests.model.test_drift_chance` measures it at the size that docs/monitoring.md tells.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from churn_assets.monitoring.drift import (
    DriftPolicy,
    drift_report,
    ks_p_value,
    prediction_shift,
    sizes_of,
)

POLICY = DriftPolicy()
CUSTOMERS = 300


def population(rng: np.random.Generator, customers: int, features: int) -> np.ndarray:
    """The features of customers, who keep them: whole numbers and amounts of one distribution."""
    values = rng.lognormal(3, 0.8, (customers, features))
    values[:, ::2] = rng.poisson(6, (customers, (features + 1) // 2))
    return values


def rows_of(values: np.ndarray, customers: np.ndarray) -> pd.DataFrame:
    columns = {f"f{n}": values[customers, n] for n in range(values.shape[1])}
    return pd.DataFrame({**columns, "customer_id": customers})


def month(seed: int, features: int, days: range) -> tuple[bool, bool]:
    """Whether a month without any drift alarms: by customers, and were each row its own customer.

    A reference of 800 other customers at six cutoffs; windows of seven days, in which a customer
    comes anything from not at all to several times a day, much the same from day to day.
    """
    rng = np.random.default_rng(seed)
    reference = rows_of(population(rng, 800, features), np.tile(np.arange(800), 6))
    now = population(rng, CUSTOMERS, features)
    daily = rng.gamma(0.5, 2.0, CUSTOMERS)
    visits = rng.poisson(daily, (days.stop + 7, CUSTOMERS))
    names = [name for name in reference if name != "customer_id"]
    found = [False, False]
    for day in days:
        current = rows_of(now, np.repeat(np.arange(CUSTOMERS), visits[day : day + 7].sum(axis=0)))
        report = drift_report(reference, current, names, POLICY)
        allowed = POLICY.chance_allowed(features + 1)
        found[0] |= report.verdict == "drift"
        found[1] |= any(
            f.statistic is not None
            and f.statistic > POLICY.alert_above
            and ks_p_value(f.statistic, f.reference_rows, f.current_rows) <= allowed
            for f in report.features
        )
    return found[0], found[1]


def test_repeated_customers_raise_no_false_alarm_where_counting_rows_would() -> None:
    months = [month(seed, 10, range(0, 30, 10)) for seed in range(14)]
    by_customers, by_rows = (sum(alarms) for alarms in zip(*months, strict=True))
    assert by_customers == 0
    assert by_rows >= 3


def test_what_really_drifted_is_found_among_as_few_customers() -> None:
    rng = np.random.default_rng(1)
    reference = rows_of(population(rng, 1500, 4), np.tile(np.arange(1500), 6))
    moved = population(rng, CUSTOMERS, 4)
    moved[:, 1] *= 2
    current = rows_of(moved, np.repeat(np.arange(CUSTOMERS), rng.poisson(4, CUSTOMERS)))
    report = drift_report(reference, current, ["f0", "f1", "f2", "f3"], POLICY)
    assert report.drifted == ("f1",)


def test_rows_are_worth_their_customers() -> None:
    assert sizes_of(None, 7) == (7, 7, 7.0)
    assert sizes_of(np.arange(5).repeat(7), 35) == (35, 5, pytest.approx(5))
    # One with nearly all of the rows is hardly more than one.
    heavy = sizes_of(np.concatenate([np.zeros(1000, int), np.arange(1, 51)]), 1050)
    assert heavy.customers == 51
    assert heavy.effective == pytest.approx(1.1, abs=0.01)
    assert sizes_of(np.empty(0, np.int64), 0).effective == 0


def test_p_values_of_repeated_customers_are_those_of_chance() -> None:
    """Under the null, p <= 0.1 about one time in ten; by rows it would be most of the time."""
    rng = np.random.default_rng(3)
    by_customers = by_rows = 0
    for _ in range(200):
        then, now = rng.normal(size=1000), rng.normal(size=300)
        codes = np.repeat(np.arange(300), rng.poisson(3, 300))
        found = drift_report(
            {"x": then}, {"x": now[codes], "customer_id": codes}, ["x"], replace(POLICY, min_rows=2)
        ).features[0]
        assert found.statistic is not None
        assert found.p_value is not None
        by_customers += found.p_value <= 0.1
        by_rows += ks_p_value(found.statistic, 1000, found.current_rows) <= 0.1
    assert 6 <= by_customers <= 34
    assert by_rows > 50


@pytest.mark.parametrize(
    ("moved", "customers", "verdict"),
    [
        (0.02, 1000, "ok"),
        (0.2, 1000, "drift"),
        (-0.2, 1000, "drift"),
        (0.11, 210, "insufficient"),
        (0.2, 150, "insufficient"),
    ],
)
def test_the_prediction_mean(moved: float, customers: int, verdict: str) -> None:
    rng = np.random.default_rng(4)
    then = rng.choice([0.1, 0.9], 5000)
    now = rng.permutation(np.tile([0.1, 0.9], customers // 2)) + moved
    codes = np.repeat(np.arange(customers), 5)
    found = prediction_shift((then, None), (now[codes], codes), POLICY, 6)
    assert (found.verdict, found.alert) == (verdict, verdict == "drift")
    assert (found.shift is None) == (customers < POLICY.min_customers)
    assert found.rows == 5 * customers


def main(months: int) -> None:
    """Print the share of months with a false alarm, 20 features on 30 days each."""
    done = [month(seed, 20, range(30)) for seed in range(months)]
    for name, alarms in zip(("by customers", "by rows"), zip(*done, strict=True), strict=True):
        print(f"{name}: {sum(alarms)} of {months} months")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 300)
