"""A confidence sequence of a mean: an interval that holds at every look at once.

For observations in [0, 1] and a guess c_i of each, made before it is seen, Fan, Grama and Liu
(2015) give

    E exp(r (X_i - m_i) - psi(r) (X_i - c_i)^2) <= 1,    psi(r) = -log(1 - r) - r,    0 <= r < 1

with m_i the mean of X_i given what came before. The products of these over i, and any mixture of
them over r, are then supermartingales that begin at 1, and by Ville's inequality one ever exceeds
1 / alpha with probability alpha at most. Where the mixture would is the boundary of

    sum (X_i - m_i),    as a function of    V = sum (X_i - c_i)^2

This is the empirical-Bernstein confidence sequence of Howard, Ramdas, McAuliffe and Sekhon (2021,
"Time-uniform, nonparametric, nonasymptotic confidence sequences", theorem 4), with a mixture of
finitely many rates. It is of the running mean of the m_i, which need not be equal: a model may
become better or worse while it is watched. Nothing is assumed but the bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# The best rate for a boundary at V is about sqrt(2 log(1 / alpha) / V): these serve V from a few
# to a few hundred thousand, each with the same share of alpha.
_RATES = 0.8 * 2.0 ** (-np.arange(18) / 2)
_COSTS = -np.log1p(-_RATES) - _RATES
_SHARES = np.log(np.full(len(_RATES), 1 / len(_RATES)))
_STEPS = 5
_LEAST, _GRID = 0.01, 1.002


class MeanSequence(NamedTuple):
    """At each look, the mean so far and bounds of what it estimates."""

    mean: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


def boundary(variance: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """What sum (X_i - m_i) ever exceeds with probability `alpha` at most, by V = `variance`.

    It rises with V, so that of a value of V rounded up, by 0.2 % at most, is one, too: a path of
    thousands of looks then needs few of them.
    """
    rounds = np.ceil(np.log(np.maximum(variance, _LEAST) / _LEAST) / np.log(_GRID))
    wanted, place = np.unique(rounds, return_inverse=True)
    return _boundary(_LEAST * _GRID**wanted, alpha)[place].reshape(variance.shape)


def _boundary(variance: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Where the mixture is 1 / `alpha`, by V = `variance` [points].

    Newton's method on the logarithm of the mixture, which is convex and rising, from a point beyond
    the root: every step stays beyond it, so that the bound holds however few there are.
    """
    target = np.log(1 / alpha)
    begun = _SHARES - _COSTS * variance[:, None]
    excess = ((target - begun) / _RATES).min(axis=1)
    for _ in range(_STEPS):
        terms = begun + _RATES * excess[:, None]
        largest = terms.max(axis=1)
        weights = np.exp(terms - largest[:, None])
        total = weights.sum(axis=1)
        beyond = np.maximum(largest + np.log(total) - target, 0)
        excess = excess - beyond * total / (weights * _RATES).sum(axis=1)
    return excess


def confidence_sequence(
    values: NDArray[np.float64],
    low: float,
    high: float,
    alpha: float,
    looks: NDArray[np.int64] | None = None,
) -> MeanSequence:
    """The mean of `values` [..., n] after each of them, or after the numbers of them in `looks`.

    `values` lie in [low, high], in an order that was settled before they were seen. With
    probability 1 - `alpha` at least, every interval of a sequence holds the mean of what its values
    were expected to be; either bound alone with 1 - `alpha` / 2. Raises ValueError for a value out
    of range.
    """
    values = np.asarray(values, dtype=np.float64)
    # Written so that a NaN is refused as well.
    if values.size and not (values.min() >= low and values.max() <= high):
        raise ValueError(f"a value is not in [{low}, {high}]")
    width = high - low
    scaled = (values - low) / width
    counts = np.arange(1, values.shape[-1] + 1)
    sums = scaled.cumsum(axis=-1)
    # A guess is the mean so far, with one more observation in the middle.
    guesses = (0.5 + sums - scaled) / counts
    variance = ((scaled - guesses) ** 2).cumsum(axis=-1)
    if looks is not None:
        counts = counts[looks - 1]
        sums, variance = sums[..., looks - 1], variance[..., looks - 1]
    away = boundary(variance, alpha / 2) / counts
    mean = sums / counts
    return MeanSequence(
        low + width * mean,
        low + width * np.maximum(mean - away, 0),
        low + width * np.minimum(mean + away, 1),
    )
