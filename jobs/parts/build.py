"""A part: the finished rows of one shard as one object, encoded whole, then committed. Knows no models.

    part = build_part(spec, plan, shard, attempt=attempt, made=made, rejects=rejects, ...)
    upload = create_part(store, part)     # None: another attempt was first; else ours is the shard's part
    write_derived(store, part.footer, [upload])      # any time later

Everything that must survive is in the part: its rows and, in the footer under `overtone`, what happened. The
tables under `timings/` and `rejects/` are derived from the footer (`write_derived`) and can be made again;
only the `upload` line of the timings, which a part cannot hold about itself, is then gone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from overtone.jobs.media import Kind, media_kind
from overtone.jobs.parts.footer import Footer, Timing, digest, package_versions, shallow
from overtone.jobs.parts.formats import parquet_bytes, tar_bytes
from overtone.jobs.parts.names import part_name
from overtone.jobs.parts.table import Made, part_schema, row_groups, rows_table
from overtone.jobs.plan import JobPlan, Shard
from overtone.jobs.rows import Reject
from overtone.jobs.spec import JobSpec


@dataclass(frozen=True)
class Part:
    """A finished shard, ready to be committed."""

    key: str
    data: bytes = field(repr=False)
    footer: Footer = field(repr=False)

    @property
    def attempt(self) -> str:
        return self.footer.attempt

    @property
    def num_rows(self) -> int:
        return self.footer.rows

    @property
    def num_rejects(self) -> int:
        return len(self.footer.rejects)


@dataclass(frozen=True)
class AttemptFacts:
    """What a part says of the attempt that made it."""

    id: str
    """Unique, by which a store tells one attempt's object from another's."""
    worker: str
    device: str
    node: str = ""
    """Of Ray; empty where there is none."""
    started: float | None = None
    """Seconds since 1970, from which the timings' `start_s` count."""
    retry: int = 0
    """Number of the retry that it belongs to; 0: of the job itself."""


def build_part(
    spec: JobSpec,
    plan: JobPlan,
    shard: Shard,
    *,
    attempt: AttemptFacts,
    made: Sequence[Made],
    rejects: Sequence[Reject],
    passthrough: pa.Table,
    first_row: int,
    timings: Sequence[Timing],
    kind: Kind | None = None,
) -> Part:
    """The part of a shard, with its rows in the order of the input, however they were batched.

    `passthrough` has the input rows from `first_row` on (`ShardRows`). `kind` is what the model
    makes; None: as `made` shows, or images where nothing was made.
    """
    begin = time.time()
    made = sorted(made, key=lambda one: (one.row.source, one.row.image_index))
    rejects = sorted(rejects, key=lambda one: one.source)
    kind = kind or (media_kind(made[0].data) if made else "image")
    format = spec.output.format
    footer = Footer(
        shard=shard.index,
        num_shards=plan.num_shards,
        attempt=attempt.id,
        fingerprint=plan.fingerprint,
        first_row=shard.first_row,
        input_rows=shard.num_rows,
        rows=len(made),
        digests={
            "row_id": digest(one.row.row_id.encode() for one in made),
            kind: digest(one.data for one in made),
        },
        worker=attempt.worker,
        device=attempt.device,
        node=attempt.node,
        started=attempt.started,
        versions=package_versions(),
        rejects=tuple(rejects),
        retry=attempt.retry,
    )
    schema = part_schema(spec, passthrough.schema, kind)
    tables = (rows_table(spec, schema, made[a:b], passthrough, first_row, kind) for a, b in row_groups(made))

    def finished() -> Footer:
        """The footer with the time that writing took so far: the last thing that is written."""
        writing = Timing(
            None,
            "part_write",
            len(made),
            seconds=time.time() - begin,
            start_s=None if attempt.started is None else begin - attempt.started,
        )
        return Footer(**{**shallow(footer), "timings": (*timings, writing)})

    if format == "webdataset":
        footer, data = tar_bytes(tables, kind, finished)
    else:
        footer, data = parquet_bytes(tables, schema, kind, made, finished)
    return Part(part_name(plan, shard.index, format, attempt.retry), data, footer)
