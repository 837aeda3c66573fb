"""Prompt tables in csv, read from one of every 1024 remembered rows on. Knows no meanings.

Importing this module raises the csv module's limit of a field for the whole process.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pyarrow as pa

from overtone.jobs.column_types import fitted_values
from overtone.jobs.errors import PromptsError
from overtone.jobs.prompts.encodings import Utf8Check
from overtone.jobs.prompts.lines import MAX_LINE_BYTES, Lines, chunks, encodable, opened
from overtone.jobs.prompts.places import Found, Place
from overtone.jobs.prompts.scan import BLOCK_ROWS, Batch, Scan, TextStyle, Wanted, batch_of, check_names

csv.field_size_limit(MAX_LINE_BYTES)  # the module's own limit of 128 KiB is for the whole process
_SAID = re.compile("sep=(.)")  # a line before the names by which Excel knows the delimiter
_DELIMITERS = (",", ";", "\t", "|")


def scan_csv(place: Place, found: Found, style: TextStyle) -> Scan:
    """Read a csv file once, to count its rows and to find where every 1024th begins."""
    with opened(place, found, style.encoding) as file:
        check = Utf8Check(found.path) if style.encoding is None else None
        lines = Lines(file, found.path, check=check)
        header, delimiter = _header(lines, found.path, style)
        blocks, count = [], 0
        for start, _ in _rows(lines, found.path, delimiter):
            if count % BLOCK_ROWS == 0:
                blocks.append(start)
            count += 1
        if check is not None:
            check.end()
        schema = pa.schema([(name, pa.string()) for name in header])
        return Scan(count, 0, tuple(blocks), lines.sha.hexdigest(), schema)


def read_csv(
    place: Place,
    found: Found,
    wanted: Wanted,
    first_row: int,
    num_rows: int,
    blocks: Sequence[int],
    style: TextStyle,
) -> Iterator[Batch]:
    """The rows [first_row, first_row + num_rows); `table.read` states the rules."""
    with opened(place, found, style.encoding) as file:
        header, delimiter = _header(Lines(file, found.path), found.path, style)
    start = blocks[first_row // BLOCK_ROWS]
    with opened(place, found, style.encoding, start) as file:
        rows = _rows(Lines(file, found.path, start), found.path, delimiter)
        for chunk in chunks(rows, first_row, num_rows):
            yield _batch([cells for _, cells in chunk], header, wanted)


def _header(lines: Lines, path: str, style: TextStyle) -> tuple[list[str], str]:
    """(names of the columns, delimiter)."""
    first = next(lines, None)
    while first is not None and not first.strip("\r\n"):  # empty lines are no rows
        first = next(lines, None)
    if first is None:
        raise PromptsError(f"{path} is empty; a csv file begins with a line of column names")
    said = _SAID.fullmatch(first.rstrip("\r\n"))
    if said:
        first = next(lines, "")
    delimiter = style.delimiter or (said[1] if said else _delimiter(first, style.prompt))
    _, names = next(_rows(lines, path, delimiter, first), (0, []))
    if any("\udc80" <= char <= "\udcff" for name in names for char in name):
        raise PromptsError(
            f"{path}: its column names are not valid UTF-8; convert the file, or say under `prompts` what it "
            "is, as in `encoding: cp1252`"
        )
    # Data frames write their index as a first column without a name, spreadsheets empty columns as last ones.
    names = [name or f"Unnamed: {number}" for number, name in enumerate(names)]
    check_names(names, path)
    return names, delimiter


def _delimiter(first: str, prompt: str) -> str:
    """The delimiter by which the first line has the column of the prompts. Where there is none, the file is
    refused, with the names by the one that gives the most; a comma where they go on in the next line."""
    names: dict[str, list[str]] = {}
    for delimiter in _DELIMITERS:
        with suppress(csv.Error):
            names[delimiter] = next(csv.reader([first], delimiter=delimiter, strict=True), [])
            if prompt in names[delimiter]:
                return delimiter
    return max(names, key=lambda delimiter: len(names[delimiter]), default=_DELIMITERS[0])


def _rows(
    lines: Lines, path: str, delimiter: str, first: str | None = None
) -> Iterator[tuple[int, list[str]]]:
    """(where the row begins, its cells); empty lines are no rows. `first`: a line that was read already."""
    rows = csv.reader(lines if first is None else _after(first, lines), delimiter=delimiter, strict=True)
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


def _after(first: str, lines: Lines) -> Iterator[str]:
    yield first
    yield from lines


def _batch(rows: list[list[str]], header: list[str], wanted: Wanted) -> Batch:
    problems = {
        i: f"the row has {len(cells)} cells where the first line has {len(header)}"
        for i, cells in enumerate(rows)
        if len(cells) != len(header)
    }

    def cells_of(name: str) -> list[str | None] | None:
        if name not in header:
            return None
        k = header.index(name)
        return [(cells[k] or None) if k < len(cells) else None for cells in rows]

    def values(name: str) -> list[str | bytes | None] | None:
        cells = cells_of(name)
        return None if cells is None else list(map(_undo_surrogates, cells))

    def others(column: pa.Field) -> tuple[pa.Array, list[int]] | None:
        cells = cells_of(column.name)
        if cells is None:
            return None
        for i, cell in enumerate(cells):
            if cell is not None and not encodable(cell):
                problems.setdefault(i, f"its {column.name!r} is not valid UTF-8")
                cells[i] = None
        return fitted_values(cells, column.type)

    return batch_of(wanted, len(rows), values=values, others=others, problems=problems)


def _undo_surrogates(cell: str | None) -> str | bytes | None:
    if cell is None or encodable(cell):
        return cell
    return cell.encode("utf-8", "surrogateescape")
