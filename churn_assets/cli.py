"""The `churn` command: what make calls, and the small tools beside it."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from churn_assets.errors import UserError
from churn_assets.home import Home

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from churn_assets.lifecycle.proposals import Proposal


# They bring a home to the format of this code, or keep it as it is.
_OF_ANY_FORMAT = ("backup", "restore", "upgrade")
_CODE_SERVER_STOP_S = 20.0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def cli(context: click.Context) -> None:
    """The life of a churn model: data, training, evaluation, registry, service, drift."""
    if context.invoked_subcommand not in _OF_ANY_FORMAT:
        Home.from_environment().check_format()


@cli.command()
def run() -> None:
    """Materialize the whole graph and print what came out."""
    from churn_assets.data.sources import check_files
    from churn_assets.settings import load_settings, utc_today

    home, settings = Home.from_environment(), load_settings()
    # What can be seen to be wrong is said before Dagster's slow imports.
    _, last = settings.history(utc_today())
    if not home.has_data():
        settings.require_history(last)
    check_files(settings.source)
    home.prepare()
    with home.exclusive():
        home.claim(settings.identity())
        try:
            _import_skops()
            from churn_assets.defs.launch import run_everything

            run_everything(home)
        except KeyboardInterrupt:
            click.echo("stopped; `make run` goes on from here", err=True)
            sys.exit(130)


@cli.command()
@click.option("--reason", help="Why to train again, whatever was done this week.")
@click.option(
    "--url",
    envvar="CHURN_DAGSTER_URL",
    help="Ask the Dagster webserver at this address instead of training in this home.",
)
def train(reason: str | None, url: str | None) -> None:
    """Train, judge and register: once a week, or again for a reason. Exits with 1 when refused."""
    from churn_assets.settings import load_settings

    if reason is not None and not reason.strip():
        raise UserError("--reason is empty; say why to train again")
    settings = load_settings()
    if url:
        from churn_assets.defs.remote import RemoteDagster
        from churn_assets.defs.weekly import week_of

        dagster = RemoteDagster(url, os.environ.get("CHURN_DAGSTER_TOKEN"))
        week = week_of(datetime.now(UTC), settings.schedules.timezone)
        sys.exit(0 if dagster.train_for(week, reason, click.echo) == "SUCCESS" else 1)
    home = _home_with_data()
    with home.exclusive():
        home.claim(settings.identity())
        _import_skops()
        from churn_assets.defs.launch import train as train_here

        outcome = train_here(home, reason)
    if outcome is None:
        return
    for name, why in outcome.refused_by.items():
        click.echo(f"refused by {name}: {why}")
    click.echo(f"Dagster run {outcome.run_id}, {outcome.seconds:.0f} s")
    sys.exit(0 if outcome.success else 1)


@cli.command()
def up() -> None:
    """Run Dagster, MLflow, the churn service and the reports; Ctrl-C stops them."""
    from churn_assets.settings import load_settings
    from churn_assets.up import check_ports, run_all

    home, settings = Home.from_environment(), load_settings()
    check_ports()
    home.prepare()
    with home.exclusive("up"):
        if home.has_data():
            home.claim(settings.identity())
        from churn_assets.defs.launch import close_dead_server_runs, close_lost_runs

        close_dead_server_runs()
        code = run_all(home, close_lost_runs=close_lost_runs)
    sys.exit(code)


@cli.command()
@click.option("--port", type=int, required=True, help="Port it answers on.")
@click.option("--host", help="Address of the interface it answers on. Default: 127.0.0.1.")
@click.option(
    "--workers", type=click.IntRange(1, 256), help="Processes that answer. Default: as configured."
)
def serve(port: int, host: str | None, workers: int | None) -> None:
    """Serve what is in Production, and what takes its place; waits until there is something."""
    from churn_assets.lifecycle.deployment import announced
    from churn_assets.lifecycle.serving import (
        HOST,
        OnlineStore,
        PredictionLog,
        check_port,
        serve_current,
    )
    from churn_assets.settings import load_settings

    home, settings = Home.from_environment(), load_settings()
    policy = settings.serving
    if policy.api_keys:
        # The service reads it from its environment, which it has from here.
        os.environ["CHURN_API_KEYS"] = str(home.api_keys)
    os.environ.update(settings.holdout.environment())
    location = settings.online_store.url or str(home.online_store)
    online = OnlineStore(location, policy.max_age_hours, policy.when_stale)
    kept = policy.prediction_log.location(home.prediction_log)
    log = PredictionLog(kept, policy.prediction_log.durability, policy.prediction_log.when_broken)
    listen = host or HOST
    check_port(port, listen)
    # Where the settings name the service, nobody looks for it among the processes of this machine.
    elsewhere = settings.deployment.local.url is not None
    there = contextlib.nullcontext() if elsewhere else announced(home, f"http://{HOST}:{port}")
    with there:
        serve_current(home, port, online, log, workers=workers or policy.workers, listen=listen)


@cli.command()
def prepare() -> None:
    """Make the folders of the home and note which source it is for; nothing when that is done.

    For a home that several containers share, before the first of them starts.
    """
    from churn_assets.settings import load_settings

    home, settings = Home.from_environment(), load_settings()
    home.prepare()
    with home.exclusive("prepare"):
        home.claim(settings.identity())


@cli.command("code-server")
@click.option("--port", type=click.IntRange(1, 65535), required=True, help="Port it answers on.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address it answers on.")
def code_server(port: int, host: str) -> None:
    """Run the code location that Dagster's webserver and daemon ask, until it is stopped.

    There is one of a home, as runs are processes of its own: those it finds to be running, from
    before, are over, and are closed as failed.
    """
    from churn_assets.settings import load_settings
    from churn_assets.up import code_command

    home, settings = Home.from_environment(), load_settings()
    home.prepare()
    with home.exclusive("code-server"):
        home.claim(settings.identity())
        from churn_assets.defs.launch import close_dead_server_runs

        for run_id in close_dead_server_runs("The code location that executed this run is gone."):
            click.echo(f"closed run {run_id}, whose process is gone")
        server = subprocess.Popen(code_command(host, port))
        try:
            sys.exit(server.wait())
        except KeyboardInterrupt:
            server.terminate()
            try:
                server.wait(_CODE_SERVER_STOP_S)
            except subprocess.TimeoutExpired:
                # It ends by interrupting itself, which whoever runs it in the background has off.
                server.kill()
                server.wait()
            sys.exit(0)


@cli.command()
@click.argument("release", type=click.Path(path_type=Path), required=False)
@click.option("--by-id/--features-only", default=True, help="With an online store, or without.")
@click.option("--keys/--no-keys", default=None, help="With API keys, or without. Default: as set.")
def openapi(release: Path | None, by_id: bool, keys: bool | None) -> None:
    """Print the OpenAPI document of the service with RELEASE, a directory; default: what serves.

    The service itself publishes the one that is true of it at GET /openapi.json.
    """
    import msgspec

    from churn_assets.contract.openapi import openapi as describe
    from churn_assets.contract.release import ReleaseError, read_release
    from churn_assets.lifecycle.bento import bento_of_tag
    from churn_assets.lifecycle.pointer import read_current
    from churn_assets.settings import load_settings

    home = Home.from_environment()
    if keys is None:
        keys = load_settings().serving.api_keys
    if release is None:
        current = read_current(home.current)
        if current is None:
            raise UserError("nothing is in Production yet: `make run` brings a first version there")
        release = bento_of_tag(current.bento, home.bentoml).path / "src" / "release"
    try:
        manifest = read_release(release).manifest
    except ReleaseError as error:
        raise UserError(str(error)) from None
    document = describe(manifest, by_id=by_id, keys=keys)
    click.echo(msgspec.json.format(msgspec.json.encode(document)).decode())


@cli.command()
@click.argument("names", nargs=-1, metavar="[CASE]...")
@click.option("--short", is_flag=True, help="Only the three worst, shortened.")
@click.option("--jobs", type=click.IntRange(1, 16), default=2, help="Cases at a time. Default: 2.")
@click.option("--begin", "begins", hidden=True, is_flag=True)
@click.option("--from", "start", hidden=True, type=click.Path(path_type=Path))
def drill(names: tuple[str, ...], short: bool, jobs: int, begins: bool, start: Path | None) -> None:
    """Run CASEs of the drill, or all: months of a simulated shop, and what the loop makes of them.

    Writes report.json and report.html to CHURN_HOME/drill. Exits with 1 when a goal is missed.
    """
    from churn_assets.drill.cases import CASES, SHORT, case_named

    home = Home.from_environment()
    if begins or start is not None:
        _import_skops()
        from churn_assets.defs.drill import begin, run_and_write

        home.prepare()
        if start is None:
            begin(home)
        else:
            run_and_write(case_named(names[0], short=short), home, start)
        return
    from churn_assets.drill.runner import run_cases

    chosen = [case_named(name, short=short) for name in names]
    chosen = chosen or list(SHORT if short else CASES)
    sys.exit(0 if run_cases(chosen, home, jobs=jobs, short=short) else 1)


@cli.group()
def keys() -> None:
    """API keys of the service: the file CHURN_API_KEYS names, or the home's own."""


