"""A part: the finished rows of one shard as one object, encoded whole in memory. Knows no model and no store.

    part = build_part(spec, job_plan, shard, attempt=attempt, made=made, rejects=rejects, ...)
    upload = create_part(store, part)     # None: another attempt was first; else ours is the shard's part
    write_derived(store, part.footer, [upload])      # any time later

Everything that must survive is in the part: its rows and, in the footer under `overtone`, what happened. The
tables under `timings/` and `rejects/` are derived from the footer (`write_derived`) and can be made again.
Only the `upload` line of the timings is then lost, because a part cannot hold it about itself.

The last stop of the tour: `build_part` here, then `create_part` in jobs/parts/commit.py, which is the commit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from overtone.jobs.media import Kind, media_kind
from overtone.jobs.parts.footer import Footer, Timing, digest, package_versions
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
    """What a part records about the attempt that made it."""

    id: str
    """Unique. A store tells one attempt's object from another's by it."""
    worker: str
    device: str
    node: str = ""
    """Ray's name of the machine; empty where there is no Ray."""
    started: float | None = None
    """Seconds since 1970; the timings' `start_s` count from then."""
    retry: int = 0
    """The number of the retry that it belongs to; 0: the job itself."""
    device_name: str = ""
    """The kind of processor behind `device`; empty: not known."""
    model_commit: str = ""
    """The hub's commit that the model was loaded from; empty: not known, or no model of the hub."""


def build_part(
    spec: JobSpec,
    job_plan: JobPlan,
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
    """The part of a shard. Its rows have the order of the input, however they were batched.

    `passthrough` has the input rows from `first_row` on (`ShardRows`). `kind` is what the model makes. None:
    `made` shows it, and where nothing was made it is images.
    """
    begin = time.time()
    made = sorted(made, key=lambda sample: (sample.row.source, sample.row.image_index))
    rejects = sorted(rejects, key=lambda reject: reject.source)
    kind = kind or (media_kind(made[0].data) if made else "image")
    format = spec.output.format
    schema = part_schema(spec, passthrough.schema, kind, job_plan.generation)
    foreign = {*passthrough.column_names}
    footer = Footer(
        shard=shard.index,
        num_shards=job_plan.num_shards,
        attempt=attempt.id,
        fingerprint=job_plan.fingerprint,
        first_row=shard.first_row,
        input_rows=shard.num_rows,
        rows=len(made),
        digests={
            "row_id": digest(sample.row.row_id.encode() for sample in made),
            kind: digest(sample.data for sample in made),
        },
        worker=attempt.worker,
        device=attempt.device,
        node=attempt.node,
        started=attempt.started,
        versions=package_versions(),
        rejects=tuple(rejects),
        retry=attempt.retry,
        device_name=attempt.device_name,
        model_commit=attempt.model_commit,
        settings=job_plan.samples,
        compute={
            "threads": spec.workers.threads or math.ceil(spec.workers.num_cpus),
            "compile": spec.workers.compile,
            "offload": spec.model.offload,
        },
        # None of the first generation, whose readers know them.
        own_columns=tuple(n for n in schema.names if n not in foreign) if job_plan.generation > 1 else (),
    )
    cut = [sample.prompt_truncated for sample in made if sample.prompt_truncated is not None]
    more_bytes = passthrough.nbytes // max(1, passthrough.num_rows)
    groups = row_groups(made, more_bytes)
    tables = (rows_table(spec, schema, made[a:b], passthrough, first_row, kind) for a, b in groups)

    def finished() -> Footer:
        """The footer, with the time that writing has taken so far. It is the last thing that is written."""
        writing = Timing(
            None,
            "part_write",
            len(made),
            seconds=time.time() - begin,
            start_s=None if attempt.started is None else begin - attempt.started,
            truncated=sum(cut) if cut else None,
        )
        return replace(footer, timings=(*timings, writing))

    if format == "webdataset":
        footer, data = tar_bytes(tables, kind, finished)
    else:
        footer, data = parquet_bytes(tables, schema, kind, made, finished)
    return Part(part_name(job_plan, shard.index, format, attempt.retry), data, footer)
