"""Content hashes: what a table says, whatever the order of its rows or the writer of its file."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_SORTABLE_TEXT = (pa.types.is_large_string, pa.types.is_string_view)


def content_hash(table: pa.Table) -> str:
    """SHA-256 (hex) of the rows of `table` as a multiset.

    Two tables hash alike when they have the same column names and the same rows, with the same
    multiplicity. Order of rows and columns, chunks, dictionary encoding, string width and schema
    metadata do not matter; the type of a column (int64, double, timestamp unit) does. -0.0 counts
    as 0.0, and every NaN as the same NaN. Supports the flat types the lake stores.
    """
    columns = {name: _canonical(table[name]) for name in sorted(table.column_names)}
    canonical = pa.table(columns) if columns else table
    if canonical.num_rows > 1:
        keys = [(name, "ascending") for name in columns]
        canonical = canonical.take(pc.sort_indices(canonical, sort_keys=keys))
    digest = hashlib.sha256(f"rows:{table.num_rows}".encode())
    for name in columns:
        digest.update(f"\0{name}\0{canonical.schema.field(name).type}\0".encode())
        _update(digest, canonical[name].combine_chunks())
    return digest.hexdigest()


def combined_hash(parts: list[tuple[str, str]]) -> str:
    """SHA-256 (hex) over (label, hash) pairs in sorted order."""
    digest = hashlib.sha256()
    for label, part in sorted(parts):
        digest.update(f"{label}\0{part}\0".encode())
    return digest.hexdigest()


def _canonical(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if any(is_type(column.type) for is_type in _SORTABLE_TEXT):
        column = column.cast(pa.string())
    if pa.types.is_floating(column.type):
        # Adding 0.0 turns -0.0 into 0.0; the replaced NaN has one fixed bit pattern.
        column = pc.add(column, pa.scalar(0.0, column.type))
        column = pc.if_else(pc.is_nan(column), pa.scalar(float("nan"), column.type), column)
    return column


def _update(digest: hashlib._Hash, array: pa.Array | pa.ChunkedArray) -> None:
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if array.null_count:
        digest.update(b"nulls")
        digest.update(np.packbits(array.is_null().to_numpy(zero_copy_only=False)))
    if pa.types.is_string(array.type):
        array = array.fill_null("") if array.null_count else array
        digest.update(pc.binary_length(array).to_numpy(zero_copy_only=False))
        offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset :]
        text = array.buffers()[2]
        if text is not None and len(array):
            digest.update(memoryview(text)[offsets[0] : offsets[len(array)]])
        return
    if pa.types.is_boolean(array.type):
        array = array.fill_null(False) if array.null_count else array
        digest.update(np.packbits(array.to_numpy(zero_copy_only=False)))
        return
    if pa.types.is_null(array.type):
        return
    if pa.types.is_temporal(array.type):
        array = array.view(pa.int32() if array.type.bit_width == 32 else pa.int64())
    array = array.fill_null(0) if array.null_count else array
    digest.update(np.ascontiguousarray(array.to_numpy(zero_copy_only=False)))