@keys.command("add")
@click.argument("name")
@click.option("--rate", type=float, help="Requests a second, of one worker. Default: any number.")
@click.option("--days", type=click.IntRange(1), help="Valid for so long. Default: until revoked.")
def add_key(name: str, rate: float | None, days: int | None) -> None:
    """Make a key and print it, once: only its hash is kept."""
    from churn_assets.lifecycle import keys as files

    path = Home.from_environment().api_keys
    kept, key = files.add_key(path, name, now=datetime.now(UTC), rate=rate, days=days)
    click.echo(f"key {kept.id} of {kept.name} is in {path}; it is shown this once:", err=True)
    click.echo(key)


@keys.command("list")
def list_keys() -> None:
    """List the keys, without the keys themselves."""
    from churn_assets.lifecycle import keys as files

    path = Home.from_environment().api_keys
    found, now = files.list_keys(path), datetime.now(UTC)
    for key in found:
        until = f"until {key.expires_at:%Y-%m-%d}" if key.expires_at else "until revoked"
        if key.expires_at and key.expires_at <= now:
            until = f"expired {key.expires_at:%Y-%m-%d}"
        rate = f"{key.rate:g}/s" if key.rate else "any rate"
        click.echo(f"{key.id}  {key.name:20}  {key.created_at:%Y-%m-%d}  {until:18}  {rate}")
    if not found:
        click.echo(f"there are no keys in {path}; churn keys add NAME makes one")


