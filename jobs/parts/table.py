"""Finished samples as the table of a part: its schema, its rows, its row groups. Knows no file format."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from overtone.jobs.column_types import fitted, plain
from overtone.jobs.columns import (
    GENERATION,
    OUTPUT_COLUMNS,
    SOURCE_COLUMNS,
    SOURCE_MEDIA,
    own_columns,
    source_columns,
)
from overtone.jobs.features import as_metadata, features_of, known_features
from overtone.jobs.media import Kind, media_extension, media_name
from overtone.jobs.parts.footer import StageTime
from overtone.jobs.rows import Given, Row
from overtone.jobs.spec import PICTURES, JobSpec

ROW_GROUP_ROWS = 100
ROW_GROUP_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Made:
    """One finished sample."""

    row: Row
    data: bytes
    """The encoded picture or video."""
    height_px: int
    width_px: int
    num_steps: int
    stages: tuple[StageTime, ...]
    denoise_seconds: float
    """The row's share of all denoising and expansions."""
    latents: np.ndarray | None = None
    """They are kept as float32, whatever their type is here. None: the spec does not ask for them."""
    delta: float | None = None
    """The one used; None: the spec's."""
    guidance_scale: float | None = None
    """The one used; None: the spec's."""
    true_cfg_scale: float | None = None
    """The one used; None: the spec's."""
    prompt_truncated: bool | None = None
    """None: not known."""

    @property
    def source_bytes(self) -> int:
        """Of the files that the row starts from."""
        return sum(one.size_bytes for one in (self.row.image, self.row.mask) if one)


@dataclass(frozen=True, slots=True)
class PartRow:
    """The columns of a row in a part that are checked and shown."""

    row_id: str
    prompt: str
    height_px: int
    width_px: int
    data: bytes
    seed: int = 0
    num_steps: int = 0
    negative_prompt: str | None = None
    """None: there is none, or no column for it."""


def part_schema(
    spec: JobSpec, passthrough: pa.Schema, kind: Kind = "image", generation: int = GENERATION
) -> pa.Schema:
    """The columns of every part of a job. The metadata has what `datasets` needs in order to see pictures.

    Every column is nullable, as `datasets` wants it, and of a type that rows can be taken of. `generation` is
    the plan's. ValueError for a pass-through column with a name of ours.
    """
    ipc = passthrough.serialize().to_pybytes()
    return _part_schema(ipc, kind, spec.output.latents, source_columns(spec), generation)


@lru_cache(maxsize=16)  # every part of a job has the same
def _part_schema(
    passthrough_ipc: bytes, kind: Kind, latents: bool, sources: tuple[str, ...], generation: int
) -> pa.Schema:
    """The cache needs the schema's bytes: to Arrow, schemas that differ only in their metadata, which
    `datasets` reads, are equal."""
    passthrough = pa.ipc.read_schema(pa.py_buffer(passthrough_ipc))
    taken = sorted(set(passthrough.names) & set(OUTPUT_COLUMNS))
    if taken:
        raise ValueError(f"pass-through columns {', '.join(taken)} have the names of output columns")
    own = own_columns(kind, latents=latents, sources=sources, generation=generation, taken=passthrough.names)
    foreign = (pa.field(f.name, plain(f.type), metadata=f.metadata) for f in passthrough)
    schema = pa.schema([*own, *foreign])
    features = features_of(schema) | known_features(passthrough)
    features[kind] = {"_type": kind.capitalize()}
    features |= {name: {"_type": "Image"} for name in sources if name in SOURCE_MEDIA}
    return schema.with_metadata(as_metadata({f.name: features[f.name] for f in schema if f.name in features}))


