"""The KS statistic of ten million rows a side: ours, and scipy's, which is exact."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from churn_assets.monitoring.ks import streaming_ks
from tests.bench.measuring import Figures, measure, row

_SHAPES = ("amounts", "whole")


def run(data: Path, rows: int = 10_000_000) -> list[Figures]:
    """The lines of drift.json. `data` keeps the generated rows from one run to the next."""
    lines: list[Figures] = []
    size = f"{rows // 1_000_000}M" if rows >= 1_000_000 else str(rows)
    for shape in _SHAPES:
        case = f"drift/ks-{size}" if shape == "amounts" else f"drift/ks-{size}-{shape}"
        print(case, flush=True)
        folder = generate(data / f"ks-{shape}-{rows}", shape, rows)
        ours = measure("drift:ours", str(folder), runs=5)
        theirs = measure("drift:scipy", str(folder))
        error = abs(ours["statistic"] - theirs["statistic"])
        if error > ours["error_bound"] + 1e-9:
            raise RuntimeError(f"{case}: {ours} is not within its bound of {theirs}")
        lines += [
            row(case, "seconds", ours, "scipy", theirs),
            row(case, "peak_mb", ours, "scipy", theirs),
            row(case, "max_abs_error", ours | {"max_abs_error": error}),
            row(case, "error_bound", ours),
        ]
    return lines


def generate(folder: Path, shape: str, rows: int) -> Path:
    """Two samples that differ a little, as files of numbers, where they are not there already."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, side in enumerate(("reference", "current")):
        path = folder / f"{side}.npy"
        if not path.exists():
            draw = np.random.default_rng([11, number])
            values = (
                draw.lognormal(4 + 0.02 * number, 0.8, rows)
                if shape == "amounts"
                else draw.poisson(2 + 0.05 * number, rows).astype(np.float64)
            )
            np.save(path, values)
    return folder


def ours(folder: str) -> Figures:
    """Within 5e-4, by counting."""
    then, now = _samples(folder)
    start = time.perf_counter()
    found = streaming_ks([then], [now])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, **found._asdict()}


def scipy(folder: str) -> Figures:
    """Exactly, by sorting."""
    from scipy.stats import ks_2samp

    then, now = _samples(folder)
    start = time.perf_counter()
    found = ks_2samp(then, now, method="asymp")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "statistic": float(found.statistic)}


def _samples(folder: str) -> list[NDArray[np.float64]]:
    return [np.load(Path(folder) / f"{side}.npy") for side in ("reference", "current")]
