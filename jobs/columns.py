"""The columns of an output: for each its name, its type and what it means. Knows no rows.

`DATA`, `TIMINGS_COLUMNS` and `REJECTS_COLUMNS` are the only lists of them. The schemas, the reserved names
and the tables of README, card and `overtone schema --output` follow from these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import pyarrow as pa

from overtone.jobs.media import Kind
from overtone.jobs.spec import JobSpec
from overtone.jobs.words import markdown_table


class Column(NamedTuple):
    """A column of an output."""

    name: str
    type: pa.DataType
    meaning: str
    """Markdown."""
    since: int = 1
    """The generation of columns that it came with."""


GENERATION = 2
"""Of the columns of a job that begins now. A job keeps those that it began with, for all its parts are one
data set, which some readers take only with the same columns in each. The later ones can all be null, and give
way to a column of the input that has their name."""

FOOTER_KEY = b"overtone"
"""Key of a Parquet file's metadata by which a part is known."""
MEDIA = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
STAGES = pa.list_(
    pa.struct(
        [
            pa.field("height", pa.int32()),
            pa.field("width", pa.int32()),
            pa.field("tokens", pa.int64()),
            pa.field("steps", pa.int32()),
            pa.field("seconds", pa.float64()),
        ]
    )
)
LATENTS = pa.struct([pa.field("shape", pa.list_(pa.int32())), pa.field("values", pa.list_(pa.float32()))])
_MEDIA = "The encoded {kind}, and a file name made from `row_id`, safe on any disk: `{{bytes, path}}`."

DATA = (
    Column(
        "row_id",
        pa.string(),
        "The row's name, unique in the job: the input's `row_id` or `id`, else its file and number. Where a "
        "row asks for several images, `#0`, `#1`, ... follow.",
    ),
    Column("prompt", pa.string(), "As it was read."),
    Column("negative_prompt", pa.string(), "As it was read; null: none was given.", since=2),
    Column(
        "prompt_truncated",
        pa.bool_(),
        "Whether every text encoder of the model cut the prompt, so that its end had no effect; null: not "
        "known.",
        since=2,
    ),
    Column(
        "seed",
        pa.int64(),
        "What the row's noise follows from: its own, else a hash of the job's seed and `row_id`.",
    ),
    Column("height", pa.int32(), "Pixels."),
    Column("width", pa.int32(), "Pixels."),
    Column("image", MEDIA, _MEDIA.format(kind="picture")),
    Column("video", MEDIA, _MEDIA.format(kind="video (MP4, H.264)")),
    Column(
        "source_image",
        MEDIA,
        "The picture that the row started from, as the prompt table gave it. This and the next three only in "
        "jobs whose rows start from pictures, the bytes with `output.sources: bytes`.",
        since=2,
    ),
    Column("source_mask", MEDIA, "Its mask; null: it had none.", since=2),
    Column("source_sha256", pa.string(), "SHA-256 of the file of `source_image`, in hex.", since=2),
    Column("source_mask_sha256", pa.string(), "The same of `source_mask`.", since=2),
    Column("mode", pa.string(), "`sampling.mode` of the spec."),
    Column("delta", pa.float64(), "Error allowed per frequency at a change of grid; the one that was used."),
    Column(
        "num_steps",
        pa.int32(),
        "Steps of the schedule: of all stages together, where the row starts from noise.",
    ),
    Column(
        "guidance_scale",
        pa.float64(),
        "What the pipeline was called with: of the spec, else its own default; null: it takes none.",
    ),
    Column("true_cfg_scale", pa.float64(), "The same, of `true_cfg_scale`.", since=2),
    Column("model", pa.string(), "`model.id`, with `@` and the revision where the spec has one."),
    Column(
        "stages",
        STAGES,
        "The stages of the row's trajectory, first to last: grid in latent cells, tokens, steps, and the "
        "seconds of the batch over the rows in it.",
    ),
    Column("denoise_seconds", pa.float64(), "The row's share of all denoising and expansions."),
    Column(
        "latents",
        LATENTS,
        "The final latents, which the VAE decodes: `values` in C order, of `shape` [C, H, W] or "
        "[C, T, H, W]. Only with `output.latents`.",
    ),
)
"""The columns that a part has beside those that pass through from the input. It has either `image` or
`video`."""

TIMINGS_COLUMNS = (
    Column("shard", pa.int64(), "The shard that was made."),
    Column("attempt", pa.string(), "The attempt whose part was committed."),
    Column(
        "batch",
        pa.int32(),
        "Counts the attempt's batches from 0; null: what is done once for the whole shard.",
    ),
    Column(
        "stage",
        pa.string(),
        "`read`, `text_encode`, `denoise`, `expand`, `vae_decode`, `image_encode`, `part_write` or `upload`.",
    ),
    Column("rows", pa.int32(), "Rows of the batch that the line is about."),
    Column("height", pa.int32(), "Latent cells, where the stage has a grid."),
    Column("width", pa.int32(), "Latent cells, where the stage has a grid."),
    Column("tokens", pa.int64(), "Of one row on that grid."),
    Column("steps", pa.int32(), "Scheduler steps, of `denoise`."),
    Column(
        "seconds",
        pa.float64(),
        "Of all these rows, at work on them. Lines of one thread never overlap; pictures are encoded by "
        "several threads.",
    ),
    Column("start_s", pa.float64(), "Seconds from the attempt's beginning to the stage's."),
    Column("start", pa.timestamp("us", tz="UTC"), "The same as a time, by the worker's clock."),
    Column("worker", pa.string(), "The worker's name."),
    Column("device", pa.string(), "What it computed on."),
    Column("node", pa.string(), "The machine it ran on."),
    Column("row_ids", pa.list_(pa.string()), "These rows, for joins with `data/`."),
    Column(
        "truncated",
        pa.int32(),
        "Of `part_write`: rows of the part with `prompt_truncated`; null: not known.",
        since=2,
    ),
)

