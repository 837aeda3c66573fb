"""What the columns of a prompt table mean, and which of them pass through to the output. Reads no rows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from difflib import get_close_matches

import pyarrow as pa
import pyarrow.parquet as pq

from overtone.jobs.columns import OUTPUT_COLUMNS
from overtone.jobs.errors import PromptsError
from overtone.jobs.prompts.input_file import Source
from overtone.jobs.prompts.scan import Format, Scan, is_text
from overtone.jobs.prompts.text_tables import merged
from overtone.jobs.spec import COLUMNS, JobSpec

_TYPES: dict[str, tuple[str, ...]] = {
    "prompt": ("text",),
    "negative_prompt": ("text",),
    "row_id": ("text", "whole numbers"),
    "seed": ("whole numbers",),  # a fraction cannot hold all seeds
    "height": ("whole numbers", "fractions"),
    "width": ("whole numbers", "fractions"),
    "num_images": ("whole numbers", "fractions"),
}
"""What each column may hold. Fractions are allowed because many tools turn whole numbers into them where
values are missing."""
_USUAL_PROMPTS = ("caption", "text", "description", "Prompt", "Text", "TEXT")


def named_columns(spec: JobSpec, scanned: Scan, path: str, format: Format) -> dict[str, str]:
    """The column of this file that holds each meaning of `COLUMNS`, for the meanings that the file has."""
    names, columns = scanned.schema.names, {}
    for meaning in COLUMNS:
        mapped = spec.prompts.columns.get(meaning)  # type: ignore[call-overload]
        if mapped is not None and mapped not in names and format != "jsonl":
            raise PromptsError(
                f"{path} has no column {mapped!r}, which prompts.columns names for {meaning}; "
                f"it has {_listed(names)}"
            )
        if (mapped or meaning) in names:
            columns[meaning] = mapped or meaning
    if "row_id" not in columns and "row_id" not in spec.prompts.columns and "id" in names:
        columns["row_id"] = "id"
    if "prompt" not in columns and scanned.num_rows:
        wanted = spec.prompts.column("prompt")
        like = get_close_matches(wanted.lower(), [name.lower() for name in names], 1, 0.6)
        guess = next((name for name in names if name.lower() in like), None)
        guess = guess or next((name for name in _USUAL_PROMPTS if name in names), "caption")
        raise PromptsError(
            f"{path} has no column {wanted!r}, it has {_listed(names)}; "
            f"say which one holds the prompts, as in `columns: {{prompt: {guess}}}` under `prompts`"
        )
    if format == "parquet":
        for meaning, name in columns.items():
            _check_type(meaning, name, scanned.schema.field(name).type, path)
    return columns


def _check_type(meaning: str, name: str, type: pa.DataType, path: str) -> None:
    kinds = {
        "text": is_text(type),
        "whole numbers": pa.types.is_integer(type) or pa.types.is_decimal(type),
        "fractions": pa.types.is_floating(type),
    }
    allowed = _TYPES[meaning]
    if pa.types.is_null(type) or any(kinds[kind] for kind in allowed):
        return
    called = name if name == meaning else f"{name} ({meaning})"
    raise PromptsError(
        f"{path}: column {called} has type {type}, but must hold {allowed[0]}; convert it, or name another "
        "column under `prompts.columns`"
    )


def passthrough(spec: JobSpec, scanned: Scan, columns: dict[str, str], path: str) -> pa.Schema:
    """The columns of this file that pass through to the output. `columns` are those that have a meaning."""
    keep, used = spec.prompts.keep, set(columns.values())
    rest = [column for column in scanned.schema if column.name not in used]
    if keep is not None:
        missing = [name for name in keep if name not in scanned.schema.names and not scanned.mixed]
        if missing:
            raise PromptsError(f"{path} has no column {missing[0]!r}, which prompts.keep names")
        rest = [column for column in rest if column.name in keep]
    for column in rest:
        if column.name in OUTPUT_COLUMNS:
            raise PromptsError(
                f"{path}: column {column.name!r} would pass through to the output, which has one of "
                "that name itself; rename it, or name those to pass through, without it, in `prompts.keep`"
            )
        if column.name in scanned.mixed:
            raise PromptsError(scanned.mixed[column.name])
    metadata = (
        scanned.schema.metadata
    )  # by which `datasets` knows a column of pictures, here and in the output
    return pa.schema([pa.field(column.name, column.type) for column in rest], metadata=metadata)


def same_columns(
    known: pa.Schema, schema: pa.Schema, source: Source, first_path: str, *, all_jsonl: bool
) -> pa.Schema:
    """The pass-through columns of the files so far, `known`, together with those of one more file.

    A null column takes any type, and only a jsonl file may lack a column. `all_jsonl`: the files so far are
    all jsonl. `first_path` names the first of them in errors.
    """
    if known.equals(schema):
        return known
    path, loose = source.found.path, source.format == "jsonl"
    types = {column.name: column.type for column in known}
    for name in types:
        if name not in schema.names and not loose:
            raise _other_columns(path, f"lacks the column {name!r}", first_path)
    for column in schema:
        if column.name not in types and not all_jsonl:
            raise _other_columns(path, f"has a column {column.name!r} more", first_path)
        before = types.get(column.name, pa.null())
        if loose and all_jsonl:
            types[column.name] = merged(before, column.type, f"{path} and others: column {column.name!r}")
        elif pa.types.is_null(before) or before.equals(column.type):
            types[column.name] = column.type
        elif not pa.types.is_null(column.type):
            raise _other_columns(
                path, f"has type {column.type} in its column {column.name!r}, not {before}", first_path
            )
    return pa.schema(list(types.items()), metadata=known.metadata)


def _other_columns(path: str, what: str, first_path: str) -> PromptsError:
    return PromptsError(
        f"{path} {what}, unlike {first_path}; make them alike, or name the columns to pass through in "
        "`prompts.keep`"
    )


def writable(schema: pa.Schema, path: str) -> None:
    """PromptsError where Parquet cannot hold one of Arrow's types, which otherwise the first part would
    show."""
    try:
        pq.write_table(schema.empty_table(), io.BytesIO())
    except (pa.ArrowException, OSError) as error:
        raise PromptsError(
            f"{path}: a column cannot pass through to the output: {error}; leave it out of `prompts.keep`"
        ) from error


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return (shown or "no columns") + (f" and {len(names) - 20} more" if len(names) > 20 else "")
