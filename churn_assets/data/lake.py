"""The lake: tables in daily partitions of parquet, each replaced as a whole or not at all.

Layout: `<root>/<table>/day=YYYY-MM-DD/part-0.parquet`. A partition without rows is a file with the
schema and no rows, so "empty" and "missing" differ. Writers work in `<root>/<table>/.tmp-*/` and
put whole files in place at the end: by a rename on a disk, by a copy in an object store (which has
no rename, and where a key holds its old content until all of the new one is there). Readers of an
object store fetch a file with one request. So nobody ever sees half a partition.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from functools import cached_property, partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import fsspec
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from ibis.backends import BaseBackend
from ibis.backends.duckdb import Backend as DuckDBBackend

from churn_assets.data.contents import content_hash
from churn_assets.data.day_files import DAY, DayFiles
from churn_assets.data.results import is_spark
from churn_assets.data.tables import RAW_TABLES
from churn_assets.data.windows import days_between
from churn_assets.errors import UserError

if TYPE_CHECKING:
    from ibis.backends.pyspark import Backend as SparkBackend

_FILE = "part-0.parquet"
_PARTITION = re.compile(rf"/{DAY}=(\d{{4}}-\d{{2}}-\d{{2}})/{re.escape(_FILE)}$")
_WORKSPACE = re.compile(r"\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{32}$")
_ABANDONED_AFTER_SECONDS = 24 * 3600
_DAY_FIELD = pa.field(DAY, pa.date32())
# Of each partition's path: its stamp when its rows were counted, and how many they were.
_ROWS: dict[str, tuple[str, int]] = {}


@dataclass(frozen=True)
class Lake:
    """Tables in daily partitions under `root`: a local path, or a URI fsspec understands.

    `storage_options` go to fsspec. `clock` (seconds) only decides when the temporaries a killed
    run left behind on another machine are old enough to be removed. Every method raises UserError
    for an object store that cannot be reached or refuses, or a bucket that is not there.
    """

    root: str
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", str(self.root))

    @cached_property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The filesystem `root` lies on."""
        try:
            return fsspec.core.url_to_fs(self.root, **self.storage_options)[0]
        except (ImportError, ValueError) as error:
            scheme = self.root.partition("://")[0]
            raise UserError(
                f"the lake {self.root} cannot be opened ({error}); use a path, s3://, or install "
                f"fsspec's package for {scheme}://"
            ) from error

    @cached_property
    def base(self) -> str:
        """`root` as `filesystem` names it."""
        return self.filesystem._strip_protocol(self.root).rstrip("/")

    @cached_property
    def on_disk(self) -> bool:
        """Whether the lake is a folder of this machine, where a rename is atomic."""
        return isinstance(self.filesystem, LocalFileSystem)

    @cached_property
    def _whole_files(self) -> fsspec.AbstractFileSystem:
        """The filesystem to read partitions from."""
        return self.filesystem if self.on_disk else _WholeFiles(self.filesystem)

    def path(self, table: str, day: date) -> str:
        """Where the partition `day` of `table` is, whether or not it exists."""
        return f"{self.base}/{table}/{DAY}={day.isoformat()}/{_FILE}"

    def days(self, table: str) -> list[date]:
        """The partitions of `table` that exist, oldest first."""
        with self._reaching():
            if self.on_disk:
                # A tenth of the time of fsspec's walk, and this is asked all the time.
                paths = glob.iglob(f"{glob.escape(self.base)}/{table}/{DAY}=*/{_FILE}")
            else:
                self.filesystem.invalidate_cache()
                paths = self.filesystem.find(f"{self.base}/{table}")
        found = (_PARTITION.search(path) for path in paths)
        return sorted(date.fromisoformat(match[1]) for match in found if match)

    def missing(self, table: str, first: date, last: date) -> list[date]:
        """The days of [first, last] that have no partition of `table`."""
        present = set(self.days(table))
        return [day for day in days_between(first, last) if day not in present]

    def newest_values(self, table: str, column: str, days: Sequence[date]) -> dict[date, Any]:
        """The greatest value of `column` in each partition of `days`, from the parquet footers.

        None for a partition without one. Raises UserError when a partition does not exist.
        """
        self._require(table, days)
        footers = self._footers(table, days)
        return {day: _greatest(footer, column) for day, footer in footers.items()}

    def row_counts(
        self, table: str, first: date | None = None, last: date | None = None
    ) -> dict[date, int]:
        """Rows per existing partition of [first, last], from the parquet footers.

        A footer is read once in a process for each time its partition was written.
        """
        stamps = self.stamps(table)
        days = [
            day
            for day in sorted(stamps)
            if (first is None or day >= first) and (last is None or day <= last)
        ]
        counted = {day: _ROWS.get(self.path(table, day), ("", 0)) for day in days}
        new = [day for day, (stamp, _) in counted.items() if stamp != stamps[day]]
        for day, footer in self._footers(table, new).items():
            counted[day] = _ROWS[self.path(table, day)] = stamps[day], footer.num_rows
        return {day: rows for day, (_, rows) in counted.items()}

    def stamps(self, table: str) -> dict[date, str]:
        """What changes with every write of each partition of `table`; nothing is opened."""
        with self._reaching():
            if self.on_disk:
                return {day: _stamp(self.path(table, day)) for day in self.days(table)}
            self.filesystem.invalidate_cache()
            found = self.filesystem.find(f"{self.base}/{table}", detail=True)
        named = ((_PARTITION.search(path), about) for path, about in found.items())
        return {
            date.fromisoformat(match[1]): f"{about.get('ETag')} {_changed_at(about)}"
            for match, about in named
            if match
        }

    def schema(self, table: str, day: date) -> pa.Schema:
        """The schema of one partition's file.

        Raises UserError when the partition does not exist.
        """
        self._require(table, [day])
        with self._reaching():
            return pq.read_schema(self.path(table, day), filesystem=self.filesystem)

    def scan(
        self,
        con: BaseBackend,
        table: str,
        first: date | None = None,
        last: date | None = None,
        *,
        days: Sequence[date] | None = None,
        strict: bool = True,
    ) -> ir.Table:
        """The rows of [first, last] (all there are, without bounds) with their `day`, unread.

        Only the files of those days are opened, or of `days` when given instead. `con` is an Ibis
        connection of one of the engines (data/engines.py).
        Raises UserError when `strict` and a day of [first, last] is missing, when nothing is there
        and the schema is unknown.
        """
        days = self._wanted(table, first, last, days, strict=strict)
        if is_spark(con):
            return self._scan_by_spark(con, table, days)
        if days:
            duckdb = cast(DuckDBBackend, con)
            if self.on_disk:
                paths = [self.path(table, day) for day in days]
                return duckdb.read_parquet(paths, hive_partitioning=True)
            # DuckDB's own reader of object stores is an extension it would have to download.
            name = f"lake_scan_{uuid.uuid4().hex}"
            with self._reaching():
                duckdb.con.register(name, self._dataset(table, days, with_day=True))
            return duckdb.table(name)
        if table not in RAW_TABLES:
            raise _nothing_there(table)
        return ibis.memtable(_with_day(RAW_TABLES[table].schema).empty_table())

    def _scan_by_spark(self, con: BaseBackend, table: str, days: Sequence[date]) -> ir.Table:
        from churn_assets.data.spark import scan, scan_by_python

        if not days and table not in RAW_TABLES:
            raise _nothing_there(table)
        schema = _with_day(self.schema(table, days[0]) if days else RAW_TABLES[table].schema)
        spark = cast("SparkBackend", con)
        if self.on_disk:
            paths = [self.path(table, day) for day in days]
            return scan(spark, f"{self.base}/{table}", paths, schema)
        # Spark's own reader of object stores is jars that pyspark does not bring.
        return scan_by_python(spark, partial(replace(self).read_day, table), days, schema)

    def read_day(self, table: str, day: date) -> pa.Table:
        """The rows of one partition with its `day`.

        Raises UserError when it does not exist.
        """
        # Without a listing: whoever asks has made one.
        try:
            with self._reaching():
                rows = self._partition(table, day)
        except FileNotFoundError:
            _refuse_missing(table, [day])
            raise
        return rows.append_column(_DAY_FIELD, pa.repeat(pa.scalar(day, pa.date32()), len(rows)))

    def read(
        self,
        table: str,
        first: date | None = None,
        last: date | None = None,
        *,
        days: Sequence[date] | None = None,
        columns: Sequence[str] | None = None,
        customers: Collection[str] | None = None,
        schema: pa.Schema | None = None,
        strict: bool = True,
    ) -> pa.Table:
        """The rows of [first, last] as they are stored (without `day`), oldest partition first.

        With `customers`, only theirs; the others are never in memory. With `schema`, columns of it
        that a partition was written without are null there; otherwise the first partition says
        which there are. Raises UserError as `scan` does.
        """
        days = self._wanted(table, first, last, days, strict=strict)
        if days:
            ids = None if customers is None else pa.array(list(customers), pa.string())
            wanted = None if ids is None else ds.field("customer_id").isin(ids)
            with self._reaching():
                dataset = self._dataset(table, days, schema=schema)
                return dataset.to_table(list(columns) if columns else None, wanted)
        if table not in RAW_TABLES:
            raise _nothing_there(table)
        empty = RAW_TABLES[table].schema.empty_table()
        return empty.select(list(columns)) if columns else empty

    def content_hash(self, table: str, day: date) -> str:
        """The hash of what one partition says; row order and parquet writer do not matter.

        Raises UserError when the partition does not exist.
        """
        return self.content_hashes(table, [day])[day]

    def content_hashes(self, table: str, days: Sequence[date]) -> dict[date, str]:
        """`content_hash` of several partitions at once."""
        self._require(table, days)
        with self._reaching(), ThreadPoolExecutor(_threads()) as pool:
            hashes = pool.map(lambda day: content_hash(self._partition(table, day)), days)
            return dict(zip(days, hashes, strict=True))

    def write(
        self,
        table: str,
        first: date,
        last: date,
        rows: pa.Table | ir.Table,
        *,
        day_of: str,
        order_by: Sequence[str] = (),
        before_replacing: Callable[[list[date]], None] | None = None,
    ) -> dict[date, int]:
        """Replace exactly the partitions [first, last] of `table` by `rows`; rows per day.

        A partition that is byte for byte the same already is left untouched. `before_replacing`
        hears, before the first is put in place, which existing partitions will say something else.

        `day_of` names the column that says which day a row belongs to: a timestamp (UTC), which is
        kept, or the date column `day`, which becomes the directory's name. `order_by` sorts the
        rows of a partition (default: as they come). All files are complete before the first is
        put in place, so whatever happens a reader finds the old partition or the new one.

        Raises ValueError when a row lies outside of [first, last] or has no day; nothing is
        replaced then.
        """
        with self.replacing(
            table,
            first,
            last,
            day_of=day_of,
            order_by=order_by,
            before_replacing=before_replacing,
        ) as files:
            files.append(rows, complete=True)
        return files.counts

    @contextmanager
    def replacing(
        self,
        table: str,
        first: date,
        last: date,
        *,
        day_of: str,
        order_by: Sequence[str] = (),
        before_replacing: Callable[[list[date]], None] | None = None,
    ) -> Generator[DayFiles]:
        """`write` for rows that come in parts: they are appended to what this gives.

        The partitions are replaced when the block ends, and none of them when it raises.
        """
        wanted = days_between(first, last)
        if not wanted:
            raise ValueError(f"no days between {first} and {last}")
        with self._workspace(table) as workspace, ExitStack() as stack:
            # An object store takes files, not appends.
            folder = workspace if self.on_disk else stack.enter_context(TemporaryDirectory())
            files = DayFiles(folder, wanted, day_of, order_by, _threads())
            yield files
            files.finish()
            complete = {day: f"{workspace}/{day.isoformat()}.tmp" for day in wanted}
            if not self.on_disk:
                self.filesystem.put([files.path(day) for day in wanted], list(complete.values()))
            prints = self._fingerprints(table)
            new, replaced = [], []
            for day in wanted:
                if (old := prints(self.path(table, day))) is None:
                    new.append(day)
                elif old != prints(complete[day]):
                    replaced.append(day)
            if replaced and before_replacing is not None:
                before_replacing(replaced)
            self._place({complete[day]: self.path(table, day) for day in sorted(new + replaced)})

    def _fingerprints(self, table: str) -> Callable[[str], str | None]:
        """A function from the path of a file to what tells its bytes; None where there is none."""
        if self.on_disk:
            return _sha256
        self.filesystem.invalidate_cache()
        listed = self.filesystem.find(f"{self.base}/{table}", detail=True)

        def told(path: str) -> str | None:
            if path not in listed:
                return None
            # An upload in parts has a tag of another kind, with a dash; it may differ needlessly.
            return str(listed[path].get("ETag") or uuid.uuid4())

        return told

    def put(self, folder: str, name: str, content: pa.Table | bytes) -> str:
        """Store `<root>/<folder>/<name>` beside the tables, whole or not at all; its path.

        A table becomes parquet. A file of that name is replaced.
        """
        target = f"{self.base}/{folder}/{name}"
        with self._workspace(folder) as workspace:
            temporary = f"{workspace}/{name}.tmp"
            if isinstance(content, bytes):
                self.filesystem.pipe_file(temporary, content)
            else:
                pq.write_table(content, temporary, filesystem=self.filesystem, compression="zstd")
            self._place({temporary: target})
        return target

    def names(self, folder: str) -> list[str]:
        """The names of the files that `put` stored in `folder`, sorted."""
        with self._reaching():
            self.filesystem.invalidate_cache()
            paths = self.filesystem.find(f"{self.base}/{folder}")
        own = (path.removeprefix(f"{self.base}/{folder}/") for path in paths)
        return sorted(name for name in own if "/" not in name)

    def remove(self, folder: str, name: str) -> None:
        """Remove a file that `put` stored; nothing happens when it is gone already."""
        with self._reaching(), suppress(FileNotFoundError):
            self.filesystem.rm_file(f"{self.base}/{folder}/{name}")

    def get_bytes(self, folder: str, name: str) -> bytes:
        """One file that `put` stored. Raises FileNotFoundError."""
        with self._reaching():
            return self._whole_files.cat_file(f"{self.base}/{folder}/{name}")

    def get_table(self, folder: str, name: str) -> pa.Table:
        """One table that `put` stored. Raises FileNotFoundError, or ArrowInvalid when damaged."""
        with self._reaching():
            return pq.read_table(f"{self.base}/{folder}/{name}", filesystem=self._whole_files)

    @contextmanager
    def _workspace(self, folder: str) -> Generator[str]:
        """A folder for temporaries inside `folder`; first sweeps away those of killed runs."""
        name = f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        workspace = f"{self.base}/{folder}/{name}"
        with self._reaching():
            self._sweep(folder)
            if self.on_disk:
                # An object store has no folders, and would make a bucket that is not there.
                self.filesystem.makedirs(workspace)
            try:
                yield workspace
            finally:
                with suppress(FileNotFoundError):
                    self.filesystem.rm(workspace, recursive=True)

    def _place(self, targets: Mapping[str, str]) -> None:
        """Put the complete files (keys) where readers look for them (values)."""
        if not self.on_disk:
            self.filesystem.copy(list(targets), list(targets.values()))
            return
        for source, target in targets.items():
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(source, target)

    @contextmanager
    def _reaching(self) -> Generator[None]:
        """Say what a person can do about an object store that does not answer as it should."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            told = None if self.on_disk else _store_error(error, self.root, self._endpoint)
            if told is None:
                raise
            raise told from error

    @property
    def _endpoint(self) -> str:
        given = self.storage_options.get("endpoint_url")
        return (
            given
            or os.environ.get("AWS_ENDPOINT_URL_S3")
            or os.environ.get("AWS_ENDPOINT_URL")
            or "AWS"
        )

    @property
    def _requests(self) -> int:
        """How many files to ask for at once: an object store is slow to answer, not busy."""
        return _threads() if self.on_disk else 16

    def _sweep(self, table: str) -> None:
        """Remove what killed runs left behind; leave the workspaces of runs still at work."""
        folder = f"{self.base}/{table}"
        self.filesystem.invalidate_cache()
        if not self.filesystem.isdir(folder):
            return
        for entry in self.filesystem.ls(folder, detail=True):
            match = _WORKSPACE.search(entry["name"])
            if match and self._abandoned(entry, match["host"], int(match["pid"])):
                self.filesystem.rm(entry["name"], recursive=True)

    def _abandoned(self, entry: dict[str, Any], host: str, pid: int) -> bool:
        if self.on_disk:
            if host == socket.gethostname():
                return not _alive(pid)
            changed = [float(entry["mtime"])]
        else:
            # Machines that share a bucket may share a name too, so only the age counts; and only
            # the files of a folder have one.
            files = self.filesystem.find(entry["name"], detail=True).values()
            changed = [_changed_at(file) for file in files]
        return all(self.clock() - moment > _ABANDONED_AFTER_SECONDS for moment in changed)

    def _partition(self, table: str, day: date) -> pa.Table:
        path = self.path(table, day)
        with pq.ParquetFile(path, filesystem=self._whole_files) as file:
            return file.read()

    def _footers(self, table: str, days: Sequence[date]) -> dict[date, pq.FileMetaData]:
        with self._reaching():
            if self.on_disk:
                # One after the other, past fsspec: a third of the processor time of threads.
                return {day: pq.read_metadata(self.path(table, day)) for day in days}

            def footer(day: date) -> pq.FileMetaData:
                return pq.read_metadata(self.path(table, day), filesystem=self.filesystem)

            with ThreadPoolExecutor(self._requests) as pool:
                return dict(zip(days, pool.map(footer, days), strict=True))

    def _dataset(
        self,
        table: str,
        days: Sequence[date],
        with_day: bool = False,
        schema: pa.Schema | None = None,
    ) -> ds.Dataset:
        paths = [self.path(table, day) for day in days]
        day = ds.partitioning(pa.schema([(DAY, pa.date32())]), flavor="hive") if with_day else None
        return ds.dataset(
            paths,
            schema,
            filesystem=self._whole_files,
            format="parquet",
            partitioning=day,
            partition_base_dir=f"{self.base}/{table}",
        )

    def _existing(self, table: str, first: date | None, last: date | None) -> list[date]:
        return [
            day
            for day in self.days(table)
            if (first is None or day >= first) and (last is None or day <= last)
        ]

    def _wanted(
        self,
        table: str,
        first: date | None,
        last: date | None,
        days: Sequence[date] | None,
        *,
        strict: bool,
    ) -> list[date]:
        if days:
            first, last = min(days), max(days)
        present = self._existing(table, first, last)
        if not present and (first is None or last is None):
            if strict:
                raise _nothing_there(table)
            return []
        wanted = sorted(set(days or days_between(first or present[0], last or present[-1])))
        if strict:
            _refuse_missing(table, sorted(set(wanted) - set(present)))
        return sorted(set(wanted) & set(present))

    def _require(self, table: str, days: Sequence[date]) -> None:
        if days:
            present = set(self._existing(table, min(days), max(days)))
            _refuse_missing(table, [day for day in days if day not in present])


class _WholeFiles(fsspec.AbstractFileSystem):
    """Reads every file of `inner` with one request: one version of it, also while it is replaced.

    A reader that asked for ranges would find the footer of one version and the columns of another.
    """

    protocol = "churn-lake"
    cachable = False

    def __init__(self, inner: fsspec.AbstractFileSystem) -> None:
        super().__init__()
        self._inner = inner

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """That it is a file: who reads one has just listed it, and finds out with the content."""
        return {"name": path, "type": "file", "size": None}

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> io.BytesIO:
        return io.BytesIO(self.cat_file(path))

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        """The content of a file. s3fs would fetch a large one in parts, of any version each."""
        return self._inner.cat_file(path, max_concurrency=1)


def open_lake(root: str, endpoint_url: str | None = None) -> Lake:
    """The lake at `root`: a path, or `s3://bucket/prefix`, at `endpoint_url` where not AWS itself.

    Credentials come from the environment or AWS's own configuration, and from nowhere else. Raises
    UserError for an address that holds some.
    """
    bucket = urlsplit(root) if "://" in root else None
    for name, url in (
        ("lake", bucket),
        ("lake_endpoint_url", urlsplit(endpoint_url or "")),
        ("AWS_ENDPOINT_URL", urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))),
    ):
        if url is not None and "@" in url.netloc:
            raise UserError(
                f"{name} holds credentials; remove what is before the @ and set AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY in the environment"
            )
    if bucket is None or bucket.scheme not in ("s3", "s3a"):
        if endpoint_url:
            raise UserError(
                f"lake_endpoint_url is set but the lake {root} is not on S3; remove it or set "
                "lake: s3://bucket/prefix"
            )
        return Lake(root)
    if not bucket.netloc:
        raise UserError(f"lake: {root} names no bucket; write s3://bucket/prefix")
    if endpoint_url and urlsplit(endpoint_url).scheme not in ("http", "https"):
        raise UserError(
            f"lake_endpoint_url: {endpoint_url} is no address; write it like https://host:port"
        )
    options: dict[str, Any] = {
        "config_kwargs": {"connect_timeout": 10, "retries": {"max_attempts": 2}}
    }
    return Lake(root, options | ({"endpoint_url": endpoint_url} if endpoint_url else {}))


def _store_error(error: Exception, root: str, endpoint: str) -> UserError | None:
    """The words for an error of an object store; None for one that is not the store's."""
    from botocore import exceptions as aws

    bucket = urlsplit(root).netloc
    if isinstance(error, FileNotFoundError):
        if "bucket does not exist" not in str(error):
            return None
        return UserError(f"there is no bucket {bucket} at {endpoint}; make it or correct lake")
    if isinstance(error, PermissionError | aws.ClientError):
        why = str(error) or type(error).__name__
        return UserError(
            f"{endpoint} refuses {root} ({why}); check the bucket's policy and the credentials in "
            "the environment"
        )
    if isinstance(
        error,
        aws.NoCredentialsError
        | aws.PartialCredentialsError
        | aws.CredentialRetrievalError
        | aws.ProfileNotFound,
    ):
        return UserError(
            f"there are no usable credentials for {root} ({error}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment, or AWS_PROFILE"
        )
    if isinstance(error, aws.HTTPClientError | aws.ConnectionError | ValueError) and (
        not isinstance(error, ValueError) or "Invalid endpoint" in str(error)
    ):
        return UserError(
            f"the lake {root} cannot be reached at {endpoint} ({type(error).__name__}); check "
            "lake_endpoint_url or AWS_ENDPOINT_URL, and that the store is up"
        )
    return None


