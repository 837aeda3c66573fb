"""Names of columns that no file has: those that folders give, and those that a column has in the output.
Knows no files.

Files below `lang=en/year=2024/` have a column `lang` and a column `year`. Folders count that lie below what
`prompts.path` names, and those right above a file, so that `lang=en/*` has a column `lang` too. A column of
that name in the file itself comes first.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from urllib.parse import unquote

import pyarrow as pa

from overtone.jobs.columns import OUTPUT_COLUMNS
from overtone.jobs.spec import COLUMNS, JobSpec

_RENAMED = "source_"
LINEAGE = ("prompt", "seed", "model")
"""Of a job's output that is the table of the next one: what made the picture that a row starts from, and
stays beside it as `source_prompt`, `source_seed` and `source_model`."""
LINEAGE_OUT = tuple(f"{_RENAMED}{name}" for name in LINEAGE)
_NULL = "__HIVE_DEFAULT_PARTITION__"


def folder_values(path: str, relpath: str) -> dict[str, int | str | None]:
    """What the folders of a file say about all its rows: whole numbers where they are written as such, else
    text; None where a writer had no value."""
    below = relpath.split("/")[:-1]
    above = path.split("/")[: -1 - len(below)] if path.endswith(relpath) else path.split("/")[:-1]
    if all(_pair(name) for name in below):
        while above and _pair(above[-1]):
            below.insert(0, above.pop())
    return {key: _value(text) for key, text in filter(None, map(_pair, below))}


def with_folders(schema: pa.Schema, values: Mapping[str, int | str | None]) -> pa.Schema:
    """A file's columns, and those that its folders give."""
    for name, value in values.items():
        if name not in schema.names:
            schema = schema.append(pa.field(name, _type(value)))
    return schema


def merged_folders(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type of a column that folders give, where one of them is no whole number; None: it is another
    column's."""
    kinds = (pa.int64(), pa.string())
    return pa.string() if (a, b) in (kinds, kinds[::-1]) else None


def output_name(spec: JobSpec, name: str, folders: Container[str]) -> str:
    """The name in the output of a column that passes through. `source_` stands before a name of ours that the
    spec turned off, and before one that a folder gives and the output has itself."""
    off = name in COLUMNS and spec.prompts.column(name) is None
    return f"{_RENAMED}{name}" if off or (name in folders and name in OUTPUT_COLUMNS) else name


def source_name(
    spec: JobSpec, passed_as: str, folders: Container[str], used: Container[str] = frozenset(COLUMNS)
) -> str:
    """The name in the table of a column that passes through: the reverse of `output_name`. `used`: the
    columns of the file that have a meaning; those of `LINEAGE` that have none are another job's."""
    name = passed_as.removeprefix(_RENAMED)
    if passed_as != name and spec.pictured and name in LINEAGE and name not in used:
        return name
    return name if output_name(spec, name, folders) == passed_as else passed_as


def _pair(name: str) -> tuple[str, str] | None:
    key, equals, text = name.partition("=")
    return (unquote(key), unquote(text)) if key and equals else None


def _value(text: str) -> int | str | None:
    if text == _NULL:
        return None
    digits = text.removeprefix("-")
    whole = digits.isascii() and digits.isdigit() and len(digits) < 19
    return int(text) if whole and str(int(text)) == text else text


def _type(value: int | str | None) -> pa.DataType:
    return pa.null() if value is None else pa.int64() if isinstance(value, int) else pa.string()
