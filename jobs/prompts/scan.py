"""What all readers of prompt tables share: formats, what is asked of them and what they give, errors. Opens
no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from overtone.jobs.column_types import fitted
from overtone.jobs.errors import PromptsError
from overtone.jobs.words import one_line

Format = Literal["parquet", "csv", "jsonl"]

ENDINGS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}

BLOCK_ROWS = 1024  # rows of csv or jsonl between two remembered places
BATCH_ROWS = 1024


@dataclass(frozen=True)
class TextStyle:
    """How csv and jsonl files are written."""

    encoding: str | None
    """As Python calls it. None: UTF-8, or the file is refused."""
    delimiter: str | None
    """Of csv, one character. None: the one by which the first line has the column `prompt`."""
    prompt: str
    """The name of the column that holds the prompts."""


@dataclass(frozen=True)
class Scan:
    """What planning needs to know about a file."""

    num_rows: int
    num_row_groups: int
    """Of Parquet; 0 for csv and jsonl."""
    blocks: tuple[int, ...]
    """Where in a csv or jsonl file, in bytes of its text, rows 0, 1024, 2048, ... begin."""
    digest: str
    """SHA-256, in hex, of the Parquet footer; of the whole text for csv and jsonl."""
    schema: pa.Schema
    """All columns. Of the metadata it keeps only what the `datasets` library wrote."""
    unusable: dict[str, str] = field(default_factory=dict)
    """The columns that cannot be read, with a sentence about each: those of a jsonl file that have more than
    one type, whose type in `schema` is null, and encrypted ones of a Parquet file."""
    own: bool = False
    """It is a part of a job's output."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a reader. It may name columns that the file lacks."""

    values: Sequence[str]
    """Columns that have a meaning."""
    others: pa.Schema
    """Columns that pass through, in the types that the job has for them."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """For columns that the file lacks the value that all rows have, which is otherwise null."""
    raw: frozenset[str] = frozenset()
    """Those of `values` whose bytes stay bytes where the file says that they are."""


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


def batch_of(
    wanted: Wanted,
    num_rows: int,
    *,
    values: Callable[[str], list[Any] | None],
    others: Callable[[pa.Field], tuple[pa.Array, Sequence[int]] | None],
    problems: dict[int, str] | None = None,
) -> Batch:
    """A batch of rows as it is wanted. `values` and `others` read a column, the second with the rows that do
    not fit its type; None: the file lacks it. What is wrong with a row is added to `problems`."""
    problems = {} if problems is None else problems
    read, arrays = {}, []
    for name in wanted.values:
        found = values(name)
        read[name] = [wanted.given.get(name)] * num_rows if found is None else found
    for column in wanted.others:
        array, misfits = others(column) or _constant(wanted.given.get(column.name), num_rows, column.type)
        for i in misfits:
            problems.setdefault(i, f"its {column.name!r} does not fit in {column.type}")
        arrays.append(array)
    if not arrays:
        return Batch(read, rows_without_columns(num_rows), problems)
    return Batch(read, pa.Table.from_arrays(arrays, schema=wanted.others), problems)


def _constant(value: Any, num_rows: int, type: pa.DataType) -> tuple[pa.Array, list[int]]:
    return fitted(pa.array([value] * num_rows), type)


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
        pa.types.is_binary_view,
    )
    return any(check(type) for check in checks)


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
