"""The rows of a shard, and the names of all rows that a job owes. Knows no plan, only files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, count, repeat

import numpy as np
import pyarrow as pa

from overtone.jobs.column_types import empty_table
from overtone.jobs.errors import PromptsError
from overtone.jobs.prompts.column_names import folder_values, source_name
from overtone.jobs.prompts.given import GivenPictures
from overtone.jobs.prompts.input_file import InputFile, server_of, stem_of, style_of
from overtone.jobs.prompts.listing import in_threads
from overtone.jobs.prompts.places import Found, place_of
from overtone.jobs.prompts.scan import Batch, Wanted, rows_without_columns
from overtone.jobs.prompts.table import read
from overtone.jobs.prompts.values import plain_row_ids, row_identity, samples, shown_value
from overtone.jobs.rows import Reject, Row, image_row_id
from overtone.jobs.spec import PICTURES, JobSpec

_NAMED_ROWS = 8192


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard, or of any run of rows of one file, as samples."""

    rows: list[Row]
    """Rows to make, in source order; an input row that asks for n images is here n times."""
    rejects: list[Reject]
    """Samples that cannot be made, in source order; a row that asks for n images is here n times."""
    passthrough: pa.Table
    """The pass-through columns of all the input rows; a row's are at `Row.source - first_row`. The table may
    have rows but no columns."""
    first_row: int
    """Index in the file of the first input row."""

    @property
    def num_rows(self) -> int:
        """Input rows. The samples of each are in `rows` or in `rejects`."""
        return self.passthrough.num_rows


def read_shard(
    spec: JobSpec, file: InputFile, first_row: int, num_rows: int, *, with_pictures: bool = True
) -> ShardRows:
    """The rows [first_row, first_row + num_rows) of a file. Each ends in `rows` or `rejects`. Pictures that
    they start from are copied to this machine's disk; `with_pictures`: or are not even read.

    PromptsError where the file is damaged, gone, or not what it was when the job was planned; StoreError
    where it cannot be reached.
    """
    rows: list[Row] = []
    rejects: list[Reject] = []
    tables = []
    source = first_row
    pictures = GivenPictures(spec, file.path) if spec.pictured and with_pictures else None
    meanings = [name for name in spec.meanings if pictures or name not in PICTURES]
    for batch in _batches(spec, file, meanings, file.passthrough, first_row, num_rows):
        asked = [
            {meaning: column[i] for meaning, column in batch.values.items()} for i in range(batch.num_rows)
        ]
        starts = pictures.of_all(asked) if pictures else [(None, None, None)] * len(asked)
        for i, (values, (image, mask, wrong)) in enumerate(zip(asked, starts, strict=True)):
            if spec.prompts.text is not None:
                values["prompt"] = spec.prompts.text
            problem = batch.problems.get(i) or wrong
            default_id = _default_id(file, source)
            good, bad = samples(spec.seed, default_id, source, values, problem, image=image, mask=mask)
            rows += good
            rejects += bad
            source += 1
        tables.append(batch.others)
    if not len(file.passthrough):
        passthrough = rows_without_columns(num_rows)
    else:
        passthrough = pa.concat_tables(tables) if tables else empty_table(file.passthrough)
    return ShardRows(rows, rejects, passthrough, first_row)


def _batches(
    spec: JobSpec,
    file: InputFile,
    meanings: Sequence[str],
    others: pa.Schema,
    first_row: int,
    num_rows: int,
) -> Iterator[Batch]:
    """The rows in batches, with their values by meaning instead of by column name, and what passes through
    under its names in the output."""
    place = place_of(file.path, **server_of(spec))
    columns = {meaning: name for meaning, name in file.columns if meaning in meanings}
    folders = folder_values(file.path, file.relpath)
    if not num_rows:
        return
    used = {name for _, name in file.columns}
    inside = [pa.field(source_name(spec, column.name, folders, used), column.type) for column in others]
    for batch in read(
        place,
        Found(file.path, file.size_bytes, file.etag),
        file.format,
        Wanted(
            list(columns.values()),
            pa.schema(inside),
            folders,
            frozenset(name for meaning, name in columns.items() if meaning in PICTURES),
        ),
        style=style_of(spec),
        first_row=first_row,
        num_rows=num_rows,
        blocks=file.blocks,
        digest=file.footer_digest,
    ):
        values = {meaning: batch.values[name] for meaning, name in columns.items()}
        passed = batch.others
        if len(others):
            passed = pa.Table.from_arrays(passed.columns, schema=others)
        yield Batch(values, passed, batch.problems)


