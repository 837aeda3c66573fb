"""Parquet's type INTERVAL, which DuckDB writes, and Arrow reads as 12 bytes and cannot write: columns, at any
depth, that stay intervals from the prompts to a part. Knows no names.

A field of Arrow's says in its metadata that it is one. In a finished file the footer's schema is changed, by
one more field in the element of each such column (Thrift's compact protocol, in which a footer is written).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from overtone.jobs.column_types import contains, inner_fields, leaves, with_inner_fields

INTERVAL = {b"overtone:parquet_type": b"INTERVAL"}
"""Metadata of a field of 12 bytes that is an INTERVAL in Parquet."""
_INTERVAL_BYTES = 12
_CONVERTED_TYPE = 6  # the field of a schema's element, an i32
_INTERVAL_VALUE = b"\x2a"  # 21, as Thrift writes it
_SCHEMA = 2  # the field of a footer, a list of elements
_NUM_CHILDREN = 5
_TRUE, _FALSE, _BYTE, _I32, _I64, _BINARY, _STRUCT = 1, 2, 3, 5, 6, 8, 12


def with_intervals_marked(schema: pa.Schema, columns: pq.ParquetSchema) -> pa.Schema:
    """The schema that Arrow reads from a file with these columns, whose intervals say what they are, and
    nothing else does."""
    if not any(contains(type, _has_its_bytes) for type in schema.types):
        return schema
    which = {k for k in range(len(columns)) if columns.column(k).converted_type == "INTERVAL"}
    numbers = iter(range(len(columns)))
    fields = [_marked(field, numbers, which) for field in schema]
    return pa.schema(fields, metadata=schema.metadata)


def interval_leaves(schema: pa.Schema) -> list[int]:
    """Which of a file's columns, numbered as Parquet does, are such intervals."""
    return [k for k, leaf in enumerate(leaves(schema)) if (leaf.metadata or {}).items() >= INTERVAL.items()]


def with_intervals_typed(data: bytes, which: Collection[int]) -> bytes:
    """A Parquet file whose columns of these numbers, of 12 bytes each, are of the type INTERVAL."""
    if not which:
        return data
    length = struct.unpack("<I", data[-8:-4])[0]
    footer = data[-8 - length : -8]
    pieces, done, leaf = [], 0, -1
    for last_field, end, is_leaf in _elements(footer):
        leaf += is_leaf
        if is_leaf and leaf in which:
            # The field that follows is numbered from this one instead of from the last before it.
            step = _CONVERTED_TYPE - last_field
            pieces += [footer[done:end], bytes([step << 4 | _I32]), _INTERVAL_VALUE]
            pieces.append(bytes([max(0, footer[end] - (step << 4))]))  # 0 ends the element
            done = end + 1
    changed = b"".join([*pieces, footer[done:]])
    return b"".join((data[: -8 - length], changed, struct.pack("<I", len(changed)), data[-4:]))


def _has_its_bytes(type: pa.DataType) -> bool:
    return pa.types.is_fixed_size_binary(type) and type.byte_width == _INTERVAL_BYTES


def _marked(field: pa.Field, numbers: Iterator[int], which: Collection[int]) -> pa.Field:
    inner = inner_fields(field.type)
    if isinstance(field.type, pa.BaseExtensionType):
        for _ in leaves([field]):
            next(numbers)
        return field
    if inner:
        return field.with_type(with_inner_fields(field.type, [_marked(one, numbers, which) for one in inner]))
    about = {key: value for key, value in (field.metadata or {}).items() if key not in INTERVAL}
    if next(numbers) in which and _has_its_bytes(field.type):
        about |= INTERVAL
    return field.with_metadata(about or None)


def _elements(footer: bytes) -> Iterator[tuple[int, int, bool]]:
    """Of each element of a footer's schema: (its last field before the converted type, where in the footer
    that field ends, whether it is a column rather than a group)."""
    at, number = 0, 0
    while number < _SCHEMA:
        number, kind, start = _field(footer, at, number)
        at = start if number == _SCHEMA else _after(footer, start, kind)
    size, at = footer[at] >> 4, at + 1
    if size == 15:  # a longer list has its length in a number of its own
        size, at = _number(footer, at)
    for _ in range(size):
        number, last, end, is_leaf = 0, 0, at, True
        while footer[at]:
            number, kind, start = _field(footer, at, number)
            at = _after(footer, start, kind)
            is_leaf = is_leaf and number != _NUM_CHILDREN
            if number < _CONVERTED_TYPE:
                last, end = number, at
        at += 1
        yield last, end, is_leaf


def _field(data: bytes, at: int, before: int) -> tuple[int, int, int]:
    """(number, type, where its value begins) of a field, which counts from the one before it."""
    assert data[at] >> 4, "no field of a footer is more than 15 numbers on"
    return before + (data[at] >> 4), data[at] & 15, at + 1


def _after(data: bytes, at: int, kind: int) -> int:
    """Where a value ends."""
    if kind in (_TRUE, _FALSE):
        return at
    if kind == _BYTE:
        return at + 1
    if kind == _BINARY:
        length, at = _number(data, at)
        return at + length
    if kind == _STRUCT:
        while data[at]:
            at = _after(data, at + 1, data[at] & 15)
        return at + 1
    assert kind in (_I32, _I64), f"there is no field of the type {kind} in a schema"
    return _number(data, at)[1]


def _number(data: bytes, at: int) -> tuple[int, int]:
    """(a number of 7 bits a byte, the lowest first; where it ends)."""
    number = shift = 0
    while data[at] & 128:
        number, shift, at = number | (data[at] & 127) << shift, shift + 7, at + 1
    return number | data[at] << shift, at + 1
