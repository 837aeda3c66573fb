"""Prompt tables in Parquet: rows counted by the footer alone, read by row groups. Knows no meanings.

A file whose footer has another hash than the planned one is refused.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from overtone.jobs.errors import PromptsError
from overtone.jobs.prompts.places import Found, Place
from overtone.jobs.prompts.scan import BATCH_ROWS, Batch, Scan, changed, check_names, is_text, line_of

_TAIL_BYTES = 64 * 1024  # one request for most footers
_MAX_FOOTER_BYTES = 1024**3
_BUFFER_BYTES = 4 * 1024**2


def scan_parquet(place: Place, found: Found) -> Scan:
    """Count the rows of a file. PromptsError where it is no whole Parquet file."""
    metadata, digest, _ = _footer(place, found)
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if sum(rows) != metadata.num_rows or any(n < 0 for n in rows):
        raise PromptsError(f"{found.path} is damaged: its footer contradicts itself about its rows")
    return Scan(metadata.num_rows, len(rows), (), digest, _parquet_schema(metadata, found.path))


def read_parquet(
    place: Place,
    found: Found,
    values: Sequence[str],
    others: pa.Schema,
    first_row: int,
    num_rows: int,
    blocks: Sequence[int],
    digest: str,
) -> Iterator[Batch]:
    """The rows [first_row, first_row + num_rows); `table.read` states the rules."""
    metadata, now, tail = _footer(place, found)
    if now != digest:
        raise changed(found.path)
    there = set(metadata.schema.to_arrow_schema().names)
    starts = np.cumsum([0] + [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
    groups = [
        i
        for i in range(metadata.num_row_groups)
        if starts[i] < first_row + num_rows and starts[i + 1] > first_row
    ]
    if not groups:
        return
    skip, left = first_row - int(starts[groups[0]]), num_rows
    names = [name for name in dict.fromkeys([*values, *others.names]) if name in there]
    with (
        io.BytesIO(tail) if len(tail) == found.size_bytes else place.open(found.path) as file,
        pq.ParquetFile(file, metadata=metadata, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table,
    ):
        batches = table.iter_batches(
            batch_size=BATCH_ROWS,
            row_groups=groups,
            columns=names,
            use_threads=False,  # a few narrow columns, mostly of one of many files that are read at once
        )
        for raw in batches:
            batch = raw.slice(min(skip, raw.num_rows), left)
            skip -= min(skip, raw.num_rows)
            if batch.num_rows:
                left -= batch.num_rows
                yield _parquet_batch(batch, values, others)
            if not left:
                return


def _footer(place: Place, found: Found) -> tuple[pq.FileMetaData, str, bytes]:
    """(footer, its SHA-256 in hex, the file's end that was read for it, mostly at once)."""
    path = found.path
    tail = place.tail(found, _TAIL_BYTES)
    if len(tail) < 12 or tail[-4:] not in (b"PAR1", b"PARE"):
        hint = "it is empty" if not found.size_bytes else "it is truncated, or of another format"
        raise PromptsError(f"{path} is not a whole Parquet file: {hint}")
    if tail[-4:] == b"PARE":
        raise PromptsError(f"{path} has an encrypted footer; decrypt it first")
    length = struct.unpack("<I", tail[-8:-4])[0] + 8
    if length > min(found.size_bytes, _MAX_FOOTER_BYTES):
        raise PromptsError(f"{path} is not a whole Parquet file: its footer would be longer than the file")
    if length > len(tail):
        tail = place.tail(found, length)
    footer = tail[-length:]
    try:
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    except (pa.ArrowException, OSError) as error:
        raise PromptsError(f"{path} is not a whole Parquet file: {line_of(error)}") from error
    return metadata, sha256(footer).hexdigest(), tail


def _parquet_schema(metadata: pq.FileMetaData, path: str) -> pa.Schema:
    try:
        schema = metadata.schema.to_arrow_schema()
        names = schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"{path} has columns that cannot be read: {line_of(error)}") from error
    check_names(names, path)
    kept = {key: value for key, value in (metadata.metadata or {}).items() if key == b"huggingface"}
    return pa.schema([column.remove_metadata() for column in schema], metadata=kept or None)


def _parquet_batch(batch: pa.RecordBatch, values: Sequence[str], others: pa.Schema) -> Batch:
    arrays = [
        _as_type(batch.column(column.name), column.type)
        if column.name in batch.schema.names
        else pa.nulls(batch.num_rows, column.type)
        for column in others
    ]
    table = (
        pa.Table.from_arrays(arrays, schema=others)
        if arrays
        else pa.Table.from_batches([batch]).select([])  # keeps the number of rows
    )
    return Batch({name: _python_values(batch.column(name)) for name in values}, table)


def _as_type(array: pa.Array, type: pa.DataType) -> pa.Array:
    return array if array.type == type else array.cast(type)  # only from null: planning saw to the rest


def _python_values(array: pa.Array) -> list[Any]:
    """The values, with bytes for a text that is not valid UTF-8."""
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    if not is_text(array.type):
        return array.to_pylist()
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    if not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
        try:
            return array.to_numpy(zero_copy_only=False).tolist()  # several times as fast as to_pylist
        except (UnicodeDecodeError, pa.ArrowException):
            pass
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    raw = array.cast(pa.large_binary() if wide else pa.binary()).to_pylist()
    return [None if value is None else _text(value) for value in raw]


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