def _default_id(file: InputFile, source: int) -> str:
    return f"{stem_of(file.relpath)}:{source}"


def expected_row_ids(
    spec: JobSpec, files: Iterable[InputFile], shard_rows: int
) -> Iterator[tuple[int, list[str]]]:
    """(shard, row_ids of all its samples) for every shard in order, whether they are in `data` or in
    `rejects`.

    Only the row_id and num_images columns are read, as a stream; of tables without these, nothing.
    """
    shard = 0
    for file in files:
        ids: list[str] = []  # of the shard in hand
        row = 0
        for names, counts in _named_rows(spec, file):
            ends = list(accumulate(counts)) if counts else range(1, len(names) + 1)
            done, taken = 0, 0  # rows and ids of this batch that are in shards
            while done < len(ends):
                n = min(len(ends) - done, shard_rows - row % shard_rows)
                done, row = done + n, row + n
                ids += names[taken : ends[done - 1]]
                taken = ends[done - 1]
                if row % shard_rows == 0 or row == file.num_rows:
                    yield shard, ids
                    shard, ids = shard + 1, []


def check_row_ids(spec: JobSpec, files: Sequence[InputFile]) -> None:
    """PromptsError where two samples of the job have one name. A driver calls it before any GPU work.

    The files are read in parallel. It takes 8 bytes of memory for each sample, and twice that for a moment.
    """
    if not any("row_id" in dict(file.columns) for file in files):
        return  # named after file and index: distinct by construction
    with closing(in_threads(lambda i: _hashes(spec, files[i]), range(len(files)))) as of_files:
        hashes = np.concatenate([*of_files])
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not twice:
        return
    seen: dict[str, tuple[str, int]] = {}
    for file in files:
        sources = count()
        for names, counts in _named_rows(spec, file):
            rows = (source for n in counts or repeat(1, len(names)) for source in repeat(next(sources), n))
            for row_id, source in zip(names, rows, strict=True):
                if hash(row_id) not in twice:
                    continue
                if row_id in seen:
                    path, first = seen[row_id]
                    raise PromptsError(
                        f"row_id {shown_value(row_id)} is there twice: row {first} of {path}, row {source} "
                        f"of {file.path} (counted from 0); make row_ids unique, or name rows after file and "
                        "number by `columns: {row_id: null}` under `prompts`"
                    )
                seen[row_id] = (file.path, source)


def _named_rows(spec: JobSpec, file: InputFile) -> Iterator[tuple[list[str], list[int] | None]]:
    """The names of all samples of a file, in batches: (names, how many of them each row has). None: each row
    has one."""
    if not {"row_id", "num_images"} & set(dict(file.columns)):
        stem = stem_of(file.relpath)
        for start in range(0, file.num_rows, _NAMED_ROWS):
            rows = range(start, min(start + _NAMED_ROWS, file.num_rows))
            yield [f"{stem}:{source}" for source in rows], None
        return
    start = 0
    for batch in _batches(spec, file, ("row_id", "num_images"), pa.schema([]), 0, file.num_rows):
        given = batch.values.get("row_id")
        if given is not None and "num_images" not in batch.values and plain_row_ids(given):
            yield given, None
        else:
            names, counts = [], []
            for i in range(batch.num_rows):
                values = {meaning: column[i] for meaning, column in batch.values.items()}
                row_id, num_images, _ = row_identity(_default_id(file, start + i), values)
                names += [image_row_id(row_id, k, num_images) for k in range(num_images)]
                counts.append(num_images)
            yield names, counts
        start += batch.num_rows


def _hashes(spec: JobSpec, file: InputFile) -> np.ndarray:
    """[samples] int64: `hash` of each name in a file."""
    hashes = [np.fromiter(map(hash, names), np.int64, len(names)) for names, _ in _named_rows(spec, file)]
    return np.concatenate([np.empty(0, np.int64), *hashes])
