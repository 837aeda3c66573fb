"""TODO: jobs/parts/table.py."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from overtone.jobs.columns import OUTPUT_COLUMNS, own_columns
from overtone.jobs.features import as_metadata, features_of, known_features
from overtone.jobs.media import Kind, media_extension, media_name
from overtone.jobs.parts.footer import StageTime
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec

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
    """Kept as float32, whatever they are; None: not asked for."""
    delta: float | None = None
    """The one used; None: the spec's."""
    guidance_scale: float | None = None
    """The one used; None: the spec's."""


@dataclass(frozen=True, slots=True)
class PartRow:
    """What is checked and shown of a row in a part."""

    row_id: str
    prompt: str
    height_px: int
    width_px: int
    data: bytes


def part_schema(spec: JobSpec, passthrough: pa.Schema, kind: Kind = "image") -> pa.Schema:
    """The columns of every part of a job; the metadata has what `datasets` needs to see pictures.

    Everything is nullable, as `datasets` wants it. ValueError for a pass-through column with a name of ours.
    """
    return _part_schema(passthrough.serialize().to_pybytes(), kind, spec.output.latents)


@lru_cache(maxsize=16)  # every part of a job has the same
def _part_schema(passthrough_ipc: bytes, kind: Kind, latents: bool) -> pa.Schema:
    """By the bytes: schemas that differ in their metadata alone, which `datasets` reads, count as equal."""
    passthrough = pa.ipc.read_schema(pa.py_buffer(passthrough_ipc))
    taken = sorted(set(passthrough.names) & set(OUTPUT_COLUMNS))
    if taken:
        raise ValueError(f"pass-through columns {', '.join(taken)} have the names of output columns")
    own = own_columns(kind, latents=latents)
    schema = pa.schema([*own, *(f.with_nullable(True) for f in passthrough)])
    features = features_of(schema) | known_features(passthrough)
    features[kind] = {"_type": kind.capitalize()}
    return schema.with_metadata(as_metadata({f.name: features[f.name] for f in schema if f.name in features}))


def rows_table(
    spec: JobSpec, schema: pa.Schema, made: Sequence[Made], passthrough: pa.Table, first_row: int, kind: Kind
) -> pa.Table:
    """Finished samples as rows of `part_schema`. `passthrough` has the input rows from `first_row` on."""
    sampling, model = spec.sampling, spec.model
    extension = media_extension(spec.output, kind)
    name = f"{model.id}@{model.revision}" if model.revision else model.id
    columns: dict[str, Any] = {
        "row_id": [one.row.row_id for one in made],
        "prompt": [one.row.prompt for one in made],
        "seed": [one.row.seed for one in made],
        "height": [one.height_px for one in made],
        "width": [one.width_px for one in made],
        kind: [{"bytes": one.data, "path": media_name(one.row.row_id, extension)} for one in made],
        "mode": [sampling.mode] * len(made),
        "delta": [sampling.delta if one.delta is None else one.delta for one in made],
        "num_steps": [one.num_steps for one in made],
        "guidance_scale": [
            sampling.guidance_scale if one.guidance_scale is None else one.guidance_scale for one in made
        ],
        "model": [name] * len(made),
        "stages": [[asdict(stage) for stage in one.stages] for one in made],
        "denoise_seconds": [one.denoise_seconds for one in made],
    }
    if spec.output.latents:
        columns["latents"] = [
            None
            if one.latents is None
            else {"shape": one.latents.shape, "values": np.asarray(one.latents, np.float32).ravel()}
            for one in made
        ]
    foreign = passthrough.take(pa.array([one.row.source - first_row for one in made], pa.int64()))
    arrays = [
        foreign[f.name] if f.name in foreign.column_names else pa.array(columns[f.name], f.type)
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def row_groups(made: Sequence[Made]) -> Iterable[tuple[int, int]]:
    """Ranges of rows: at most `ROW_GROUP_ROWS`, and at most `ROW_GROUP_BYTES` unless it is one row."""
    first = size_bytes = 0
    for i, one in enumerate(made):
        row_bytes = len(one.data) + (0 if one.latents is None else 4 * one.latents.size)
        if i > first and (i - first >= ROW_GROUP_ROWS or size_bytes + row_bytes > ROW_GROUP_BYTES):
            yield first, i
            first, size_bytes = i, 0
        size_bytes += row_bytes
    if first < len(made):
        yield first, len(made)


def stored_schema(schema: pa.Schema) -> pa.Schema:
    """A schema as it comes back from Parquet, which has no timestamps in seconds, for example."""
    return _empty_file(schema).schema_arrow


@lru_cache(maxsize=16)  # every part of a job has the same
def leaf_paths(schema: pa.Schema) -> list[str]:
    """The names of the Parquet columns, with those inside structs and lists."""
    columns = _empty_file(schema).schema
    return [columns.column(i).path for i in range(len(columns))]


@cache
def own_paths(kind: Kind) -> frozenset[str]:
    """Those of them that do not pass through from the input."""
    return frozenset(leaf_paths(pa.schema(own_columns(kind, latents=True))))


def _empty_file(schema: pa.Schema) -> pq.ParquetFile:
    sink = io.BytesIO()
    pq.ParquetWriter(sink, schema).close()
    return pq.ParquetFile(sink)
