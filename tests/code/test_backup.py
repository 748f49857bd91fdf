"""All state in one file and back: whole, proven before anything changes, or refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import tarfile
import threading
import uuid
from collections.abc import Callable, Generator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import pytest

from churn_assets.contract.logged import CREATE_TABLE, TABLE, hold
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.home_format import RESTORING, Marker, current_marker, write_marker
from churn_assets.lifecycle import backup as backups
from churn_assets.lifecycle import postgres_dump
from churn_assets.lifecycle import restore as restores
from churn_assets.lifecycle.backup import MANIFEST, Manifest, back_up
from churn_assets.lifecycle.deployment import announced
from churn_assets.lifecycle.postgres_dump import dump, load
from churn_assets.lifecycle.restore import restore
from churn_assets.lifecycle.state_places import files_of, state_of
from churn_assets.settings import Settings, load_settings
from churn_service.log_postgres import PostgresLog

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
PARTITION = "lake/orders/day=2024-01-01/part-0.parquet"


@pytest.fixture(autouse=True)
def own_environment() -> Generator[None]:
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("CHURN_")]:
            if name != "CHURN_TEST_POSTGRES":
                del os.environ[name]
        yield


@pytest.fixture
def settings() -> Settings:
    return load_settings()


def rooms_of(home: Home) -> list[Path]:
    """Every file and folder a home knows of itself."""
    named = [getattr(home, name) for name, kind in vars(Home).items() if isinstance(kind, property)]
    inside = [path for path in named if isinstance(path, Path) and path.is_relative_to(home.root)]
    # It is of a process that runs.
    return [path for path in inside if path != home.running_service]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """One with a file of every kind; its database has rows that are only in the write-ahead log."""
    made = Home(tmp_path / "home")
    made.prepare()
    texts = {
        "serving/current.json": "{}",
        "serving/keys.json": '{"keys": []}',
        "serving/releases/v1-a/model.onnx": "a model",
        "records/model/latest.json": json.dumps({"path": f"{made.root}/reports/page.html"}),
        "monitoring/metrics.jsonl": '{"a": 1}\n{"b": 2}\n',
        PARTITION: "rows",
        "new_room/something.txt": "of a room nobody here knows",
        "drill/home/lake/x": "no state",
        "run.lock": "",
        "lake/orders/.tmp-host-1-abc/part-0.parquet": "half",
    }
    for name, text in texts.items():
        path = made.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for room in rooms_of(made):
        if not room.exists() and not room.suffix:
            room.mkdir(parents=True)
        path = room / "a" / "file" if room.is_dir() else room
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(f"{room}\n")
    (made.root / "serving/keys.json").chmod(0o600)
    os.utime(made.root / PARTITION, ns=(1_700_000_000_123_456_789, 1_700_000_000_123_456_789))
    with closing(sqlite3.connect(made.root / "mlflow.db")) as connection, connection:
        connection.execute("CREATE TABLE tags (value VARCHAR)")
        connection.execute("INSERT INTO tags VALUES (?)", (f"{made.root}/mlartifacts/1",))
    return made


@pytest.fixture(params=["b.tar", "b.tar.gz", "b.tgz", "folder"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


def backed_up(home: Home, settings: Settings, target: Path) -> Manifest:
    return back_up(home, state_of(home, settings), target, now=NOW)


def restored(
    home: Home,
    settings: Settings,
    source: Path,
    *,
    replace: bool = False,
    say: Callable[[str], object] = print,
) -> Manifest:
    return restore(home, state_of(home, settings), source, replace=replace, say=say)


def contents(home: Home) -> dict[str, tuple[bytes, int, int]]:
    """Every file there is, with its permissions and time, but for those of locks."""
    return {
        path.relative_to(home.root).as_posix(): (
            path.read_bytes(),
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in sorted(home.root.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def test_a_home_comes_back_whole_at_its_place(home: Home, settings: Settings, target: Path) -> None:
    made = backed_up(home, settings, target)
    before = contents(home)
    for room in rooms_of(home):
        under = f"home/{room.relative_to(home.root).as_posix()}"
        assert any(f"{name}/".startswith(f"{under}/") for name in made.files), room
    shutil.rmtree(home.root)
    assert restored(home, settings, target) == made
    after = contents(home)
    left_out = ("drill/home/lake/x", "lake/orders/.tmp-host-1-abc/part-0.parquet")
    assert after.keys() == before.keys() - set(left_out)
    for name in after.keys() - {"mlflow.db"}:
        assert after[name] == before[name], name
    assert not list(home.root.glob(".re*"))
    home.check_format()
    others = [p for p in target.parent.iterdir() if p not in (target, home.root)]
    assert others == []
    assert target.stat().st_mode & 0o077 == 0


def test_what_refers_to_something_is_copied_before_it(home: Home, settings: Settings) -> None:
    names = [place.name for place in state_of(home, settings).places]
    assert names[0] == "serving/current.json"
    for earlier, later in (
        *(("dagster", "records"), ("records", "mlflow.db"), ("mlflow.db", "serving")),
        *(("mlflow.db", "mlartifacts"), ("mlflow.db", "bentoml"), ("serving/log", "lake")),
        *((name, "lake") for name in names if name != "lake"),
    ):
        assert names.index(earlier) < names.index(later), (earlier, later)


def test_the_registry_of_feast_is_not_copied_while_it_is_written(
    home: Home, settings: Settings, tmp_path: Path
) -> None:
    """It is written in place, by who holds the lock beside it."""
    home.feast_registry.write_bytes(b"half")
    with home.feast_registry.with_name("registry.db.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copying = threading.Thread(target=backed_up, args=(home, settings, tmp_path / "folder"))
        copying.start()
        copying.join(timeout=1)
        assert copying.is_alive()
        home.feast_registry.write_bytes(b"half and half")
        fcntl.flock(lock, fcntl.LOCK_UN)
    copying.join(timeout=30)
    copy = tmp_path / "folder" / "home" / "feast" / "registry.db"
    assert copy.read_bytes() == b"half and half"


def test_a_home_of_a_newer_version_is_not_backed_up_by_this_one(
    home: Home, settings: Settings, tmp_path: Path
) -> None:
    marker = current_marker()
    write_marker(home.root, Marker({**marker.formats, "lake": 99}, marker.libraries))
    with pytest.raises(UserError, match="lake has format 99"):
        backed_up(home, settings, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


def test_a_home_comes_back_at_another_place_and_refers_to_itself(
    home: Home, settings: Settings, tmp_path: Path
) -> None:
    backed_up(home, settings, tmp_path / "b.tar")
    other = Home(tmp_path / "elsewhere" / "home")
    restored(other, settings, tmp_path / "b.tar")
    with closing(sqlite3.connect(other.root / "mlflow.db")) as connection:
        assert connection.execute("SELECT value FROM tags").fetchone() == (
            f"{other.root}/mlartifacts/1",
        )
    record = json.loads((other.records / "model/latest.json").read_text())
    assert record["path"] == f"{other.root}/reports/page.html"


def test_a_backup_is_of_one_moment_while_a_database_is_written(
    home: Home, settings: Settings, tmp_path: Path
) -> None:
    """Two tables that are always changed together, by a writer that does not stop."""
    path, stop = home.root / "alerts" / "outbox.db", threading.Event()
    path.unlink()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE one (n)")
        connection.execute("CREATE TABLE two (n)")

    def write() -> None:
        with closing(sqlite3.connect(path, timeout=30)) as connection:
            while not stop.is_set():
                with connection:
                    connection.execute("INSERT INTO one VALUES (zeroblob(5000))")
                    connection.execute("INSERT INTO two VALUES (1)")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        backed_up(home, settings, tmp_path / "folder")
    finally:
        stop.set()
        writer.join()
    copy = tmp_path / "folder" / "home" / "alerts" / "outbox.db"
    with closing(sqlite3.connect(copy)) as connection:
        (one,), (two,) = (
            connection.execute(f"SELECT count(*) FROM {name}").fetchone() for name in ("one", "two")
        )
        assert one == two
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_half_written_line_is_left_out(home: Home, settings: Settings, tmp_path: Path) -> None:
    with home.metrics.open("a") as file:
        file.write('{"half": ')
    backed_up(home, settings, tmp_path / "folder")
    copy = tmp_path / "folder" / "home" / "monitoring" / "metrics.jsonl"
    assert copy.read_text() == '{"a": 1}\n{"b": 2}\n'


def test_what_goes_away_while_it_is_copied_makes_it_begin_again(
    home: Home, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cleaning removes a release between the listing of its folder and the copying of it."""
    gone = [home.releases / "v1-a" / "model.onnx"]
    add = backups._add

    def and_remove(sink: object, name: str, path: Path, scratch: Path) -> object:
        if path in gone:
            gone.remove(path)
            shutil.rmtree(path.parent)
        return add(sink, name, path, scratch)  # ty: ignore[invalid-argument-type]

    monkeypatch.setattr(backups, "_add", and_remove)
    made = backed_up(home, settings, tmp_path / "b.tar")
    assert not gone
    assert not [name for name in made.files if "v1-a" in name]
    restored(Home(tmp_path / "other"), settings, tmp_path / "b.tar")


