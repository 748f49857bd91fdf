"""What JSON Schema cannot say about a body, put right before Schemathesis sends it."""

from __future__ import annotations

import schemathesis

from churn_assets.contract.features import FEATURES

INTEGERS = {feature.name for feature in FEATURES if feature.dtype == "int"}


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: object) -> object:
    """An integer the way the contract wants it written: to a schema 3.0 is the integer 3."""
    if not isinstance(body, dict):
        return body
    return {
        name: int(value)
        if name in INTEGERS and isinstance(value, float) and value.is_integer()
        else value
        for name, value in body.items()
    }
