from __future__ import annotations

from pathlib import Path

import pytest

from churn_assets.errors import UserError
from churn_assets.settings import Settings, load_settings

SHOP = "source: {kind: shop}\ncalendar: {start: 2024-01-01}\n"
DATABASE = """
calendar: {start: 2024-01-01}
source:
  kind: tables
  tables:
    orders:
      from: postgresql://reader:open+sesame@db/shop
      table: orders
      columns: {order_id: id, customer_id: customer, occurred_at: at, amount: value}
    customers: {derive_from: orders}
"""


def settings(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "churn.yaml"
    path.write_text(text)
    return load_settings(path)


def test_a_lake_is_where_the_settings_say(tmp_path: Path, monkeypatch) -> None:
    assert settings(tmp_path, SHOP).lake is None
    assert settings(tmp_path, SHOP + "lake: ours").lake == str(tmp_path / "ours")
    assert settings(tmp_path, SHOP + "lake: s3://bucket/prefix").lake == "s3://bucket/prefix"
    monkeypatch.setenv("CHURN_TEST_BUCKET", "named")
    mine = settings(tmp_path, SHOP + "lake: s3://${CHURN_TEST_BUCKET}/x")
    assert mine.lake == "s3://named/x"


def test_a_variable_that_is_not_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lake_endpoint_url needs .\{CHURN_NOT_SET\}"):
        settings(tmp_path, SHOP + "lake: s3://b\nlake_endpoint_url: ${CHURN_NOT_SET}")


def test_what_is_written_down_of_a_home_holds_no_password(tmp_path: Path) -> None:
    mine = settings(tmp_path, DATABASE)
    assert "open+sesame" not in mine.identity()
    assert "postgresql://reader:***@db/shop" in mine.identity()
    rotated = settings(tmp_path, DATABASE.replace("sesame", "barley"))
    assert rotated.identity() == mine.identity()
    other = settings(tmp_path, DATABASE.replace("@db/", "@other/"))
    assert other.identity() != mine.identity()