@keys.command("revoke")
@click.argument("name")
def revoke_key(name: str) -> None:
    """Revoke the keys called NAME, or the one with this id; services know within a second."""
    from churn_assets.lifecycle import keys as files

    for key in files.revoke_keys(Home.from_environment().api_keys, name):
        click.echo(f"key {key.id} of {key.name} is revoked")


@cli.command("validate-data")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--min-rows", type=int, help="Default: 10000 for a FILE.")
@click.option("--max-null-ratio", type=float, help="Default: 0.05 for a FILE.")
@click.option(
    "--schema", type=click.Path(path_type=Path), help="JSON schema of `churn schema` to hold it to."
)
def validate_data(
    file: Path | None,
    min_rows: int | None,
    max_null_ratio: float | None,
    schema: Path | None,
) -> None:
    """Judge a parquet or CSV file by the data gate; exits with 1 when it does not pass.

    Without FILE, the rows that a training started now would have, by the limits of the settings.
    """
    if file is not None:
        from churn_assets.data.gate import GatePolicy, validate_file

        default = GatePolicy()
        result = validate_file(
            file,
            default.min_rows if min_rows is None else min_rows,
            default.max_null_ratio if max_null_ratio is None else max_null_ratio,
            schema,
        )
    else:
        if schema is not None or min_rows is not None or max_null_ratio is not None:
            raise UserError(
                "--schema, --min-rows and --max-null-ratio are for a FILE; without one, "
                "data_gate in the settings holds"
            )
        home = _home_with_data()
        from churn_assets.defs.resources import Project
        from churn_assets.defs.training import judge_next_training_set

        result = judge_next_training_set(Project.of(home))
    click.echo(result.reason)
    for name, value in result.figures.items():
        click.echo(f"  {name}: {value}")
    sys.exit(0 if result.passed else 1)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
