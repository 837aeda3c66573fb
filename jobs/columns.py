"""What the columns of an output mean: for README, card and `overtone schema --output`. Knows no rows."""

from __future__ import annotations

import pyarrow as pa

from overtone.jobs.media import Kind

_MEDIA = "The encoded {kind}, and a file name made from `row_id`, safe on any disk: `{{bytes, path}}`."

DATA_MEANINGS = {
    "row_id": "The row's name, unique in the job: the input's `row_id` or `id`, else its file and number. "
    "Where a row asks for several images, `#0`, `#1`, ... follow.",
    "prompt": "As it was read.",
    "seed": "What the row's noise follows from: its own, else a hash of the job's seed and `row_id`.",
    "height": "Pixels.",
    "width": "Pixels.",
    "image": _MEDIA.format(kind="picture"),
    "video": _MEDIA.format(kind="video (MP4, H.264)"),
    "mode": "`sampling.mode` of the spec.",
    "delta": "Error allowed per frequency at a change of grid; the one that was used.",
    "num_steps": "Scheduler steps over all stages.",
    "guidance_scale": "Of the spec; null: the pipeline's own default.",
    "model": "`model.id`, with `@` and the revision where the spec has one.",
    "stages": "The stages of the row's trajectory, first to last: grid in latent cells, tokens, steps, and "
    "the seconds of the batch over the rows in it.",
    "denoise_seconds": "The row's share of all denoising and expansions.",
    "latents": "The final latents, which the VAE decodes: `values` in C order, of `shape` [C, H, W] or "
    "[C, T, H, W]. Only with `output.latents`.",
}

TIMINGS_MEANINGS = {
    "shard": "The shard that was made.",
    "attempt": "The attempt whose part was committed.",
    "batch": "Counts the attempt's batches from 0; null: what is done once for the whole shard.",
    "stage": "`read`, `text_encode`, `denoise`, `expand`, `vae_decode`, `image_encode`, `part_write` or "
    "`upload`.",
    "rows": "Rows in the batch.",
    "height": "Latent cells, where the stage has a grid.",
    "width": "Latent cells, where the stage has a grid.",
    "tokens": "Of one row on that grid.",
    "steps": "Scheduler steps, of `denoise`.",
    "seconds": "Of the whole batch.",
    "start_s": "Seconds from the attempt's beginning to the stage's.",
    "start": "The same as a time, by the worker's clock.",
    "worker": "The worker's name.",
    "device": "What it computed on.",
    "node": "The machine it ran on.",
    "row_ids": "The rows in the batch, for joins with `data/`.",
}

REJECTS_MEANINGS = {
    "row_id": "The row's name, as it would be in `data/`.",
    "error_class": "The exception's type; `InvalidRow`: refused by the reader, before any model saw it.",
    "message": "Why.",
    "stage": "Where it ended: `read`, or a stage as in the timings.",
    "attempts": "How often it was tried; 0: refused by the reader.",
    "source": "Index of the row in its input file, from 0.",
    "prompt": "Cut to 1,000 characters; null: it had none.",
    "shard": "The shard it belongs to.",
    "attempt": "The attempt whose part was committed.",
}


def output_reference_markdown() -> str:
    """A table for each of the three folders of an output."""
    video = next(column for column in own_columns("video", latents=True) if column.name == "video")
    data = [*own_columns("image", latents=True)]
    data.insert([column.name for column in data].index("image") + 1, video)
    tables = (
        ("`data/train-*-of-*.parquet`", data, DATA_MEANINGS),
        ("`timings/part-*.parquet`", list(TIMINGS), TIMINGS_MEANINGS),
        ("`rejects/part-*.parquet`", list(REJECTS), REJECTS_MEANINGS),
    )
    return "\n\n".join(
        f"### {title}\n\n{columns_markdown(columns, meanings)}" for title, columns, meanings in tables
    )


def data_columns_markdown(kind: Kind, *, latents: bool, passthrough: pa.Schema) -> str:
    """The table of one job's own columns."""
    meanings = DATA_MEANINGS | {column.name: "From the prompt table, untouched." for column in passthrough}
    return columns_markdown([*own_columns(kind, latents=latents), *passthrough], meanings)


def columns_markdown(columns: list[pa.Field], meanings: dict[str, str]) -> str:
    """A row for each column: name, type, meaning."""
    lines = ["| column | type | meaning |", "|---|---|---|"]
    lines += [f"| {code(c.name)} | {code(_type(c.type))} | {meanings[c.name]} |" for c in columns]
    return "\n".join(lines)


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


OUTPUT_COLUMNS = frozenset(
    (
        *("row_id", "prompt", "seed", "height", "width", "image", "video", "mode", "delta", "num_steps"),
        *("guidance_scale", "model", "stages", "denoise_seconds", "latents", "latents_shape"),
    )
)
"""Names that the output has itself, or keeps for itself: no column passes through under one of them."""
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

TIMINGS = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("attempt", pa.string()),
        pa.field("batch", pa.int32()),
        pa.field("stage", pa.string()),
        pa.field("rows", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("tokens", pa.int64()),
        pa.field("steps", pa.int32()),
        pa.field("seconds", pa.float64()),
        pa.field("start_s", pa.float64()),
        pa.field("start", pa.timestamp("us", tz="UTC")),
        pa.field("worker", pa.string()),
        pa.field("device", pa.string()),
        pa.field("node", pa.string()),
        pa.field("row_ids", pa.list_(pa.string())),
    ]
)

REJECTS = pa.schema(
    [
        pa.field("row_id", pa.string()),
        pa.field("error_class", pa.string()),
        pa.field("message", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("attempts", pa.int32()),
        pa.field("source", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("shard", pa.int64()),
        pa.field("attempt", pa.string()),
    ]
)


def own_columns(kind: Kind, *, latents: bool) -> list[pa.Field]:
    """The columns of a part that do not pass through from the input. `latents`: with theirs."""
    return [
        pa.field("row_id", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field(kind, MEDIA),
        pa.field("mode", pa.string()),
        pa.field("delta", pa.float64()),
        pa.field("num_steps", pa.int32()),
        pa.field("guidance_scale", pa.float64()),
        pa.field("model", pa.string()),
        pa.field("stages", STAGES),
        pa.field("denoise_seconds", pa.float64()),
        *([pa.field("latents", LATENTS)] if latents else []),
    ]
