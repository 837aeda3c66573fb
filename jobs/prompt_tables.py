"""Tables in Parquet, csv and JSON lines: how many rows a file has, any run of its rows. Knows no meanings.

A Parquet file is known by its footer alone. csv and jsonl are read once from end to end, which finds where
every 1024th row begins, so that later reads start there. In csv all columns are text and an empty cell is
null; in jsonl a column has one type over all rows, and a key that a row lacks is null.
"""

from __future__ import annotations

import csv
import io
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import PromptsError, StoreError
from jobs.prompt_files import Found, Place, gone

_T = TypeVar("_T")
Format = Literal["parquet", "csv", "jsonl"]
ENDINGS: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
BLOCK_ROWS = 1024  # rows of csv or jsonl between two remembered places

_TAIL_BYTES = 64 * 1024  # one request for most footers
_MAX_FOOTER_BYTES = 1024**3
_MAX_LINE_BYTES = 256 * 1024**2
_BATCH_ROWS = 1024
_BUFFER_BYTES = 4 * 1024**2

csv.field_size_limit(_MAX_LINE_BYTES)  # the module's own limit of 128 KiB is for the whole process


@dataclass(frozen=True)
class Scan:
    """What planning needs to know of a file."""

    num_rows: int
    num_row_groups: int
    """Of Parquet; 0 for csv and jsonl."""
    blocks: tuple[int, ...]
    """Where in a csv or jsonl file, in bytes, rows 0, 1024, 2048, ... begin."""
    digest: str
    """SHA-256, in hex, of the Parquet footer; of the whole file for csv and jsonl."""
    schema: pa.Schema
    """All columns; of the metadata only what the `datasets` library wrote."""
    mixed: dict[str, str] = field(default_factory=dict)
    """Columns of a jsonl file that have no one type, with a sentence about each; their type here is null."""


@dataclass
class Batch:
    """Some rows: the columns that have a meaning as Python values, the others as they are.

    A text that is not valid UTF-8 is given as its bytes.
    """

    values: dict[str, list[Any]]
    others: pa.Table
    problems: dict[int, str] = field(default_factory=dict)
    """Rows (index in the batch) that could not be read, with the reason."""

    @property
    def num_rows(self) -> int:
        return self.others.num_rows


def scan(place: Place, found: Found, format: Format) -> Scan:
    """Count a file's rows. PromptsError where it is not a whole file of its format, StoreError where it
    cannot be reached."""
    with _reading(found.path):
        return {"parquet": _scan_parquet, "csv": _scan_csv, "jsonl": _scan_jsonl}[format](place, found)


def read(
    place: Place,
    found: Found,
    format: Format,
    *,
    values: Sequence[str],
    others: pa.Schema,
    first_row: int,
    num_rows: int,
    blocks: Sequence[int] = (),
    digest: str,
) -> Iterator[Batch]:
    """Exactly the rows [first_row, first_row + num_rows), in order, in batches of at most 1024.

    `values` and `others` name columns; `others` also ones that the file lacks. PromptsError where the file is
    damaged or no longer the one that `digest` was made of; StoreError where it cannot be reached.
    """
    reader = {"parquet": _read_parquet, "csv": _read_csv, "jsonl": _read_jsonl}[format]
    left = num_rows
    with _reading(found.path):
        now = place.stat(found.path)
        if now is None:
            raise gone(found.path)
        if now.size_bytes != found.size_bytes:
            raise _changed(found.path)
        for batch in reader(place, found, values, others, first_row, num_rows, blocks, digest):
            left -= batch.num_rows
            yield batch
    if left:
        raise PromptsError(f"{found.path} is damaged: it has {left:,} rows fewer than when it was planned")


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Arrow's OSErrors are about the file's contents, those with a number are the machine's."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise PromptsError(f"{path} cannot be read: {_line(error)}") from error
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise PromptsError(f"{path} cannot be read: {_line(error)}") from error


# Parquet


def _scan_parquet(place: Place, found: Found) -> Scan:
    metadata, digest, _ = _footer(place, found)
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    if sum(rows) != metadata.num_rows or any(n < 0 for n in rows):
        raise PromptsError(f"{found.path} is damaged: its footer contradicts itself about its rows")
    return Scan(metadata.num_rows, len(rows), (), digest, _parquet_schema(metadata, found.path))