def offers(file: Path) -> None:
    """Record the retention offers of FILE, CSV or parquet: customer_id, and served_at with a zone.

    All of them or, when one cannot be used, none. What is known already stays as it is.
    """
    from churn_assets.data.lake import open_lake
    from churn_assets.data.offers import offers_from, read_offers_file, record_offers
    from churn_assets.data.sources import OfferedShop, ShopSourceConfig
    from churn_assets.settings import load_settings

    home, settings = _home_with_data(), load_settings()
    given = read_offers_file(file, _now())
    lake = open_lake(settings.lake or str(home.lake), settings.lake_endpoint_url)
    with home.exclusive("offers"):
        home.claim(settings.identity())
        if isinstance(settings.source, ShopSourceConfig):
            try:
                shop = OfferedShop(settings.source, settings.calendar.start, None)
                shop.check(offers_from(given))
            except UserError as error:
                raise UserError(f"{file}: {error}") from error
        new = record_offers(lake, given)
    click.echo(f"offers: {new:,} new, {given.num_rows - new:,} known")
    in_holdout = settings.holdout.membership()
    held_out = {customer for customer in given["customer_id"].to_pylist() if in_holdout(customer)}
    if held_out:
        click.echo(
            f"warning: {len(held_out):,} of the customers are in the hold-out, which nobody may "
            "treat (docs/holdout.md)",
            err=True,
        )


@cli.command()
@click.argument("table")
def schema(table: str) -> None:
    """Print the JSON schema of a table: a raw table, customer_features or training_set."""
    from churn_assets.data.gate import schema_json

    click.echo(schema_json(table))


@cli.command("training-set")
@click.option("--model-version", help="The set a registered version was trained on.")
@click.option("--hash", "data_hash", help="The set with this content hash.")
@click.option("--out", type=click.Path(path_type=Path), help="Write it here, as parquet.")
def training_set(model_version: str | None, data_hash: str | None, out: Path | None) -> None:
    """Bring a training set back and check its hash."""
    if (model_version is None) == (data_hash is None):
        raise UserError("name the training set by --model-version or by --hash, one of them")
    from churn_assets.data.lake import open_lake
    from churn_assets.lifecycle import lineage
    from churn_assets.settings import load_settings

    home = Home.from_environment()
    if model_version is not None:
        client, name = _registry(home)
        data_hash = lineage.data_hash_of(client, name, model_version)
    assert data_hash is not None
    settings = load_settings()
    lake = open_lake(settings.lake or str(home.lake), settings.lake_endpoint_url)
    restored = lineage.restore(lake, data_hash, out)
    click.echo(f"{restored.rows:,} rows, hash {restored.data_hash} checked")
    for part in restored.changed:
        click.echo(f"  changed in the lake since: {part.table} {part.day}")
    if out is not None:
        click.echo(f"written to {out}")


@cli.command()
def versions() -> None:
    """List the registered versions, newest first."""
    from churn_assets.lifecycle import lineage

    client, name = _registry(Home.from_environment())
    listed = lineage.versions(client, name)
    if not listed:
        click.echo(f"no version of {name} yet; `make run` trains one")
    for line in listed:
        click.echo(
            f"{line.version:>4}  {line.stage:10}  gates {line.gates:8}  {line.family:22}  "
            f"{line.registered_at:%Y-%m-%d %H:%M}  data {line.data_hash[:12]}  "
            f"run {line.mlflow_run}"
        )


@cli.command()
@click.argument("version", required=False)
def evaluate(version: str | None) -> None:
    """Print how a version was judged, the newest unless named; exits with 1 when refused."""
    from churn_assets.lifecycle.registry import read_registry
    from churn_assets.lifecycle.tracking import evaluation_of

    client, name = _registry(Home.from_environment())
    if version is None:
        version = max(read_registry(client, name).versions, key=int, default=None)
        if version is None:
            raise UserError(f"no version of {name} yet; `churn train` trains one")
    record = evaluation_of(client, name, version)
    click.echo(f"{name} {version}, {record.model.family}")
    if record.held_out_use is not None:
        click.echo(f"  {record.held_out_use.sentence}")
    for gate in record.gates:
        click.echo(f"  {'passed ' if gate.passed else 'refused'}  {gate.reason}")
    sys.exit(0 if record.passed else 1)


