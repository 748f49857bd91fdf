"""A healthcheck: `answers.py URL [--once FILE]` exits with 0 when URL answers with 200.

With --once it only has to once FILE is there.
"""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 when it answers, 1 when it does not."""
    url, *rest = arguments
    if rest and not Path(rest[1]).exists():
        return 0
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return 0 if response.status == 200 else 1
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
