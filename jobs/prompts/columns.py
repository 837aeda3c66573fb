"""What the columns of a prompt table mean, and which of them pass through to the output. Reads no rows."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Container, Sequence, Set
from difflib import get_close_matches

import pyarrow as pa
import pyarrow.parquet as pq

from overtone.jobs.column_types import contains, empty_table, merged
from overtone.jobs.columns import DATA, OUTPUT_COLUMNS, SOURCE_COLUMNS
from overtone.jobs.errors import PromptsError
from overtone.jobs.features import merged_metadata
from overtone.jobs.prompts.column_names import (
    LINEAGE,
    LINEAGE_OUT,
    merged_folders,
    output_name,
    source_name,
)
from overtone.jobs.prompts.scan import Format, Scan, is_text
from overtone.jobs.spec import JobSpec

_TYPES: dict[str, tuple[str, ...]] = {
    "prompt": ("text",),
    "negative_prompt": ("text",),
    "row_id": ("text", "whole numbers", "UUIDs"),
    "seed": ("whole numbers",),  # a fraction cannot hold all seeds
    "height": ("whole numbers", "fractions"),
    "width": ("whole numbers", "fractions"),
    "num_images": ("whole numbers", "fractions"),
    "image": ("pictures as {bytes, path}, bytes or paths",),
    "mask": ("pictures as {bytes, path}, bytes or paths",),
}
"""What each column may hold. Fractions are allowed because many tools turn whole numbers into them where
values are missing."""
_CHAINED = ("row_id", "image", "mask")
"""What another job's output can say of this one's rows, unless the spec names its other columns."""
_OWN = frozenset([*(column.name for column in DATA), *LINEAGE_OUT])
_USUAL_PROMPTS = ("caption", "text", "description", "prompt")


def named_columns(spec: JobSpec, scanned: Scan, path: str, format: Format) -> dict[str, str]:
    """The column of this file that holds each meaning of `COLUMNS`, for the meanings that the file has."""
    names, columns = scanned.schema.names, dict[str, str]()
    chained = spec.pictured and scanned.own
    for meaning in spec.meanings:
        name = spec.prompts.column(meaning)
        if chained and meaning not in (*_CHAINED, *spec.prompts.columns):
            continue  # it tells of the picture that the row starts from
        if name is not None and name in names:
            columns[meaning] = name
    if "row_id" not in columns and "row_id" not in spec.prompts.columns and "id" in names:
        columns["row_id"] = "id"
    if "prompt" not in columns and spec.prompts.text is None and scanned.num_rows:
        if chained:
            raise PromptsError(
                f"{path} is a job's output, whose prompts tell of the pictures that rows start from; say "
                "what is made of them by `text` under `prompts`, or by a column, as in `columns: {prompt: "
                "instruction}` (`{prompt: prompt}`: the same again)"
            )
        wanted = spec.prompts.column("prompt") or "prompt"
        like = get_close_matches(wanted.lower(), [name.lower() for name in names], 1, 0.6)
        guess = next((name for name in names if name.lower() in like), None)
        guess = guess or next((name for name in names if name.lower() in _USUAL_PROMPTS), "caption")
        raise PromptsError(
            f"{path} has no column {wanted!r}, it has {_listed(names)}; "
            f"say which one holds the prompts, as in `columns: {{prompt: {_yaml(guess)}}}` under "
            "`prompts`"
        )
    if spec.pictured and "image" not in columns and scanned.num_rows:
        raise PromptsError(
            f"{path} has no column {spec.prompts.column('image')!r}, whose pictures the rows start from; "
            f"it has {_listed(names)}; say which one holds them, as in `columns: {{image: photo}}` under "
            "`prompts`, or leave out sampling.strength"
        )
    for meaning, name in columns.items():
        if format == "parquet" and name in scanned.unusable:
            raise PromptsError(scanned.unusable[name])
        if format == "parquet" and scanned.num_rows:
            _check_type(meaning, name, scanned.schema.field(name).type, path)
    return columns


def _yaml(name: str) -> str:
    """A name as YAML takes it between braces."""
    return name if re.fullmatch(r"[^\W\d](?:[\w .-]*\w)?", name) else json.dumps(name, ensure_ascii=False)


def check_mapping(spec: JobSpec, names: Set[str], path: str, num_files: int) -> None:
    """PromptsError where the spec names a column that none of the files has. `names` are all that they have,
    and `path` is the first of them."""
    where = path if num_files == 1 else f"{path}, like all other files,"
    for meaning, mapped in spec.prompts.columns.items():
        if mapped is not None and mapped not in names:
            raise PromptsError(
                f"{where} has no column {mapped!r}, which prompts.columns names for {meaning}; "
                f"it has {_listed(sorted(names))}"
            )
    for name in spec.prompts.keep or ():
        if name not in names:
            raise PromptsError(f"{where} has no column {name!r}, which prompts.keep names")


def _check_type(meaning: str, name: str, type: pa.DataType, path: str) -> None:
    kinds = {
        "text": is_text(type),
        "whole numbers": pa.types.is_integer(type) or pa.types.is_decimal(type),
        "fractions": pa.types.is_floating(type),
        "UUIDs": isinstance(type, pa.UuidType),
        "pictures as {bytes, path}, bytes or paths": is_text(type) or holds_pictures(type),
    }
    allowed = _TYPES[meaning]
    if pa.types.is_null(type) or any(kinds[kind] for kind in allowed):
        return
    called = name if name == meaning else f"{name} ({meaning})"
    raise PromptsError(
        f"{path}: column {called} has type {type}, but must hold {allowed[0]}; convert it, or name another "
        f"column under `prompts.columns`, or none: `columns: {{{meaning}: null}}`"
    )


def holds_pictures(type: pa.DataType) -> bool:
    """Whether a column holds pictures as `datasets` writes them: their bytes, their path, or both."""
    if not pa.types.is_struct(type):
        return False
    names = {field.name for field in type}
    fit = names <= {"bytes", "path"}
    return fit and all(is_text(field.type) or pa.types.is_null(field.type) for field in type)


def passthrough(
    spec: JobSpec, scanned: Scan, columns: dict[str, str], path: str, folders: Container[str]
) -> pa.Schema:
    """The columns of this file that pass through to the output, under the names that they have there.
    `columns` are those that have a meaning, and `folders` those that folders give."""
    keep, used = spec.prompts.keep, set(columns.values())
    rest = [column for column in scanned.schema if column.name not in used]
    chained = spec.pictured and scanned.own
    if chained:  # what its job measured is not this one's, and what came before is found by `row_id`
        rest = [column for column in rest if column.name in LINEAGE or column.name not in _OWN]
    if keep is not None:
        rest = [column for column in rest if column.name in keep]
    passed = []
    for column in rest:
        lineage = chained and column.name in LINEAGE
        passed_as = f"source_{column.name}" if lineage else output_name(spec, column.name, folders)
        if spec.pictured and not lineage and column.name in LINEAGE_OUT:
            raise PromptsError(
                f"{path}: column {column.name!r} has the name of what a job's output says of pictures; "
                "rename it, or name those to pass through, without it, in `prompts.keep`"
            )
        if passed_as in OUTPUT_COLUMNS or (spec.pictured and passed_as in SOURCE_COLUMNS):
            raise PromptsError(
                f"{path}: column {column.name!r} would pass through to the output, which has one of "
                "that name itself; rename it, or name those to pass through, without it, in `prompts.keep`"
            )
        if column.name in scanned.unusable:
            raise PromptsError(scanned.unusable[column.name])
        if not lineage and source_name(spec, column.name, folders) != column.name:
            raise PromptsError(
                f"{path}: column {column.name!r} has the name under which the column "
                f"{source_name(spec, column.name, folders)!r} passes through; rename it"
            )
        passed.append(pa.field(passed_as, column.type, metadata=column.metadata))
    # By the metadata `datasets` knows a column of pictures, here and in the output.
    return pa.schema(passed, metadata=scanned.schema.metadata)


def same_columns(
    known: pa.Schema, schema: pa.Schema, path: str, first_path: str, folders: Container[str]
) -> pa.Schema:
    """The pass-through columns of the files so far, `known`, together with those of one more file.

    A column that some files lack is null there, and one that has several types gets the type that holds them
    all. `first_path` names the first of the files in errors.
    """
    if known.equals(schema, check_metadata=True):
        return known
    fields = {column.name: column for column in known}
    for column in schema:
        before = fields.setdefault(column.name, column)
        type = merged(before.type, column.type)
        if type is None and column.name in folders:
            type = merged_folders(before.type, column.type)
        if type is None:
            raise PromptsError(
                f"{path} has type {column.type} in its column {column.name!r}, not {before.type}, unlike "
                f"{first_path}; make them alike, or name the columns to pass through in `prompts.keep`"
            )
        about = [one.metadata for one in (before, column) if not pa.types.is_null(one.type)]
        alike = about and all(one == about[0] for one in about)
        fields[column.name] = pa.field(column.name, type, metadata=about[0] if alike else None)
    return pa.schema(list(fields.values()), metadata=merged_metadata(known, schema))


def writable(schema: pa.Schema, path: str) -> None:
    """PromptsError where Parquet cannot hold one of Arrow's types, which otherwise the first part would
    show. Lists of no elements Arrow writes, reads wrongly, or ends the process on, as the rows are."""
    for field in schema:
        if contains(field.type, lambda type: pa.types.is_fixed_size_list(type) and not type.list_size):
            raise PromptsError(
                f"{path}: column {field.name!r} cannot pass through to the output: it has lists of a fixed "
                "size of 0; leave it out of `prompts.keep`"
            )
    try:
        pq.write_table(empty_table(schema), io.BytesIO())
    except (pa.ArrowException, OSError) as error:
        raise PromptsError(
            f"{path}: a column cannot pass through to the output: {error}; leave it out of `prompts.keep`"
        ) from error


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return (shown or "no columns") + (f" and {len(names) - 20} more" if len(names) > 20 else "")
