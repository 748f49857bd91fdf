"""`churn offers FILE`: the file's offers in the lake, all or none, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from command import Done, churn, write_config

from churn_assets.contract.holdout import Holdout
from churn_assets.data.lake import Lake
from churn_assets.data.offers import OFFERS, offers_of
from churn_assets.simulator import Shop, ShopParams

START = date(2024, 1, 1)
SHOP: dict[str, Any] = {
    "source": {"kind": "shop", "shop": {"customers": 300}},
    "calendar": {"start": str(START), "days": 220},
    "holdout": {"share": 0.2},
}


@dataclass(frozen=True)
class Place:
    """A home whose lake has a day of the shop's customers."""

    home: Path
    config: Path
    lake: Lake
    held_out: list[str]
    others: list[str]

    def record(self, *rows: str) -> Done:
        path = self.home.parent / "offers.csv"
        path.write_text("\n".join(["customer_id,served_at", *rows, ""]), encoding="utf-8")
        return churn(self.home, self.config, "offers", str(path))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    home = tmp_path / "home"
    lake = Lake(str(home / "lake"))
    customers = Shop(ShopParams(customers=300), START).events("customers", START, START)
    lake.write("customers", START, START, customers, day_of="occurred_at")
    held, ids = Holdout(0.2).membership(), customers["customer_id"].to_pylist()
    return Place(
        home,
        write_config(tmp_path / "shop.yaml", SHOP),
        lake,
        [customer for customer in ids if held(customer)],
        [customer for customer in ids if not held(customer)],
    )


def test_offers_are_recorded_once(place: Place) -> None:
    first, second, *_ = place.others
    rows = [f"{first},2024-03-01T10:00:00Z", f"{second},2024-03-02T10:00:00+02:00"]
    done = place.record(*rows)
    assert (done.code, done.out, done.err) == (0, "offers: 2 new, 0 known\n", "")
    done = place.record(*rows, f"{first},2024-03-09T10:00:00Z", rows[0])
    assert (done.code, done.out, done.err) == (0, "offers: 1 new, 3 known\n", "")
    assert [(one.customer_id, f"{one.served_at:%m-%d %H}") for one in offers_of(place.lake)] == [
        (first, "03-01 10"),
        (second, "03-02 08"),
        (first, "03-09 10"),
    ]


def test_offers_to_the_hold_out_are_recorded_and_told(place: Place) -> None:
    treated = [*place.held_out[:2], place.others[0], place.held_out[0]]
    done = place.record(*(f"{who},2024-03-0{n}T10:00:00Z" for n, who in enumerate(treated, 1)))
    assert (done.code, done.out) == (0, "offers: 4 new, 0 known\n")
    assert done.err == (
        "warning: 2 of the customers are in the hold-out, which nobody may treat "
        "(docs/holdout.md)\n"
    )
    assert len(offers_of(place.lake)) == 4


def test_an_offer_that_cannot_be_is_refused_with_all_others(place: Place) -> None:
    good = f"{place.others[0]},2024-03-01T10:00:00Z"
    said = place.record(good, "c-9999999,2024-03-01T10:00:00Z").refusal()
    assert "offers.csv: the shop has no customer 'c-9999999'" in said
    said = place.record(good, f"{place.others[0]},2023-12-31T10:00:00Z").refusal()
    assert f"{place.others[0]} was not a customer yet on 2023-12-31" in said
    assert place.lake.days(OFFERS) == []


def test_a_home_of_another_shop_or_without_data_is_left_alone(place: Place) -> None:
    row = f"{place.others[0]},2024-03-01T10:00:00Z"
    place.record(row)
    write_config(place.config, SHOP | {"source": {"kind": "shop", "shop": {"customers": 400}}})
    assert "holds the data of another source" in place.record(row).refusal()
    empty = Place(place.home.parent / "empty" / "home", place.config, place.lake, [], [])
    empty.home.mkdir(parents=True)
    assert "there is no data in" in empty.record(row).refusal()
    assert not (empty.home / "lake").exists()
