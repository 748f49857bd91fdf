"""An installation brought back from a backup: proven first, then put in place."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import msgspec

from churn_assets.contract.logged import LOG_APPLICATION, without_password
from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.home_format import RESTORING, Marker, refuse_newer
from churn_assets.lifecycle.backup import (
    ARCHIVES,
    FORMAT,
    MANIFEST,
    Manifest,
    copy_hashed,
    part_of,
)
from churn_assets.lifecycle.in_use import unused
from churn_assets.lifecycle.postgres_dump import count_rows, count_tables, count_users, load
from churn_assets.lifecycle.relocation import relocate
from churn_assets.lifecycle.state_places import HOME, OUTSIDE, Place, State, files_of

_REPLACED = ".replaced-"
_STAGED = ".restore-"
_NOTHING = "nothing was changed"


def restore(
    home: Home,
    state: State,
    source: Path,
    *,
    replace: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Manifest:
    """Bring `home` back from the backup at `source`, also when it was made of a home elsewhere.

    Everything is compared with the manifest before anything is changed. replace: what is there now
    may go; `say` is told what went from databases. Killed in the middle, the home is refused by
    every command until it is restored again. Raises UserError for a backup that is damaged or newer
    than this code, for a home that is used or not empty, and for another configuration than the
    backup's.
    """
    if not source.exists():
        raise UserError(f"there is no backup {source}; check the path")
    with unused(home, state.log):
        if not replace:
            _refuse_occupied(home, state)
        _refuse_used(state)
        for left in home.root.glob(f"{_STAGED}*"):
            shutil.rmtree(left)
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=home.root))
        try:
            manifest = _proven(source, staged)
            _refuse_elsewhere(home, state, manifest)
            (home.root / RESTORING).write_text(f'{{"from": "{source.name}"}}\n', encoding="utf-8")
            _put_in_place(home, state, staged, say)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        former = Path(manifest.home)
        if former != home.root:
            relocate(home, former)
        (home.root / RESTORING).unlink()
        for left in home.root.glob(f"{_REPLACED}*"):
            shutil.rmtree(left)
    return manifest


def _refuse_occupied(home: Home, state: State) -> None:
    there = [place for place in state.places if _is_there(place)]
    if there or (home.root / RESTORING).exists():
        what = there[0].path or without_password(there[0].url or "") if there else home.root
        raise UserError(
            f"{what} is not empty; --replace puts the backup in the place of all state that is "
            "there, or set CHURN_HOME to another folder"
        )


def _is_there(place: Place) -> bool:
    if place.url is not None:
        return count_tables(place.url, place.tables) > 0
    return next(files_of(place), None) is not None


def _refuse_used(state: State) -> None:
    for place in state.places:
        if place.url is None:
            continue
        # Others may use the database of the prediction log for their own.
        only = "%" if place.tables is None else LOG_APPLICATION
        if users := count_users(place.url, only):
            who = "connections use" if place.tables is None else "services write predictions to"
            raise UserError(f"{users} {who} {without_password(place.url)}; stop what uses it first")


def _proven(source: Path, staged: Path) -> Manifest:
    """The manifest of a backup whose files, each as it says, lie in `staged` now."""
    found: dict[str, tuple[int, str]] = {}
    try:
        for name, content in _entries(source):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise _damaged(source, f"it names {name!r}")
            found[name] = copy_hashed(content, staged / name)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise _damaged(source, f"it cannot be read to its end: {error}") from None
    found.pop(MANIFEST, None)
    try:
        content = (staged / MANIFEST).read_bytes()
        told = msgspec.json.decode(content)
        if isinstance(told, dict) and told.get("format") != FORMAT:
            raise UserError(
                f"{source} has format {told.get('format')}, this code reads {FORMAT}; use the "
                f"version of churn_assets that made it ({told.get('product')}); {_NOTHING}"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except FileNotFoundError:
        raise _damaged(source, f"it has no {MANIFEST}, so it is incomplete") from None
    except msgspec.DecodeError as error:
        raise _damaged(source, f"its {MANIFEST} is not one ({error})") from None
    (staged / MANIFEST).unlink()
    _compare(source, manifest, found)
    refuse_newer(source, Marker(manifest.formats, manifest.libraries))
    for name, copied in manifest.files.items():
        os.chmod(staged / name, copied.mode)
        os.utime(staged / name, ns=(copied.mtime_ns, copied.mtime_ns))
    return manifest


def _entries(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if source.suffix not in ARCHIVES:
        for folder, _, names in os.walk(source):
            for name in names:
                path = Path(folder) / name
                with path.open("rb") as content:
                    yield path.relative_to(source).as_posix(), content
        return
    with tarfile.open(source, "r:*") as archive:
        for entry in archive:
            content = archive.extractfile(entry) if entry.isreg() else None
            if content is None:
                raise tarfile.ReadError(f"{entry.name} is no file")
            yield entry.name, content


def _compare(source: Path, manifest: Manifest, found: dict[str, tuple[int, str]]) -> None:
    def part_with(name: str) -> str:
        of_home = name.removeprefix(f"{HOME}/").removeprefix(f"{OUTSIDE}/")
        fits = [p.name for p in manifest.parts if f"{of_home}/".startswith(f"{p.name}/")]
        return fits[0] if fits else name.partition("/")[0]

    wrong = {
        name: "is missing" if name not in found else "is not what was copied"
        for name, copied in manifest.files.items()
        if found.get(name) != (copied.size, copied.sha256)
    } | dict.fromkeys(found.keys() - manifest.files.keys(), "is in no part")
    for name, what in sorted(wrong.items()):
        raise _damaged(source, f"part {part_with(name)}: {name} {what}")
    total = part_of("", manifest.files)
    counted = sum(part.files for part in manifest.parts), sum(p.bytes for p in manifest.parts)
    if counted != (total.files, total.bytes):
        raise _damaged(source, f"its {MANIFEST} counts other files than it lists")


def _damaged(source: Path, why: str) -> UserError:
    return UserError(f"{source} is damaged or incomplete: {why}; use another backup, {_NOTHING}")


def _refuse_elsewhere(home: Home, state: State, manifest: Manifest) -> None:
    """Where a restore could not lead to what the configuration says."""
    if sorted(manifest.outside) != state.outside:
        raise UserError(
            "the backup has other parts outside of the home "
            f"({', '.join(manifest.outside) or 'none'}) than this configuration "
            f"({', '.join(state.outside) or 'none'}); restore with the configuration and "
            f"environment it was made with; {_NOTHING}"
        )
    for place in state.places:
        # The prediction log's tables are made by its first service.
        if place.url is not None and place.tables is None and place.under not in manifest.files:
            raise UserError(f"the backup has no {place.under}; use another backup, {_NOTHING}")
    own = f"sqlite:///{home.root / 'mlflow.db'}"
    if Path(manifest.home) != home.root and home.mlflow_uri != own:
        raise UserError(
            "MLflow's store is not in the home, and the paths of artifacts in it begin with "
            f"{manifest.home}; restore with CHURN_HOME={manifest.home}; {_NOTHING}"
        )


def _put_in_place(home: Home, state: State, staged: Path, say: Callable[[str], object]) -> None:
    for place in state.places:
        if place.url is None:
            continue
        dumped, shown = staged / place.under, without_password(place.url)
        if place.tables and (rows := count_rows(place.url, place.tables)):
            say(f"{place.name}: {rows:,} rows were in {shown}; what the backup lacks is gone")
        # Without a dump the backup found nothing there.
        gone = load(place.url, dumped if dumped.exists() else None, place.tables)
        if gone:
            say(f"{place.name}: gone from {shown}, as not in the backup: {', '.join(gone)}")
    replaced = Path(tempfile.mkdtemp(prefix=_REPLACED, dir=home.root))
    for place in state.places:
        if place.under.startswith(f"{OUTSIDE}/") and place.path is not None:
            _swap(staged / place.under, place.path, replaced / OUTSIDE / place.name)
    inside = {p.under.split("/")[1] for p in state.places if p.under.startswith(f"{HOME}/")}
    for name in sorted(inside.union(_names(staged / HOME))):
        _swap(staged / HOME / name, home.root / name, replaced / name)


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _swap(new: Path, place: Path, replaced: Path) -> None:
    """Put `new`, where there is such a thing, in place of what is there."""
    # A database of SQLite would take what another one has left beside it for its own.
    for end in ("", "-wal", "-shm", "-journal"):
        old = place.with_name(f"{place.name}{end}")
        if old.exists() or old.is_symlink():
            replaced.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(old, replaced.with_name(f"{replaced.name}{end}"))
    if new.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(new, place)
