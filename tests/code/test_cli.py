from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from churn_assets import cli
from churn_assets.contract.features import FEATURES
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.settings import load_settings


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path) -> Generator[None]:
    """A home of its own, and signal handlers and environment as they were."""
    handler = signal.getsignal(signal.SIGTERM)
    with mock.patch.dict(os.environ, {"CHURN_HOME": str(tmp_path / "home")}):
        os.environ.pop("CHURN_CONFIG", None)
        yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def churn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The entry point: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["churn", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


def orders(rows: int, nulls: int = 0) -> pa.Table:
    return pa.table(
        {
            "order_id": [f"o{n}" for n in range(rows)],
            "amount": pa.array([None] * nulls + [1.5] * (rows - nulls), pa.float64()),
        }
    )


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_the_data_gate_by_itself(churn, tmp_path, suffix):
    path = tmp_path / f"orders.{suffix}"
    write = pq.write_table if suffix == "parquet" else pyarrow.csv.write_csv
    write(orders(100, nulls=5), path)
    code, out, err = churn("validate-data", path, "--min-rows", 100, "--max-null-ratio", 0.05)
    assert (code, err) == (0, "")
    assert "100 rows, at least 100 asked for" in out
    assert "null_ratio amount: 0.05" in out
    code, out, _ = churn("validate-data", path, "--min-rows", 101)
    assert code == 1
    assert out.startswith("100 rows are fewer than the 101 asked for")
    code, out, _ = churn("validate-data", path, "--min-rows", 1, "--max-null-ratio", 0.04)
    assert code == 1
    assert "nulls above 4.0%: amount 5.0%" in out


def test_the_data_gate_holds_a_file_to_an_exported_schema(churn, tmp_path):
    code, out, err = churn("schema", "customer_features")
    assert (code, err) == (0, "")
    exported = json.loads(out)
    assert {f["name"] for f in exported["fields"]} >= {f.name for f in FEATURES}
    (tmp_path / "schema.json").write_text(out)
    pq.write_table(orders(10), tmp_path / "orders.parquet")
    arguments = ("--min-rows", 1, "--schema", tmp_path / "schema.json")
    code, out, _ = churn("validate-data", tmp_path / "orders.parquet", *arguments)
    assert code == 1
    assert "customer_id is missing" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("validate-data", "gone.parquet"), "there is no file gone.parquet; check the path"),
        (("validate-data", "--min-rows", 5), "are for a FILE; without one, data_gate in the sett"),
        (("validate-data",), "there is no data in"),
        (("validate-data", "a.parquet", "--min-rows", 0), "min_rows is 0; set at least 1"),
        (("validate-data", "a.parquet", "--max-null-ratio", "nan"), "max_null_ratio is nan; set"),
        (("validate-data", "a.parquet", "--schema", "gone.json"), "gone.json"),
        (("schema", "order"), "there is no table order; choose one of customers, orders"),
        (("training-set",), "by --model-version or by --hash, one of them"),
        (("training-set", "--hash", "a", "--model-version", "1"), "one of them"),
        (("training-set", "--hash", "abc"), "'abc' is not a data hash; give the 64"),
        (("training-set", "--hash", "0" * 64), "there is no training set 0000"),
        (("training-set", "--model-version", "1"), "`make run`"),
        (("versions",), "`make run`"),
        (("history",), "`make run`"),
        (("history", "--on", "3 March"), "'3 March' is no day; give one such as 2026-03-03"),
    ],
)
def test_what_a_person_can_mend_is_one_line(churn, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    pq.write_table(orders(10), "a.parquet")
    code, out, err = churn(*arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "home").exists()


def test_an_error_of_several_lines_is_told_in_one(churn, monkeypatch):
    def broken(_table: str) -> str:
        raise UserError("first\n  second")

    monkeypatch.setattr("churn_assets.data.gate.schema_json", broken)
    assert churn("schema", "orders") == (2, "", "error: first second\n")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def broken(_table: str) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("churn_assets.data.gate.schema_json", broken)
    monkeypatch.setattr("sys.argv", ["churn", "schema", "orders"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_the_workers_of_the_service_are_a_setting_and_an_option(churn, monkeypatch, tmp_path):
    started: list[tuple[int, str]] = []
    monkeypatch.setattr(
        "churn_assets.lifecycle.serving.serve_current",
        lambda *_, workers, listen: started.append((workers, listen)),
    )
    config = tmp_path / "churn.yaml"
    config.write_text("source: {kind: shop}\ncalendar: {start: 2024-01-01}\n")
    monkeypatch.setenv("CHURN_CONFIG", str(config))
    assert churn("serve", "--port", 1)[0] == 0
    config.write_text(config.read_text() + "serving: {workers: 2}\n")
    assert churn("serve", "--port", 1)[0] == 0
    assert churn("serve", "--port", 1, "--workers", 3)[0] == 0
    assert churn("serve", "--port", 1, "--host", "0.0.0.0")[0] == 0
    here = "127.0.0.1"
    assert started == [(1, here), (2, here), (3, here), (2, "0.0.0.0")]
    assert churn("serve", "--port", 1, "--workers", 0)[0] == 2
    config.write_text(config.read_text().replace("2}", "0}"))
    code, _, err = churn("serve", "--port", 1)
    assert code
    assert "serving.workers is 0; give 1 to 256 processes" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_exit_code_130(churn, monkeypatch, number):
    monkeypatch.setattr("churn_assets.data.gate.schema_json", lambda _: signal.raise_signal(number))
    code, out, err = churn("schema", "orders")
    assert (code, out, err.strip()) == (130, "", "stopped")


def test_usage_is_told_on_request_and_on_a_mistake(churn):
    code, out, _ = churn("--help")
    assert code == 0
    for name in ("run", "up", "serve", "validate-data", "schema", "training-set", "versions"):
        assert f"  {name} " in out
    code, _, err = churn("ru")
    assert code == 2
    assert "No such command 'ru'" in err


def test_a_home_is_claimed_for_one_source_once_it_has_data(tmp_path):
    home = Home(tmp_path / "home")
    with mock.patch.dict(os.environ):
        home.prepare()
    home.claim("one")
    home.claim("two")
    (home.lake / "orders" / "day=2024-01-01").mkdir(parents=True)
    home.claim("two")
    with pytest.raises(UserError, match=r"another source.*set CHURN_HOME"):
        home.claim("one")
    assert (home.root / "source.json").read_text() == "two"


def test_only_one_holds_a_home(tmp_path):
    home = Home(tmp_path)
    with home.exclusive(), pytest.raises(UserError, match="another `make run`"), home.exclusive():
        pass
    with home.exclusive():
        pass


def identity(tmp_path: Path, text: str) -> str:
    (tmp_path / "c.yaml").write_text(text)
    return load_settings(tmp_path / "c.yaml").identity()


def test_the_identity_of_a_source_is_what_its_data_depend_on(tmp_path):
    shop = "calendar: {start: 2024-01-01}\nsource: {kind: shop}\n"
    same = identity(tmp_path, shop)
    assert same == identity(tmp_path, shop + "windows: {horizon_days: 30}\nseed: 7\n")
    assert same == identity(tmp_path, shop.replace("shop}", "shop, shop: {seed: 42}}"))
    assert same != identity(tmp_path, shop.replace("shop}", "shop, shop: {seed: 43}}"))
    assert same != identity(tmp_path, shop + "windows: {horizon_days: 31}\n")
    assert same != identity(tmp_path, shop.replace("-01}", "-02}"))


def test_the_identity_holds_no_password(tmp_path):
    columns = "{order_id: o, customer_id: c, occurred_at: t, amount: a}"
    orders = f"{{from: 'postgresql://me:secret@host/db', table: orders, columns: {columns}}}"
    tables = f"{{orders: {orders}, customers: {{derive_from: orders}}}}"
    source = f"{{kind: tables, tables: {tables}}}"
    told = identity(tmp_path, f"calendar: {{start: 2024-01-01}}\nsource: {source}")
    assert "secret" not in told
    assert "me:***@host/db" in told


@pytest.mark.parametrize(
    ("arguments", "job", "given"),
    [
        (
            ("start", "4", "--share", "0.25", "--no-shadow", "--who", "ada", "--why", "faster"),
            "start_trial",
            {"version": "4", "share": 0.25, "shadow": False, "who": "ada", "why": "faster"},
        ),
        # What is not said is the settings' to say.
        (
            ("start", "4", "--who", "ada"),
            "start_trial",
            {"version": "4", "who": "ada", "why": "a trial"},
        ),
        (("stop", "--who", "ada"), "stop_trial", {"who": "ada", "why": "enough was seen"}),
    ],
)
def test_a_trial_is_begun_and_ended_by_a_run(
    churn, monkeypatch: pytest.MonkeyPatch, arguments: tuple, job: str, given: dict
) -> None:
    asked: list[tuple] = []
    launch = SimpleNamespace(act=lambda _, *rest: asked.append(rest))
    monkeypatch.setitem(sys.modules, "churn_assets.defs.launch", launch)
    monkeypatch.setattr(cli, "_registry", lambda _: None)
    code, _, err = churn("trial", *arguments)
    assert (code, err) == (0, "")
    assert asked == [(job, "production_release", {"what": job} | given)]


def test_a_trial_needs_a_person(churn) -> None:
    code, _, err = churn("trial", "start", "4", "--who", "automatic policy")
    assert code == 2
    assert "is not a person" in err


def test_a_shared_home_is_prepared_once_and_for_one_source(churn, tmp_path: Path) -> None:
    home = Home.from_environment()
    for _ in range(2):
        assert churn("prepare") == (0, "", "")
    assert (home.reports.is_dir(), home.releases.is_dir()) == (True, True)
    assert json.loads((home.root / "source.json").read_text())["start"] == "2024-01-01"
    (home.lake / "orders" / "day=2024-01-01").mkdir(parents=True)
    other = tmp_path / "other.yaml"
    other.write_text("source: {kind: shop}\ncalendar: {start: 2023-01-01}\n")
    os.environ["CHURN_CONFIG"] = str(other)
    code, _, err = churn("prepare")
    assert (code, "holds the data of another source" in err) == (2, True)
