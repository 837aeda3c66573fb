"""Overtone inside somebody else's Ray Data pipeline: a callable class for `map_batches`. Knows no jobs.

    made = dataset.map_batches(
        ProgressiveGenerator,
        fn_constructor_kwargs={"model": "black-forest-labs/FLUX.1-dev", "sampling": {"delta": 0.05}},
        batch_format="pyarrow", batch_size=64, num_gpus=1,
        compute=ray.data.ActorPoolStrategy(size=4),
    )

A row is made as a job makes it: the same row_id, seed and settings give the same pixels, whatever the batch,
the actor or the order. Only a job can be resumed, and only a job gives up on rows that kill their process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data.block import BlockAccessor

from overtone.cluster.worker import EngineFactory, Runner, load_engine
from overtone.jobs.column_types import plain_table
from overtone.jobs.columns import OUTPUT_COLUMNS, SOURCE_COLUMNS
from overtone.jobs.parts import part_schema, rows_table
from overtone.jobs.prompts import GivenPictures, samples
from overtone.jobs.rows import Given, Reject, Row
from overtone.jobs.spec import PICTURES, JobSpec

ERROR = "error"
EXACT_FRACTIONS = 2**53
"""Below it a float64 holds every whole number."""


class ProgressiveGenerator:
    """Loads a model once, then turns batches of prompts into batches of pictures or videos.

    Takes a column `prompt` and, where they exist, `row_id`, `negative_prompt`, `seed`, `height`, `width`
    (pixels) and `num_images`, null wherever a row has none. A row without `row_id` is named after its
    content, so that equal rows give equal pictures. Nulls turn whole numbers into fractions in Ray's default
    batches, which cannot hold large seeds: use `batch_format="pyarrow"`. With `strength` in `sampling` also
    `image` and, if there is one, `mask`: files as bytes, or `{bytes, path}` as `datasets` writes them, that
    rows start from.

    Returns an Arrow table in the order of the input, one row a sample, with the columns of a job's output:
    `row_id`, `prompt`, `seed`, `height`, `width`, `image` (or `video`; bytes and file name), `mode`, `delta`,
    `num_steps`, `guidance_scale`, `model`, `stages` (with seconds), `denoise_seconds`, and `latents` if asked
    for; all other columns of the input as they are; and `error`. A sample that cannot be made has a null
    image and the reason in `error`; of the others `error` is null.

    Args:
        model: the section `model` of a job's spec, or its `id`.
        sampling: the section `sampling`.
        output: the keys `image`, `video` and `latents` of the section `output`.
        workers: the keys `batch_size` (rows on the device at once, whatever the size of Ray's batches) and
            `threads` of the section `workers`.
        seed: of rows that have none of their own.
        engine_factory: makes the engine from the spec; for models that Overtone cannot load.

    ValueError for a key or value that a spec would not take either. A call raises what is not a row's fault
    (a broken device, say), and ValueError for a column with the name of one of the output that it would hide.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any],
        sampling: Mapping[str, Any] | None = None,
        *,
        output: Mapping[str, Any] | None = None,
        workers: Mapping[str, Any] | None = None,
        seed: int = 0,
        engine_factory: EngineFactory = load_engine,
    ) -> None:
        nowhere = "-"  # a spec has these two paths, which nothing here reads or writes
        self._spec = JobSpec.model_validate(
            {
                "model": model,
                "prompts": nowhere,
                "output": {**(output or {}), "path": nowhere},
                "sampling": sampling or {},
                "workers": workers or {},
                "seed": seed,
            }
        )
        engine = engine_factory(self._spec)
        engine.plan(self._spec.sampling)  # what is wrong with it is wrong with every row
        self._runner = Runner(self._spec, None, None, engine)

    def __call__(self, batch: pa.Table | dict[str, np.ndarray]) -> pa.Table:
        """The samples of a batch, which may have any of Ray's formats (pandas too)."""
        table = BlockAccessor.for_block(BlockAccessor.batch_to_block(batch)).to_arrow()
        foreign = _foreign(table, self._spec)
        values = {name: table[name].to_pylist() for name in self._spec.meanings if name in table.column_names}
        pictures = GivenPictures(self._spec, None) if self._spec.pictured else None
        if "prompt" not in values:
            raise ValueError(f"there is no column `prompt`; there are: {', '.join(table.column_names)}")
        rows: list[Row] = []
        rejects: list[Reject] = []
        order: list[tuple[int, str]] = []  # of all samples: place of the input row, row_id
        for source in range(table.num_rows):
            asked = {name: column[source] for name, column in values.items()}
            problem, start = _too_large(asked), dict[str, Given | None]()
            if pictures is not None:
                start["image"], start["mask"], bad = pictures.of(asked)
                problem = problem or bad
                asked |= {name: given and given.sha256 for name, given in start.items()}
            some, refused = samples(self._spec.seed, _content_id(asked), source, asked, problem, **start)
            rows += some
            rejects += refused
            order += [(source, row.row_id) for row in some] + [(source, one.row_id) for one in refused]
        made, failed = self._runner.make(rows)
        rejects += failed

        schema = part_schema(self._spec, foreign.schema, self._runner.kind)
        whole = rows_table(self._spec, schema, made, foreign, 0, self._runner.kind)
        broken = _broken(schema, rejects, foreign, values["prompt"])
        ended = [(one.row.source, one.row.row_id) for one in made]
        ended += [(one.source, one.row_id) for one in rejects]
        places = {sample: place for place, sample in enumerate(ended)}
        return pa.concat_tables([whole, broken]).take(pa.array([places[key] for key in order], pa.int64()))


