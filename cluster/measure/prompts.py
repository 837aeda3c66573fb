"""The rows of a job that are measured: a few prompts, spread over its table, and which sizes they ask for.
Knows no engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from overtone.jobs.errors import PromptsError
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import read_shard
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec

_LOOK_AT_SHARDS = 16  # where a job's sizes are counted; spread over the job

Judge = Callable[[Image.Image, str], tuple[int, int]]
"""(objects drawn right, objects asked for) of a picture and its prompt."""


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
    return rows[:count]


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
    return Sizes(
        rows=tuple(rows),
        shares=Counter((row.height, row.width) for row in rows),
        num_samples=round(job_plan.num_rows * len(rows) / inputs),
        exact=count == job_plan.num_shards,
    )


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


def tiny_judge(spec: JobSpec, rows: Sequence[Row]) -> Judge | None:
    """The picture world's own judge, where the job's model is the embedded one and draws captions of that
    world at its size; None elsewhere."""
    sizes = {(row.height or spec.sampling.height, row.width or spec.sampling.width) for row in rows}
    if spec.model.id != "tiny" or not sizes <= {(None, None), (256, 256), (256, None), (None, 256)}:
        return None
    from overtone.progressive.tiny import judge, world

    try:
        for row in rows:
            world.parse(row.prompt)
    except ValueError:
        return None
    return judge.judge
