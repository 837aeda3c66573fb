"""What all readers of prompt tables share: formats, results of scans and reads, errors. Opens no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from overtone.jobs.errors import PromptsError
from overtone.jobs.words import one_line

Format = Literal["parquet", "csv", "jsonl"]

ENDINGS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}

BLOCK_ROWS = 1024  # rows of csv or jsonl between two remembered places
BATCH_ROWS = 1024


@dataclass(frozen=True)
class Scan:
    """What planning needs to know about a file."""

    num_rows: int
    num_row_groups: int
    """Of Parquet; 0 for csv and jsonl."""
    blocks: tuple[int, ...]
    """Where in a csv or jsonl file, in bytes, rows 0, 1024, 2048, ... begin."""
    digest: str
    """SHA-256, in hex, of the Parquet footer; of the whole file for csv and jsonl."""
    schema: pa.Schema
    """All columns. Of the metadata it keeps only what the `datasets` library wrote."""
    mixed: dict[str, str] = field(default_factory=dict)
    """The columns of a jsonl file that have more than one type, with a sentence about each. `schema` gives
    them the type null."""


@dataclass
class Batch:
    """Some rows. The columns that have a meaning are Python values, and the others stay as they are.

    A text that is not valid UTF-8 is kept as its bytes.
    """

    values: dict[str, list[Any]]
    others: pa.Table
    problems: dict[int, str] = field(default_factory=dict)
    """Rows (index in the batch) that could not be read, with the reason."""

    @property
    def num_rows(self) -> int:
        return self.others.num_rows


def check_names(names: Sequence[str], path: str) -> None:
    """PromptsError where two columns have one name."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PromptsError(f"{path} has two columns named {twice[0]!r}; rename one of them")


def is_text(type: pa.DataType) -> bool:
    """Whether a column may hold text: strings of any kind, and binary, because writers that know no logical
    types store text as binary."""
    if pa.types.is_dictionary(type):
        return is_text(type.value_type)
    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )
    return any(check(type) for check in checks)


def table_of_rows(arrays: list[pa.Array], schema: pa.Schema, num_rows: int) -> pa.Table:
    """A table that keeps its number of rows where it has no columns."""
    if arrays:
        return pa.Table.from_arrays(arrays, schema=schema)
    return rows_without_columns(num_rows)


def rows_without_columns(num_rows: int) -> pa.Table:
    """A table with rows and no columns."""
    return pa.table({"x": pa.nulls(num_rows)}).select([])


def changed(path: str) -> PromptsError:
    """What to raise where a prompt file is not the one that was planned."""
    return PromptsError(
        f"{path} changed since the job was planned; put the old file back, or choose a new output folder"
    )


def line_of(error: BaseException) -> str:
    """An error's message on one line."""
    return one_line(error, 500)