def rows_table(
    spec: JobSpec, schema: pa.Schema, made: Sequence[Made], passthrough: pa.Table, first_row: int, kind: Kind
) -> pa.Table:
    """Finished samples as rows of `part_schema`. `passthrough` has the input rows from `first_row` on."""
    sampling, model = spec.sampling, spec.model
    extension = media_extension(spec.output, kind)
    name = f"{model.id}@{model.revision}" if model.revision else model.id
    columns: dict[str, Any] = {
        "row_id": [sample.row.row_id for sample in made],
        "prompt": [sample.row.prompt for sample in made],
        "negative_prompt": [sample.row.negative_prompt for sample in made],
        "prompt_truncated": [sample.prompt_truncated for sample in made],
        "seed": [sample.row.seed for sample in made],
        "height": [sample.height_px for sample in made],
        "width": [sample.width_px for sample in made],
        kind: [{"bytes": sample.data, "path": media_name(sample.row.row_id, extension)} for sample in made],
        "mode": [sampling.mode] * len(made),
        "delta": [sampling.delta if sample.delta is None else sample.delta for sample in made],
        "num_steps": [sample.num_steps for sample in made],
        "guidance_scale": [
            sampling.guidance_scale if sample.guidance_scale is None else sample.guidance_scale
            for sample in made
        ],
        "true_cfg_scale": [
            sampling.true_cfg_scale if sample.true_cfg_scale is None else sample.true_cfg_scale
            for sample in made
        ],
        "model": [name] * len(made),
        "stages": [[asdict(stage) for stage in sample.stages] for sample in made],
        "denoise_seconds": [sample.denoise_seconds for sample in made],
    }
    if spec.output.latents:
        columns["latents"] = [
            None
            if sample.latents is None
            else {"shape": sample.latents.shape, "values": np.asarray(sample.latents, np.float32).ravel()}
            for sample in made
        ]
    sources = source_columns(spec)
    for meaning in PICTURES:
        given: list[Given | None] = [getattr(sample.row, meaning) for sample in made]
        if f"source_{meaning}" in sources:
            columns[f"source_{meaning}"] = [one and {"bytes": one.read(), "path": one.name} for one in given]
    if sources:
        columns["source_sha256"] = [sample.row.image and sample.row.image.sha256 for sample in made]
        columns["source_mask_sha256"] = [sample.row.mask and sample.row.mask.sha256 for sample in made]
    own = own_columns(kind, latents=spec.output.latents, sources=sources)
    assert columns.keys() == {f.name for f in own}
    places = [sample.row.source - first_row for sample in made]
    arrays = [
        pa.array(columns[f.name], f.type)
        if f.name in columns
        else _taken(passthrough[f.name], places, f.type)
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _taken(column: pa.ChunkedArray, places: Sequence[int], type: pa.DataType) -> pa.ChunkedArray:
    """The values at some places, from what lies between them: taking from all of a large column would put it
    together first, which Arrow cannot do beyond 2 GiB."""
    first, last = min(places, default=0), max(places, default=-1)
    near = column.slice(first, last + 1 - first)
    if near.type != type:
        near = pa.chunked_array([fitted(chunk, type)[0] for chunk in near.chunks], type)
    return near.take(pa.array([place - first for place in places], pa.int64()))


def row_groups(made: Sequence[Made], more_bytes: int = 0) -> Iterable[tuple[int, int]]:
    """Ranges of rows, of at most `ROW_GROUP_ROWS`, and of at most `ROW_GROUP_BYTES` unless it is one row.
    `more_bytes` are those of a row that pass through."""
    first = size_bytes = 0
    for i, sample in enumerate(made):
        row_bytes = more_bytes + len(sample.data) + (0 if sample.latents is None else 4 * sample.latents.size)
        row_bytes += sample.source_bytes
        if i > first and (i - first >= ROW_GROUP_ROWS or size_bytes + row_bytes > ROW_GROUP_BYTES):
            yield first, i
            first, size_bytes = i, 0
        size_bytes += row_bytes
    if first < len(made):
        yield first, len(made)


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """A schema as Parquet returns it; Parquet has no timestamps in seconds, for example."""
    return _empty_file(schema).schema_arrow


@lru_cache(maxsize=16)  # every part of a job has the same
def leaf_paths(schema: pa.Schema) -> list[str]:
    """The names of the Parquet columns, the ones inside structs and lists among them."""
    columns = _empty_file(schema).schema
    return [columns.column(i).path for i in range(len(columns))]


@cache
def own_paths(kind: Kind) -> frozenset[str]:
    """The leaf paths that do not pass through from the input."""
    return frozenset(leaf_paths(pa.schema(own_columns(kind, latents=True, sources=SOURCE_COLUMNS))))


def _empty_file(schema: pa.Schema) -> pq.ParquetFile:
    sink = io.BytesIO()
    pq.ParquetWriter(sink, schema).close()
    return pq.ParquetFile(sink)
