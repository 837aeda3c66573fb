"""Prompt tables in JSON lines, read from one of every 1024 remembered lines on. Knows no meanings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa

from overtone.jobs.column_types import fitted_values, merged
from overtone.jobs.errors import PromptsError
from overtone.jobs.prompts.encodings import Utf8Check
from overtone.jobs.prompts.lines import Lines, chunks, encodable, opened
from overtone.jobs.prompts.places import Found, Place
from overtone.jobs.prompts.scan import BLOCK_ROWS, Batch, Scan, TextStyle, Wanted, batch_of, line_of


def scan_jsonl(place: Place, found: Found, style: TextStyle) -> Scan:
    """Read a jsonl file once, to count its rows, to find where every 1024th begins, and to learn its
    columns."""
    path = found.path
    types: dict[str, pa.DataType] = {}
    mixed: dict[str, str] = {}
    with opened(place, found, style.encoding) as file:
        check = Utf8Check(path) if style.encoding is None else None
        lines = Lines(file, path, check=check)
        blocks, count = [], 0
        rows = _rows(lines)
        while chunk := list(islice(rows, BLOCK_ROWS)):
            if not count and chunk[0].problem:
                if check is not None:
                    check.end()
                raise PromptsError(f"{path}:{chunk[0].number}: not JSON lines: {chunk[0].problem}")
            blocks.append(chunk[0].start)
            count += len(chunk)
            for name in dict.fromkeys(name for line in chunk for name in line.row):
                where = f"{path}: column {name!r} in lines {chunk[0].number} to {chunk[-1].number}"
                try:
                    type = _type_of([line.row.get(name) for line in chunk], where)
                    types[name] = _merged(types.get(name, pa.null()), type, f"{path}: column {name!r}")
                except PromptsError as error:
                    mixed.setdefault(name, str(error))
                    types.setdefault(name, pa.null())
        if check is not None:
            check.end()
    schema = pa.schema([(name, pa.null() if name in mixed else type) for name, type in types.items()])
    return Scan(count, 0, tuple(blocks), lines.sha.hexdigest(), schema, mixed)


def read_jsonl(
    place: Place,
    found: Found,
    wanted: Wanted,
    first_row: int,
    num_rows: int,
    blocks: Sequence[int],
    style: TextStyle,
) -> Iterator[Batch]:
    """The rows [first_row, first_row + num_rows); `table.read` states the rules."""
    start = blocks[first_row // BLOCK_ROWS]
    with opened(place, found, style.encoding, start) as file:
        for chunk in chunks(_rows(Lines(file, found.path, start)), first_row, num_rows):
            yield _batch(chunk, wanted)


def _batch(lines: list[_JsonLine], wanted: Wanted) -> Batch:
    def values(name: str) -> list[Any] | None:
        if name in wanted.given and not any(name in line.row for line in lines):
            return None
        return [line.row.get(name) for line in lines]

    def others(column: pa.Field) -> tuple[pa.Array, list[int]] | None:
        cells = values(column.name)
        return None if cells is None else fitted_values(cells, column.type)

    problems = {i: line.problem for i, line in enumerate(lines) if line.problem}
    return batch_of(wanted, len(lines), values=values, others=others, problems=problems)


class _JsonLine(NamedTuple):
    start: int
    """Where the line begins, in bytes."""
    number: int
    """From 1."""
    row: dict[str, Any]
    problem: str | None
    """Why it is no row; None: it is one."""


def _rows(lines: Lines) -> Iterator[_JsonLine]:
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
    if not all(map(encodable, row)):
        return {}, "the line has a key that is not valid Unicode"
    return row, None


def _type_of(column: list[Any], where: str) -> pa.DataType:
    try:
        return pa.array(column).type
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, RecursionError) as error:
        raise PromptsError(
            f"{where} has values of several kinds, or ones that do not fit: {line_of(error)}"
        ) from None


def _merged(a: pa.DataType, b: pa.DataType, where: str) -> pa.DataType:
    type = merged(a, b)
    if type is None:
        raise PromptsError(f"{where} has both {a} and {b}; make it one type")
    return type
