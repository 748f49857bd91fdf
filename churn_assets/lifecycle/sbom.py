"""What the service installs, with the digests of the lock: its software bill of materials.

`python -m churn_assets.lifecycle.sbom requirements.lock` prints it as a requirements file, which
`make sbom` hands to CycloneDX's own tool.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from churn_assets.errors import UserError
from churn_assets.lifecycle.bento import SERVICE_REQUIREMENTS, pinned_requirements

_PIN = re.compile(r"^([a-z0-9._-]+==[^\s;]+)([^\n]*(?:\n[ \t]+--hash[^\n]*)*)", re.MULTILINE)
_HASH = re.compile(r"--hash=\S+")


def service_pins() -> list[str]:
    """Every package of the service's bento, name==version, in alphabetical order."""
    return sorted([*pinned_requirements(SERVICE_REQUIREMENTS), _bentoml()])


def with_hashes(pins: Sequence[str], lock: str) -> str:
    """The requirements `pins` with the hashes that the lock file of text `lock` has of them.

    Raises UserError for a pin that is not in it: what is installed is not what was locked.
    """
    locked = {pin: _HASH.findall(rest) for pin, rest in _PIN.findall(lock)}
    lines = []
    for pin in pins:
        if not locked.get(pin):
            raise UserError(f"requirements.lock has no {pin}, which is installed; run `make env`")
        lines.append(" \\\n    ".join([pin, *locked[pin]]) + "\n")
    return "".join(lines)


def _bentoml() -> str:
    return f"bentoml=={metadata.version('bentoml')}"


if __name__ == "__main__":
    try:
        sys.stdout.write(with_hashes(service_pins(), Path(sys.argv[1]).read_text("utf-8")))
    except UserError as error:
        sys.exit(f"error: {error}")