def test_a_backup_is_refused_where_there_is_none_to_make(
    home: Home, settings: Settings, tmp_path: Path
) -> None:
    taken = tmp_path / "b.tar"
    taken.touch()
    for target, says in ((taken, "is there already"), (home.root / "b.tar", "in the home itself")):
        with pytest.raises(UserError, match=says):
            backed_up(home, settings, target)
    with pytest.raises(UserError, match="could not be written"):
        backed_up(home, settings, tmp_path / "none" / "b.tar")
    with pytest.raises(UserError, match="there is nothing in"):
        backed_up(Home(tmp_path / "empty"), settings, tmp_path / "c.tar")
    (home.root / "mlflow.db").write_bytes(b"SQLite format 3\0" + bytes(5000))
    with pytest.raises(UserError, match=r"mlflow.db cannot be copied.*mend it or move it"):
        backed_up(home, settings, tmp_path / "c.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "home"]


# A restore that is refused changes nothing.


def no_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return "has no manifest.json, so it is incomplete"


def half_a_manifest(folder: Path) -> str:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:-40])
    return "its manifest.json is not one"


def changed(folder: Path) -> str:
    path = folder / "home" / PARTITION
    path.write_text("rowt")
    return f"part lake: home/{PARTITION} is not what was copied"


def missing(folder: Path) -> str:
    (folder / "home/serving/releases/v1-a/model.onnx").unlink()
    return "part serving: home/serving/releases/v1-a/model.onnx is missing"


