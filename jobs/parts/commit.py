"""The commit of a part, one create-if-absent, and the tables that its footer gives. Knows no rows.

The tour ends here: when `create_part` returns a timing, the shard is done, whatever happens to its worker.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq

from overtone.jobs.columns import FIRST_TIMINGS, REJECTS, TIMINGS
from overtone.jobs.parts.build import Part
from overtone.jobs.parts.footer import Footer, Timing
from overtone.jobs.parts.names import rejects_name, timings_name
from overtone.jobs.store import Store

_CONTENT_TYPE = {"parquet": "application/vnd.apache.parquet", "tar": "application/x-tar"}


def create_part(store: Store, part: Part) -> Timing | None:
    """Create the part under its final name, unless another attempt did so before. This is the commit.

    Returns how long that took: the part is ours, and `write_derived` is due. None: another attempt's part was
    first, and ours is forgotten. StoreError: it is not known which; call again, which is harmless.
    """
    begin = time.time()
    content_type = _CONTENT_TYPE[part.key.rpartition(".")[2]]
    if not store.create(part.key, part.data, attempt=part.attempt, content_type=content_type):
        return None
    started = part.footer.started
    return Timing(
        None,
        "upload",
        part.num_rows,
        seconds=time.time() - begin,
        start_s=None if started is None else begin - started,
    )


def write_derived(store: Store, footer: Footer, more: Sequence[Timing] = ()) -> None:
    """Write a part's timings and, if it has any, its rejects. `more` are timings that a part cannot hold
    about itself.

    The rejects of a retry replace the earlier ones, by an empty table where none is left, so that writers
    need no right to delete. Call it for the parts of one shard in order, so that the newest part's rejects
    stay.
    """
    if footer.rejects or footer.retry:
        store.put(rejects_name(footer.num_shards, footer.shard), _table_bytes(rejects_table(footer)))
    timings = _table_bytes(timings_table(footer, more))
    store.put(timings_name(footer.num_shards, footer.shard, footer.retry), timings, durable=False)


def timings_table(footer: Footer, more: Sequence[Timing] = ()) -> pa.Table:
    """The timings of a part: one row for each stage of each batch."""
    timings = (*footer.timings, *more)
    same = {name: [getattr(footer, name)] for name in ("shard", "attempt", "worker", "device", "node")}
    columns = {name: value * len(timings) for name, value in same.items()}
    columns |= {f.name: [getattr(timing, f.name) for timing in timings] for f in fields(Timing)}
    columns["start"] = [_moment(footer.started, timing.start_s) for timing in timings]
    schema = TIMINGS if footer.own_columns else FIRST_TIMINGS
    return pa.Table.from_arrays([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def rejects_table(footer: Footer) -> pa.Table:
    """The rejects of a part, one row for each."""
    about = {"shard": footer.shard, "attempt": footer.attempt}
    lines = [asdict(reject) | about for reject in footer.rejects]
    return pa.Table.from_pylist(lines, schema=REJECTS)


def _table_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    texts = [column.name for column in table.schema if pa.types.is_string(column.type)]
    pq.write_table(table, sink, compression="zstd", use_dictionary=texts, write_page_index=True)
    return sink.getvalue()


def _moment(started: float | None, start_s: float | None) -> datetime | None:
    return None if started is None or start_s is None else datetime.fromtimestamp(started + start_s, UTC)
