"""The confidence sequence holds at every look, and the simulation would see one that does not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from churn_assets.monitoring.confidence import _COSTS, _RATES, boundary, confidence_sequence

RUNS, LOOKS, ALPHA = 300, 2000, 0.05

Values = NDArray[np.float64]


def normal(rng: np.random.Generator) -> Values:
    return np.clip(rng.normal(0, 0.3, (RUNS, LOOKS)), -1, 1)


def two_ends(rng: np.random.Generator) -> Values:
    """The largest spread there is."""
    return rng.choice([-1.0, 1.0], (RUNS, LOOKS))


def rare_losses(rng: np.random.Generator) -> Values:
    """A long tail on one side: for a while every sample looks better than it is."""
    return np.where(rng.random((RUNS, LOOKS)) < 0.01, 1.0, -0.01 / 0.99)


def in_bursts(rng: np.random.Generator) -> Values:
    """Quiet for long, then wild: the spread seen so far says nothing of what comes."""
    wild = (np.arange(LOOKS) // 200) % 2 == 1
    return rng.choice([-1.0, 1.0], (RUNS, LOOKS)) * np.where(wild, 1.0, 0.05)


def following(rng: np.random.Generator) -> Values:
    """Each value's spread depends on the one before; its mean is still zero."""
    signs = rng.choice([-1.0, 1.0], (RUNS, LOOKS))
    values = signs.copy()
    for i in range(1, LOOKS):
        values[:, i] *= np.where(values[:, i - 1] > 0, 1.0, 0.2)
    return values


NULLS = [normal, two_ends, rare_losses, in_bursts, following]


def ever_missed(lower: Values, upper: Values, truth: Values | float = 0.0) -> float:
    """The share of runs whose interval misses the truth at any look."""
    return float(((lower > truth) | (upper < truth)).any(axis=-1).mean())


def fixed_n_interval(values: Values) -> tuple[Values, Values]:
    """The usual interval, which holds at one look settled beforehand, from the 30th look on."""
    counts = np.arange(1, LOOKS + 1)
    mean = values.cumsum(axis=1) / counts
    spread = np.sqrt(np.maximum((values**2).cumsum(axis=1) / counts - mean**2, 1e-12) / counts)
    return (mean - 1.96 * spread)[:, 30:], (mean + 1.96 * spread)[:, 30:]


@pytest.mark.parametrize("null", NULLS)
def test_looking_after_every_outcome_misleads_no_more_often_than_promised(null) -> None:
    values = null(np.random.default_rng(1))
    found = confidence_sequence(values, -1, 1, ALPHA)
    assert ever_missed(found.lower, found.upper) <= ALPHA


def test_the_usual_interval_fails_the_same_simulation() -> None:
    for null in (normal, two_ends, rare_losses):
        values = null(np.random.default_rng(1))
        assert ever_missed(*fixed_n_interval(values)) > 4 * ALPHA
        last = [bound[:, -1:] for bound in fixed_n_interval(values)]
        assert ever_missed(*last) < 2 * ALPHA + 0.05, "at one look it is the usual interval"


def test_a_boundary_a_third_as_far_fails_it_too() -> None:
    """The simulation is sharp enough to see a mistake in a constant."""
    values = two_ends(np.random.default_rng(1))
    found = confidence_sequence(values, -1, 1, ALPHA)
    away = (found.upper - found.mean) / 3
    assert ever_missed(found.mean - away, found.mean + away) > 2 * ALPHA


def test_means_that_change_are_followed() -> None:
    rng = np.random.default_rng(2)
    means = 0.3 * np.sin(np.arange(LOOKS) / 150)
    values = np.clip(means + rng.normal(0, 0.2, (RUNS, LOOKS)), -1, 1)
    # Of a clipped normal variable, by simulation of its own.
    grid = np.linspace(-0.3, 0.3, 61)
    draws = rng.normal(0, 0.2, 200_000)
    exact = np.interp(means, grid, [np.clip(m + draws, -1, 1).mean() for m in grid])
    truth = exact.cumsum() / np.arange(1, LOOKS + 1)
    found = confidence_sequence(values, -1, 1, ALPHA)
    assert ever_missed(found.lower, found.upper, truth) <= ALPHA


@pytest.mark.parametrize(("difference", "enough"), [(-0.05, 1500), (-0.1, 500)])
def test_a_difference_is_found(difference: float, enough: int) -> None:
    rng = np.random.default_rng(3)
    values = np.clip(rng.normal(difference, 0.3, (RUNS, LOOKS)), -1, 1)
    upper = confidence_sequence(values, -1, 1, ALPHA).upper
    assert (upper[:, enough] < 0).mean() > 0.9


def test_the_width_shrinks_as_it_should() -> None:
    """Within a factor of 2.5 of the interval one gets by looking once."""
    values = np.clip(np.random.default_rng(4).normal(0, 0.2, (1, 50_000)), -1, 1)
    looks = np.array([500, 5000, 50_000])
    found = confidence_sequence(values, -1, 1, ALPHA, looks)
    once = 2 * 1.96 * 0.2 / np.sqrt(looks)
    assert (found.upper - found.lower < 2.5 * once)[0, 1:].all()
    assert (found.upper - found.lower > once).all()


def test_looks_are_those_of_the_whole_path() -> None:
    values = normal(np.random.default_rng(5))[0]
    path = confidence_sequence(values, -1, 1, ALPHA)
    looks = np.array([1, 17, 2000])
    some = confidence_sequence(values, -1, 1, ALPHA, looks)
    for whole, part in zip(path, some, strict=True):
        np.testing.assert_allclose(part, whole[looks - 1])
    np.testing.assert_allclose(path.mean, values.cumsum() / np.arange(1, LOOKS + 1))


def test_the_bounds_of_the_negative_are_the_negative_bounds() -> None:
    values = rare_losses(np.random.default_rng(6))[0]
    found, turned = (confidence_sequence(v, -1, 1, ALPHA) for v in (values, -values))
    np.testing.assert_allclose(turned.lower, -found.upper, atol=1e-12)
    np.testing.assert_allclose(turned.upper, -found.lower, atol=1e-12)


def test_at_the_boundary_the_mixture_is_what_it_must_be() -> None:
    variance = np.array([0.0, 0.3, 2.0, 47.0, 900.0, 1e5])
    found = boundary(variance, ALPHA)
    wealth = np.exp(np.outer(found, _RATES) - np.outer(variance, _COSTS)).mean(axis=1)
    # Never below: what is rounded is rounded away from the truth; and not by much.
    assert (wealth >= 1 / ALPHA * (1 - 1e-9)).all()
    assert (wealth[1:] <= 1 / ALPHA * 1.3).all()
    assert (np.diff(found) > 0).all()
    assert (boundary(variance, ALPHA / 10) > found).all()


@pytest.mark.parametrize("wrong", [1.001, -1.001, float("nan"), float("inf")])
def test_a_value_out_of_range_is_no_observation(wrong: float) -> None:
    with pytest.raises(ValueError, match="not in"):
        confidence_sequence(np.array([0.5, wrong]), -1, 1, ALPHA)
