"""Prompt tables in csv and JSON lines, read from one of every 1024 remembered rows on. Knows no meanings.

Importing this module raises the csv module's limit of a field for the whole process.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, TypeVar

import pyarrow as pa

from overtone.jobs.errors import PromptsError
from overtone.jobs.prompts.places import Found, Place
from overtone.jobs.prompts.scan import (
    BATCH_ROWS,
    BLOCK_ROWS,
    Batch,
    Scan,
    check_names,
    line_of,
    table_of_rows,
)

_T = TypeVar("_T")
_MAX_LINE_BYTES = 256 * 1024**2

csv.field_size_limit(_MAX_LINE_BYTES)  # the module's own limit of 128 KiB is for the whole process


def scan_csv(place: Place, found: Found) -> Scan:
    """Read a csv file once, to count its rows and to find where every 1024th begins."""
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


def read_csv(
    place: Place,
    found: Found,
    values: Sequence[str],
    others: pa.Schema,
    first_row: int,
    num_rows: int,
    blocks: Sequence[int],
    digest: str,
) -> Iterator[Batch]:
    """The rows [first_row, first_row + num_rows); `table.read` states the rules."""
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
    return Batch(read, table_of_rows(arrays, others, len(rows)), problems)


def _undo_surrogates(cell: str | None) -> str | bytes | None:
    if cell is None or _encodable(cell):
        return cell
    return cell.encode("utf-8", "surrogateescape")


def _csv_header(lines: _Lines, path: str) -> list[str]:
    for _, cells in _csv_rows(lines, path):
        if any("\udc80" <= char <= "\udcff" for name in cells for char in name):
            raise PromptsError(f"{path}: its column names are not valid UTF-8; is it a csv file in UTF-8?")
        for number, name in enumerate(cells, 1):
            if not name:
                raise PromptsError(f"{path}: column {number} has no name in the first line")
        check_names(cells, path)
        return cells
    raise PromptsError(f"{path} is empty; a csv file begins with a line of column names")


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


def scan_jsonl(place: Place, found: Found) -> Scan:
    """Read a jsonl file once, to count its rows, to find where every 1024th begins, and to learn its
    columns."""
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


def read_jsonl(
    place: Place,
    found: Found,
    values: Sequence[str],
    others: pa.Schema,
    first_row: int,
    num_rows: int,
    blocks: Sequence[int],
    digest: str,
) -> Iterator[Batch]:
    """The rows [first_row, first_row + num_rows); `table.read` states the rules."""
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
                table_of_rows(arrays, others, len(chunk)),
                {i: line.problem for i, line in enumerate(chunk) if line.problem},
            )


class _JsonLine(NamedTuple):
    start: int
    """Where the line begins, in bytes."""
    number: int
    """From 1."""
    row: dict[str, Any]
    problem: str | None
    """Why it is no row; None: it is one."""


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
        return {}, f"the line is not JSON: {line_of(error)}"
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
            f"{where} has values of several kinds, or ones that do not fit: {line_of(error)}"
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


class _Lines:
    """The lines of a file, decoded, and the place where the next one begins. Bad UTF-8 is kept as
    surrogates."""

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


def _chunks(rows: Iterator[_T], first_row: int, num_rows: int) -> Iterator[list[_T]]:
    """`num_rows` rows from `first_row` on, a batch at a time; `rows` begin at the block that holds
    `first_row`."""
    rows = islice(rows, first_row % BLOCK_ROWS, None)
    while num_rows and (chunk := list(islice(rows, min(num_rows, BATCH_ROWS)))):
        num_rows -= len(chunk)
        yield chunk


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
