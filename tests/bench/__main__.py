"""`python -m tests.bench [NAME]`: measure, and write `$CHURN_HOME/bench/<name>.json`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.bench import drift, engines, features, model, online, serving, validation
from tests.bench.measuring import Figures, store

BENCHES = {
    "features": features.run,
    "online": online.run,
    "engines": engines.run,
    "validation": validation.run,
    "model": model.run,
    "serving": serving.run,
    "drift": drift.run,
}


def main(names: list[str]) -> int:
    """Run the benches `names`, or all."""
    unknown = sorted(set(names) - set(BENCHES))
    if unknown:
        print(f"there is no bench {unknown[0]}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    folder = Path(os.environ.get("CHURN_HOME", "var")).resolve() / "bench"
    for name in names or BENCHES:
        lines = BENCHES[name](folder / "data")
        path = store(folder, name, lines)
        print(_table(lines), f"\n{path}", flush=True)
    return 0


def _table(lines: list[Figures]) -> str:
    head = ("case", "metric", "ours", "peer", "theirs", "ratio")
    cells = [head, *(tuple(_shown(line.get(name)) for name in head) for line in lines)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _shown(value: object) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