def _with_day(schema: pa.Schema) -> pa.Schema:
    return schema.append(_DAY_FIELD)


def _stamp(path: str) -> str:
    """A partition is a new file whenever it is written."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return "gone"
    return f"{about.st_ino} {about.st_mtime_ns} {about.st_size}"


def _sha256(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _greatest(footer: pq.FileMetaData, column: str) -> Any:
    place = footer.schema.to_arrow_schema().get_field_index(column)
    groups = (footer.row_group(number).column(place) for number in range(footer.num_row_groups))
    found = [
        group.statistics.max
        for group in groups
        if group.statistics is not None and group.statistics.has_min_max
    ]
    return max(found, default=None)


def _changed_at(file: Mapping[str, Any]) -> float:
    """When a file of an object store was written, in seconds; now where the store does not say."""
    moment = file.get("LastModified") or file.get("last_modified") or file.get("created")
    return moment.timestamp() if isinstance(moment, datetime) else time.time()


def _refuse_missing(table: str, missing: Sequence[date]) -> None:
    if not missing:
        return
    days = ", ".join(day.isoformat() for day in missing[:3]) + (", ..." if missing[3:] else "")
    raise UserError(
        f"{table} has no partition for {len(missing)} day(s) ({days}); materialize {table} "
        f"for {missing[0]} to {missing[-1]}"
    )


def _nothing_there(table: str) -> UserError:
    return UserError(f"there is no partition of {table} yet; materialize {table} first")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _threads() -> int:
    return min(4, os.cpu_count() or 1)