@cli.command()
def promote() -> None:
    """Carry out the latest promotion decision; exits with 1 when it refuses."""
    home = Home.from_environment()
    _registry(home)
    from churn_assets.defs.launch import promote as carry_out

    decision, production = carry_out(home)
    said = {
        "promote": "was promoted",
        "wait": "waits for a person: churn approve --who NAME --why REASON",
        "refuse": "is not promoted",
    }
    click.echo(f"version {decision.version} {said[decision.verdict]}")
    # Not the same where the version has been taken back since.
    click.echo(f"version {production} is in Production" if production else "nothing is there")
    for reason in decision.reasons:
        click.echo(f"  {reason}")
    sys.exit(1 if decision.verdict == "refuse" else 0)


@cli.command()
def deploy() -> None:
    """Package what is in Production as a bento and deploy it to the target of the settings."""
    home = Home.from_environment()
    _registry(home)
    from churn_assets.defs.launch import deploy as package

    done = package(home)
    click.echo(f"version {done.model_version} is served by {done.bento}")
    click.echo(f"target {done.target}: {done.said}")


@cli.command()
@click.option("--tag", help="The bento, when it is not the one in Production.")
def image(tag: str | None) -> None:
    """Build the container of the bento in Production."""
    from churn_assets.lifecycle.bento import bento_of_tag
    from churn_assets.lifecycle.container import build_image
    from churn_assets.lifecycle.pointer import read_current
    from churn_assets.settings import load_settings

    home = Home.from_environment()
    if tag is None:
        current = read_current(home.current)
        if current is None:
            raise UserError("nothing is in Production yet; `make run` brings a first version there")
        tag = current.bento
    bento = bento_of_tag(tag, home.bentoml)
    click.echo(f"building the container of {bento.tag}, a minute the first time", err=True)
    built = build_image(bento, load_settings().deployment.image)
    click.echo(f"{built.pinned}  {built.size_bytes / 1e6:.0f} MB  {built.id}")


@cli.command()
@click.option("--who", required=True, help="Your name.")
@click.option("--why", required=True, help="Why it may serve.")
@click.option("--model-version", help="The version to promote, when it is not the newest.")
def approve(who: str, why: str, model_version: str | None) -> None:
    """Put the version in Staging into Production."""
    from churn_assets.lifecycle.promotion import Approval

    word = Approval(who, why)
    config = {"who": word.who, "why": word.why}
    _act("approve_promotion", "promotion_decision", config, version=model_version)


@cli.command()
@click.option("--who", required=True, help="Your name.")
@click.option("--why", required=True, help="What is wrong with the version in Production.")
@click.option("--to", help="The version to go back to, when it is not the last known good one.")
def rollback(who: str, why: str, to: str | None) -> None:
    """Take the version in Production back."""
    from churn_assets.lifecycle.promotion import Approval

    word = Approval(who, why)
    _act("rollback", "production_release", {"who": word.who, "why": word.why}, to=to)


@cli.group()
def trial() -> None:
    """A version in Staging beside the one in Production, on live requests."""


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


_WHO = click.option("--who", default=_account, help="Your name (default: of your account).")


@trial.command("start")
@click.argument("version")
@click.option("--share", type=float, help="Of the customers, whom it answers.")
@click.option(
    "--shadow/--no-shadow", default=None, help="Both models score every request, or each its own."
)
@_WHO
@click.option("--why", default="a trial", help="Why it is worth one.")
def start_trial(version: str, share: float | None, shadow: bool | None, who: str, why: str) -> None:
    """Put VERSION, which is in Staging, on trial, and serve both models."""
    config = {"what": "start_trial", "share": share, "shadow": shadow, "version": version}
    _act_on_trial("start_trial", who, why, config)


@trial.command("stop")
@_WHO
@click.option("--why", default="enough was seen", help="Why it ends.")
def stop_trial(who: str, why: str) -> None:
    """End the trial that is going on; its version stays in Staging."""
    _act_on_trial("stop_trial", who, why, {"what": "stop_trial"})


@trial.command("status")
def trial_status() -> None:
    """The trial that is going on, what it has shown so far, and the ones before."""
    home = Home.from_environment()
    client, name = _registry(home)
    from churn_assets.lifecycle.history import trials
    from churn_assets.lifecycle.registry import read_registry

    found = trials(read_registry(client, name).history)
    if not found:
        click.echo("no version has been on trial; `churn trial start VERSION` begins a trial")
        return
    from churn_assets.monitoring.trial import last_report

    report = last_report(home.records, found[-1].id)
    for each in reversed(found):
        click.echo(each.line())
        if each is found[-1]:
            for line in report.lines() if report else ["not judged yet: job trial, daily"]:
                click.echo(f"  {line}")


