"""Arrow types of columns that pass through: what a part can hold, what holds two, values made to fit.
Knows no files and no names of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_FAILURES = (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError, RecursionError)


def plain(type: pa.DataType) -> pa.DataType:
    """The type that stands for this one in a part, at any depth: Arrow cannot take rows of views, and Parquet
    has no runs."""
    if pa.types.is_string_view(type) or pa.types.is_binary_view(type):
        return pa.string() if pa.types.is_string_view(type) else pa.binary()
    if pa.types.is_run_end_encoded(type):
        return plain(type.value_type)
    if pa.types.is_dictionary(type):
        value = plain(type.value_type)
        return type if value == type.value_type else pa.dictionary(type.index_type, value, type.ordered)
    if isinstance(type, pa.BaseExtensionType):
        return _on_storage(type, plain(type.storage_type))
    if not pa.types.is_nested(type) or pa.types.is_union(type):
        return type
    return with_inner_fields(type, [field.with_type(plain(field.type)) for field in inner_fields(type)])


def with_inner_values(type: pa.DataType) -> pa.DataType:
    """The type with values for the categories within it; a column of categories itself stays. Arrow reads a
    nested column with categories one row group at a time, and never the whole of a part."""
    if not pa.types.is_nested(type) or not contains(type, pa.types.is_dictionary):
        return type
    inner = inner_fields(type)
    types = (one.type.value_type if pa.types.is_dictionary(one.type) else one.type for one in inner)
    fields = [one.with_type(with_inner_values(new)) for one, new in zip(inner, types, strict=True)]
    return with_inner_fields(type, fields)


def plain_table(table: pa.Table) -> pa.Table:
    """A table with its columns in such types."""
    for i, field in enumerate(table.schema):
        if field.type != plain(field.type):
            chunks = [fitted(chunk, plain(field.type))[0] for chunk in table.column(i).chunks]
            column = pa.chunked_array(chunks, plain(field.type))
            table = table.set_column(i, pa.field(field.name, column.type, metadata=field.metadata), column)
    return table


def merged(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both, at any depth; None: there is none.

    Null gives way to any type, whole numbers to fractions, categories to their values, a time zone to UTC
    where there are two, and of two structs the fields come together. What fields within them say beside
    their types stays where both say it.
    """
    if a.equals(b, check_metadata=pa.types.is_nested(a)) or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if isinstance(a, pa.BaseExtensionType) or isinstance(b, pa.BaseExtensionType):
        return merged(*map(_storage, (a, b))) if _storage(a) is a or _storage(b) is b else None
    if pa.types.is_dictionary(a) or pa.types.is_dictionary(b):
        return merged(*(one.value_type if pa.types.is_dictionary(one) else one for one in (a, b)))
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        return _merged_structs(a, b)
    if pa.types.is_map(a) and pa.types.is_map(b):
        key, item = merged(a.key_type, b.key_type), merged(a.item_type, b.item_type)
        return None if key is None or item is None else pa.map_(key, item)
    if _is_list(a) and _is_list(b):
        return _merged_lists(a, b)
    if pa.types.is_timestamp(a) and pa.types.is_timestamp(b) and a.tz and b.tz and a.tz != b.tz:
        a, b = (pa.timestamp(one.unit, "UTC") for one in (a, b))
    if {pa.types.is_decimal(a), pa.types.is_decimal(b)} == {True, False}:
        scale, whole = (a.scale, b) if pa.types.is_decimal(a) else (b.scale, a)
        if pa.types.is_integer(whole):
            return pa.decimal128(38, scale) if scale <= 18 else None
    try:
        schemas = [pa.schema([("x", one)]) for one in (a, b)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def fitted(array: pa.Array, type: pa.DataType) -> tuple[pa.Array, list[int]]:
    """(the values in a type that `merged` gave, the rows whose value is not in it and is null now). A number
    above 2^53 is no fraction, and a time of the year 3000 has no nanoseconds."""
    if array.type == type:
        return array, []
    try:
        return _cast(array, type), []
    except _FAILURES:
        pass
    pieces, misfits = [], []
    for i in range(len(array)):
        try:
            pieces.append(_cast(array.slice(i, 1), type))
        except _FAILURES:
            pieces.append(pa.nulls(1, type))
            misfits.append(i)
    return pa.concat_arrays(pieces), misfits


def fitted_values(values: Sequence[Any], type: pa.DataType) -> tuple[pa.Array, list[int]]:
    """The same for Python values."""
    try:
        return pa.array(values, type), []
    except _FAILURES:
        pass
    pieces, misfits = [], []
    for i, value in enumerate(values):
        try:
            piece, misfit = fitted(pa.array([value]), type)
        except _FAILURES:
            piece, misfit = pa.nulls(1, type), [0]
        pieces.append(piece)
        misfits += [i] * len(misfit)
    return pa.concat_arrays(pieces), misfits


def empty_table(schema: pa.Schema) -> pa.Table:
    """No rows; `Schema.empty_table` refuses some extension types."""
    return pa.Table.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema)


def contains(type: pa.DataType, check: Any) -> bool:
    """Whether a type or any within it passes the check."""
    if check(type):
        return True
    if isinstance(type, pa.BaseExtensionType):
        return contains(type.storage_type, check)
    return any(contains(field.type, check) for field in inner_fields(type))


def inner_fields(type: pa.DataType) -> list[pa.Field]:
    """The fields of a struct, the one of a list's elements, a map's keys and items, in the order in which a
    file has them; of an extension type its storage's; none of what is not nested."""
    type = _storage(type)
    if pa.types.is_map(type):
        return [type.key_field, type.item_field]
    return [type.field(i) for i in range(type.num_fields)] if pa.types.is_nested(type) else []


