"""Prompt tables in Parquet: rows counted by the footer alone, read by row groups. Knows no meanings.

A file whose footer has another hash than the planned one is refused. Of large rows few are read at once: the
footer says how large they are.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from overtone.jobs.column_types import contains, fitted, leaves, plain, with_inner_values
from overtone.jobs.columns import FOOTER_KEY
from overtone.jobs.errors import PromptsError
from overtone.jobs.intervals import INTERVAL, with_intervals_marked
from overtone.jobs.prompts.places import Found, Place
from overtone.jobs.prompts.scan import (
    BATCH_ROWS,
    Batch,
    Scan,
    Wanted,
    batch_of,
    changed,
    check_names,
    is_text,
    line_of,
)

_TAIL_BYTES = 64 * 1024  # one request for most footers
_MAX_FOOTER_BYTES = 1024**3
_BUFFER_BYTES = 4 * 1024**2
_BATCH_BYTES = 32 * 1024**2
_SIGNED_BYTES = 28  # nonce and tag behind a footer that can be read although columns are encrypted


def scan_parquet(place: Place, found: Found) -> Scan:
    """Count the rows of a file. PromptsError where it is no whole Parquet file."""
    metadata, digest, tail, signed = _footer(place, found)
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if sum(rows) != metadata.num_rows or any(n < 0 for n in rows):
        raise PromptsError(f"{found.path} is damaged: its footer contradicts itself about its rows")
    footer = b"PAR1" + tail[-_footer_length(tail) :]
    schema = _schema(footer, metadata, found.path)
    if signed:
        unusable = _encrypted_columns(metadata, footer, schema, found.path)
    else:
        unusable = _null_arrays(place, found, metadata, schema, tail)
    unusable |= _extensions_of_categories(schema, found.path)
    own = FOOTER_KEY in (metadata.metadata or {})
    return Scan(metadata.num_rows, len(rows), (), digest, schema, unusable, own)


def read_parquet(
    place: Place,
    found: Found,
    wanted: Wanted,
    first_row: int,
    num_rows: int,
    digest: str,
) -> Iterator[Batch]:
    """The rows [first_row, first_row + num_rows); `table.read` states the rules."""
    metadata, now, tail, signed = _footer(place, found)
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
    names = [name for name in dict.fromkeys([*wanted.values, *wanted.others.names]) if name in there]
    with _open(place, found, metadata, tail) as table:
        # Arrow reads no nested column with categories of several row groups at once.
        nested = any(pa.types.is_nested(table.schema_arrow.field(name).type) for name in names)
        batch_rows = 64 if signed else _batch_rows(metadata, groups, names)
        batches = (
            batch
            for some in ([[group] for group in groups] if nested else [groups])
            for batch in table.iter_batches(
                batch_size=batch_rows,
                row_groups=some,
                columns=names,
                use_threads=False,  # a few narrow columns, mostly of one of many files that are read at once
            )
        )
        for raw in batches:
            batch = raw.slice(min(skip, raw.num_rows), left)
            skip -= min(skip, raw.num_rows)
            if batch.num_rows:
                left -= batch.num_rows
                yield _batch(batch, wanted)
            if not left:
                return


@contextmanager
def _open(place: Place, found: Found, metadata: pq.FileMetaData, tail: bytes) -> Iterator[pq.ParquetFile]:
    with (
        io.BytesIO(tail) if len(tail) == found.size_bytes else place.open(found.path) as file,
        pq.ParquetFile(file, metadata=metadata, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table,
    ):
        yield table


def _footer(place: Place, found: Found) -> tuple[pq.FileMetaData, str, bytes, bool]:
    """(footer, its SHA-256 in hex, the file's end that was read for it, mostly at once, whether the footer is
    signed, as it is where columns are encrypted)."""
    path = found.path
    tail = place.tail(found, _TAIL_BYTES)
    if len(tail) < 12 or tail[-4:] not in (b"PAR1", b"PARE"):
        hint = "it is empty" if not found.size_bytes else "it is truncated, or of another format"
        raise PromptsError(f"{path} is not a whole Parquet file: {hint}")
    if tail[-4:] == b"PARE":
        raise PromptsError(f"{path} has an encrypted footer; decrypt it first")
    length = _footer_length(tail)
    if length > min(found.size_bytes, _MAX_FOOTER_BYTES):
        raise PromptsError(f"{path} is not a whole Parquet file: its footer would be longer than the file")
    if length > len(tail):
        tail = place.tail(found, length)
    footer = tail[-length:]
    try:
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    except NotImplementedError as error:  # Arrow's, about a type that it has not
        raise PromptsError(
            f"{path} has a column that cannot be read: {line_of(error)}; cast or drop it"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise PromptsError(f"{path} is not a whole Parquet file: {line_of(error)}") from error
    signed = metadata.serialized_size + _SIGNED_BYTES == length - 8
    return metadata, sha256(footer).hexdigest(), tail, signed


def _footer_length(tail: bytes) -> int:
    return struct.unpack("<I", tail[-8:-4])[0] + 8


def _schema(footer: bytes, metadata: pq.FileMetaData, path: str) -> pa.Schema:
    """The columns as reading gives them, in types that a part can hold. What is not of Arrow's own types says
    so in the metadata of its field."""
    try:
        schema = pq.ParquetFile(pa.BufferReader(footer)).schema_arrow
        names = schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"{path} has columns that cannot be read: {line_of(error)}") from error
    check_names(names, path)
    kept = {key: value for key, value in (schema.metadata or {}).items() if key == b"huggingface"}
    fields = [_field(column) for column in with_intervals_marked(schema, metadata.schema)]
    return pa.schema(fields, metadata=kept or None)


def _field(column: pa.Field) -> pa.Field:
    about = {
        key: value
        for key, value in (column.metadata or {}).items()
        if key.startswith(b"ARROW:extension:") or key in INTERVAL
    }
    return pa.field(column.name, with_inner_values(plain(column.type)), metadata=about or None)


def _encrypted_columns(
    metadata: pq.FileMetaData, footer: bytes, schema: pa.Schema, path: str
) -> dict[str, str]:
    """A sentence about each encrypted column. Whoever asks the footer itself about one ends the process."""
    found = {}
    for name in schema.names:
        try:
            with pq.ParquetFile(pa.BufferReader(footer), metadata=metadata) as file:
                next(file.iter_batches(batch_size=1, columns=[name], use_threads=False), None)
        except (pa.ArrowException, OSError) as error:  # that of the others: there are no rows in the footer
            if "decrypt" in str(error):
                found[name] = (
                    f"{path}: column {name!r} is encrypted; decrypt it, or name the columns to pass through, "
                    "without it, in `prompts.keep`"
                )
    return found


def _null_arrays(
    place: Place, found: Found, metadata: pq.FileMetaData, schema: pa.Schema, tail: bytes
) -> dict[str, str]:
    """A sentence about each column with an array of a fixed size that is null, which DuckDB writes as a list
    of its size that has no elements, so that only DuckDB can read it. The footer shows where there may be
    one; those columns are read, up to the first."""
    unusable: dict[str, str] = {}
    for name, groups in may_have_null_arrays(metadata, schema).items():
        try:
            with _open(place, found, metadata, tail) as table:
                rows = _batch_rows(metadata, groups, [name])
                for _ in table.iter_batches(rows, row_groups=groups, columns=[name], use_threads=False):
                    pass
        except pa.ArrowInvalid as error:
            unusable[name] = (
                f"{found.path}: column {name!r} cannot be read ({line_of(error)}), for so DuckDB writes null "
                "arrays of a fixed size; cast it to a list there, as in `x::INTEGER[]`, or name the columns "
                "to pass through, without it, in `prompts.keep`"
            )
    return unusable


def _extensions_of_categories(schema: pa.Schema, path: str) -> dict[str, str]:
    """A sentence about each column of an extension type on categories: on reading one in batches Arrow ends
    the process."""
    return {
        field.name: (
            f"{path}: column {field.name!r} has an extension type on categories, which "
            "cannot be read; cast its values, or name the columns to pass through, without it, in "
            "`prompts.keep`"
        )
        for field in schema
        if contains(field.type, _is_extension_of_categories)
    }


def _is_extension_of_categories(type: pa.DataType) -> bool:
    return isinstance(type, pa.BaseExtensionType) and contains(type.storage_type, pa.types.is_dictionary)


def may_have_null_arrays(metadata: pq.FileMetaData, schema: pa.Schema) -> dict[str, list[int]]:
    """The row groups of each column of lists in which there may be one."""
    found: dict[str, set[int]] = {}
    if not (metadata.created_by or "").startswith("DuckDB"):
        return {}
    columns = [column.name for column in schema for _ in leaves([column])]
    for leaf, name in enumerate(columns):
        depth = metadata.schema.column(leaf).max_repetition_level
        for group in range(metadata.num_row_groups if depth else 0):
            chunk, rows = metadata.row_group(group).column(leaf), metadata.row_group(group).num_rows
            size, rest = divmod(chunk.num_values, max(1, rows))
            nulls = chunk.statistics.null_count if chunk.statistics else None
            # Lists within lists may have any number of values; an array of one element is written as it is.
            if (depth > 1 or (size > 1 and not rest)) and (nulls is None or nulls > 0):
                found.setdefault(name, set()).add(group)
    return {name: sorted(groups) for name, groups in found.items()}


def _batch_rows(metadata: pq.FileMetaData, groups: Sequence[int], names: Sequence[str]) -> int:
    """How many rows are read at once, so that they are not much more than `_BATCH_BYTES`."""
    largest = 1
    for group in (metadata.row_group(i) for i in groups):
        columns = (group.column(j) for j in range(group.num_columns))
        size_bytes = sum(
            column.total_uncompressed_size
            for column in columns
            if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in names)
        )
        largest = max(largest, size_bytes // max(1, group.num_rows))
    return max(1, min(BATCH_ROWS, _BATCH_BYTES // largest))


def _batch(batch: pa.RecordBatch, wanted: Wanted) -> Batch:
    there = set(batch.schema.names)

    def values(name: str) -> list[Any] | None:
        return _python_values(batch.column(name), raw=name in wanted.raw) if name in there else None

    def others(column: pa.Field) -> tuple[pa.Array, list[int]] | None:
        return fitted(batch.column(column.name), column.type) if column.name in there else None

    return batch_of(wanted, batch.num_rows, values=values, others=others)


def _python_values(array: pa.Array, *, raw: bool = False) -> list[Any]:
    """The values, with bytes for a text that is not valid UTF-8, and for all binary ones where they are
    wanted `raw`."""
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    if not is_text(array.type) or (raw and _is_binary(array.type)):
        return array.to_pylist()
    if array.type != plain(array.type):
        array = array.cast(plain(array.type))
    if not _is_binary(array.type):
        try:
            return array.to_numpy(zero_copy_only=False).tolist()  # several times as fast as to_pylist
        except (UnicodeDecodeError, pa.ArrowException):
            pass
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    found = array.cast(pa.large_binary() if wide else pa.binary()).to_pylist()
    return [None if value is None else _text(value) for value in found]


def _is_binary(type: pa.DataType) -> bool:
    checks = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view
    return any(check(type) for check in checks)


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