def _act_on_trial(job: str, who: str, why: str, config: Mapping[str, object]) -> None:
    from churn_assets.lifecycle.promotion import Approval

    word = Approval(who, why)
    _act(job, "production_release", {"who": word.who, "why": word.why}, **config)


@cli.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def clean(dry_run: bool) -> None:
    """Remove versions archived for long enough, with their releases and bentos."""
    from churn_assets.lifecycle import cleaning
    from churn_assets.lifecycle.registry import read_registry
    from churn_assets.settings import load_settings

    home = Home.from_environment()
    client, name = _registry(home)
    policy, now = load_settings().registry, datetime.now(UTC)
    if dry_run:
        done = cleaning.plan_cleaning(read_registry(client, name), policy, home, now=now)
    else:
        done = cleaning.clean(client, name, policy, home, now=now)
    click.echo("\n".join(done.lines()))


def _act(job: str, asset: str, config: Mapping[str, object], **more: object) -> None:
    home = Home.from_environment()
    _registry(home)
    from churn_assets.defs.launch import act

    given = {name: value for name, value in more.items() if value not in (None, "")}
    act(home, job, asset, {**config, **given})


@cli.command()
@click.option("--on", "day", help="What was in Production then: 2026-03-03, or 2026-03-03T14:00.")
@click.option("--json", "as_json", is_flag=True, help="For a machine: a JSON list of steps.")
def history(day: str | None, as_json: bool) -> None:
    """What happened in the registry, or what was in Production, who put it there and on what."""
    import msgspec

    from churn_assets.lifecycle.history import in_production, moment
    from churn_assets.lifecycle.registry import read_registry

    then = moment(day) if day is not None else None
    steps = read_registry(*_registry(Home.from_environment())).history
    there = in_production(steps, then) if then is not None else []
    if as_json:
        shown = steps if then is None else [tenure.step for tenure in there]
        click.echo(msgspec.json.encode(shown))
    elif then is None:
        for step in steps:
            click.echo(step.line())
        if not steps:
            click.echo("nothing has happened yet; `make run` trains a first version")
    else:
        for tenure in there:
            click.echo("\n".join(tenure.lines()))
        if not there:
            click.echo(f"nothing was in Production on {day}")


@cli.command()
@click.option("--all", "every", is_flag=True, help="Also those that asked for nothing.")
@click.option("--days", type=click.IntRange(1), default=30, help="Of the last so many days.")
def decisions(every: bool, days: int) -> None:
    """What was decided on retraining and rollback, the newest last, and why."""
    from datetime import timedelta

    from churn_assets.lifecycle.records import every_record
    from churn_assets.monitoring.retraining import RetrainingDecision
    from churn_assets.monitoring.rollback import RollbackDecision

    records, since = Home.from_environment().records, _now() - timedelta(days=days)
    made = [
        *every_record(records, "retraining_decision", RetrainingDecision),
        *every_record(records, "rollback_decision", RollbackDecision),
    ]
    shown = [d for d in made if d.at >= since and (every or d.action != "nothing")]
    for one in sorted(shown, key=lambda decision: decision.at):
        click.echo(f"{one.at:%Y-%m-%d %H:%M}  {one.verdict}: {one.action}  [{one.id}]")
        for reason in one.reasons:
            click.echo(f"  {reason}")
    if not shown:
        click.echo(f"nothing was asked for in the last {days} days; --all shows every decision")


def _proposals(home: Home) -> list[Proposal]:
    from churn_assets.lifecycle.proposals import Proposal, open_proposals
    from churn_assets.lifecycle.records import every_record
    from churn_assets.monitoring.retraining import RetrainingDecision

    made = every_record(home.records, "retraining_decision", RetrainingDecision)
    proposed = [Proposal(d.id, d.proposal, d.at) for d in made if d.proposal]
    return open_proposals(home.proposals, proposed)


@cli.group(invoke_without_command=True)
@click.pass_context
def proposals(context: click.Context) -> None:
    """What decisions propose to persons, such as wider features, and what became of it."""
    if context.invoked_subcommand is not None:
        return
    found = _proposals(Home.from_environment())
    for one in found:
        click.echo(one.line())
    if not found:
        click.echo("nothing has been proposed")