def _footer(place: Place, found: Found) -> tuple[pq.FileMetaData, str, bytes]:
    """(footer, its SHA-256 in hex, the file's end that was read for it, mostly at once)."""
    path = found.path
    tail = place.tail(found, _TAIL_BYTES)
    if len(tail) < 12 or tail[-4:] not in (b"PAR1", b"PARE"):
        hint = "it is empty" if not found.size_bytes else "it is truncated, or of another format"
        raise PromptsError(f"{path} is not a whole Parquet file: {hint}")
    if tail[-4:] == b"PARE":
        raise PromptsError(f"{path} has an encrypted footer; decrypt it first")
    length = struct.unpack("<I", tail[-8:-4])[0] + 8
    if length > min(found.size_bytes, _MAX_FOOTER_BYTES):
        raise PromptsError(f"{path} is not a whole Parquet file: its footer would be longer than the file")
    if length > len(tail):
        tail = place.tail(found, length)
    footer = tail[-length:]
    try:
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    except (pa.ArrowException, OSError) as error:
        raise PromptsError(f"{path} is not a whole Parquet file: {_line(error)}") from error
    return metadata, sha256(footer).hexdigest(), tail


def _parquet_schema(metadata: pq.FileMetaData, path: str) -> pa.Schema:
    try:
        schema = metadata.schema.to_arrow_schema()
        names = schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"{path} has columns that cannot be read: {_line(error)}") from error
    _check_names(names, path)
    kept = {key: value for key, value in (metadata.metadata or {}).items() if key == b"huggingface"}
    return pa.schema([column.remove_metadata() for column in schema], metadata=kept or None)


