"""A software bill of materials in CycloneDX's format, written by hand: a list of packages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import quote

SPECIFICATION = "1.6"


def bill_of(name: str, pins: Sequence[str]) -> bytes:
    """The CycloneDX document of the application `name` that installs `pins`, name==version each.

    The same for the same packages: neither a time nor a serial number is in it.
    """
    document = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPECIFICATION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "version": 1,
        "metadata": {"component": {"type": "application", "bom-ref": name, "name": name}},
        "components": [_component(*pin.split("==")) for pin in sorted(pins)],
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def _component(name: str, version: str) -> dict[str, str]:
    purl = f"pkg:pypi/{quote(name, safe='')}@{quote(version, safe='')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