@proposals.command("answer")
@click.argument("identity", metavar="ID")
@click.argument("verdict", type=click.Choice(["accepted", "declined"]))
@click.option("--who", default=_account, help="Who decides. Default: your account.")
@click.option("--why", required=True, help="The reason.")
def answer_proposal(
    identity: str, verdict: Literal["accepted", "declined"], who: str, why: str
) -> None:
    """Say what becomes of a proposal; it is kept with your name."""
    from churn_assets.lifecycle.proposals import answer

    home = Home.from_environment()
    done = answer(home.proposals, _proposals(home), identity, verdict, who=who, why=why, now=_now())
    click.echo(done.line())


def _home_with_data() -> Home:
    home = Home.from_environment()
    if not home.has_data():
        raise UserError(f"there is no data in {home.root} yet; `make run` brings it in")
    home.prepare()
    return home


@cli.command()
@click.argument("version")
def lineage(version: str) -> None:
    """Print where a registered version comes from and what was made of it.

    VERSION is the `model_version` of any prediction.
    """
    from churn_assets.lifecycle.lineage import lineage_of

    home = Home.from_environment()
    client, name = _registry(home)
    for line in lineage_of(client, name, version, home).lines():
        click.echo(line)


def _registry(home: Home) -> tuple[MlflowClient, str]:
    from churn_assets.settings import load_settings

    name = load_settings().model_name
    _require_dagster(home)
    from mlflow import MlflowClient

    return MlflowClient(home.mlflow_uri), name


@cli.command()
@click.argument("target", type=click.Path(path_type=Path))
def backup(target: Path) -> None:
    """Copy all state to TARGET: a .tar, .tar.gz or .tgz, or a folder. Nothing has to be stopped."""
    from churn_assets.lifecycle.backup import back_up
    from churn_assets.lifecycle.state_places import state_of
    from churn_assets.settings import load_settings

    home = Home.from_environment()
    made = back_up(home, state_of(home, load_settings()), target, now=datetime.now(UTC))
    click.echo("\n".join(made.lines()))
    click.echo(f"{home.root} is backed up in {target}")


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Also where there is state, which goes.")
def restore(source: Path, replace: bool) -> None:
    """Bring the home back from SOURCE, which `churn backup` made; nothing may be using it."""
    from churn_assets.lifecycle.restore import restore as bring_back
    from churn_assets.lifecycle.state_places import state_of
    from churn_assets.settings import load_settings

    home = Home.from_environment()
    state = state_of(home, load_settings())
    made = bring_back(home, state, source, replace=replace, say=click.echo)
    click.echo("\n".join(made.lines()))
    click.echo(f"{home.root} is as {made.home} was at {made.made_at:%Y-%m-%d %H:%M} UTC")


@cli.command()
@click.option(
    "--backup",
    "target",
    type=click.Path(path_type=Path),
    help="Where the backup goes. Default: beside the home.",
)
@click.option("--no-backup", is_flag=True, help="When you have made one.")
def upgrade(target: Path | None, no_backup: bool) -> None:
    """Bring a home of an older version to the formats of this one; backs it up first."""
    from churn_assets.lifecycle.backup import back_up
    from churn_assets.lifecycle.state_places import state_of
    from churn_assets.lifecycle.upgrade import upgrade as bring_up
    from churn_assets.settings import load_settings

    home, now = Home.from_environment(), datetime.now(UTC)
    state = state_of(home, load_settings())
    kept = target or home.root.with_name(f"{home.root.name}-before-{now:%Y%m%dT%H%M%S}.tar")

    def keep() -> None:
        back_up(home, state, kept, now=now)
        click.echo(f"backed up in {kept}")

    bring_up(home, log=state.log, back_up=None if no_backup else keep, say=click.echo)


@cli.command()
def reconcile() -> None:
    """Give every MLflow run the ending its Dagster run had."""
    home = Home.from_environment()
    home.prepare()
    from churn_assets.defs.launch import reconcile_mlflow

    for run_id, ending in reconcile_mlflow(home).items():
        click.echo(f"{run_id} {ending}")


