"""The rows of a job that are measured: a few prompts, spread over its table, and which sizes they ask for.
Knows no engine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from overtone.cluster.faults import first_line
from overtone.cluster.worker import sized
from overtone.jobs.errors import PictureError, PromptsError, UserError
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import read_shard
from overtone.jobs.rows import Row
from overtone.jobs.sampling import checkpoint_of
from overtone.jobs.spec import JobSpec
from overtone.progressive.families import FAMILIES

_LOOK_AT_SHARDS = 16  # where a job's sizes are counted; spread over the job


def sample_rows(spec: JobSpec, count: int) -> list[Row]:
    """Up to `count` rows that can be made, spread evenly over the prompt table. PromptsError where there is
    none."""
    job_plan = make_plan(spec)
    step = max(1, job_plan.num_shards // count)
    per_shard = -(-count // -(-job_plan.num_shards // step))  # rows over the shards that are looked at
    rows: list[Row] = []
    for index in range(0, job_plan.num_shards, step):
        shard = job_plan.shard(index)
        rows += read_shard(spec, job_plan.files[shard.file], shard.first_row, shard.num_rows).rows[:per_shard]
        if len(rows) >= count:
            break
    if not rows:
        raise PromptsError("none of the prompt table's rows that were looked at can be made")
    return _sized(spec, rows[:count])


def spread_out(rows: Sequence[Row]) -> list[Row]:
    """The rows in an order whose first ones, however many, are spread over all of them: by the multiples of
    the golden ratio, modulo 1. What is measured on few rows is measured on rows of all kinds."""
    return [rows[k] for k in sorted(range(len(rows)), key=lambda k: k * (math.sqrt(5) - 1) / 2 % 1)]


@contextmanager
def naming_rows(rows: Sequence[Row]) -> Iterator[None]:
    """Within it rows are made. PromptsError, which names them, where what they start from cannot be used: a
    job rejects such rows, and what is measured here is rows that are made."""
    try:
        yield
    except PictureError as error:
        raise PromptsError(f"row {error.row_id}: {error}; the job would reject it") from error
    except ValueError as error:
        if isinstance(error, UserError) or not any(row.image for row in rows):
            raise
        names = ", ".join(row.row_id for row in rows)
        raise PromptsError(
            f"one of the rows {names}: {first_line(error)}; the job would reject it"
        ) from error


def job_sizes(spec: JobSpec, job_plan: JobPlan) -> Sizes:
    """Sizes and number of the job's samples, from shards spread over it. PromptsError if there are none."""
    count = min(job_plan.num_shards, _LOOK_AT_SHARDS)
    rows: list[Row] = []
    inputs = 0
    for k in range(count):
        shard = job_plan.shard(k * job_plan.num_shards // count)
        read = read_shard(spec, job_plan.files[shard.file], shard.first_row, shard.num_rows)
        rows += read.rows
        inputs += shard.num_rows
    if not rows:
        raise PromptsError("none of the prompt table's rows that were looked at can be made")
    rows = _sized(spec, rows)
    return Sizes(
        rows=tuple(rows),
        shares=Counter((row.height, row.width) for row in rows),
        num_samples=round(job_plan.num_rows * len(rows) / inputs),
        exact=count == job_plan.num_shards,
    )


def _sized(spec: JobSpec, rows: list[Row]) -> list[Row]:
    """The rows with the sizes that follow from their pictures, as far as the model is known here."""
    if not spec.pictured:
        return rows
    try:
        return sized(rows, FAMILIES[checkpoint_of(spec).family], spec.sampling)
    except UserError:
        return rows


@dataclass(frozen=True)
class Sizes:
    """The sizes that a job's rows ask for, as far as its shards were looked at."""

    rows: tuple[Row, ...]
    """The rows that were looked at, those that can be made."""
    shares: Counter[tuple[int | None, int | None]]
    """How many of them ask for each height and width in pixels; None: the job's own."""
    num_samples: int
    """Samples that the whole job makes."""
    exact: bool
    """All shards were looked at."""
