"""What the tests of deploy/compose share."""

from __future__ import annotations

import importlib.util
import os

import pytest

from churn_assets.home import PROJECT_ROOT

COMPOSE = PROJECT_ROOT / "deploy" / "compose"

_spec = importlib.util.spec_from_file_location("make_secrets", COMPOSE / "make_secrets.py")
assert _spec is not None
assert _spec.loader is not None
make_secrets = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_secrets)


def postgres_url() -> str:
    """The server the tests may make databases on, or a skip."""
    url = os.environ.get("CHURN_TEST_POSTGRES")
    if not url:
        pytest.skip("set CHURN_TEST_POSTGRES to the URL of a database to run this")
    return url