def leaves(fields: Iterable[pa.Field]) -> Iterator[pa.Field]:
    """The fields without inner ones, each a column of a Parquet file, in the order of the file."""
    for field in fields:
        inner = inner_fields(field.type)
        yield from leaves(inner) if inner else [field]


def with_inner_fields(type: pa.DataType, fields: Sequence[pa.Field]) -> pa.DataType:
    """A nested type with other fields, and without views."""
    if pa.types.is_struct(type):
        return pa.struct(fields)
    if pa.types.is_map(type):
        return pa.map_(*fields, keys_sorted=type.keys_sorted)
    if pa.types.is_fixed_size_list(type):
        return pa.list_(fields[0], type.list_size)
    large = pa.types.is_large_list(type) or pa.types.is_large_list_view(type)
    return pa.large_list(fields[0]) if large else pa.list_(fields[0])


def _cast(array: pa.Array, type: pa.DataType) -> pa.Array:
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), type)
    if isinstance(array.type, pa.BaseExtensionType) and not isinstance(type, pa.BaseExtensionType):
        array = array.storage
    if contains(array.type, _has_no_cast):
        array = _rebuilt(array)
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    if pa.types.is_dictionary(array.type) and not array.type.equals(type):
        array = array.dictionary_decode()
    return array if array.type.equals(type) else array.cast(type)


def _is_list_view(type: pa.DataType) -> bool:
    return pa.types.is_list_view(type) or pa.types.is_large_list_view(type)


def _has_no_cast(type: pa.DataType) -> bool:
    return _is_list_view(type) or (isinstance(type, pa.BaseExtensionType) and plain(type) != type)


def _rebuilt(array: pa.Array) -> pa.Array:
    """Lists for views of lists, of which Arrow's cast of a slice is broken; and for extension types on views,
    between which it has no cast, those on plain types. Lists of these must not be flattened before: Arrow
    gives texts of more than 12 bytes another memory's contents."""
    type, none = array.type, array.is_null()
    if not contains(type, _has_no_cast):
        return array
    if isinstance(type, pa.BaseExtensionType):
        other, storage = plain(type), _cast(array.storage, plain(type.storage_type))
        return pa.ExtensionArray.from_storage(other, storage) if other != storage.type else storage
    if pa.types.is_struct(type):
        fields = [_rebuilt(field) for field in array.flatten()]
        return pa.StructArray.from_arrays(fields, [field.name for field in type], mask=none)
    if pa.types.is_fixed_size_list(type):
        size = type.list_size
        inner = _rebuilt(array.values.slice(array.offset * size, len(array) * size))
        return pa.FixedSizeListArray.from_arrays(inner, size, mask=none)
    if pa.types.is_map(type):
        inner = (_rebuilt(array.keys), _rebuilt(array.items))
        return pa.MapArray.from_arrays(pc.add(array.offsets, 0), *inner, mask=none)
    large = pa.types.is_large_list(type) or pa.types.is_large_list_view(type)
    kind, inner = (pa.LargeListArray if large else pa.ListArray), _rebuilt(array.values)
    # Of the same field's name, or Arrow would cast it once more, which breaks lists of nothing but nulls.
    to = (pa.large_list if large else pa.list_)(type.value_field.with_type(inner.type))
    if not _is_list_view(type):
        offsets = pc.add(array.offsets, 0)  # a copy: no slice has a mask
        return kind.from_arrays(offsets, inner, type=to, mask=none)
    starts, sizes = (numbers.to_numpy().astype(np.int64) for numbers in (array.offsets, array.sizes))
    sizes[none.to_numpy(zero_copy_only=False)] = 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int64() if large else pa.int32())
    return kind.from_arrays(offsets, _viewed(inner, starts, sizes), type=to, mask=none)


def _viewed(values: pa.Array, starts: np.ndarray, sizes: np.ndarray) -> pa.Array:
    """The values that views show, one view after the other. Arrow's `take` does not know all types."""
    starts, ends = starts[sizes > 0], (starts + sizes)[sizes > 0]
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    runs = zip(np.split(starts, breaks), np.split(ends, breaks), strict=True)
    pieces = [values.slice(first[0], last[-1] - first[0]) for first, last in runs if len(first)]
    return pa.concat_arrays(pieces) if pieces else values.slice(0, 0)


def _on_storage(type: pa.BaseExtensionType, storage: pa.DataType) -> pa.DataType:
    """The same extension type on another storage; the storage itself where there is none."""
    if storage == type.storage_type:
        return type
    if type.extension_name == "arrow.json":
        return pa.json_(storage)
    if type.extension_name == "arrow.opaque":
        return pa.opaque(storage, type.type_name, type.vendor_name)
    return storage


def _storage(type: pa.DataType) -> pa.DataType:
    return type.storage_type if isinstance(type, pa.BaseExtensionType) else type


def _is_list(type: pa.DataType) -> bool:
    return pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)


def _merged_structs(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    types = {field.name: field.type for field in a}
    for field in b:
        type = merged(types.get(field.name, pa.null()), field.type)
        if type is None:
            return None
        types[field.name] = type
    return pa.struct(list(types.items()))


def _merged_lists(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    element = merged(a.value_type, b.value_type)
    if element is None:
        return None
    if pa.types.is_fixed_size_list(a) and pa.types.is_fixed_size_list(b) and a.list_size == b.list_size:
        return pa.list_(element, a.list_size)
    large = pa.types.is_large_list(a) or pa.types.is_large_list(b)
    return pa.large_list(element) if large else pa.list_(element)
