"""All state of an installation in one file or folder, made while everything runs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Generator
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Protocol

import msgspec

from churn_assets.errors import UserError
from churn_assets.home import Home
from churn_assets.home_format import read_marker, refuse_newer
from churn_assets.lifecycle.postgres_dump import count_tables, dump
from churn_assets.lifecycle.state_places import Place, State, files_of

FORMAT = 1
MANIFEST = "manifest.json"
ARCHIVES = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz"}
_ATTEMPTS = 3
_SQLITE = b"SQLite format 3\0"
_BLOCK = 1 << 20


class Copied(msgspec.Struct, frozen=True, array_like=True):
    """A file of a backup: bytes, sha256, permissions, and when it was changed, in ns."""

    size: int
    sha256: str
    mode: int
    mtime_ns: int


class Part(msgspec.Struct, frozen=True):
    """A part of the state. sha256: of the digests of its files, sorted by their names."""

    name: str
    files: int
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What a backup holds.

    product: the version of churn_assets. home: where the home lay. formats: of the home. outside:
    parts that lay outside of it. elsewhere: state that is not in the backup, and who keeps it.
    """

    format: int
    product: str
    made_at: datetime
    home: str
    formats: dict[str, int]
    libraries: dict[str, str]
    parts: tuple[Part, ...]
    outside: tuple[str, ...]
    elsewhere: dict[str, str]
    files: dict[str, Copied]

    def lines(self) -> list[str]:
        """The parts, for a person."""
        shown = [
            f"{part.name:22} {part.files:>7,} files {part.bytes / 1e6:>10,.1f} MB"
            for part in self.parts
            if part.files
        ]
        return [*shown, *(f"{name:22} elsewhere, {why}" for name, why in self.elsewhere.items())]


class _Changed(Exception):
    """A file went away, or became shorter, while it was copied."""


class _Sink(Protocol):
    def add(self, name: str, content: IO[bytes], size: int, mode: int, mtime_ns: int) -> str: ...


def back_up(home: Home, state: State, target: Path, *, now: datetime) -> Manifest:
    """Copy everything in `state` to `target`, which ends in .tar, .tar.gz or .tgz, or is a folder.

    Nothing has to be stopped. SQLite and Postgres hand out what they held at one moment; files are
    replaced as a whole or only appended to, and copied in the order of `state`. What is removed
    while it is copied makes it begin again. Raises UserError, and leaves nothing then.
    """
    marker = read_marker(home.root)
    if marker is None:
        raise UserError(
            f"there is nothing in {home.root} yet; `make run` makes it, or set CHURN_HOME"
        )
    refuse_newer(home.root, marker)
    target = target.absolute()
    if target.exists():
        raise UserError(f"{target} is there already; name another file or folder")
    if target.is_relative_to(home.root):
        raise UserError(f"{target} lies in the home itself; name a place outside of {home.root}")
    try:
        product = version("churn-assets")
    except PackageNotFoundError:
        product = "unknown"
    begun = Manifest(
        format=FORMAT,
        product=product,
        made_at=now,
        home=str(home.root),
        formats=marker.formats,
        libraries=marker.libraries,
        parts=(),
        outside=tuple(state.outside),
        elsewhere=dict(state.elsewhere),
        files={},
    )
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(_Changed):
            try:
                return _write(state, target, begun)
            except OSError as error:
                raise UserError(
                    f"{target} could not be written ({error.strerror or error}: "
                    f"{error.filename or target}); nothing is left of it"
                ) from error
    raise UserError(
        "files went away each time while they were copied; try again when no cleaning is going on"
    )


def _write(state: State, target: Path, manifest: Manifest) -> Manifest:
    parts: list[Part] = []
    files: dict[str, Copied] = {}
    done: list[str] = []
    with _sink(target) as (sink, scratch):
        for place in state.places:
            found = _copy(place, sink, scratch, done)
            done.append(place.under)
            files |= found
            parts.append(part_of(place.name, found))
        manifest = msgspec.structs.replace(manifest, parts=tuple(parts), files=files)
        content = msgspec.json.encode(manifest)
        stamp = int(manifest.made_at.timestamp()) * 10**9
        sink.add(MANIFEST, io.BytesIO(content), len(content), 0o600, stamp)
    return manifest


def part_of(name: str, files: dict[str, Copied]) -> Part:
    """The entry of the manifest for a part with these files."""
    digests = "".join(f"{files[name].sha256}  {name}\n" for name in sorted(files))
    size = sum(copied.size for copied in files.values())
    return Part(name, len(files), size, hashlib.sha256(digests.encode()).hexdigest())


