"""The two-sample Kolmogorov-Smirnov statistic: exact, or of any number of rows with a proven bound.

D is the largest gap between two cumulative distributions. Sorting finds it exactly, and costs too
much for millions of rows. Counting the rows in cells of an ordered grid gives the gap at every edge
between two cells exactly. Inside a cell that holds the share r of the reference and c of the
current rows, the gap g (reference minus current) can rise from that of its left edge by r at most,
and fall by c:

    largest |g| of an edge  <=  D  <=  largest of max(g + r, c - g) over the cells

So each call proves how far its answer can be off. Cells that could hide more than is allowed are
looked into again, and they alone. A value that is often there has a cell of its own, in which
nothing can hide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

EXACT_ROWS = 50_000
TOLERANCE = 5e-4

Values = NDArray[np.float64]
Chunks = Sequence[Values]

_PART_ROWS = 1 << 15
_BANDS = 1 << 15
_SAMPLE_ROWS, _SAMPLE_CHUNKS = 1 << 16, 16
# The few that lie furthest out in a sample, on either side, must not stretch the cells.
_TAIL = 1e-4
_SORTED_ROWS = 1 << 21


class KSStatistic(NamedTuple):
    """D lies in [statistic, statistic + error_bound]; the bound of an exact one is 0."""

    statistic: float
    error_bound: float


class _Grid(NamedTuple):
    """Bands of one width on [low, high], each in three cells: below its pivot, equal, above.

    No step from a value to its cell turns the order of two values around, rounding included.
    """

    low: float
    high: float
    scale: float
    pivots: Values

    @classmethod
    def of(cls, sample: Values) -> _Grid:
        """The grid for values like those of `sample`, pivots at the most frequent of a band."""
        low, middle, high = np.quantile(sample, [_TAIL, 0.5, 1 - _TAIL], method="nearest")
        with np.errstate(over="ignore", divide="ignore"):
            scale = float((_BANDS - 1) / (high - low))
        if not 0 < scale < np.inf:
            # The width of neighbouring numbers, or of the largest there are, is none to divide by.
            return cls(float(low), float(low), 0.0, np.full(_BANDS, middle))
        grid = cls(float(low), float(high), scale, np.zeros(_BANDS))
        values, often = np.unique(sample, return_counts=True)
        values = values[np.argsort(often, kind="stable")]
        bands = grid.bands(values, np.empty(len(values), np.int64), np.empty(len(values)))
        # Of several for one band, the last is kept.
        grid.pivots[bands] = values
        return grid

    def bands(self, part: Values, band: NDArray[np.int64], spare: Values) -> NDArray[np.int64]:
        """The band of each value, written to `band`; all three are of one length."""
        np.clip(part, self.low, self.high, out=spare)
        np.subtract(spare, self.low, out=spare)
        np.multiply(spare, self.scale, out=spare)
        np.copyto(band, spare, casting="unsafe")
        return band

    def cells(self, part: Values, cell: NDArray[np.int64], spare: Values) -> NDArray[np.int64]:
        """The cell of each value, written to `cell`, which may be longer, as may `spare`."""
        cell, spare = cell[: len(part)], spare[: len(part)]
        self.bands(part, cell, spare)
        # No band is out of range; without this mode the result would be copied.
        self.pivots.take(cell, out=spare, mode="clip")
        np.multiply(cell, 3, out=cell)
        np.add(cell, part >= spare, out=cell)
        np.add(cell, part > spare, out=cell)
        return cell


_CELLS = 3 * _BANDS
_OF_ONE_VALUE = np.arange(_CELLS) % 3 == 1


@dataclass(frozen=True)
class _Side:
    """The rows of one sample that lie in certain cells of grids, each within the one before."""

    chunks: Chunks
    within: tuple[tuple[_Grid, NDArray[np.bool_]], ...] = ()
    _cell: NDArray[np.int64] = field(default_factory=lambda: np.empty(_PART_ROWS, np.int64))
    _spare: Values = field(default_factory=lambda: np.empty(_PART_ROWS))

    def parts(self) -> Iterator[Values]:
        """The rows, some at a time. Raises ValueError for one that is not finite."""
        for chunk in self.chunks:
            for start in range(0, len(chunk), _PART_ROWS):
                part = np.asarray(chunk[start : start + _PART_ROWS], dtype=np.float64)
                if not np.isfinite(part).all():
                    raise ValueError("a value is not finite")
                for grid, chosen in self.within:
                    part = part[chosen[grid.cells(part, self._cell, self._spare)]]
                yield part

    def inside(self, grid: _Grid, chosen: NDArray[np.bool_]) -> _Side:
        """The rows in the `chosen` cells of `grid`."""
        return _Side(self.chunks, (*self.within, (grid, chosen)))

    def counts(self, grid: _Grid) -> NDArray[np.int64]:
        """How many rows are in each cell of `grid`."""
        found = np.zeros(_CELLS, dtype=np.int64)
        for part in self.parts():
            found += np.bincount(grid.cells(part, self._cell, self._spare), minlength=_CELLS)
        return found

    def sample(self) -> Values:
        """Some rows of some chunks, to lay a grid by."""
        places = np.linspace(0, len(self.chunks) - 1, _SAMPLE_CHUNKS).round().astype(int)
        chunks = [self.chunks[place] for place in np.unique(places)] if len(self.chunks) else []
        steps = [max(1, len(chunk) * len(chunks) // _SAMPLE_ROWS) for chunk in chunks]
        drawn = [np.asarray(c[::step], np.float64) for c, step in zip(chunks, steps, strict=True)]
        found = np.concatenate([np.empty(0), *drawn])
        return found[np.isfinite(found)]

    def every(self, step: int) -> Values:
        """Each `step`-th of the rows."""
        found, seen = [np.empty(0)], 0
        for part in self.parts():
            found.append(part[-seen % step :: step])
            seen += len(part)
        return np.concatenate(found)


def ks_of(reference: ArrayLike, current: ArrayLike) -> KSStatistic:
    """D of two samples [rows]: exact up to EXACT_ROWS a side, else within TOLERANCE.

    Raises ValueError for an empty sample, and for a value that is not finite.
    """
    then, now = (np.asarray(side, dtype=np.float64) for side in (reference, current))
    if max(len(then), len(now)) <= EXACT_ROWS:
        return exact_ks(then, now)
    return streaming_ks([then], [now])


def exact_ks(reference: Values, current: Values) -> KSStatistic:
    """D of two samples [rows], by sorting them. Raises ValueError as `ks_of`."""
    if not len(reference) or not len(current):
        raise ValueError("a sample is empty")
    if not (np.isfinite(reference).all() and np.isfinite(current).all()):
        raise ValueError("a value is not finite")
    then, now = np.sort(reference), np.sort(current)
    largest = 0.0
    for at in (then, now):
        gaps = then.searchsorted(at, "right") / len(then) - now.searchsorted(at, "right") / len(now)
        largest = max(largest, float(np.abs(gaps).max()))
    return KSStatistic(largest, 0.0)


def streaming_ks(reference: Chunks, current: Chunks, tolerance: float = TOLERANCE) -> KSStatistic:
    """D of two samples in chunks of rows, within `tolerance`, in memory that does not grow.

    Chunks are looked at one at a time, a few to lay the grid by and then all of them, once; again
    only when a cell could hide more than `tolerance`. They must be the same each time. Raises
    ValueError as `ks_of`.
    """
    then, now = _Side(reference), _Side(current)
    sample = np.concatenate([then.sample(), now.sample()])
    if not len(sample):
        raise ValueError("a sample is empty, or no value of it is finite")
    low, high = _between(then, now, _Grid.of(sample), None, 0.0, 0.0, tolerance)
    return KSStatistic(low, high - low)


def _between(
    then: _Side,
    now: _Side,
    grid: _Grid,
    rows: tuple[int, int] | None,
    before: float,
    low: float,
    tolerance: float,
) -> tuple[float, float]:
    """A gap that is attained among the rows of the sides, `low` at least, and what none exceeds.

    rows: of both whole samples, None when these are they. before: the gap left of these rows.
    """
    counts = then.counts(grid), now.counts(grid)
    if rows is None:
        rows = int(counts[0].sum()), int(counts[1].sum())
        if not all(rows):
            raise ValueError("a sample is empty")
    of_then, of_now = rows
    here, there = counts[0] / of_then, counts[1] / of_now
    ends = before + counts[0].cumsum() / of_then - counts[1].cumsum() / of_now
    starts = np.concatenate([[before], ends[:-1]])
    low = max(low, float(np.abs(ends).max()))
    highest = np.maximum(starts + here, there - starts)
    # Where nothing can hide, the edges tell all.
    plain = _OF_ONE_VALUE | (counts[0] == 0) | (counts[1] == 0)
    highest[plain] = np.maximum(np.abs(starts), np.abs(ends))[plain]
    in_cells = counts[0] + counts[1]
    while len(wide := np.flatnonzero(highest > low + tolerance)):
        chosen = np.zeros(_CELLS, dtype=np.bool_)
        if in_cells[wide].sum() <= _SORTED_ROWS:
            chosen[wide] = True
            sides = then.inside(grid, chosen), now.inside(grid, chosen)
            highest[chosen] = found = _sorted(sides, grid, counts, chosen, starts, rows)
        else:
            first, last = _neighbours(wide, int(highest.argmax()), in_cells)
            chosen[first : last + 1] = True
            sides = then.inside(grid, chosen), now.inside(grid, chosen)
            step = max(1, int(in_cells[chosen].sum()) // _SAMPLE_ROWS)
            finer = _Grid.of(np.concatenate([side.every(step) for side in sides]))
            found, highest[chosen] = _between(
                *sides, finer, rows, float(starts[first]), low, tolerance
            )
        low = max(low, found)
    return low, max(low, float(highest.max()))


def _neighbours(wide: NDArray[np.intp], worst: int, rows: NDArray[np.int64]) -> tuple[int, int]:
    """The first and last cell to lay a finer grid on: the worst, and those of `wide` close by.

    A quarter of the cells at most, and never all that have rows: it has to become finer.
    """
    close = wide[np.abs(wide - worst) <= _CELLS // 8]
    first, last = int(close[0]), int(close[-1])
    return (worst, worst) if rows[first : last + 1].sum() == rows.sum() else (first, last)


def _sorted(
    sides: tuple[_Side, _Side],
    grid: _Grid,
    counts: tuple[NDArray[np.int64], NDArray[np.int64]],
    chosen: NDArray[np.bool_],
    starts: Values,
    rows: tuple[int, int],
) -> float:
    """The largest |gap| in the `chosen` cells, exactly."""
    then, now = (np.sort(side.every(1)) for side in sides)
    # How many of the rows taken out lie left of each cell.
    left_then, left_now = (np.where(chosen, c, 0).cumsum() - np.where(chosen, c, 0) for c in counts)
    largest = 0.0
    for at in (then, now):
        cell = grid.cells(at, np.empty(len(at), np.int64), np.empty(len(at)))
        gaps = (
            starts[cell]
            + (then.searchsorted(at, "right") - left_then[cell]) / rows[0]
            - (now.searchsorted(at, "right") - left_now[cell]) / rows[1]
        )
        largest = max(largest, float(np.abs(gaps).max(initial=0.0)))
    return largest
