"""A software bill of materials in CycloneDX's format, written by hand: a list of packages.

`python -m churn_assets.contract.bill NAME` prints that of the environment it runs in. The image of
a bento is built with it: which packages pip installs depends on the Python of the base image.
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import distributions
from urllib.parse import quote

SPECIFICATION = "1.6"


def bill_of(name: str, pins: Iterable[str]) -> str:
    """The CycloneDX document of the application `name` that installs `pins`, name==version each.

    The same for the same packages: neither a time nor a serial number is in it.
    """
    document = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPECIFICATION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "version": 1,
        "metadata": {"component": {"type": "application", "bom-ref": name, "name": name}},
        "components": [_component(*pin.split("==")) for pin in sorted(set(pins))],
    }
    return json.dumps(document, indent=1) + "\n"


def installed_pins() -> list[str]:
    """Every package in the environment of this Python, its name as package indexes write it."""
    folders = list({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    found = [(one.metadata["Name"], one.version) for one in distributions(path=folders)]
    return sorted(f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}" for name, version in found)


def _component(name: str, version: str) -> dict[str, str]:
    purl = f"pkg:pypi/{quote(name, safe='')}@{quote(version, safe='')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


if __name__ == "__main__":
    sys.stdout.write(bill_of(sys.argv[1], installed_pins()))