def added(folder: Path) -> str:
    (folder / "home/serving/releases/v1-a/more").write_text("more")
    return "part serving: home/serving/releases/v1-a/more is in no part"


def of_another_format(folder: Path) -> str:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    return "has format 2, this code reads 1"


def of_a_newer_home(folder: Path) -> str:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["formats"]["lake"] = 99
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return "lake has format 99"


def counted_wrongly(folder: Path) -> str:
    """As where the list of files was cut by hand."""
    manifest = json.loads((folder / MANIFEST).read_text())
    name = f"home/{PARTITION}"
    del manifest["files"][name]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / name).unlink()
    return "counts other files than it lists"


@pytest.mark.parametrize(
    "bad",
    [
        *(no_manifest, half_a_manifest, changed, missing, added, of_another_format),
        *(of_a_newer_home, counted_wrongly),
    ],
    ids=lambda bad: bad.__name__,
)
def test_a_bad_backup_is_refused_and_nothing_is_changed(
    home: Home, settings: Settings, tmp_path: Path, bad: Callable[[Path], str]
) -> None:
    folder = tmp_path / "folder"
    backed_up(home, settings, folder)
    says = bad(folder)
    before = contents(home)
    with pytest.raises(UserError) as refused:
        restored(home, settings, folder, replace=True)
    assert says in str(refused.value)
    assert contents(home) == before
    home.check_format()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_a_file_that_was_cut_off_is_refused(
    home: Home, settings: Settings, tmp_path: Path, suffix: str, share: float
) -> None:
    source = tmp_path / f"b{suffix}"
    backed_up(home, settings, source)
    content = source.read_bytes()
    source.write_bytes(content[: int(len(content) * share)])
    before = contents(home)
    with pytest.raises(UserError, match="damaged or incomplete"):
        restored(home, settings, source, replace=True)
    assert contents(home) == before


