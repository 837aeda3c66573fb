"""Tables in Parquet, csv and JSON lines: how many rows a file has, any run of its rows. Knows no meanings.

A Parquet file is planned by its footer alone. A csv or jsonl file is read once from end to end, which finds
where every 1024th row begins, so that later reads start there. In csv all columns are text, and an empty cell
is null; in jsonl a column has one type over all rows, and a key that a row lacks is null.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa

from overtone.jobs.errors import PromptsError, StoreError
from overtone.jobs.prompts.csv_tables import read_csv, scan_csv
from overtone.jobs.prompts.jsonl_tables import read_jsonl, scan_jsonl
from overtone.jobs.prompts.parquet import read_parquet, scan_parquet
from overtone.jobs.prompts.places import Found, Place, gone
from overtone.jobs.prompts.scan import Batch, Format, Scan, TextStyle, Wanted, changed, line_of
from overtone.jobs.words import counted


def scan(place: Place, found: Found, format: Format, style: TextStyle) -> Scan:
    """Count a file's rows. PromptsError where it is not a whole file of its format, StoreError where it
    cannot be reached."""
    with _reading(found.path):
        if format == "parquet":
            return scan_parquet(place, found)
        return scan_jsonl(place, found, style) if format == "jsonl" else scan_csv(place, found, style)


def read(
    place: Place,
    found: Found,
    format: Format,
    wanted: Wanted,
    *,
    style: TextStyle,
    first_row: int,
    num_rows: int,
    blocks: Sequence[int] = (),
    digest: str,
) -> Iterator[Batch]:
    """Exactly the rows [first_row, first_row + num_rows), in order, in batches of at most 1024.

    PromptsError where the file is damaged or no longer the one that `digest` was made of; StoreError where it
    cannot be reached.
    """
    left = num_rows
    with _reading(found.path):
        now = place.stat(found.path)
        if now is None:
            raise gone(found.path)
        if now.size_bytes != found.size_bytes:
            raise changed(found.path)
        if format == "parquet":
            batches = read_parquet(place, found, wanted, first_row, num_rows, digest)
        elif format == "csv":
            batches = read_csv(place, found, wanted, first_row, num_rows, blocks, style)
        else:
            batches = read_jsonl(place, found, wanted, first_row, num_rows, blocks, style)
        for batch in batches:
            left -= batch.num_rows
            yield batch
    if left:
        raise PromptsError(
            f"{found.path} is damaged: it has {counted(left, 'row')} fewer than when it was planned"
        )


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn the errors of a reader into ours. An OSError without a number is Arrow's and concerns the file's
    contents; one with a number is the machine's."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise PromptsError(f"{path} cannot be read: {line_of(error)}") from error
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise PromptsError(f"{path} cannot be read: {line_of(error)}") from error
