"""The KS statistic of many rows: no further from the exact one than it says, nor than allowed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from churn_assets.monitoring import ks
from churn_assets.monitoring.drift import ks_statistic
from churn_assets.monitoring.ks import EXACT_ROWS, TOLERANCE, exact_ks, ks_of, streaming_ks

ROWS = 120_000
Draw = Callable[[np.random.Generator, float], np.ndarray]


def two_clusters(rng: np.random.Generator, shift: float) -> np.ndarray:
    far = np.where(rng.random(ROWS) < 0.5, 1e9, 0.0)
    return far + rng.normal(shift, 1, ROWS)


SHAPES: dict[str, Draw] = {
    "normal": lambda rng, by: rng.normal(by, 1, ROWS),
    "whole numbers": lambda rng, by: rng.poisson(2 + by, ROWS).astype(float),
    "sevenths": lambda rng, by: rng.poisson(3 + by, ROWS) / 7,
    "money": lambda rng, by: np.round(rng.lognormal(4, 0.8, ROWS) + by, 2),
    "many zeros": lambda rng, by: np.where(
        rng.random(ROWS) < 0.4, 0, rng.exponential(1, ROWS) + by
    ),
    "wild tails": lambda rng, by: rng.standard_cauchy(ROWS) + by,
    "over 30 orders of magnitude": lambda rng, by: rng.lognormal(by, 9, ROWS),
    "clusters far apart": two_clusters,
    "constant": lambda rng, by: np.full(ROWS, 3.0 + by),
    "tiny": lambda rng, by: rng.normal(by, 1, ROWS) * 1e-300,
    "huge": lambda rng, by: np.clip(rng.normal(by, 1, ROWS), -3, 3) * 5e307,
    "sorted": lambda rng, by: np.sort(rng.normal(by, 1, ROWS)),
}


@pytest.mark.parametrize("sorted_rows", [ks._SORTED_ROWS, 5000], ids=["sorts", "refines"])
@pytest.mark.parametrize("shift", [0.0, 0.02, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bound_holds_and_is_small(
    shape: str, shift: float, sorted_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ks, "_SORTED_ROWS", sorted_rows)
    rng = np.random.default_rng(5)
    before, after = SHAPES[shape](rng, 0.0), SHAPES[shape](rng, shift)[: ROWS // 2]
    found = streaming_ks(np.array_split(before, 7), [after])
    exact = exact_ks(before, after).statistic
    assert found.error_bound <= TOLERANCE
    assert found.statistic - 1e-12 <= exact <= found.statistic + found.error_bound + 1e-12


def test_the_exact_statistic_is_scipys() -> None:
    rng = np.random.default_rng(6)
    before, after = rng.poisson(3, 900) / 7, rng.poisson(3.4, 700) / 7
    theirs = ks_2samp(before, after, method="asymp")
    assert exact_ks(before, after).statistic == pytest.approx(theirs.statistic, abs=1e-12)
    ours = ks_statistic(before, after)
    assert ours == pytest.approx((theirs.statistic, theirs.pvalue), abs=1e-9)


def test_it_is_exact_up_to_so_many_rows_and_streams_beyond() -> None:
    rng = np.random.default_rng(7)
    rows, more = rng.normal(size=EXACT_ROWS), rng.normal(size=EXACT_ROWS + 1)
    assert ks_of(rows, rows[::-1]) == (0.0, 0.0)
    assert ks_of(rows, more).error_bound > 0


def test_ties_are_exact_however_many_rows() -> None:
    rng = np.random.default_rng(8)
    before, after = (rng.poisson(rate, ROWS).astype(float) for rate in (2, 2.5))
    found = streaming_ks([before], [after])
    assert found.error_bound == 0
    assert found.statistic == pytest.approx(exact_ks(before, after).statistic, abs=1e-12)


def test_each_chunk_is_looked_at_once_where_no_cell_hides_anything() -> None:
    class Counting(list):
        passes = 0

        def __iter__(self):
            type(self).passes += 1
            return super().__iter__()

    rng = np.random.default_rng(9)
    before = Counting(np.array_split(rng.normal(0, 1, ROWS), 9))
    streaming_ks(before, [rng.normal(0.5, 1, ROWS)])
    assert Counting.passes == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [10, ROWS])
def test_what_is_not_finite_is_refused(bad: float, rows: int) -> None:
    values = np.arange(float(rows))
    spoiled = np.where(np.arange(rows) == rows - 2, bad, values)
    for sides in ((values, spoiled), (spoiled, values)):
        with pytest.raises(ValueError, match="not finite"):
            ks_of(*sides)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        ks_of([], [1.0])
    for sides in (([], []), ([np.empty(0)], [np.ones(3)]), ([np.ones(3)], [])):
        with pytest.raises(ValueError, match="empty"):
            streaming_ks(*sides)


@settings(max_examples=150, deadline=None)
@given(
    before=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    after=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    tolerance=st.sampled_from([0.0, 0.05]),
)
def test_any_numbers_at_all(before: list[float], after: list[float], tolerance: float) -> None:
    sides = np.array(before), np.array(after)
    found = streaming_ks([sides[0]], [sides[1]], tolerance)
    exact = exact_ks(*sides).statistic
    assert found.error_bound <= tolerance + 1e-12
    assert found.statistic - 1e-12 <= exact <= found.statistic + found.error_bound + 1e-12
