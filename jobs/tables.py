"""Small Parquet tables, as bytes. Knows no jobs."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def table_of(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table that the bytes are, or these columns of it in this order. ArrowInvalid where they are none,
    KeyError where a column is missing.

    In this thread alone: `pq.read_table` of a Python file leaves the last word to a thread of Arrow's, which
    aborts a process that ends just then (apache/arrow#34314): on a busy core, three of sixty that did.
    """
    wanted = None if columns is None else list(columns)
    table = pq.ParquetFile(pa.BufferReader(data)).read(wanted, use_threads=False)
    return table if wanted is None else table.select(wanted)