@pytest.mark.parametrize("name", ["../outside", "home/../../outside", "ABSOLUTE"])
def test_a_name_that_leads_out_of_the_home_is_refused(
    home: Home, settings: Settings, tmp_path: Path, name: str
) -> None:
    source, outside = tmp_path / "b.tar", tmp_path / "outside"
    with tarfile.open(source, "w") as archive:
        entry = archive.gettarinfo(__file__)
        # A tar drops the slash only of what it adds itself.
        entry.name = str(outside) if name == "ABSOLUTE" else name
        with open(__file__, "rb") as content:
            archive.addfile(entry, content)
    with pytest.raises(UserError, match="damaged or incomplete: it names"):
        restored(home, settings, source, replace=True)
    assert not outside.exists()
    assert not (home.root / "outside").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_what_is_no_file_is_not_unpacked(
    home: Home, settings: Settings, tmp_path: Path, kind: bytes
) -> None:
    """A link in the place of a file would show another one, of the archive or of the machine."""
    source = tmp_path / "b.tar"
    backed_up(home, settings, source)
    with tarfile.open(source, "a") as archive:
        entry = tarfile.TarInfo("home/records/link")
        entry.type, entry.linkname = kind, f"home/{PARTITION}"
        archive.addfile(entry)
    before = contents(home)
    with pytest.raises(UserError, match=r"home/records/link is no file"):
        restored(home, settings, source, replace=True)
    assert contents(home) == before


def test_a_home_that_is_not_empty_is_replaced_on_request_alone(
    home: Home, settings: Settings, tmp_path: Path
) -> None:
    backed_up(home, settings, tmp_path / "b.tar")
    (home.records / "later.json").write_text("{}")
    (home.root / "later_room").mkdir()
    (home.root / "later_room" / "file").write_text("of a room that came later")
    (home.root / "mlflow.db-wal").write_bytes(b"of the database that was here")
    before = contents(home)
    with pytest.raises(UserError, match="is not empty; --replace"):
        restored(home, settings, tmp_path / "b.tar")
    assert contents(home) == before
    restored(home, settings, tmp_path / "b.tar", replace=True)
    after = contents(home)
    assert "records/later.json" not in after
    assert "later_room/file" not in after
    assert "mlflow.db-wal" not in after
    assert after[PARTITION] == before[PARTITION]


def test_a_home_that_is_used_is_not_replaced(
    home: Home, settings: Settings, tmp_path: Path
) -> None:
    source = tmp_path / "b.tar"
    backed_up(home, settings, source)
    for command in ("run", "up"):
        with home.exclusive(command), pytest.raises(UserError, match=f"another `make {command}`"):
            restored(home, settings, source, replace=True)
    with (home.root / "mlflow.db.lock").open("a") as transition:
        fcntl.flock(transition, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="a transition of the registry"):
            restored(home, settings, source, replace=True)
    with (
        announced(home, "http://127.0.0.1:9"),
        pytest.raises(UserError, match=r"the service at http://127\.0\.0\.1:9 uses"),
    ):
        restored(home, settings, source, replace=True)
    worker = hold(home.prediction_log / "w.lock")
    assert worker is not None
    with pytest.raises(UserError, match="a service writes its predictions"):
        restored(home, settings, source, replace=True)
    os.close(worker)
    restored(home, settings, source, replace=True)


