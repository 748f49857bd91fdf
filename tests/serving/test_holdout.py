"""The hold-out: who is in it, and that every answer and the log say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving_cases import NOON, VALID, Model, release_of, trial_of

from churn_assets.contract.holdout import Holdout
from churn_assets.contract.lookup import Found
from churn_assets.contract.release import Release, ReleaseError
from churn_assets.contract.trial import assignment
from churn_assets.errors import UserError
from churn_assets.settings import load_settings
from churn_service.served import Served

IDS = [f"c-{number:06}" for number in range(20_000)]
HALF = Holdout(0.5)


def members(holdout: Holdout) -> set[str]:
    return set(filter(holdout.membership(), IDS))


def test_it_is_the_same_for_ever() -> None:
    """By these customers: whoever changes the function lets customers of hold-outs go."""
    assert sorted(members(Holdout(0.0003))) == FOREVER


FOREVER = ["c-003568", "c-005498", "c-012432", "c-013760", "c-015824", "c-019935"]


def test_a_larger_share_adds_customers_and_lets_none_go() -> None:
    shares = (0.0, 0.01, 0.05, 0.1, 0.5)
    held = [members(Holdout(share)) for share in shares]
    assert not held[0]
    for smaller, larger, share in zip(held, held[1:], shares[1:], strict=False):
        assert smaller < larger
        assert abs(len(larger) / len(IDS) - share) < 4 * np.sqrt(share * (1 - share) / len(IDS))


@pytest.mark.parametrize("trial", ["retention", "trial-8-beside-7"])
def test_it_has_nothing_to_do_with_a_trial_or_another_salt(trial: str) -> None:
    held, arm_of = members(HALF), assignment(trial, 0.5)
    challenged = {customer for customer in IDS if arm_of(customer) == "challenger"}
    for other in (challenged, members(Holdout(0.5, f"{trial}-2"))):
        assert abs(len(held & other) / len(IDS) - 0.25) < 4 * np.sqrt(0.1875 / len(IDS))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"CHURN_HOLDOUT_SHARE": "5%"}, "holdout.share is nan"),
        ({"CHURN_HOLDOUT_SHARE": "nan"}, "holdout.share is nan"),
        ({"CHURN_HOLDOUT_SHARE": "-0.01"}, "holdout.share is -0.01; give a share from 0 to 0.5"),
        ({"CHURN_HOLDOUT_SHARE": "0.51"}, "holdout.share is 0.51"),
        ({"CHURN_HOLDOUT_SALT": "a\nb"}, "holdout.salt is"),
        ({"CHURN_HOLDOUT_SALT": "x" * 101}, "holdout.salt is"),
    ],
)
def test_a_setting_that_is_none_is_refused(
    given: dict[str, str],
    message: str,
    release: Release,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ReleaseError, match=f"CHURN_HOLDOUT_SHARE or CHURN_HOLDOUT_SALT: {message}"):
        Served(release)


def test_settings_and_environment_are_two_ways_to_say_it(tmp_path: Path) -> None:
    config = (
        "source: {kind: shop}\ncalendar: {start: 2024-01-01}\nholdout: {share: %s, salt: s 1}\n"
    )
    (tmp_path / "shop.yaml").write_text(config % 0.123456789)
    settings = load_settings(tmp_path / "shop.yaml").holdout
    assert Holdout.from_environment(settings.environment()) == settings
    assert Holdout.from_environment({}) == load_settings().holdout == Holdout()
    assert Holdout.from_environment({"CHURN_HOLDOUT_SHARE": ""}) == Holdout()
    (tmp_path / "shop.yaml").write_text(config % 2)
    with pytest.raises(UserError, match=r"holdout\.share is 2"):
        load_settings(tmp_path / "shop.yaml")


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in HALF.environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("half")
def test_every_way_to_ask_gets_the_same_mark(release: Release, model: Model) -> None:
    served, of = Served(release), HALF.membership()
    values = model.x[0].tolist()
    found = Found(values, NOON, stale=False)
    rows = served.predict_rows(
        [(i, values, found if n % 2 else None) for n, i in enumerate(IDS[:40])]
    )
    assert {row.answer.holdout for row in rows} == {True, False}
    for customer, row in zip(IDS[:40], rows, strict=True):
        body = json.dumps(VALID | {"customer_id": customer}).encode()
        request: Any = served.decoder.decode(body)
        alone: Any = served.predict(request).answer
        by_id: Any = served.predict_stored(customer, found).answer
        marks = (row.answer.holdout, alone.holdout, by_id.holdout)
        assert marks == (of(customer),) * 3


@pytest.mark.usefixtures("half")
def test_who_is_held_out_is_still_answered_by_their_arm(
    release: Release, model: Model, tmp_path: Path
) -> None:
    challenger = release_of(model, tmp_path / "challenger", version="8")
    both = Served(trial_of(release, challenger, tmp_path / "both"))
    before, values = Served(release), model.x[0].tolist()
    rows = both.predict_rows([(customer, values, None) for customer in IDS[:200]])
    found = {(row.arm, row.answer.holdout) for row in rows}
    assert len(found) == 4
    for customer, row in zip(IDS[:200], rows, strict=True):
        assert (
            row.answer.holdout is before.predict_rows([(customer, values, None)])[0].answer.holdout
        )
