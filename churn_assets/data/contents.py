"""Content hashes: what a table says, whatever the order of its rows or the writer of its file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa


def content_hash(table: pa.Table) -> str:
    """SHA-256 (hex) of the rows of `table` as a multiset.

    Two tables hash alike when they have the same column names and the same rows, with the same
    multiplicity. Order of rows and columns, chunks, dictionary encoding, string width and schema
    metadata do not matter; the type of a column (int64, double, timestamp unit) does. -0.0 counts
    as 0.0, and every NaN as the same NaN. Supports the flat types the lake stores.
    """
    columns = {name: _plain(table[name]) for name in sorted(table.column_names)}
    if columns:
        table = pa.table(columns).sort_by([(name, "ascending") for name in columns])
    digest = hashlib.sha256(f"rows:{table.num_rows}".encode())
    for name in columns:
        digest.update(f"\0{name}\0{table.schema.field(name).type}\0".encode())
        for part in _parts(pa.concat_arrays([pa.array([], table[name].type), *table[name].chunks])):
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    return column


def _parts(array: pa.Array) -> Iterator[np.ndarray]:
    """What a column says, as plain buffers: where it is null, then values with nulls zeroed."""
    if array.null_count:
        yield np.packbits(array.is_null().to_numpy(zero_copy_only=False))
    kind = array.type
    if pa.types.is_null(kind):
        return
    if pa.types.is_string(kind):
        array = array.fill_null("") if array.null_count else array
        offsets = np.frombuffer(array.buffers()[1], np.int32, len(array) + 1, array.offset * 4)
        yield np.diff(offsets)
        if offsets[-1] > offsets[0]:
            text = np.frombuffer(array.buffers()[2], np.uint8)
            yield text[offsets[0] : offsets[-1]]
        return
    if pa.types.is_boolean(kind):
        array = array.fill_null(False) if array.null_count else array
        yield np.packbits(array.to_numpy(zero_copy_only=False))
        return
    if pa.types.is_temporal(kind):
        array = array.view(pa.int32() if kind.bit_width == 32 else pa.int64())
    array = array.fill_null(0) if array.null_count else array
    values = array.to_numpy(zero_copy_only=False)
    if pa.types.is_floating(kind):
        values = np.where(np.isnan(values), np.nan, values + 0.0).astype(values.dtype)
    yield values