@cli.group(invoke_without_command=True)
@click.pass_context
def alerts(context: click.Context) -> None:
    """List what is wrong at the moment, and the messages that wait to be sent."""
    if context.invoked_subcommand is not None:
        return
    from churn_assets.monitoring.alert_delivery import channels_of
    from churn_assets.monitoring.alert_outbox import Outbox
    from churn_assets.monitoring.alerts import waits_until
    from churn_assets.settings import load_settings

    home, policy = Home.from_environment(), load_settings().alerts
    outbox = Outbox(home.alerts, policy)
    there = home.alerts.exists()
    open_ones, waiting = (outbox.open(), outbox.waiting()) if there else ([], [])
    click.echo(f"{len(open_ones)} open")
    for condition in open_ones:
        alert = condition.alert
        click.echo(f"  {alert.severity:8}  {condition.since:%Y-%m-%d %H:%M}  {alert.title}")
        click.echo(f"            {alert.what}")
        click.echo(f"            being done: {alert.doing}")
        if (told_from := waits_until(condition, policy)) is not None:
            click.echo(f"            sent if it lasts until {told_from:%Y-%m-%d %H:%M}")
        click.echo(f"            {alert.key}  {alert.link or ''}".rstrip())
    click.echo(f"{len(waiting)} not delivered")
    for line in (line for each in waiting for line in each.lines()):
        click.echo(f"  {line}")
    labels = [channel.label for channel in channels_of(policy.places, os.environ)]
    click.echo(f"sent to {', '.join(labels) or 'nobody: alerts.urls is empty (docs/alerts.md)'}")


@alerts.command("test")
def alerts_test() -> None:
    """Send a message to every URL now; exits with 1 unless it arrives everywhere."""
    from churn_assets.monitoring.alert_delivery import AppriseSender, channels_of
    from churn_assets.monitoring.alerts import NO_URL, test_message
    from churn_assets.settings import load_settings
    from churn_assets.up import DAGSTER

    policy, send = load_settings().alerts, AppriseSender(os.environ)
    message = test_message(_now(), policy.dagster_url or DAGSTER.url)
    answers = {c.label: send(c, message) for c in channels_of(policy.places, os.environ)}
    for label, error in answers.items():
        click.echo(f"{label}: {'arrived' if error is None else f'did not arrive: {error}'}")
    if not answers:
        click.echo(NO_URL)
    sys.exit(1 if not answers or any(answers.values()) else 0)


@alerts.command("check")
def alerts_check() -> None:
    """Alert when Dagster's daemon is not running, which no sensor can; exits with 1 then.

    Exits with 2, and alerts of that, when Dagster's storage cannot be had. For cron, or another
    scheduler outside of Dagster.
    """
    home = Home.from_environment()
    _require_dagster(home)
    from churn_assets.defs.alerting import check_daemon

    unhealthy = check_daemon(home)
    click.echo("\n".join(f"no heartbeat: {name}" for name in unhealthy) or "every daemon runs")
    sys.exit(1 if unhealthy else 0)


@alerts.command("close")
@click.argument("key")
@click.option("--who", default=_account, help="Your name (default: of your account).")
@click.option("--why", required=True, help="Why it needs nobody any longer.")
def alerts_close(key: str, who: str, why: str) -> None:
    """Close the alert KEY by hand; it opens again when what it is about happens again."""
    from churn_assets.monitoring.alert_outbox import Outbox
    from churn_assets.settings import load_settings

    home = Home.from_environment()
    outbox = Outbox(home.alerts, load_settings().alerts)
    if not outbox.clear(key, now=_now(), why=f"closed by {who}: {why}"):
        raise UserError(f"no alert {key} is open; `churn alerts` lists those that are")
    click.echo(f"{key} is closed")


def _import_skops() -> None:
    """Before all else that a training imports.

    It looks each of scipy's functions up in every module that is there, which takes seconds later.
    """
    import skops.io  # noqa: F401


def _now() -> datetime:
    from churn_assets.contract import clock

    try:
        return clock.now(os.environ)
    except ValueError as error:
        raise UserError(str(error)) from error


def _require_dagster(home: Home) -> None:
    if not home.dagster.is_dir():
        raise UserError(f"nothing has run in {home.root} yet; `make run` does, or set CHURN_HOME")
    home.prepare()


def main() -> None:
    """Entry point: a UserError is one line on standard error and exit code 2; Ctrl-C gives 130."""
    # A process manager's stop is a Ctrl-C: what was begun is closed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(cli.main(standalone_mode=False))
    except UserError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
