"""Files into DuckDB tables, as they are: text stays text, and a corrupt CSV line stops nothing."""

from __future__ import annotations

import csv
import glob
import gzip
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TextIO

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from churn_assets.data.mapping import ROW, sql_name, sql_text
from churn_assets.errors import UserError

Format = Literal["auto", "csv", "parquet"]

CORRUPT_SCHEMA = pa.schema(
    [("file", pa.string()), ("line", pa.int64()), ("problem", pa.string()), ("text", pa.string())]
)
"""Corrupt lines: number within the file, from 1 (a row of several lines counts as one), what is
wrong with it, how it begins."""

_TEXT_KEPT = 1000

_LONGEST_LINE = 1024 * 1024
# What unpacks to more is no table: CSV rows shrink to a tenth, and rows of a parquet file that have
# keys of their own take a byte or more. Small files may be anything.
_UNPACKED_TIMES, _UNPACKED_BYTES = 200, 64 * 1024 * 1024
_ROWS_PER_BYTE, _ROWS = 100, 1_000_000


def connect() -> duckdb.DuckDBPyConnection:
    """A DuckDB in memory, in UTC."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def find_files(pattern: str) -> list[Path]:
    """The files a path or glob names, sorted.

    Raises UserError when there is none, or when it names a directory.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a directory; name its files, for example {path}/*.parquet")
    if path.is_file():
        return [path]
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files = [file for file in found if file.is_file()]
    if not files:
        raise UserError(f"there is no file {path}; check the path")
    return files


def format_of(path: Path, format: Format = "auto") -> Literal["csv", "parquet"]:
    """The format of `path`: the one given, or the one its name tells.

    Raises UserError when the name does not tell.
    """
    if format != "auto":
        return format
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    last = suffixes[-1] if suffixes else ""
    if last in (".parquet", ".pq"):
        return "parquet"
    if last in (".csv", ".tsv", ".txt"):
        return "csv"
    raise UserError(f"the name of {path} does not tell its format; set format to csv or parquet")


def columns_of(
    path: Path, *, format: Format = "auto", delimiter: str = ",", encoding: str = "utf-8"
) -> list[str]:
    """The columns of one file, from its head alone; none of an empty CSV file.

    Raises UserError when it cannot be read.
    """
    if format_of(path, format) == "csv":
        return _header(path, delimiter, encoding)
    try:
        return pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read: {first}; is the file complete?") from error


def load_files(
    connection: duckdb.DuckDBPyConnection,
    target: str,
    paths: Sequence[Path],
    *,
    format: Format = "auto",
    delimiter: str = ",",
    encoding: str = "utf-8",
    null_values: Sequence[str] = ("",),
) -> pa.Table:
    """Make DuckDB table `target` of the rows of `paths`, with ROW; give the corrupt lines.

    CSV columns are all text. Returns CORRUPT_SCHEMA: lines with too few or too many fields, with
    broken quoting or of another encoding; they are not in `target`. Raises UserError when a file
    cannot be read at all or the files differ in their columns.
    """
    formats = {format_of(path, format) for path in paths}
    if len(formats) > 1:
        raise UserError(f"{paths[0].parent} mixes CSV and parquet; read one of them")
    names = "[" + ", ".join(sql_text(str(path)) for path in paths) + "]"
    shown = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    try:
        for path in paths:
            _check_expansion(path, parquet=formats == {"parquet"})
        if formats == {"parquet"}:
            load_query(connection, target, f"FROM read_parquet({names})")
            return CORRUPT_SCHEMA.empty_table()
        columns = _shared_header(paths, delimiter, encoding)
        if not columns:
            connection.execute(f"CREATE TABLE {target} ({sql_name(ROW)} BIGINT)")
            return CORRUPT_SCHEMA.empty_table()
        types = ", ".join(f"{sql_text(column)}: 'VARCHAR'" for column in columns)
        nulls = "[" + ", ".join(sql_text(value) for value in null_values) + "]"
        options = f"""auto_detect = false, header = true, columns = {{{types}}},
            delim = {sql_text(delimiter)}, quote = '"', escape = '"', nullstr = {nulls},
            encoding = {sql_text(encoding)}, store_rejects = true, rejects_limit = 0"""
        try:
            load_query(connection, target, f"FROM read_csv({names}, {options})")
            return _corrupt_lines(connection)
        except duckdb.InvalidInputException as error:
            # What DuckDB says of lines that end in different ways, as of files put together.
            if "state machine" not in str(error) or encoding == "utf-16":
                raise
        with tempfile.TemporaryDirectory() as folder:
            copies = {f"{folder}/{n}.csv": path for n, path in enumerate(paths)}
            for copy, path in copies.items():
                _copy_with_one_line_end(path, Path(copy))
            names = "[" + ", ".join(sql_text(copy) for copy in copies) + "]"
            load_query(connection, target, f"FROM read_csv({names}, {options})")
        corrupt = _corrupt_lines(connection)
        given = [str(copies[file]) for file in corrupt["file"].to_pylist()]
        return corrupt.set_column(0, "file", pa.array(given, pa.string()))
    except duckdb.Error as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{shown} cannot be read: {first}; is the file complete?") from error


def _check_expansion(path: Path, *, parquet: bool) -> None:
    """Refuse a small file that becomes a huge table, before anything holds it."""
    size = path.stat().st_size
    if parquet:
        if _parquet_rows(path) > max(_ROWS, _ROWS_PER_BYTE * size):
            raise UserError(f"{path} says it has more rows than {size} bytes hold; check the file")
        return
    # Deflate makes at most 1032 bytes of one, so a small file needs no look.
    if path.suffix.lower() != ".gz" or size * 1032 <= _UNPACKED_BYTES:
        return
    limit, unpacked = max(_UNPACKED_BYTES, _UNPACKED_TIMES * size), 0
    try:
        with gzip.open(path, "rb") as file:
            while block := file.read(1 << 20):
                unpacked += len(block)
                if unpacked > limit:
                    raise UserError(
                        f"{path} unpacks to more than {_UNPACKED_TIMES} times its size; check the "
                        "file, or unpack it first if it is sound"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}; is the file complete?") from error


def _parquet_rows(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read: {first}; is the file complete?") from error


def _copy_with_one_line_end(path: Path, copy: Path) -> None:
    zipped = path.suffix.lower() == ".gz"
    with (gzip.open if zipped else open)(path, "rb") as source, copy.open("wb") as target:
        held = b""
        while block := source.read(1 << 20):
            block = held + block
            # A block may end between the two characters of a line end.
            held = b"\r" if block.endswith(b"\r") else b""
            block = block.removesuffix(held)
            target.write(block.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
        target.write(b"\n" if held else b"")


def load_query(connection: duckdb.DuckDBPyConnection, target: str, query: str) -> None:
    """Make DuckDB table `target` of what `query` (FROM ...) gives, with ROW. NaN becomes null."""
    types = connection.execute(f"DESCRIBE SELECT * {query}").fetchall()
    columns = [
        f"CASE WHEN NOT isnan({sql_name(name)}) THEN {sql_name(name)} END AS {sql_name(name)}"
        if kind in ("DOUBLE", "FLOAT")
        else sql_name(name)
        for name, kind, *_ in types
    ]
    connection.execute(
        f"CREATE TABLE {target} AS "
        f"SELECT row_number() OVER () AS {sql_name(ROW)}, {', '.join(columns)} {query}"
    )


def _corrupt_lines(connection: duckdb.DuckDBPyConnection) -> pa.Table:
    # One line can be rejected for several reasons, and quoting never closed takes in all that
    # follows: how far it reaches is part of what is wrong.
    lines = connection.sql(
        f"""SELECT file_path AS file, CAST(line AS BIGINT) AS line,
              replace(arg_min(error_message, error_type), chr(10), ' ') || CASE WHEN swallowed > 0
                THEN ' It takes in the ' || swallowed || ' lines after it.' ELSE '' END AS problem,
              left(told, {_TEXT_KEPT}) AS text
            FROM (SELECT *, length(told) - length(replace(told, chr(10), '')) AS swallowed
                  FROM (SELECT *, trim(csv_line, chr(10) || chr(13)) AS told FROM reject_errors))
              JOIN reject_scans USING (scan_id, file_id)
            GROUP BY file_path, line, told, swallowed ORDER BY 1, 2"""
    ).to_arrow_table()
    return lines.cast(CORRUPT_SCHEMA)


def _shared_header(paths: Sequence[Path], delimiter: str, encoding: str) -> list[str]:
    headers = {path: _header(path, delimiter, encoding) for path in paths}
    first, *others = headers
    for other in others:
        if headers[other] != headers[first]:
            raise UserError(f"{other} has other columns than {first}; read them as two sources")
    return headers[first]


def _header(path: Path, delimiter: str, encoding: str) -> list[str]:
    """The column names of a CSV file; [] for an empty file."""
    try:
        zipped = path.suffix.lower() == ".gz" and path.stat().st_size > 0
        with (gzip.open if zipped else open)(
            path,
            "rt",
            encoding="utf-8-sig" if encoding == "utf-8" else encoding,
            errors="replace",
            newline="",
        ) as text:
            names = next(csv.reader(_lines(text, path), delimiter=delimiter), [])
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; is the file complete?") from error
    names = [name.strip() or f"column_{place}" for place, name in enumerate(names, 1)]
    lower = [name.lower() for name in names]
    for name in names:
        if lower.count(name.lower()) > 1:
            raise UserError(f"{path} has two columns {name}; rename one in its first line")
    return names


def _lines(text: TextIO, path: Path) -> Iterator[str]:
    """The lines of a file, of which none is held that has no end."""
    while line := text.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise UserError(f"{path} begins with a line that has no end; is it a CSV file?")
        yield line
