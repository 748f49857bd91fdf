"""From a bad model in Production back to the one before it, by one action, as a person does it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from command import ROOT, environment, write_config
from conftest import SHOP
from mlflow import MlflowClient
from registered import CUSTOMER, TEST_DAY, Shop, done_by

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.holdout import Holdout
from churn_assets.contract.release import MODEL
from churn_assets.data.lake import DAY, Lake
from churn_assets.data.offers import offers_table, record_offers
from churn_assets.data.windows import cutoff_of, label_partition
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.home_format import MARKER
from churn_assets.lifecycle.bento import bento_of_tag
from churn_assets.lifecycle.comparison import Comparison
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.pointer import read_current
from churn_assets.lifecycle.promotion import PromotionPolicy, population_of
from churn_assets.lifecycle.registry import read_registry
from churn_assets.lifecycle.release import fetch_release
from churn_assets.lifecycle.relocation import relocate
from churn_assets.lifecycle.serving import ask_bento, free_port
from churn_assets.simulator.params import Offer

pytestmark = pytest.mark.filterwarnings(
    # MLflow's way of asking its own database.
    "ignore:The ``noload`` loader strategy",
)


FEW_HELD_OUT = Holdout(0.05)


def figure(evidence: Evidence, name: str) -> float:
    value = evidence.figures[name]
    assert isinstance(value, float | int), value
    return value


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
    folder = tmp_path_factory.mktemp("rollback")
    made = Shop(Home(folder / "home"), write_config(folder / "shop.yaml", SHOP), free_port())
    with mock.patch.dict(os.environ):
        made.home.prepare()
        log = folder / "service.log"
        with log.open("wb") as sink:
            service = subprocess.Popen(
                [sys.executable, "-m", "churn_assets", "serve", "--port", str(made.port)],
                cwd=ROOT,
                env=environment(made.home.root, made.config),
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        try:
            yield made
            assert service.poll() is None, log.read_text()
        finally:
            service.terminate()
            service.wait(60)


@dataclass(frozen=True)
class Back:
    """From version 2, which has it backwards, to version 1, in a shop both were approved in.

    good, bad, again: what the service answered with each in Production. evidence: of the approval
    of version 2. told, seconds: of the rollback, until it was served.
    """

    shop: Shop
    good: dict
    bad: dict
    again: dict
    evidence: Evidence
    told: str
    seconds: float


@pytest.fixture(scope="module")
def back(begun: Shop) -> Back:
    shop = begun
    assert shop.register(good=True) == "1"
    done_by(shop, "approve", "--who", "ada", "--why", "the first one")
    good = shop.until_served("1")
    # A person may approve what the comparison speaks against; it is on record that it did.
    assert shop.register(good=False) == "2"
    done_by(shop, "approve", "--who", "eve", "--why", "a hunch")
    bad = shop.until_served("2")
    evidence = shop.read().history[-1].evidence
    began = time.monotonic()
    told = done_by(shop, "rollback", "--who", "ada", "--why", "everyone is at risk")
    again = shop.until_served("1")
    return Back(shop, good, bad, again, evidence, told, time.monotonic() - began)


@pytest.fixture
def shop(back: Back) -> Shop:
    """The shop with version 1 in Production again."""
    return back.shop


def test_from_a_bad_model_to_the_one_before_it_by_one_action(
    back: Back, record_property: Callable[[str, object], None]
) -> None:
    shop, evidence = back.shop, back.evidence
    assert back.good["risk_level"] == "low"
    assert back.bad["risk_level"] == "high"
    assert (evidence.kind, evidence.passed, evidence.incumbent) == ("paired_replay", False, "1")
    assert figure(evidence, "candidate_auc") < 0.1 < 0.9 < figure(evidence, "incumbent_auc")

    assert back.again == back.good
    print(f"rolled back and served again after {back.seconds:.1f} s")
    record_property("rollback_seconds", round(back.seconds, 1))

    assert "version 1 is in Production (Dagster run " in back.told
    assert shop.get("/health")["release_id"] == shop.releases["1"].manifest.release_id
    registry = shop.read()
    assert {v.version: v.stage for v in registry.versions.values()} == {
        "1": "Production",
        "2": "Archived",
    }
    last = registry.history[-1]
    assert (last.who, last.why, last.evidence.kind) == ("ada", "everyone is at risk", "rollback")
    assert last.source == "Archived"
    pointer = read_current(shop.home.current)
    assert pointer
    assert (pointer.model_version, pointer.step) == ("1", last.number)


def test_two_versions_on_the_labelled_customers_of_a_day(shop: Shop, tmp_path: Path) -> None:
    day, horizon = date(2024, 6, 3), 30
    rng = np.random.default_rng(7)
    x = rng.integers(0, 30, (600, len(FEATURE_NAMES)))
    ids = [f"c-{number}" for number in range(len(x))]
    features = pa.table({"customer_id": ids, **dict(zip(FEATURE_NAMES, x.T, strict=True))})
    leaving = x[:, 2] > x[:, 0]
    lake = Lake(str(tmp_path))

    def compared(
        version: str, former: str, on: date = day, holdout: Holdout = FEW_HELD_OUT
    ) -> Evidence | str:
        policy, releases = PromotionPolicy(), shop.home.releases
        comparison = Comparison(
            shop.client(), shop.read(), lake, releases, policy, holdout, horizon
        )
        return comparison.on_day(version, former, on, min_rows=100)

    def write_labels(churned: np.ndarray) -> None:
        labels = pa.table({"customer_id": ids, "churned": churned})
        dated = labels.append_column(DAY, pa.array([matured] * len(ids), pa.date32()))
        lake.write("churn_labels", matured, matured, dated, day_of=DAY)

    matured = label_partition(day, horizon)
    dated = features.append_column(DAY, pa.array([day] * len(ids), pa.date32()))
    lake.write("customer_features", day, day, dated, day_of=DAY)
    write_labels(leaving)
    worse = compared("2", "1")
    assert isinstance(worse, Evidence)
    assert (worse.passed, worse.incumbent, worse.rows) == (False, "1", 600)
    better = compared("1", "2")
    assert isinstance(better, Evidence)
    assert better.passed
    gap = figure(worse, "log_loss_difference")
    assert better.figures["log_loss_difference"] == -gap < -1
    assert "population" not in worse.figures

    # Whoever was about to leave got an offer and stayed, but for the hold-out.
    holdout = Holdout(0.5)
    held_out = np.array([*map(holdout.membership(), ids)])
    treated = leaving & ~held_out
    served = [Offer(ids[n], cutoff_of(day) + timedelta(days=1)) for n in np.flatnonzero(treated)]
    write_labels(leaving & held_out)
    record_offers(lake, offers_table([Offer(ids[0], cutoff_of(day) - timedelta(days=2))]))
    before = compared("2", "1", holdout=holdout)
    assert isinstance(before, Evidence)
    assert "population" not in before.figures
    record_offers(lake, offers_table(served))
    judged = compared("2", "1", holdout=holdout)
    assert isinstance(judged, Evidence)
    told = {name: judged.figures[name] for name in ("population", "offered", "held_out")}
    assert told == {"population": "held out", "offered": treated.sum(), "held_out": held_out.sum()}
    assert judged.rows == held_out.sum()
    assert figure(judged, "log_loss_difference") > 1
    # Too few: the good version looks hardly better than the other one, and it is said of whom.
    of_all = compared("2", "1")
    assert isinstance(of_all, Evidence)
    assert (of_all.rows, of_all.figures["population"]) == (600, "everyone")
    assert figure(of_all, "log_loss_difference") < 0.6 * gap
    assert "of whom" in population_of(of_all)

    without = features.drop_columns(["login_frequency_7d"])
    dated = without.append_column(DAY, pa.array([day] * len(ids), pa.date32()))
    lake.write("customer_features", day, day, dated, day_of=DAY)
    assert "version 2 needs login_frequency_7d" in str(compared("2", "1"))
    assert "2024-06-04" in str(compared("2", "1", date(2024, 6, 4)))


def test_a_candidate_is_compared_on_the_hold_out_where_offers_were_served(
    shop: Shop, tmp_path: Path
) -> None:
    """On the test cutoff of its own training set."""
    lake = Lake(str(tmp_path / "lake"))
    shutil.copytree(shop.home.lake, lake.root)

    def compared() -> Evidence:
        policy = PromotionPolicy(min_rows=100)
        evidence = Comparison(
            shop.client(), shop.read(), lake, shop.home.releases, policy, Holdout(0.5), 30
        ).with_incumbent("2")
        assert isinstance(evidence, Evidence)
        return evidence

    assert "population" not in (before := compared()).figures
    record_offers(lake, offers_table([Offer("c-3", cutoff_of(TEST_DAY) + timedelta(days=29))]))
    after = compared()
    assert (after.figures["population"], after.figures["offered"]) == ("held out", 1)
    assert after.rows == figure(after, "held_out") < (before.rows or 0)
    record_offers(lake, offers_table([Offer("c-4", cutoff_of(TEST_DAY) + timedelta(days=30))]))
    assert compared() == after


def test_a_copied_home_refers_to_itself(shop: Shop, tmp_path: Path, monkeypatch) -> None:
    copy = Home(tmp_path / "elsewhere")
    shutil.copytree(shop.home.root, copy.root)
    beside = f"{shop.home.root}-2/page.html"
    (copy.records / "note.json").write_text(f'["{beside}", "{shop.home.root}/page.html"]')
    assert relocate(copy, shop.home.root) > 3
    assert relocate(copy, shop.home.root) == 0
    assert (copy.records / "note.json").read_text() == f'["{beside}", "{copy.root}/page.html"]'
    client = MlflowClient(copy.mlflow_uri)
    version = read_registry(client, "churn").version("1")
    # From MLflow's artifacts, as this folder has no release yet.
    found = fetch_release(client, version, tmp_path / "releases")
    assert found.model == shop.releases["1"].model
    assert str(copy.root) in str(client.get_run(found.manifest.mlflow_run).info.artifact_uri)
    shutil.rmtree(copy.mlflow_artifacts)
    with pytest.raises(UserError):
        fetch_release(client, version, tmp_path / "none")
    monkeypatch.setenv("CHURN_MLFLOW_URI", "http://127.0.0.1:5000")
    with pytest.raises(UserError, match="unset CHURN_MLFLOW_URI"):
        relocate(copy, shop.home.root)


def test_a_home_comes_back_from_a_backup_at_another_place_and_goes_on(
    shop: Shop, tmp_path: Path
) -> None:
    """Made while the service answers, and brought back as a home of an older version."""
    done_by(shop, "backup", str(tmp_path / "b.tar"))
    copy = Shop(Home(tmp_path / "elsewhere" / "home"), shop.config, free_port())
    done_by(copy, "restore", str(tmp_path / "b.tar"))
    (copy.home.root / MARKER).unlink()
    assert "run `churn upgrade`" in copy.churn("versions").refusal()
    done_by(copy, "upgrade", "--no-backup")
    for command in ("versions", "history"):
        assert done_by(copy, command) == done_by(shop, command)
    of_lake = [
        {p.relative_to(h.lake): p.read_bytes() for p in h.lake.rglob("*") if p.is_file()}
        for h in (shop.home, copy.home)
    ]
    assert of_lake[0] == of_lake[1] != {}
    current = read_current(copy.home.current)
    assert current
    assert current == read_current(shop.home.current)
    bento = bento_of_tag(current.bento, copy.home.bentoml)
    answered = ask_bento(bento, copy.home.bentoml, CUSTOMER).response
    served = shop.get("/predict", CUSTOMER)
    assert {name: answered[name] for name in served} == served
    told = done_by(copy, "rollback", "--who", "ada", "--why", "a drill", "--to", "2")
    assert "version 2 is in Production (Dagster run " in told
    assert shop.read().production == "1"


def test_a_pipeline_does_not_promote_again_what_was_taken_back(shop: Shop) -> None:
    before = shop.read()
    assert "\nversion 1 is in Production\n" in done_by(shop, "promote")
    assert shop.read().history == before.history
    assert "\nversion 1 is served by churn:v1-" in done_by(shop, "deploy")
    assert shop.get("/predict", CUSTOMER)["model_version"] == "1"


# What goes wrong afterwards: refused in one line, and version 1 goes on serving.


def assert_refused(shop: Shop, says: str, *arguments: str) -> None:
    before = shop.read()
    assert says in shop.churn(*arguments).refusal()
    after = shop.read()
    assert (after.production, after.history) == (before.production, before.history)
    assert shop.get("/predict", CUSTOMER)["model_version"] == "1"


def test_a_rollback_with_nothing_to_go_back_to_is_refused(shop: Shop) -> None:
    says = "version 1 is the only one of churn that has been in Production and is still good"
    assert_refused(shop, says, "rollback", "--who", "ada", "--why", "again")


def test_a_rollback_to_a_corrupted_release_is_refused(shop: Shop) -> None:
    kept = [path for path in shop.home.root.rglob("v2-*/model.onnx") if "bentoml" not in str(path)]
    assert len(kept) == 2
    for path in kept:
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert_refused(
        shop,
        "model.onnx was changed: its sha256 is not the manifest's",
        *("rollback", "--who", "ada", "--why", "once more", "--to", "2"),
    )


def test_a_candidate_whose_artifact_was_changed_is_not_promoted(shop: Shop) -> None:
    version = shop.register(good=True)
    (logged,) = [
        path
        for path in shop.home.mlflow_artifacts.rglob(MODEL)
        if "release" not in path.parts and path.read_bytes() == shop.releases[version].model
    ]
    logged.write_bytes(logged.read_bytes() + b"\0")
    assert_refused(
        shop,
        f"the model in the registry was changed since the gates let version {version} in",
        *("approve", "--who", "ada", "--why", "better"),
    )


@pytest.mark.parametrize("command", ["approve", "rollback"])
def test_a_word_without_a_name_is_refused(shop: Shop, command: str) -> None:
    says = "needs the name of the person who gives it; set who"
    assert_refused(shop, says, command, "--who", " ", "--why", "because")


@pytest.mark.parametrize(
    ("job", "says"),
    [("approve_promotion", "needs the name of the person"), ("rollback", "needs the name of")],
)
def test_the_job_in_the_ui_as_it_stands_asks_for_a_name(shop: Shop, job: str, says: str) -> None:
    """Launched without filling in its configuration."""
    import dagster as dg

    from churn_assets.definitions import defs
    from churn_assets.defs.partitions import SETTINGS
    from churn_assets.defs.registry import production_release, promotion_decision
    from churn_assets.defs.resources import Project, RecordIOManager

    config = defs.resolve_job_def(job).run_config
    assert config is not None
    asset = {"approve_promotion": promotion_decision, "rollback": production_release}[job]
    assert config["ops"] == {asset.key.path[-1]: {"config": {"who": "", "why": ""}}}
    with dg.instance_for_test() as instance:
        result = dg.materialize(
            [asset],
            instance=instance,
            run_config=dict(config),
            resources={
                "project": Project(shop.home, SETTINGS),
                "io_manager": RecordIOManager(shop.home.records),
            },
            raise_on_error=False,
        )
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert says in str(failure.step_failure_data.error)