def _check_names(names: Sequence[str], path: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PromptsError(f"{path} has two columns named {twice[0]!r}; rename one of them")


def _read_parquet(
    place: Place,
    found: Found,
    values: Sequence[str],
    others: pa.Schema,
    first_row: int,
    num_rows: int,
    blocks: Sequence[int],
    digest: str,
) -> Iterator[Batch]:
    metadata, now, tail = _footer(place, found)
    if now != digest:
        raise _changed(found.path)
    there = set(metadata.schema.to_arrow_schema().names)
    starts = np.cumsum([0] + [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
    groups = [
        i
        for i in range(metadata.num_row_groups)
        if starts[i] < first_row + num_rows and starts[i + 1] > first_row
    ]
    if not groups:
        return
    skip, left = first_row - int(starts[groups[0]]), num_rows
    names = [name for name in dict.fromkeys([*values, *others.names]) if name in there]
    with (
        io.BytesIO(tail) if len(tail) == found.size_bytes else place.open(found.path) as file,
        pq.ParquetFile(file, metadata=metadata, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table,
    ):
        batches = table.iter_batches(
            batch_size=_BATCH_ROWS,
            row_groups=groups,
            columns=names,
            use_threads=False,  # a few narrow columns, mostly of one of many files that are read at once
        )
        for raw in batches:
            batch = raw.slice(min(skip, raw.num_rows), left)
            skip -= min(skip, raw.num_rows)
            if batch.num_rows:
                left -= batch.num_rows
                yield _parquet_batch(batch, values, others)
            if not left:
                return


def _parquet_batch(batch: pa.RecordBatch, values: Sequence[str], others: pa.Schema) -> Batch:
    arrays = [
        _as_type(batch.column(column.name), column.type)
        if column.name in batch.schema.names
        else pa.nulls(batch.num_rows, column.type)
        for column in others
    ]
    table = (
        pa.Table.from_arrays(arrays, schema=others)
        if arrays
        else pa.Table.from_batches([batch]).select([])  # keeps the number of rows
    )
    return Batch({name: _python_values(batch.column(name)) for name in values}, table)


def _as_type(array: pa.Array, type: pa.DataType) -> pa.Array:
    return array if array.type == type else array.cast(type)  # only from null: planning saw to the rest


def _python_values(array: pa.Array) -> list[Any]:
    """The values, with bytes for a text that is not valid UTF-8."""
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    if not is_text(array.type):
        return array.to_pylist()
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    if not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
        try:
            return array.to_numpy(zero_copy_only=False).tolist()  # several times as fast as to_pylist
        except (UnicodeDecodeError, pa.ArrowException):
            pass
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    raw = array.cast(pa.large_binary() if wide else pa.binary()).to_pylist()
    return [None if value is None else _text(value) for value in raw]


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def is_text(type: pa.DataType) -> bool:
    """Strings of any kind, and binary: writers that know no logical types store text as that."""
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


# csv


class _Lines:
    """The lines of a file, decoded, with the place where the next begins. Bad UTF-8 is kept as surrogates."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file, self._path = file, path
        self.position = file.tell()
        self.number = 0
        self.sha = sha256()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        return self.next_bytes().decode("utf-8", "surrogateescape")

    def next_bytes(self) -> bytes:
        line = self._file.readline(_MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        if len(line) == _MAX_LINE_BYTES:
            raise PromptsError(f"{self._path}:{self.number + 1}: a line of over {_MAX_LINE_BYTES:,} bytes")
        first = self.position == 0
        self.position += len(line)
        self.number += 1
        self.sha.update(line)
        return line.removeprefix(b"\xef\xbb\xbf") if first else line


def _csv_rows(lines: _Lines, path: str) -> Iterator[tuple[int, list[str]]]:
    """(where the row begins, its cells); empty lines are no rows."""
    rows = csv.reader(lines, strict=True)
    while True:
        start = lines.position
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise PromptsError(f"{path}:{lines.number}: not csv: {error}") from None
        if cells:
            yield start, cells


def _csv_header(lines: _Lines, path: str) -> list[str]:
    for _, cells in _csv_rows(lines, path):
        if any("\udc80" <= char <= "\udcff" for name in cells for char in name):
            raise PromptsError(f"{path}: its column names are not valid UTF-8; is it a csv file in UTF-8?")
        for number, name in enumerate(cells, 1):
            if not name:
                raise PromptsError(f"{path}: column {number} has no name in the first line")
        _check_names(cells, path)
        return cells
    raise PromptsError(f"{path} is empty; a csv file begins with a line of column names")


def _scan_csv(place: Place, found: Found) -> Scan:
    with place.open(found.path) as file:
        lines = _Lines(file, found.path)
        header = _csv_header(lines, found.path)
        blocks, count = [], 0
        for start, _ in _csv_rows(lines, found.path):
            if count % BLOCK_ROWS == 0:
                blocks.append(start)
            count += 1
        schema = pa.schema([(name, pa.string()) for name in header])
        return Scan(count, 0, tuple(blocks), lines.sha.hexdigest(), schema)


def _read_csv(
    place: Place,
    found: Found,
    values: Sequence[str],
    others: pa.Schema,
    first_row: int,
    num_rows: int,
    blocks: Sequence[int],
    digest: str,
) -> Iterator[Batch]:
    with place.open(found.path) as file:
        header = _csv_header(_Lines(file, found.path), found.path)
        file.seek(blocks[first_row // BLOCK_ROWS])
        rows = _csv_rows(_Lines(file, found.path), found.path)
        for chunk in _chunks(rows, first_row, num_rows):
            yield _csv_batch([cells for _, cells in chunk], header, values, others)


def _csv_batch(rows: list[list[str]], header: list[str], values: Sequence[str], others: pa.Schema) -> Batch:
    problems = {
        i: f"the row has {len(cells)} cells where the first line has {len(header)}"
        for i, cells in enumerate(rows)
        if len(cells) != len(header)
    }
    columns: dict[str, list[str | None]] = {}
    for k, name in enumerate(header):
        columns[name] = [(cells[k] or None) if k < len(cells) else None for cells in rows]
    arrays = []
    for column in others:
        cells = columns.get(column.name, [None] * len(rows))
        for i, cell in enumerate(cells):
            if cell is not None and not _encodable(cell):
                problems.setdefault(i, f"its {column.name!r} is not valid UTF-8")
                cells[i] = None
        arrays.append(pa.array(cells, column.type))
    read = {name: [_undo_surrogates(cell) for cell in columns[name]] for name in values if name in columns}
    return Batch(read, _table(arrays, others, len(rows)), problems)


def _undo_surrogates(cell: str | None) -> str | bytes | None:
    if cell is None or _encodable(cell):
        return cell
    return cell.encode("utf-8", "surrogateescape")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# JSON lines


class _JsonLine(NamedTuple):
    start: int
    """Where the line begins, in bytes."""
    number: int
    """From 1."""
    row: dict[str, Any]
    problem: str | None
    """Why it is no row; None: it is one."""


def _scan_jsonl(place: Place, found: Found) -> Scan:
    path = found.path
    types: dict[str, pa.DataType] = {}
    mixed: dict[str, str] = {}
    with place.open(path) as file:
        lines = _Lines(file, path)
        blocks, count = [], 0
        rows = _jsonl_rows(lines)
        while chunk := list(islice(rows, BLOCK_ROWS)):
            if not count and chunk[0].problem:
                raise PromptsError(f"{path}:{chunk[0].number}: not JSON lines: {chunk[0].problem}")
            blocks.append(chunk[0].start)
            count += len(chunk)
            for name in dict.fromkeys(name for line in chunk for name in line.row):
                where = f"{path}: column {name!r} in lines {chunk[0].number} to {chunk[-1].number}"
                try:
                    type = _jsonl_array([line.row.get(name) for line in chunk], None, where).type
                    types[name] = merged(types.get(name, pa.null()), type, f"{path}: column {name!r}")
                except PromptsError as error:
                    mixed.setdefault(name, str(error))
                    types.setdefault(name, pa.null())
    schema = pa.schema([(name, pa.null() if name in mixed else type) for name, type in types.items()])
    return Scan(count, 0, tuple(blocks), lines.sha.hexdigest(), schema, mixed)


def _jsonl_rows(lines: _Lines) -> Iterator[_JsonLine]:
    """All lines but blank ones."""
    while True:
        start = lines.position
        try:
            line = lines.next_bytes()
        except StopIteration:
            return
        if line.strip():
            yield _JsonLine(start, lines.number, *_json_object(line))


def _json_object(line: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return {}, f"the line is not JSON: {_line(error)}"
    if not isinstance(row, dict):
        return {}, "the line is not a JSON object {...}"
    if not all(map(_encodable, row)):
        return {}, "the line has a key that is not valid Unicode"
    return row, None


def _jsonl_array(column: list[Any], type: pa.DataType | None, where: str) -> pa.Array:
    try:
        return pa.array(column, type)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, RecursionError) as error:
        raise PromptsError(
            f"{where} has values of several kinds, or ones that do not fit: {_line(error)}"
        ) from None


def merged(a: pa.DataType, b: pa.DataType, where: str) -> pa.DataType:
    """The type that holds the values of both: null gives way to any, whole numbers to fractions."""
    try:
        return (
            pa.unify_schemas([pa.schema([("x", a)]), pa.schema([("x", b)])], promote_options="permissive")
            .field(0)
            .type
        )
    except pa.ArrowException:
        raise PromptsError(f"{where} has both {a} and {b}; make it one type") from None


def _read_jsonl(
    place: Place,
    found: Found,
    values: Sequence[str],
    others: pa.Schema,
    first_row: int,
    num_rows: int,
    blocks: Sequence[int],
    digest: str,
) -> Iterator[Batch]:
    with place.open(found.path) as file:
        file.seek(blocks[first_row // BLOCK_ROWS])
        for chunk in _chunks(_jsonl_rows(_Lines(file, found.path)), first_row, num_rows):
            arrays = [
                _jsonl_array(
                    [line.row.get(column.name) for line in chunk],
                    column.type,
                    f"{found.path}: column {column.name!r}",
                )
                for column in others
            ]
            yield Batch(
                {name: [line.row.get(name) for line in chunk] for name in values},
                _table(arrays, others, len(chunk)),
                {i: line.problem for i, line in enumerate(chunk) if line.problem},
            )


def _chunks(rows: Iterator[_T], first_row: int, num_rows: int) -> Iterator[list[_T]]:
    """`num_rows` from `first_row` on, of rows that begin at the block that holds it, a batch at a time."""
    rows = islice(rows, first_row % BLOCK_ROWS, None)
    while num_rows and (chunk := list(islice(rows, min(num_rows, _BATCH_ROWS)))):
        num_rows -= len(chunk)
        yield chunk


def _table(arrays: list[pa.Array], schema: pa.Schema, num_rows: int) -> pa.Table:
    if arrays:
        return pa.Table.from_arrays(arrays, schema=schema)
    return rows_without_columns(num_rows)


def rows_without_columns(num_rows: int) -> pa.Table:
    """A table with rows and no columns."""
    return pa.table({"x": pa.nulls(num_rows)}).select([])


def _changed(path: str) -> PromptsError:
    return PromptsError(
        f"{path} changed since the job was planned; put the old file back, or choose a new output folder"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
