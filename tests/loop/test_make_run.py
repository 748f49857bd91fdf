"""`make run` end to end: what a run leaves, and what the next makes of one that was stopped."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import warnings
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from command import (
    RAW,
    ROOT,
    Run,
    assert_readable,
    churn,
    days_of,
    environment,
    look,
    mlflow_of,
)

from churn_assets.cli import cli
from churn_assets.contract.features import FEATURE_NAMES
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.lifecycle.relocation import relocate

ASSETS = (
    *RAW,
    "customer_features",
    "churn_labels",
    "online_features",
    "training_set",
    "trained_model",
    "evaluation_report",
    "registered_model",
    "promotion_decision",
    "production_release",
    "registry_history",
    "churn_bento",
    "deployment",
    "drift_report",
    "trial_report",
    "prediction_log",
    "performance_report",
    "treatment_report",
    "serving_health",
    "feed_health",
    "retraining_decision",
    "rollback_decision",
    "health_page",
)
GATES = (
    "accuracy",
    "auc",
    "p95_latency_ms",
    "calibration_error",
    "segment_auc",
    "auc_over_recency",
    "log_loss_over_production",
)
# Nothing has been asked of a fresh home, and no evidence does not pass.
WITHOUT_EVIDENCE = {
    "performance_report.accuracy_holds",
    "performance_report.no_decay",
    "treatment_report.holdout_intact",
    "serving_health.latency",
    "serving_health.errors",
    "serving_health.volume",
    "serving_health.up",
}
CHECKS = {
    "customer_features.schema",
    "customer_features.nulls",
    "customer_features.no_event_after_cutoff",
    "churn_labels.whole_window_there",
    "online_features.same_as_lake",
    "training_set.data_gate",
    "training_set.known_at_cutoff",
    "training_set.no_feature_too_good",
    "training_set.no_row_lost",
    "trained_model.onnx_parity",
    *(f"evaluation_report.{name}" for name in GATES),
    "registry_history.registry_consistent",
    "churn_bento.answers",
    "drift_report.no_drift",
    "drift_report.prediction_mean_stable",
    "trial_report.no_harm",
    "prediction_log.keys_unique",
    "prediction_log.trimmed_what_is_there",
    "feed_health.feeds_sound",
}
FIRST, LAST = date(2024, 1, 1), date(2024, 8, 7)
HORIZON, ACTIVITY = 30, 90


def days(first: date, last: date) -> list[str]:
    return [str(first + timedelta(days=n)) for n in range((last - first).days + 1)]


# The first run.


def test_a_run_says_what_a_person_wants_to_know(first_run: Run):
    done, summary = first_run.done, first_run.summary
    assert done.err == ""
    for step in ASSETS:
        assert re.search(rf"^  {step} +\d+\.\d s$", done.out, re.MULTILINE), step
    bento, version = summary["bento"], summary["registered"]["version"]
    for line in (
        f"data        {FIRST} to {LAST}; rows read: customers ",
        "quarantined no rows",
        f"customers   {summary['eligible_rows']:,} at the newest labelled cutoff",
        f"{summary['model']['family']}",
        "recency alone",
        "majority",
        "oracle (latent state)",
        "gate        passed  auc",
        f"model       version {version}, stage Production",
        "promotion   promote: there is nothing in Production to compare it with; ",
        f"bento       {bento}",
        f"churn_probability {summary['prediction']['response']['churn_probability']}, risk ",
        f"drift       {summary['drift']['verdict']}: ",
        f"health      {summary['health']['page']}",
        "`make up` shows all of it: Dagster http://",
        f"summary: {first_run.home / 'run' / 'summary.json'}",
    ):
        assert line in done.out, line


def test_the_summary_has_every_figure(first_run: Run):
    summary = first_run.summary
    home = first_run.home
    assert set(summary["rows_read"]) == set(RAW)
    for table in RAW:
        stored = sum(pq.read_metadata(path).num_rows for path in parts(home, table))
        assert summary["rows_read"][table] == stored > 0
    assert summary["rows_quarantined"] == {}
    assert summary["days"] == [str(FIRST), str(LAST)]
    newest = pq.read_table(parts(home, "churn_labels")[-1])
    assert summary["eligible_rows"] == newest.num_rows
    churned = sum(newest["churned"].to_pylist())
    assert summary["churn_rate"] == pytest.approx(churned / newest.num_rows)
    assert summary["features"] == list(FEATURE_NAMES)
    model = summary["model"]
    assert model["family"] in ("logistic_regression", "random_forest", "hist_gradient_boosting")
    assert 0.9 <= model["auc"] < model["oracle_auc"] < 1
    assert model["accuracy"] >= 0.85
    for figure in ("auc", "accuracy", "brier", "log_loss", "f1"):
        assert 0 <= model[figure] <= 1
        assert {"recency", "majority"} == set(model["baselines"])
        assert all(0 <= b[figure] <= 1 for b in model["baselines"].values())
    assert model["auc"] > model["baselines"]["recency"]["auc"] > 0.5
    assert model["brier"] < model["baselines"]["recency"]["brier"]
    assert [g["name"] for g in summary["gates"]] == list(GATES)
    assert all(g["passed"] and g["reason"] for g in summary["gates"])
    assert [g["limit"] for g in summary["gates"]] == [0.85, 0.9, 5000, 0.05, 0.65, 0, 0]
    evidence = summary["evidence"]
    assert evidence["use"] == 1
    assert evidence["production"] is None
    assert set(evidence["model_minus"]) == {"majority", "recency"}
    for name, found in evidence["intervals"].items():
        assert found["value"] == pytest.approx(model[name])
        assert found["low"] < found["high"]
    offers = evidence["offers"]
    assert offers["offer_threshold"] == pytest.approx(10 / (120 * 0.3))
    assert offers["offer_profit"] > max(0, offers["offer_profit_everyone"])
    assert {s["by"] for s in evidence["segments"]} == {"tenure", "value", "activity"}
    assert summary["gates"][1]["value"] == model["auc"]
    assert summary["registered"] == {"version": "1", "stage": "Production"}
    assert summary["promotion"]["verdict"] == "promote"
    prediction = summary["prediction"]
    assert set(prediction["request"]) == {"customer_id", *FEATURE_NAMES}
    assert prediction["response"]["model_version"] == "1"
    assert prediction["response"]["customer_id"] == prediction["request"]["customer_id"]
    assert 0 <= prediction["response"]["churn_probability"] <= 1
    assert prediction["latency_ms"] > 0
    assert summary["drift"]["verdict"] == "ok"
    assert (summary["drift"]["source"], summary["drift"]["version"]) == ("customers", "1")
    assert abs(summary["drift"]["prediction_shift"]) <= 0.1
    assert set(summary["drift"]["statistics"]) == set(FEATURE_NAMES)
    stages = ["raw", "features", "labels", "online", "training", "bento", "drift", "log", "trial"]
    stages += ["performance", "treatment", "service", "decisions", "health"]
    assert list(summary["seconds"]) == stages
    assert "<h1>Health</h1>" in Path(summary["health"]["page"]).read_text()
    assert all(seconds > 0 for seconds in summary["seconds"].values())


def test_the_lake_has_every_partition(first_run: Run):
    home = first_run.home
    for table in RAW:
        assert days_of(home, table) >= days(FIRST, LAST)
    earliest = FIRST + timedelta(days=ACTIVITY - 1)
    kept = first_run.seen.partitions
    there = {name.partition("/")[0] for name in kept}
    assert there == {*RAW, "customer_features", "churn_labels"}
    for table, first in (
        *((name, FIRST) for name in RAW),
        ("customer_features", earliest),
        ("churn_labels", earliest + timedelta(days=HORIZON)),
    ):
        wanted = [f"{table}/day={day}" for day in days(first, LAST)]
        assert [name for name in kept if name.startswith(f"{table}/")] == wanted
    assert_readable(home)
    assert not list((home / "lake").rglob(".tmp-*"))


def test_dagster_has_every_asset_partition_and_check(first_run: Run):
    seen = first_run.seen
    assert set(seen.materialized) == set(ASSETS)
    for table in RAW:
        assert sorted(seen.materialized[table][0]) == days(FIRST, LAST)
    assert set(seen.checks) == CHECKS | WITHOUT_EVIDENCE
    assert {name for name, ended in seen.checks.items() if ended != "SUCCEEDED"} == (
        WITHOUT_EVIDENCE
    )
    assert seen.runs == [
        ("health", "SUCCESS"),
        ("decisions", "SUCCESS"),
        ("watch_service", "SUCCESS"),
        ("treatment", "SUCCESS"),
        ("performance", "SUCCESS"),
        ("trial", "SUCCESS"),
        ("ingest_predictions", "SUCCESS"),
        ("drift", "SUCCESS"),
        ("promotion", "SUCCESS"),
        ("training", "SUCCESS"),
        *[("daily_refresh", "SUCCESS")] * 4,
    ]


def test_dagster_knows_what_each_asset_was_made_of(first_run: Run):
    def made_of(asset: str) -> dict[str, str]:
        tags = first_run.seen.materialized[asset][1].asset_materialization.tags
        start = "dagster/input_data_version/"
        return {k.removeprefix(start): v for k, v in tags.items() if k.startswith(start)}

    assert set(made_of("training_set")) == {"customer_features", "churn_labels"}
    assert made_of("trained_model") == {"training_set": first_run.summary["data_hash"]}
    assert set(made_of("evaluation_report")) == {"trained_model"}
    assert set(made_of("registered_model")) == {"evaluation_report"}
    assert set(made_of("promotion_decision")) == {"registered_model"}
    assert set(made_of("production_release")) == {"promotion_decision"}
    assert set(made_of("churn_bento")) == {"production_release"}
    assert set(made_of("deployment")) == {"churn_bento"}
    assert set(made_of("drift_report")) == {
        "customer_features",
        "prediction_log",
        "production_release",
    }


def test_the_assets_carry_what_a_person_looks_at(first_run: Run):
    def metadata(asset: str) -> dict[str, Any]:
        return first_run.seen.materialized[asset][1].asset_materialization.metadata

    assert metadata("orders")["rows_read"].value == first_run.summary["rows_read"]["orders"]
    assert metadata("customer_features")["sample"].records
    plots = [k for k, v in metadata("evaluation_report").items() if "data:image/png" in str(v)]
    assert {"importance", "confusion_matrix"} <= set(plots)
    assert "http://" in metadata("evaluation_report")["mlflow_run"].value
    assert metadata("churn_bento")["tag"].value == first_run.summary["bento"]
    assert metadata("deployment")["bento"].value == first_run.summary["bento"]
    assert metadata("deployment")["target"].value == "local"
    assert metadata("drift_report")["evidently"].value.startswith("http://")


def test_mlflow_tracks_all_of_a_training(first_run: Run):
    (run,) = first_run.seen.mlflow
    summary = first_run.summary
    assert run.info.status == "FINISHED"
    params, tags, metrics = run.data.params, run.data.tags, run.data.metrics
    assert params["seed"] == "42"
    assert params["family"] == summary["model"]["family"]
    assert any(name.startswith("model_") for name in params)
    assert int(params["data_rows"]) == summary["training_rows"]
    assert params["data_test_cutoff"] == str(LAST - timedelta(days=HORIZON))
    assert tags["data_hash"] == summary["data_hash"]
    assert tags["features"] == ",".join(FEATURE_NAMES)
    assert (tags["team"], tags["use_case"]) == ("growth", "customer churn")
    assert tags["python_version"] == platform.python_version()
    assert tags["accelerator"]
    assert re.fullmatch("[0-9a-f]{40}|unknown", tags["git_commit"])
    assert tags["git_dirty"] in ("true", "false", "unknown")
    if (ROOT / ".git").exists():
        commits = git("log", "--format=%H", "-50").split()
        assert tags["git_commit"] in commits
    for name in ("accuracy", "f1", "auc"):
        assert metrics[name] == pytest.approx(summary["model"][name])
    assert metrics["p95_latency_ms"] > 0
    assert metrics["onnx_parity_max_difference"] <= 1e-5


def test_every_trial_of_the_search_is_a_run_nested_in_the_training(first_run: Run):
    client, (run,) = mlflow_of(first_run.home), first_run.seen.mlflow
    nested = [
        trial
        for trial in client.search_runs([run.info.experiment_id])
        if trial.data.tags.get("mlflow.parentRunId") == run.info.run_id
    ]
    assert len(nested) == int(run.data.params["trials"]) == 12
    assert {trial.info.status for trial in nested} == {"FINISHED"}
    assert all("dagster_run_id" not in trial.data.tags for trial in nested)
    best = min(
        (trial for trial in nested if trial.data.tags["given_up"] == "false"),
        key=lambda trial: trial.data.metrics["log_loss"],
    )
    assert best.data.tags["family"] == run.data.params["family"]
    for name, value in best.data.params.items():
        assert run.data.params[f"model_{name}"] == value


def test_mlflow_keeps_the_artifacts_of_a_training(first_run: Run):
    client, (run,) = mlflow_of(first_run.home), first_run.seen.mlflow
    kept = {
        file.path
        for folder in client.list_artifacts(run.info.run_id)
        for file in client.list_artifacts(run.info.run_id, folder.path)
    }
    wanted = {
        "data/training_set.json",
        "environment/packages.txt",
        "evaluation/importance.png",
        "evaluation/confusion_matrix.png",
        "evaluation/report.json",
    }
    assert wanted <= kept
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert artifacts.is_relative_to(first_run.home)
    assert (artifacts / "evaluation/importance.png").read_bytes().startswith(b"\x89PNG")
    packages = (artifacts / "environment/packages.txt").read_text().splitlines()
    for name in ("mlflow", "scikit-learn", "dagster"):
        assert f"{name}=={importlib.metadata.version(name)}" in packages
    manifest = json.loads((artifacts / "data/training_set.json").read_text())
    assert manifest["data_hash"] == first_run.summary["data_hash"]
    named = {(part["table"], part["day"]) for part in manifest["partitions"]}
    assert ("churn_labels", str(LAST)) in named
    hashes = [part["content_hash"] for part in manifest["partitions"]]
    assert all(re.fullmatch("[0-9a-f]{64}", content_hash) for content_hash in hashes)


def test_the_first_version_is_in_production_with_its_models(first_run: Run):
    (version,) = first_run.seen.versions.values()
    assert version.tags["stage"] == "Production"
    assert first_run.seen.aliases == {"production": "1"}
    assert version.run_id == first_run.seen.mlflow[0].info.run_id
    assert version.tags["data_hash"] == first_run.summary["data_hash"]
    staged, promoted = first_run.seen.history
    assert (staged.source, staged.target, staged.who) == ("None", "Staging", "pipeline")
    assert set(staged.evidence.figures) == set(GATES)
    assert (promoted.source, promoted.target, promoted.who) == (
        "Staging",
        "Production",
        "automatic policy",
    )
    assert promoted.evidence.kind == "bootstrap"
    assert promoted.evidence.figures["auc"] == first_run.summary["model"]["auc"]
    decision = first_run.seen.materialized["promotion_decision"][1].asset_materialization
    assert decision.metadata["id"].value == promoted.decision
    kept = [path.name for path in (first_run.home / "mlartifacts").rglob("model.*")]
    assert {"model.onnx", "model.skops"} <= set(kept)
    assert not list((first_run.home / "mlartifacts").rglob("*.pkl"))


def test_the_bento_and_the_drift_page_are_there(first_run: Run):
    assert [f"churn:{name}" for name in first_run.seen.bentos] == [first_run.summary["bento"]]
    page = Path(first_run.summary["drift"]["page"])
    assert page == first_run.home / "reports" / "drift" / f"{LAST}.html"
    assert "<html" in page.read_text(encoding="utf-8")[:500]


# The versions and the training sets of the first run.


def asked(home: Path, *arguments: str) -> str:
    """What the command answers about a home, asked in this process."""
    with mock.patch.dict(os.environ, {"CHURN_HOME": str(home)}), warnings.catch_warnings():
        # MLflow's way of asking its own database.
        warnings.filterwarnings("ignore", "The ``noload`` loader strategy")
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_the_week_of_a_run_is_done_and_nothing_trains_for_it_again(first_run: Run):
    config = first_run.home.parent / "shop.yaml"
    done = churn(first_run.home, config, "train")
    assert done.code == 0
    assert re.search(r"run \S+ is the training of \d{4}-W\d\d; to train again", done.out)
    (run,) = first_run.seen.mlflow
    assert run.data.tags["retrain_reason"].startswith("weekly training of ")


def test_the_rows_of_the_next_training_are_judged_alone(first_run: Run):
    config = first_run.home.parent / "shop.yaml"
    done = churn(first_run.home, config, "validate-data")
    rows = first_run.summary["training_rows"]
    assert (done.code, f"  rows: {rows}\n" in done.out) == (0, True), done
    assert "  min_rows: 5000\n" in done.out


def test_how_a_version_was_judged_is_told(first_run: Run):
    config = first_run.home.parent / "shop.yaml"
    done = churn(first_run.home, config, "evaluate")
    assert done.code == 0, done
    for gate in first_run.summary["gates"]:
        assert f"  passed   {gate['reason']}\n" in done.out
    told = churn(first_run.home, config, "evaluate", "99").refusal()
    assert "no version 99 of churn" in told


def test_versions_are_listed(first_run: Run):
    listed = asked(first_run.home, "versions")
    line = next(line for line in listed.splitlines() if line.split()[0] == "1")
    assert " Production " in line
    assert "gates passed" in line
    assert first_run.summary["data_hash"][:12] in line


def test_a_prediction_leads_back_to_its_data(first_run: Run):
    summary = first_run.summary
    version = summary["prediction"]["response"]["model_version"]
    told = asked(first_run.home, "lineage", version)
    (run,) = first_run.seen.mlflow
    card = first_run.home / "reports" / "models" / version / "card.html"
    for line in (
        f"data         {summary['data_hash']}",
        f"dagster run  {run.data.tags['dagster_run_id']}",
        f"mlflow run   {run.info.run_id}  FINISHED",
        f"version      churn {version}  ",
        f"bento        {summary['bento']}  of release v1-",
        f"held out     {LAST - timedelta(days=HORIZON)}, looked at ",
        "version 1  None -> Staging  by pipeline",
        f"model card   {card}",
    ):
        assert line in told, line
    release = re.search(r"^release      (v1-\w+)$", told, re.MULTILINE)
    assert release is not None
    assert summary["bento"].startswith(f"churn:{release[1]}-")
    with pytest.raises(UserError, match="no version 99 of churn"):
        asked(first_run.home, "lineage", "99")


def test_the_model_card_is_written_from_the_evidence(first_run: Run):
    summary, evidence = first_run.summary, first_run.summary["evidence"]
    folder = first_run.home / "reports" / "models" / "1"
    card, page = ((folder / name).read_text() for name in ("card.md", "card.html"))
    auc = evidence["intervals"]["auc"]
    for said in (
        "# churn, version 1",
        "It passed every gate.",
        f"| AUC | {auc['value']:.4f} ({auc['low']:.4f} to {auc['high']:.4f}) |",
        summary["data_hash"],
        summary["bento"],
        "first time",
        "## Limits",
    ):
        assert said in card, said
    assert all(s["name"] in card for s in evidence["segments"])
    assert page.count('src="data:image/png;base64,') == card.count("![") == 6
    assert "<table>" in page
    client, (run,) = mlflow_of(first_run.home), first_run.seen.mlflow
    kept = {file.path for file in client.list_artifacts(run.info.run_id, "model_card")}
    assert {"model_card/card.md", "model_card/card.html", "model_card/reliability.png"} <= kept
    for asset in ("evaluation_report", "churn_bento"):
        event = first_run.seen.materialized[asset][1].asset_materialization
        assert event.metadata["model_card"].value.endswith("/models/1/card.html")
    logged = Path(run.info.artifact_uri.removeprefix("file://")) / "model_card" / "card.md"
    assert logged.read_text() == card


def test_the_history_says_what_is_in_production(first_run: Run):
    told = asked(first_run.home, "history", "--on", str(datetime.now(UTC).date()))
    assert "version 1 in Production since " in told
    assert "put there automatic policy: there is nothing in Production to compare" in told
    assert "evidence  bootstrap: auc 0.9" in told
    every = asked(first_run.home, "history").splitlines()
    assert ["None -> Staging" in every[0], "Staging -> Production" in every[1]] == [True, True]
    assert "nothing was in Production on 2020-01-01" in asked(
        first_run.home, "history", "--on", "2020-01-01"
    )


def test_a_run_says_what_waits_for_a_person(first_run: Run):
    from churn_assets.defs.summary import lines
    from churn_assets.home import Home

    waiting = {"promotion": {"verdict": "wait", "reasons": ["because"]}, "prediction": None}
    told = "\n".join(lines(first_run.summary | waiting, Home(first_run.home)))
    assert "promotion   wait: because\n              approve it: churn approve --who" in told
    assert "bento       none: nothing is in Production yet" in told


def test_a_training_set_comes_back_by_version_and_by_hash(first_run: Run, tmp_path: Path):
    data_hash, rows = (first_run.summary[name] for name in ("data_hash", "training_rows"))
    for number, chosen in enumerate((("--model-version", "1"), ("--hash", data_hash))):
        out = tmp_path / f"{number}.parquet"
        told = asked(first_run.home, "training-set", *chosen, "--out", str(out))
        assert f"{rows:,} rows, hash {data_hash} checked" in told
        assert pq.read_metadata(out).num_rows == rows
    with pytest.raises(UserError, match="no version 99 of churn"):
        asked(first_run.home, "training-set", "--model-version", "99")


def test_a_training_set_that_was_changed_is_refused(first_run: Run):
    data_hash = first_run.summary["data_hash"]
    path = first_run.home / "lake" / "training_sets" / f"{data_hash}.parquet"
    before = path.read_bytes()
    try:
        pq.write_table(pq.read_table(path).slice(1), path)
        with pytest.raises(UserError, match="was changed"):
            asked(first_run.home, "training-set", "--model-version", "1")
        path.write_bytes(before[:-100])
        with pytest.raises(UserError, match="cannot be read"):
            asked(first_run.home, "training-set", "--hash", data_hash)
    finally:
        path.write_bytes(before)


# Stopped and resumed, three days later.


def test_a_killed_run_is_finished_by_the_next(resumed_run: Run):
    assert all(done.code == -signal.SIGKILL for done, _ in resumed_run.stopped)
    (_, training), (_, bento) = resumed_run.stopped
    assert training.runs[0] == ("training", "STARTED")
    assert training.mlflow[0].info.status == "RUNNING"
    assert bento.runs[0] == ("promotion", "STARTED")
    assert len(bento.bentos) == 1
    assert resumed_run.done.err == ""
    assert resumed_run.summary["bento"].startswith("churn:v3-")
    assert len(resumed_run.seen.bentos) == 2


def test_dead_runs_are_failures_in_dagster_and_in_mlflow(resumed_run: Run):
    (_, _), (_, later) = resumed_run.stopped
    # The run after it closed the one killed in training before it did anything else.
    assert ("training", "FAILURE") in later.runs
    assert [run.info.status for run in later.mlflow] == ["FINISHED", "FAILED", "FINISHED"]
    seen = resumed_run.seen
    assert not {"STARTED", "STARTING", "NOT_STARTED"} & {status for _, status in seen.runs}
    failed = [job for job, status in seen.runs if status == "FAILURE"]
    assert failed == ["promotion", "training"]
    statuses = [run.info.status for run in seen.mlflow]
    assert statuses == ["FINISHED", "FINISHED", "FAILED", "FINISHED"]


def test_only_what_is_new_is_written(first_run: Run, resumed_run: Run):
    before, after = first_run.seen.partitions, resumed_run.seen.partitions
    assert {name: after[name] for name in before} == before
    new = [name for name in after if name not in before]
    tables = (*RAW, "customer_features", "churn_labels")
    wanted = [f"{t}/day={d}" for t in tables for d in days(LAST, LAST + timedelta(days=3))[1:]]
    assert sorted(new) == sorted(wanted)
    # The runs after the first one that was killed found the data there.
    assert "raw" not in resumed_run.summary["seconds"]
    assert resumed_run.summary["days"][1] == str(LAST + timedelta(days=3))
    assert resumed_run.summary["data_hash"] != first_run.summary["data_hash"]


def test_what_the_policy_lets_pass_takes_the_place_of_the_one_before_it(resumed_run: Run):
    assert sorted(resumed_run.seen.versions) == ["1", "2", "3"]
    assert resumed_run.seen.aliases == {"production": "3"}
    assert resumed_run.summary["registered"] == {"version": "3", "stage": "Production"}
    promoted = resumed_run.seen.history[-1]
    assert promoted.evidence.kind == "paired_replay"
    assert promoted.evidence.incumbent == promoted.plan.to == "2"
    assert promoted.evidence.rows > 500
    for figure in ("auc", "log_loss", "brier"):
        assert {f"candidate_{figure}", f"incumbent_{figure}"} <= promoted.evidence.figures.keys()


# Gates no model passes.


def test_a_refusal_by_the_gates_is_a_success_of_the_run(refused_run: Run):
    done, summary = refused_run.done, refused_run.summary
    assert (done.code, done.err) == (0, "")
    assert re.search(r"gate +REFUSED auc 0\.\d+ is below 0\.9999", done.out)
    assert "nothing was promoted" in done.out
    assert list(summary["refused_by"]) == ["evaluation_report.auc"]
    assert [g["name"] for g in summary["gates"] if not g["passed"]] == ["auc"]
    # Versions 2 and 3 were judged on the same day, version 1 on that of three days before.
    assert summary["evidence"]["use"] == 3
    assert "used for the 3rd time (before: version 2, 3)" in done.out
    assert summary["evidence"]["production"] == "3"
    assert set(summary["evidence"]["model_minus"]) == {"majority", "recency", "production"}
    assert summary["bento"] is summary["prediction"] is None


def test_the_commands_of_the_readme_work_as_they_are_written(resumed_run: Run, tmp_path: Path):
    home = Home(tmp_path / "home")
    shutil.copytree(resumed_run.home, home.root)
    relocate(home, resumed_run.home)
    written = re.findall(
        r"(?:^    |`)(\.venv/bin/churn [^`\n]*)", (ROOT / "README.md").read_text(), re.M
    )
    # Nothing is in Staging: every version that passed went on by itself. And this shop is small.
    (approve,) = [command for command in written if " approve " in command]
    (validate,) = [command for command in written if " validate-data " in command]
    (offers,) = [command for command in written if " offers " in command]
    # The file is the training set that a command before has brought back; it names no offers.
    training_set = tmp_path / "training_set.parquet"
    script = ["set -e"]
    for command in written:
        typed = command + (f" --out {training_set}" if "training-set" in command else "")
        typed = re.sub(r" FILE\b", f" {training_set}", typed)
        told = f"{typed} > {tmp_path}/{len(script)}.txt"
        script.append(f"! {told} 2>&1" if command in (approve, validate, offers) else told)
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=ROOT,
        env=environment(home.root, resumed_run.home.parent / "shop.yaml"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = {
        command: (tmp_path / f"{place}.txt").read_text()
        for place, command in enumerate(written, start=1)
    }
    assert len(said) >= 8
    # Nothing is to be reconciled.
    assert [command for command, text in said.items() if not text] == [".venv/bin/churn reconcile"]
    assert "no version is in Staging" in said[approve]
    assert "min_rows" in said[validate]
    assert "served_at" in said[offers]


def test_a_refused_model_goes_nowhere(refused_run: Run, resumed_run: Run):
    version = refused_run.summary["registered"]["version"]
    assert refused_run.summary["registered"] == {"version": "4", "stage": "None"}
    assert refused_run.seen.versions[version].tags["stage"] == "None"
    assert refused_run.seen.versions[version].tags["gates"] == "refused"
    assert refused_run.seen.aliases == {"production": "3"}
    assert refused_run.seen.bentos == resumed_run.seen.bentos
    assert refused_run.seen.runs[:9] == [
        ("health", "SUCCESS"),
        ("decisions", "SUCCESS"),
        ("watch_service", "SUCCESS"),
        ("treatment", "SUCCESS"),
        ("performance", "SUCCESS"),
        ("trial", "SUCCESS"),
        ("ingest_predictions", "SUCCESS"),
        ("drift", "SUCCESS"),
        ("training", "FAILURE"),
    ]
    assert refused_run.seen.checks["evaluation_report.auc"] == "FAILED"
    assert refused_run.seen.mlflow[0].info.status == "FAILED"
    assert refused_run.seen.mlflow[0].data.tags["gates"] == "refused by auc"


def test_drift_is_reported_all_the_same(refused_run: Run, resumed_run: Run):
    assert refused_run.summary["drift"]["verdict"] == "ok"
    before, after = (r.seen.materialized["drift_report"][1] for r in (resumed_run, refused_run))
    assert after.timestamp > before.timestamp


def test_what_a_blocking_check_refused_is_made_anew(refused_run: Run, resumed_run: Run):
    before, after = (r.seen.materialized["churn_labels"][1] for r in (resumed_run, refused_run))
    assert after.timestamp > before.timestamp
    assert refused_run.seen.checks["churn_labels.whole_window_there"] == "SUCCEEDED"


# A team's own tables, with faults, stopped three times.


def test_unusable_rows_are_counted_by_reason_and_the_run_goes_on(own_tables_run: Run):
    summary = own_tables_run.summary
    assert summary["rows_quarantined"] == {
        "orders": {
            "corrupt_line": 2,
            "duplicate_order_id": 1,
            "future_occurred_at": 1,
            "invalid_amount": 1,
            "invalid_occurred_at": 1,
            "missing_customer_id": 1,
            "negative_amount_minor": 1,
        }
    }
    lines = (own_tables_run.home.parent / "orders.csv").read_text().splitlines()
    assert summary["rows_read"] == {"customers": 0, "orders": len(lines) - 1}
    used = sum(pq.read_metadata(path).num_rows for path in parts(own_tables_run.home, "orders"))
    assert used == summary["rows_read"]["orders"] - 8
    assert "quarantined orders: corrupt_line 2, " in own_tables_run.done.out
    assert set(summary["features"]) < set(FEATURE_NAMES)
    assert set(summary["prediction"]["request"]) == {"customer_id", *summary["features"]}


def test_a_run_killed_while_writing_leaves_whole_partitions(own_tables_run: Run):
    killed = zip(own_tables_run.stopped, ("orders", "customer_features"), strict=False)
    for (done, seen), step in killed:
        assert done.code == -signal.SIGKILL
        assert done.out.endswith(f"  {step:<22}")
        assert seen.runs[0] == ("daily_refresh", "STARTED")
    home = own_tables_run.home
    assert_readable(home)
    assert not list((home / "lake").rglob(".tmp-*"))
    assert days_of(home, "orders") == days(date(2024, 1, 1), date(2024, 3, 31))
    assert days_of(home, "customer_features") == days(date(2024, 1, 30), date(2024, 3, 31))
    assert {status for _, status in own_tables_run.seen.runs} == {"SUCCESS", "FAILURE"}


def test_ctrl_c_stops_a_run_in_one_line(own_tables_run: Run):
    done, seen = own_tables_run.stopped[2]
    assert done.code == 130
    assert done.err.splitlines() == ["stopped; `make run` goes on from here"]
    assert done.out.endswith("s  stopped\n")
    assert seen.runs[0] == ("training", "FAILURE")
    assert [run.info.status for run in seen.mlflow] == ["FAILED"]
    assert own_tables_run.done.code == 0
    assert own_tables_run.summary["registered"]["version"] == "1"


# A real shop.


@pytest.fixture(scope="module")
def retail(online_retail: str, tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("retail") / "home"
    config = ROOT / "churn_assets" / "config" / "online_retail.yaml"
    return churn(home, config, CHURN_DATA=online_retail), home


def test_online_retail_runs_to_its_end(retail):
    done, home = retail
    assert (done.code, done.err) == (0, "")
    summary = json.loads((home / "run" / "summary.json").read_text())
    assert summary["rows_read"] == {"customers": 0, "orders": 541_909}
    assert summary["rows_quarantined"] == {
        "orders": {
            "missing_customer_id": 135_080,
            "cancelled_invoice": 8_905,
            "price_not_positive": 40,
            "exact_duplicate": 5_192,
        }
    }
    assert sum(pq.read_metadata(path).num_rows for path in parts(home, "orders")) == 18_532
    assert summary["features"] == [
        "total_orders_30d",
        "avg_order_value",
        "days_since_last_order",
    ]
    assert 0.6 <= summary["model"]["auc"] <= 0.7
    assert summary["model"]["auc"] > summary["model"]["baselines"]["recency"]["auc"]
    assert summary["model"]["oracle_auc"] is None
    # The gates let nothing into Production, so there is nothing to compare with.
    assert (summary["drift"]["verdict"], summary["drift"]["source"]) == ("insufficient", "none")


def test_the_gates_refuse_online_retail_and_say_why(retail):
    done, home = retail
    assert re.search(r"gate +REFUSED accuracy 0\.\d+ is below 0\.85", done.out)
    assert re.search(r"gate +REFUSED auc 0\.\d+ is below 0\.9\b", done.out)
    assert "nothing was promoted" in done.out
    (version,) = look(home).versions.values()
    assert version.tags["stage"] == "None"
    assert not (home / "bentoml" / "bentos").exists()


def parts(home: Path, table: str) -> list[Path]:
    return sorted((home / "lake" / table).glob("day=*/part-0.parquet"))


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout
