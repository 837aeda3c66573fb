"""Small Parquet tables: one from its bytes, many at a time, some that stand for very many. Knows no jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_READERS = 16  # most of them wait for a store's answer


def table_of(
    data: bytes, columns: Sequence[str] | None = None, optional: Mapping[str, pa.DataType] | None = None
) -> pa.Table:
    """The table that the bytes are, or these columns of it in this order. ArrowInvalid where they are none,
    KeyError where a column is missing. Those that are `optional` are null where an older version wrote none.

    It is read in this thread alone: `pq.read_table` of a Python file leaves the last word to a thread of
    Arrow's, which aborts a process that ends just then (apache/arrow#34314): on a busy core, three of sixty
    that did.
    """
    wanted = None if columns is None else list(columns)
    table = pq.ParquetFile(pa.BufferReader(data)).read(wanted, use_threads=False)
    for name, type in (optional or {}).items():
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, type))
    return table if wanted is None else table.select(wanted)


def read_all(read: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """`read` of each item, in order, several at a time: for small objects of a store that answers slowly."""
    with ThreadPoolExecutor(_READERS, "tables") as pool:
        yield from pool.map(read, items)


def stride_of(count: int, limit: int) -> int:
    """Where only every n-th of `count` tables is read, so that they are at most `limit`: this n.

    It is a power of two. So while the tables become more, half of those that were read before are enough.
    """
    assert limit > 0, "some tables are read"
    stride = 1
    while count > stride * limit:
        stride *= 2
    return stride