def _copy(place: Place, sink: _Sink, scratch: Path, done: list[str]) -> dict[str, Copied]:
    if place.url is not None:
        if place.tables and not count_tables(place.url, place.tables):
            return {}
        dumped = scratch / "dump"
        dump(place.url, dumped, place.tables)
        found = {place.under: _add(sink, place.under, dumped, scratch)}
        dumped.unlink()
        return found
    copied: dict[str, Copied] = {}
    for name, path in files_of(place):
        if any(name == under or name.startswith(f"{under}/") for under in done):
            continue
        try:
            copied[name] = _add(sink, name, path, scratch)
        except FileNotFoundError:
            # Of a log all of whose rows are in the lake, which is copied later.
            if place.name not in ("prediction_log", "serving/log"):
                raise _Changed(name) from None
    return copied


def _add(sink: _Sink, name: str, path: Path, scratch: Path) -> Copied:
    with _snapshot(path, scratch) as (content, size, found):
        digest = sink.add(name, content, size, found.st_mode & 0o777, found.st_mtime_ns)
    return Copied(size, digest, found.st_mode & 0o777, found.st_mtime_ns)


@contextlib.contextmanager
def _snapshot(path: Path, scratch: Path) -> Generator[tuple[IO[bytes], int, os.stat_result]]:
    """The content of a file as it was at one moment, its bytes, and what the disk says of it."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        if file.read(len(_SQLITE)) == _SQLITE:
            copy = scratch / "snapshot.db"
            _copy_database(path, copy)
            with copy.open("rb") as content:
                yield content, copy.stat().st_size, found
            copy.unlink()
            return
        file.seek(0)
        if path.suffix == ".jsonl":
            # Somebody may be in the middle of a line.
            lines = file.read()
            lines = lines[: lines.rfind(b"\n") + 1]
            yield io.BytesIO(lines), len(lines), found
            return
        with contextlib.ExitStack() as held:
            with contextlib.suppress(FileNotFoundError):
                # Feast's registry is written in place, by who has this lock.
                lock = held.enter_context(path.with_name(f"{path.name}.lock").open("rb"))
                fcntl.flock(lock, fcntl.LOCK_SH)
            yield file, os.fstat(file.fileno()).st_size, found


def _copy_database(path: Path, copy: Path) -> None:
    copy.unlink(missing_ok=True)
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as source,
            contextlib.closing(sqlite3.connect(copy)) as target,
        ):
            source.backup(target)
    except sqlite3.Error as error:
        if not path.exists():
            raise FileNotFoundError(path) from None
        raise UserError(
            f"the database {path} cannot be copied ({error}); mend it or move it out of the way, "
            "then back up again"
        ) from error


@contextlib.contextmanager
def _sink(target: Path) -> Generator[tuple[_Sink, Path]]:
    """What files go to, and a folder for what is made on the way; at the end `target` is there."""
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=target.parent) as folder:
        scratch, made = Path(folder), Path(folder) / "made"
        mode = ARCHIVES.get(target.suffix)
        if mode is None:
            made.mkdir(mode=0o700)
            yield _Folder(made), scratch
        else:
            descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                with _tar(file, mode) as archive:
                    yield _Archive(archive), scratch
                file.flush()
                os.fsync(file.fileno())
        made.rename(target)


def _tar(file: IO[bytes], mode: str) -> tarfile.TarFile:
    if mode == "w":
        return tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)
    # Most of what is in it is compressed already.
    return tarfile.open(fileobj=file, mode="w:gz", format=tarfile.PAX_FORMAT, compresslevel=1)


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def add(self, name: str, content: IO[bytes], size: int, mode: int, mtime_ns: int) -> str:
        path = self._root / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        reader = HashingReader(content)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            left = size
            while left and (block := reader.read(min(left, _BLOCK))):
                file.write(block)
                left -= len(block)
        if left:
            raise _Changed(name)
        os.utime(path, ns=(mtime_ns, mtime_ns))
        return reader.digest()


class _Archive:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive

    def add(self, name: str, content: IO[bytes], size: int, mode: int, mtime_ns: int) -> str:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode, entry.mtime = size, mode, mtime_ns // 10**9
        reader = HashingReader(content)
        before = content.seek(0, os.SEEK_END)
        content.seek(0)
        if before < size:
            raise _Changed(name)
        self._archive.addfile(entry, reader)
        return reader.digest()


class HashingReader:
    """A file that is read once, and the sha256 of what was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes more."""
        block = self._file.read(size)
        self._hash.update(block)
        return block

    def digest(self) -> str:
        """In hexadecimal."""
        return self._hash.hexdigest()


def copy_hashed(source: IO[bytes], path: Path) -> tuple[int, str]:
    """Write what `source` holds to `path`; bytes and sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    reader = HashingReader(source)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        shutil.copyfileobj(reader, file, _BLOCK)
        return file.tell(), reader.digest()