REJECTS_COLUMNS = (
    Column("row_id", pa.string(), "The row's name, as it would be in `data/`."),
    Column(
        "error_class",
        pa.string(),
        "The exception's type; `InvalidRow`: refused by the reader, before any model saw it.",
    ),
    Column("message", pa.string(), "Why."),
    Column("stage", pa.string(), "Where it ended: `read`, or a stage as in the timings."),
    Column("attempts", pa.int32(), "How often it was tried; 0: refused by the reader."),
    Column("source", pa.int64(), "Index of the row in its input file, from 0."),
    Column("prompt", pa.string(), "Cut to 1,000 characters; null: it had none."),
    Column("shard", pa.int64(), "The shard it belongs to."),
    Column("attempt", pa.string(), "The attempt whose part was committed."),
)

TIMINGS = pa.schema([pa.field(column.name, column.type) for column in TIMINGS_COLUMNS])
FIRST_TIMINGS = pa.schema([pa.field(name.name, name.type) for name in TIMINGS_COLUMNS if name.since == 1])
"""Those of the first generation."""
REJECTS = pa.schema([pa.field(column.name, column.type) for column in REJECTS_COLUMNS])
OUTPUT_COLUMNS = frozenset([*(column.name for column in DATA if column.since == 1), "latents_shape"])
"""The names that a column of the input cannot pass through under: those of the output's own columns of the
first generation, and one that is kept free."""


SOURCE_MEDIA = ("source_image", "source_mask")
SOURCE_COLUMNS = (*SOURCE_MEDIA, "source_sha256", "source_mask_sha256")
"""Those of jobs whose rows start from pictures: the files, and their digests."""


def source_columns(spec: JobSpec) -> tuple[str, ...]:
    """Those of them that a job has."""
    if not spec.pictured:
        return ()
    return tuple(name for name in SOURCE_COLUMNS if spec.keeps_sources or name not in SOURCE_MEDIA)


def own_columns(
    kind: Kind,
    *,
    latents: bool,
    sources: Collection[str] = (),
    generation: int = GENERATION,
    taken: Collection[str] = (),
) -> list[pa.Field]:
    """The columns of a part that do not pass through from the input, with or without `latents` and with those
    of `SOURCE_COLUMNS` that it has. `taken`: the names of those that pass through."""
    absent = {"video" if kind == "image" else "image", *(() if latents else ("latents",))}
    absent |= {*SOURCE_COLUMNS} - {*sources}
    return [
        pa.field(column.name, column.type)
        for column in DATA
        if column.name not in absent
        and (column.since == 1 or (column.since <= generation and column.name not in taken))
    ]


def output_reference_markdown() -> str:
    """A table for each of the three folders of an output."""
    tables = (
        ("`data/train-*-of-*.parquet`", DATA),
        ("`timings/part-*.parquet`", TIMINGS_COLUMNS),
        ("`rejects/part-*.parquet`", REJECTS_COLUMNS),
    )
    return "\n\n".join(f"### {title}\n\n{columns_markdown(columns)}" for title, columns in tables)


def data_columns_markdown(
    kind: Kind,
    *,
    latents: bool,
    passthrough: pa.Schema,
    sources: Collection[str] = (),
    generation: int = GENERATION,
) -> str:
    """The table of one job's own columns, and of those that pass through from its prompt table."""
    own = own_columns(kind, latents=latents, sources=sources, generation=generation, taken=passthrough.names)
    names = {field.name for field in own}
    foreign = (Column(field.name, field.type, "From the prompt table, untouched.") for field in passthrough)
    return columns_markdown([*(column for column in DATA if column.name in names), *foreign])


def columns_markdown(columns: Iterable[Column]) -> str:
    """A row for each column: name, type, meaning."""
    rows = [(code(column.name), code(_type(column.type)), column.meaning) for column in columns]
    return markdown_table(("column", "type", "meaning"), rows)


def code(text: str) -> str:
    """Any text as code in a cell of a Markdown table."""
    text = "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|")
    fence = "``" if "`" in text else "`"
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _type(type: pa.DataType) -> str:
    """`list<struct<height: int32>>`, without the names that Arrow gives the elements of lists."""
    if pa.types.is_struct(type):
        return f"struct<{', '.join(f'{field.name}: {_type(field.type)}' for field in type)}>"
    if pa.types.is_list(type):
        return f"list<{_type(type.value_type)}>"
    return str(type)