def _foreign(table: pa.Table, spec: JobSpec) -> pa.Table:
    """The columns that pass through, and `error`: null, for the rows that are made."""
    own = OUTPUT_COLUMNS | ({*SOURCE_COLUMNS} if spec.pictured else set())
    hidden = (own | {ERROR}) - set(spec.meanings)
    clash = [name for name in table.column_names if name in hidden]
    if clash:
        raise ValueError(
            f"columns {', '.join(clash)} have the names of output columns: rename or drop them before"
        )
    used = OUTPUT_COLUMNS | ({*PICTURES} if spec.pictured else set())
    passed = plain_table(table.select([name for name in table.column_names if name not in used]))
    return passed.append_column(pa.field(ERROR, pa.string()), pa.nulls(table.num_rows, pa.string()))


def _content_id(asked: Mapping[str, Any]) -> str:
    # A row that pandas filled up with NaN has the name of one that has nulls.
    given = {name: None if value != value else value for name, value in asked.items()}
    text = repr(sorted(given.items()))
    return blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def _too_large(asked: Mapping[str, Any]) -> str | None:
    seed = asked.get("seed")
    if isinstance(seed, float) and abs(seed) >= EXACT_FRACTIONS:
        return f"seed came as the fraction {seed:.17g}, which cannot hold it: use batch_format='pyarrow'"
    return None


def _broken(
    schema: pa.Schema, rejects: Sequence[Reject], foreign: pa.Table, prompts: Sequence[Any]
) -> pa.Table:
    """Rows for the samples that cannot be made: what was asked for, the reason, and nothing else."""
    sources = [one.source for one in rejects]
    passed = foreign.take(pa.array(sources, pa.int64()))
    own = {
        "row_id": [one.row_id for one in rejects],
        "prompt": [prompts[place] if isinstance(prompts[place], str) else None for place in sources],
        ERROR: [f"{one.error_class} in {one.stage}: {one.message}" for one in rejects],
    }
    columns = []
    for field in schema:
        if field.name in own:
            columns.append(pa.array(own[field.name], field.type))
        elif field.name in passed.column_names:
            columns.append(passed[field.name])
        else:
            columns.append(pa.nulls(len(rejects), field.type))
    return pa.Table.from_arrays(columns, schema=schema)