def test_a_restore_that_was_stopped_is_run_again(
    home: Home, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "b.tar"
    backed_up(home, settings, source)
    before, moved = contents(home), []
    move = shutil.move

    def and_stop(new: str, place: str) -> object:
        moved.append(place)
        if len(moved) == 6:
            raise KeyboardInterrupt
        return move(new, place)

    monkeypatch.setattr(restores.shutil, "move", and_stop)
    with pytest.raises(KeyboardInterrupt):
        restored(home, settings, source, replace=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match="stopped in the middle; run it again"):
        home.check_format()
    restored(home, settings, source, replace=True)
    home.check_format()
    after = contents(home)
    for name in after.keys() - {"mlflow.db"}:
        assert after[name] == before[name], name
    assert not (home.root / RESTORING).exists()
    assert not list(home.root.glob(".re*"))


# Parts that lie outside of the home.


def test_parts_outside_of_the_home_come_back_where_the_configuration_has_them(
    home: Home, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake, keys = tmp_path / "big" / "lake", tmp_path / "etc" / "keys.json"
    for path, text in ((lake / "orders" / "x.parquet", "x"), (keys, '{"keys": []}')):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.setenv("CHURN_API_KEYS", str(keys))
    config = tmp_path / "churn.yaml"
    shop = "source: {kind: shop}\ncalendar: {start: 2024-01-01}\n"
    config.write_text(f"{shop}lake: {lake}\nonline_store: {{kind: redis, url: redis://h:1/0}}\n")
    made = backed_up(home, load_settings(config), tmp_path / "b.tar")
    assert made.outside == ("outside/api_keys", "outside/lake")
    assert "make run" in made.elsewhere["online_store"]
    shutil.rmtree(lake.parent)
    keys.unlink()
    other = Home(tmp_path / "other")
    with pytest.raises(UserError, match="other parts outside of the home"):
        restored(other, settings, tmp_path / "b.tar")
    assert next(files_of(state_of(other, settings).places[0]), None) is None
    restored(other, load_settings(config), tmp_path / "b.tar")
    assert (lake / "orders" / "x.parquet").read_text() == "x"
    assert keys.read_text() == '{"keys": []}'
    config.write_text(f"{shop}lake: s3://bucket/lake\n")
    made = backed_up(home, load_settings(config), tmp_path / "c.tar")
    assert "versioning of the bucket" in made.elsewhere["lake"]


@pytest.fixture
def database() -> Generator[str]:
    """A database of its own, for the time of a test."""
    server = os.environ.get("CHURN_TEST_POSTGRES")
    if not server:
        pytest.skip("set CHURN_TEST_POSTGRES to the URL of a Postgres database to run this")
    if not shutil.which("pg_dump"):
        pytest.skip("install Postgres' client programs to run this")
    import psycopg
    from sqlalchemy.engine import make_url

    name = f"churn_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def asked(url: str, question: str) -> list[tuple]:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        done = connection.execute(question.encode())
        return done.fetchall() if done.description else []


def test_databases_of_postgres_come_back(
    home: Home, settings: Settings, tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    monkeypatch.setenv("CHURN_MLFLOW_URI", database)
    asked(database, "CREATE TABLE runs (id int PRIMARY KEY)")
    asked(database, "INSERT INTO runs VALUES (1), (2)")
    made = backed_up(home, settings, tmp_path / "b.tar")
    assert "postgres/mlflow" in made.files
    asked(database, "INSERT INTO runs VALUES (3)")
    with pytest.raises(UserError, match="is not empty; --replace"):
        restored(Home(tmp_path / "empty"), settings, tmp_path / "b.tar")
    with pytest.raises(UserError, match="restore with CHURN_HOME="):
        restored(Home(tmp_path / "empty"), settings, tmp_path / "b.tar", replace=True)
    with (
        psycopg.connect(database),
        pytest.raises(UserError, match="1 connections use"),
    ):
        restored(home, settings, tmp_path / "b.tar", replace=True)
    assert len(asked(database, "SELECT * FROM runs")) == 3
    restored(home, settings, tmp_path / "b.tar", replace=True)
    assert asked(database, "SELECT * FROM runs ORDER BY id") == [(1,), (2,)]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"no pg_dump.*postgresql-client"):
        backed_up(home, settings, tmp_path / "c.tar")


def test_of_a_shared_database_only_the_prediction_log_is_taken(
    home: Home, tmp_path: Path, database: str
) -> None:
    settings = with_log(tmp_path, database)
    asked(database, "CREATE TABLE theirs (id int)")
    assert "postgres/prediction_log" not in backed_up(home, settings, tmp_path / "a.tar").files
    asked(database, "CREATE TABLE churn_prediction_log_v1 (number int)")
    asked(database, "INSERT INTO churn_prediction_log_v1 VALUES (1)")
    backed_up(home, settings, tmp_path / "b.tar")
    asked(database, "INSERT INTO theirs VALUES (1)")
    asked(database, "DELETE FROM churn_prediction_log_v1")
    restored(home, settings, tmp_path / "b.tar", replace=True)
    assert asked(database, "SELECT * FROM theirs") == [(1,)]
    assert asked(database, "SELECT * FROM churn_prediction_log_v1") == [(1,)]


def with_log(tmp_path: Path, database: str) -> Settings:
    """Settings whose prediction log is in a database."""
    config = tmp_path / "churn.yaml"
    config.write_text(
        "source: {kind: shop}\ncalendar: {start: 2024-01-01}\n"
        f"serving: {{prediction_log: {{store: '{database}'}}}}\n"
    )
    return load_settings(config)


@pytest.mark.parametrize("began", ["empty", "with rows"])
def test_no_prediction_newer_than_the_backup_is_left(
    home: Home, tmp_path: Path, database: str, began: str
) -> None:
    """Whether the log was there when the backup was made, or a service made it later."""
    settings, rows = with_log(tmp_path, database), []
    if began == "with rows":
        asked(database, CREATE_TABLE)
        asked(database, f"INSERT INTO {TABLE} VALUES ('w', 1, 'old')")
        rows = [("w", 1)]
    backed_up(home, settings, tmp_path / "b.tar")
    asked(database, CREATE_TABLE)
    asked(database, f"INSERT INTO {TABLE} VALUES ('w', 2, 'new'), ('w', 3, 'new')")
    asked(database, "CREATE TABLE churn_prediction_log_v9 (of_a_newer_version int)")
    asked(database, "CREATE TABLE churn_predictions (theirs int)")
    told: list[str] = []
    restored(home, settings, tmp_path / "b.tar", replace=True, say=told.append)
    tables = {name for (name,) in asked(database, "SELECT tablename FROM pg_tables "
                                                  "WHERE schemaname = 'public'")}  # fmt: skip
    assert tables == {"churn_predictions"} | ({TABLE} if rows else set())
    if rows:
        assert asked(database, f"SELECT writer, number FROM {TABLE}") == rows
    assert f"prediction_log: {2 + len(rows)} rows were in postgresql://" in told[0]
    assert "churn_prediction_log_v9" in told[1]
    assert (TABLE in told[1]) is (not rows)


def test_a_service_that_logs_to_the_database_is_in_the_way(
    home: Home, tmp_path: Path, database: str
) -> None:
    settings = with_log(tmp_path, database)
    backed_up(home, settings, tmp_path / "b.tar")
    before = contents(home)
    with closing(PostgresLog(database)) as service:
        service.write([b"a record"])
        with pytest.raises(UserError, match=r"1 services write predictions to .*; stop"):
            restored(home, settings, tmp_path / "b.tar", replace=True)
        assert asked(database, f"SELECT number FROM {TABLE}") == [(1,)]
    assert contents(home) == before


def test_what_a_newer_version_made_is_no_hindrance(
    home: Home,
    settings: Settings,
    tmp_path: Path,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Back from an upgrade: its tables refer to those of before."""
    monkeypatch.setenv("CHURN_MLFLOW_URI", database.replace("postgresql:", "postgresql+psycopg:"))
    asked(database, "CREATE TABLE runs (id int PRIMARY KEY)")
    backed_up(home, settings, tmp_path / "b.tar")
    asked(database, "CREATE TABLE traces (run int REFERENCES runs (id))")
    asked(database, "CREATE VIEW counted AS SELECT count(*) FROM runs")
    told: list[str] = []
    restored(home, settings, tmp_path / "b.tar", replace=True, say=told.append)
    assert asked(database, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == [
        ("runs",)
    ]
    assert ["traces" in line for line in told] == [True]


def test_a_dump_that_cannot_be_loaded_changes_nothing_in_the_database(
    home: Home, settings: Settings, tmp_path: Path, database: str
) -> None:
    asked(database, "CREATE TABLE runs (id int PRIMARY KEY)")
    asked(database, "CREATE TYPE color AS ENUM ('red')")
    asked(database, "CREATE TABLE colors (one color)")
    dump(database, tmp_path / "dump")
    asked(database, "CREATE TABLE later (id int)")
    # Of a table in another schema, which is not taken away.
    asked(database, "CREATE SCHEMA theirs CREATE TABLE colors (one public.color)")
    with pytest.raises(UserError, match="failed and changed nothing"):
        load(database, tmp_path / "dump")
    assert {name for (name,) in asked(database, "SELECT tablename FROM pg_tables "
            "WHERE schemaname = 'public'")} == {"runs", "colors", "later"}  # fmt: skip


def test_a_dump_by_programs_newer_than_the_server_is_loaded(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of Postgres 17 set what servers before it refuse."""
    asked(database, "CREATE TABLE runs (note text)")
    setting = "SET transaction_timeout = 0;"
    asked(database, f"INSERT INTO runs VALUES ('a' || chr(10) || '{setting}' || chr(10))")
    dump(database, tmp_path / "dump")
    run = postgres_dump._run

    def as_newer_ones(program: str, url: str | None, *arguments: str) -> None:
        run(program, url, *arguments)
        if program == "pg_restore":
            script = tmp_path / "dump.sql"
            old = script.read_text()
            script.write_text(
                old.replace("SET lock_timeout = 0;", f"SET lock_timeout = 0;\n{setting}", 1)
            )

    monkeypatch.setattr(postgres_dump, "_run", as_newer_ones)
    monkeypatch.setattr(postgres_dump, "_TRANSACTION_TIMEOUT_SINCE", 999_999)
    assert load(database, tmp_path / "dump") == []
    assert asked(database, "SELECT note FROM runs") == [(f"a\n{setting}\n",)]


def test_where_dagster_keeps_its_storage_is_read_from_its_configuration(
    home: Home, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = home.dagster / "dagster.yaml"
    configuration.write_text(
        "storage: {postgres: {postgres_db: {username: me, password: {env: DB_PASSWORD}, "
        "hostname: db, db_name: dagster, port: 5433}}}\n"
    )
    with pytest.raises(UserError, match="takes DB_PASSWORD from the environment"):
        state_of(home, settings)
    monkeypatch.setenv("DB_PASSWORD", "p/w")
    urls = [place.url for place in state_of(home, settings).places if place.url]
    assert urls == ["postgresql://me:p%2Fw@db:5433/dagster"]
    configuration.write_text("storage: {postgres: {postgres_url: 'postgresql://db/d'}}\n")
    urls = [place.url for place in state_of(home, settings).places if place.url]
    assert urls == ["postgresql://db/d"]
    # A home that is to be brought back to another machine has none yet.
    monkeypatch.setenv("CHURN_DAGSTER_YAML", str(configuration))
    assert state_of(Home(home.root / "none"), settings).outside == ["postgres/dagster"]
