"""From a bad model in Production back to the one before it, by one action, as a person does it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from datetime import date
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from command import ROOT, environment, write_config
from conftest import SHOP
from mlflow import MlflowClient
from registered import CUSTOMER, Shop, done_by

from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.contract.release import MODEL
from churn_assets.data.lake import DAY, Lake
from churn_assets.data.windows import label_partition
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.home_format import MARKER
from churn_assets.lifecycle.bento import bento_of_tag
from churn_assets.lifecycle.comparison import replay_on_day
from churn_assets.lifecycle.history import Evidence
from churn_assets.lifecycle.pointer import read_current
from churn_assets.lifecycle.promotion import PromotionPolicy
from churn_assets.lifecycle.registry import read_registry
from churn_assets.lifecycle.release import fetch_release
from churn_assets.lifecycle.relocation import relocate
from churn_assets.lifecycle.serving import ask_bento, free_port

pytestmark = pytest.mark.filterwarnings(
    # MLflow's way of asking its own database.
    "ignore:The ``noload`` loader strategy",
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Generator[Shop]:
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


def test_from_a_bad_model_to_the_one_before_it_by_one_action(
    shop: Shop, record_property: Callable[[str, object], None]
) -> None:
    assert shop.register(good=True) == "1"
    done_by(shop, "approve", "--who", "ada", "--why", "the first one")
    good = shop.until_served("1")
    assert good["risk_level"] == "low"

    # A person may approve what the comparison speaks against; it is on record that it did.
    assert shop.register(good=False) == "2"
    done_by(shop, "approve", "--who", "eve", "--why", "a hunch")
    bad = shop.until_served("2")
    assert bad["risk_level"] == "high"
    evidence = shop.read().history[-1].evidence
    assert (evidence.kind, evidence.passed, evidence.incumbent) == ("paired_replay", False, "1")
    assert evidence.figures["candidate_auc"] < 0.1 < 0.9 < evidence.figures["incumbent_auc"]

    began = time.monotonic()
    told = done_by(shop, "rollback", "--who", "ada", "--why", "everyone is at risk")
    assert shop.until_served("1") == good
    seconds = time.monotonic() - began
    print(f"rolled back and served again after {seconds:.1f} s")
    record_property("rollback_seconds", round(seconds, 1))

    assert "version 1 is in Production (Dagster run " in told
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
    labels = pa.table({"customer_id": ids, "churned": x[:, 2] > x[:, 0]})
    lake = Lake(str(tmp_path))

    def compared(version: str, former: str, on: date = day) -> Evidence | str:
        return replay_on_day(
            shop.client(), lake, shop.read(), version, former, on, horizon,
            shop.home.releases, PromotionPolicy(),
        )  # fmt: skip

    matured = label_partition(day, horizon)
    for table, rows, at in (
        ("customer_features", features, day),
        ("churn_labels", labels, matured),
    ):
        dated = rows.append_column(DAY, pa.array([at] * len(ids), pa.date32()))
        lake.write(table, at, at, dated, day_of=DAY)
    worse = compared("2", "1")
    assert isinstance(worse, Evidence)
    assert (worse.passed, worse.incumbent, worse.rows) == (False, "1", 600)
    better = compared("1", "2")
    assert isinstance(better, Evidence)
    assert better.passed
    gap = worse.figures["log_loss_difference"]
    assert isinstance(gap, float)
    assert better.figures["log_loss_difference"] == -gap < -1

    without = features.drop_columns(["login_frequency_7d"])
    dated = without.append_column(DAY, pa.array([day] * len(ids), pa.date32()))
    lake.write("customer_features", day, day, dated, day_of=DAY)
    assert "version 2 needs login_frequency_7d" in str(compared("2", "1"))
    assert "2024-06-04" in str(compared("2", "1", date(2024, 6, 4)))


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
