"""Whole jobs without a model: real prompt tables, plans and parts; pictures that follow from the seed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from overtone.jobs.media import encode_media
from overtone.jobs.parts import (
    AttemptFacts,
    Made,
    StageTime,
    Timing,
    build_part,
    create_part,
    write_derived,
)
from overtone.jobs.parts.build import Part
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import read_shard
from overtone.jobs.retry import read_rejected
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.rows import Reject, Row
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import Store, open_store

SIDE_PX = 16


def prompt_table(rows: int, **columns: Any) -> pa.Table:
    """`rows` prompts with unsafe row_ids, and columns that pass through; one given as None is left out."""
    usual = {
        "row_id": [f"../row/{i}" for i in range(rows)],
        "prompt": [f"a picture of number {i}" for i in range(rows)],
        "tag": [None if i % 5 == 4 else f"tag {i % 3}" for i in range(rows)],
        "score": pa.array([i / 8 for i in range(rows)], pa.float32()),
    }
    return pa.table({name: values for name, values in (usual | columns).items() if values is not None})


def small_job(
    folder: Path, table: pa.Table, *, output: str | None = None, shard_rows: int = 4, **settings: Any
) -> tuple[JobSpec, JobPlan]:
    """A job whose prompts are `table`, written to `folder`. `settings` are keys of `output`."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "prompts.parquet")
    spec = JobSpec.model_validate(
        {
            "name": "small",
            "model": "tiny",
            "prompts": str(folder / "prompts.parquet"),
            "shards": shard_rows,
            "sampling": {"height": SIDE_PX, "width": SIDE_PX},
            "output": {"path": output or str(folder / "out"), **settings},
        }
    )
    return spec, make_plan(spec)


def picture(row: Row) -> Image.Image:
    """The picture of a row: noise from its seed."""
    pixels = np.random.default_rng(row.seed).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def small_part(
    spec: JobSpec,
    plan: JobPlan,
    index: int,
    *,
    attempt: str | None = None,
    bad: Iterable[str] = (),
    started: float | None = None,
    worker: str = "w0",
    backwards: bool = False,
    forgotten: Iterable[str] = (),
    repeated: Iterable[str] = (),
    retry: RetryPlan | None = None,
    store: Store | None = None,
    message: str = "was bad",
    error_class: str = "RowError",
) -> Part:
    """The part of a shard, as a worker makes it in batches of two; the rows in `bad` are rejects.

    With `retry`, of the rejects of the part before, which is in `store` (None: where the spec says). A
    worker with a bug: `forgotten` rows are nowhere, `repeated` ones twice.
    """
    shard = plan.shard(index)
    if retry is None:
        read = read_shard(spec, plan.files[shard.file], shard.first_row, shard.num_rows)
    else:
        read = read_rejected(store or open_store(spec.output.path), spec, plan, retry, index)
    bad, forgotten, repeated = set(bad), set(forgotten), set(repeated)
    rows = [row for row in read.rows if row.row_id not in bad | forgotten]
    rows += [row for row in rows if row.row_id in repeated]
    rejects = read.rejects + [
        Reject(row.row_id, error_class, message, "denoise", 1, row.source, row.prompt)
        for row in read.rows
        if row.row_id in bad
    ]
    timings = [Timing(None, "read", len(rows), seconds=0.01, start_s=0.0)]
    for batch, first in enumerate(range(0, len(rows), 2)):
        ids = tuple(row.row_id for row in rows[first : first + 2])
        start_s = 0.01 + batch
        for stage, grid in (
            ("text_encode", ()),
            ("denoise", (1, 1)),
            ("expand", (1, 1)),
            ("denoise", (2, 2)),
        ):
            size = dict(zip(("height", "width"), grid, strict=False))
            tokens = {"tokens": grid[0] * grid[1], "steps": 5} if grid else {}
            timings.append(
                Timing(batch, stage, len(ids), **size, **tokens, seconds=0.25, start_s=start_s, row_ids=ids)
            )
            start_s += 0.25
    made = [
        Made(
            row,
            encode_media(picture(row), spec.output),
            SIDE_PX,
            SIDE_PX,
            10,
            (StageTime(1, 1, 1, 5, 0.125), StageTime(2, 2, 4, 5, 0.125)),
            0.375,
            np.full((4, 2, 2), row.source, np.float16) if spec.output.latents else None,
            delta=0.05,
        )
        for row in rows
    ]
    return build_part(
        spec,
        plan,
        plan.shard(index),
        attempt=AttemptFacts(
            attempt or uuid4().hex,
            worker,
            "cpu",
            "here",
            time.time() if started is None else started,
            0 if retry is None else retry.number,
        ),
        made=made[::-1] if backwards else made,
        rejects=rejects,
        passthrough=read.passthrough,
        first_row=read.first_row,
        timings=timings,
        kind="image",
    )


def commit_part(store: Store, part: Part) -> bool:
    """`create_part`, then what is derived from it; whether the part is ours."""
    upload = create_part(store, part)
    if upload is not None:
        write_derived(store, part.footer, (upload,))
    return upload is not None


def finish(store: Store, spec: JobSpec, plan: JobPlan, *, bad: Iterable[str] = ()) -> None:
    """Commit every part of a job."""
    bad = set(bad)
    for index in range(plan.num_shards):
        assert commit_part(store, small_part(spec, plan, index, bad=bad))


def model_folder(
    place: Path, pipeline: str, scheduler: str = "FlowMatchEulerDiscreteScheduler", **config
) -> str:
    """A model's folder without weights."""
    files = {
        "model_index.json": {
            "_class_name": pipeline,
            "scheduler": ["diffusers", scheduler],
            "transformer": ["diffusers", "X"],
        },
        "scheduler/scheduler_config.json": {"shift": 3.0} | config,
        "transformer/config.json": {},
    }
    for name, value in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(json.dumps(value))
    return str(place)
