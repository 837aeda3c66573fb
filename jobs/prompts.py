"""The prompt table: which files it is made of, and its rows one by one. Knows no models and no output."""

from __future__ import annotations

import io
import posixpath
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from itertools import accumulate, count, repeat
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import PromptsError, StoreError
from jobs.prompt_files import Expanded, Found, Place, expand, place_of, relative_names
from jobs.prompt_rows import plain_row_ids, row_identity, samples, shown_value
from jobs.prompt_tables import ENDINGS, Batch, Format, Scan, is_text, merged, read, rows_without_columns, scan
from jobs.rows import Reject, Row, image_row_id
from jobs.spec import COLUMNS, JobSpec, is_url

if TYPE_CHECKING:
    from jobs.plan import JobPlan

_In = TypeVar("_In")
_Out = TypeVar("_Out")

OUTPUT_COLUMNS = frozenset(
    (
        *("row_id", "prompt", "seed", "height", "width", "image", "video", "mode", "delta", "num_steps"),
        *("guidance_scale", "model", "stages", "denoise_seconds", "latents", "latents_shape"),
    )
)
"""Names that the output has itself, or keeps for itself: no column passes through under one of them."""

_TYPES: dict[str, tuple[str, ...]] = {
    "prompt": ("text",),
    "negative_prompt": ("text",),
    "row_id": ("text", "whole numbers"),
    "seed": ("whole numbers",),  # a fraction cannot hold all seeds
    "height": ("whole numbers", "fractions"),
    "width": ("whole numbers", "fractions"),
    "num_images": ("whole numbers", "fractions"),
}
"""What each column may hold; fractions only because tables often turn to them where values are missing."""
_USUAL_PROMPTS = ("caption", "text", "description", "Prompt", "Text", "TEXT")
_THREADS = 32  # that read files at once: most wait for an answer
_AHEAD = 4 * _THREADS
_NAMED_ROWS = 8192
_HASHED_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the prompt table, as it was when the job was planned. Small, and pickles."""

    path: str
    """Absolute path or URL; never with credentials."""
    relpath: str
    """Relative to the deepest folder that holds all that `prompts.path` names: what row_ids and the
    fingerprint use, so that a job can move with its inputs."""
    format: Format
    size_bytes: int
    etag: str
    """What the store gives for the contents. On local disk a hash of them where all files together are small
    (256 MiB), so that a copy is the same input; else made of the modification time and the size."""
    footer_digest: str
    """Hash of the Parquet footer; of the whole file for csv and jsonl."""
    num_rows: int
    """Rows that the job uses: the first ones, all but where `prompts.limit` cuts."""
    file_rows: int
    """Rows in the file."""
    num_row_groups: int
    """Of Parquet; 0 for csv and jsonl."""
    blocks: tuple[int, ...]
    """Where in a csv or jsonl file, in bytes, each block of rows begins; empty for Parquet."""
    passthrough: pa.Schema
    """Columns that pass through to the output, the same for all files, under their output names."""
    columns: tuple[tuple[str, str], ...] = ()
    """(one of `COLUMNS`, the column of this file that holds it), for those that it has."""


class FileList(Sequence[InputFile]):
    """The input files in order, kept as a table: 100,000 of them take tens of megabytes."""

    IDENTITY: ClassVar[tuple[str, ...]] = ("size in bytes", "etag", "footer", "number of rows used")

    _SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            pa.field("path", pa.string(), nullable=False),
            pa.field("relpath", pa.string(), nullable=False),
            pa.field("format", pa.string(), nullable=False),
            pa.field("size_bytes", pa.int64(), nullable=False),
            pa.field("etag", pa.string(), nullable=False),
            pa.field("footer_digest", pa.string(), nullable=False),
            pa.field("num_rows", pa.int64(), nullable=False),
            pa.field("file_rows", pa.int64(), nullable=False),
            pa.field("num_row_groups", pa.int64(), nullable=False),
            pa.field("blocks", pa.list_(pa.int64()), nullable=False),
            pa.field("columns", pa.map_(pa.string(), pa.string()), nullable=False),
        ]
    )

    def __init__(self, table: pa.Table, passthrough: pa.Schema) -> None:
        self.table = table.cast(self._SCHEMA).combine_chunks()
        self.passthrough = passthrough
        self.num_rows: np.ndarray = self.table["num_rows"].to_numpy()
        self.size_bytes: np.ndarray = self.table["size_bytes"].to_numpy()

    @classmethod
    def of(cls, files: Iterable[InputFile], passthrough: pa.Schema) -> FileList:
        """The list of these files; all of them get the given pass-through columns."""
        columns: dict[str, list] = {name: [] for name in cls._SCHEMA.names}
        for file in files:
            for name, values in columns.items():
                values.append(getattr(file, name))
        return cls(pa.table(columns, schema=cls._SCHEMA), passthrough)

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> InputFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[InputFile]: ...
    def __getitem__(self, index: int | slice) -> InputFile | list[InputFile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"input file {index} of {len(self)}")
        row = {name: self.table[name][index % len(self)].as_py() for name in self._SCHEMA.names}
        row |= {"blocks": tuple(row["blocks"]), "columns": tuple(map(tuple, row["columns"]))}
        return InputFile(**row, passthrough=self.passthrough)

    def identities(self) -> dict[str, tuple]:
        """For each relpath, in order, what would show that the file changed; `IDENTITY` names the values."""
        names = ("size_bytes", "etag", "footer_digest", "num_rows")
        values = zip(*(self.table[name].to_pylist() for name in names), strict=True)
        return dict(zip(self.table["relpath"].to_pylist(), values, strict=True))

    def digest(self) -> str:
        """SHA-256, in hex, of all identities in order."""
        sha = sha256()
        for name, identity in self.identities().items():
            sha.update(repr((name, *identity)).encode())
        return sha.hexdigest()


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard, or of any run of rows of one file."""

    rows: list[Row]
    """Rows to make, in source order; an input row that asks for n images is here n times."""
    rejects: list[Reject]
    """Samples that cannot be made, in source order; a row that asks for n images is here n times."""
    passthrough: pa.Table
    """All the input rows' pass-through columns: take `Row.source - first_row`. It may have rows but no
    columns."""
    first_row: int
    """Index in the file of the first input row."""

    @property
    def num_rows(self) -> int:
        """Input rows: every one is in `rows` or in `rejects`."""
        return self.passthrough.num_rows


# Planning: from paths to a list of files


def list_files(spec: JobSpec) -> FileList:
    """The job's input files, from Parquet footers alone; csv and jsonl are read once, and local files that
    are small altogether are hashed.

    PromptsError, with the file and column, where a file is missing, unreadable or damaged, has no prompts, a
    column of another type than its meaning asks for, one that the output has itself, or other ones than
    the first file.
    """
    sources = _sources(spec)
    limit = spec.prompts.limit
    left = limit if limit is not None else sys.maxsize
    small = sum(source.found.size_bytes for source in sources) <= _HASHED_BYTES
    files: list[InputFile] = []
    schema: pa.Schema | None = None
    with closing(_in_threads(lambda source: _scanned(spec, source, small), sources)) as scans:
        for source, (scanned, etag) in zip(sources, scans, strict=True):
            path = source.found.path
            columns = _columns(spec, scanned, path, source.format)
            schema = _same_columns(schema, _passthrough(spec, scanned, columns, path), source, files)
            files.append(
                InputFile(
                    path=path,
                    relpath=source.relpath,
                    format=source.format,
                    size_bytes=source.found.size_bytes,
                    etag=etag,
                    footer_digest=scanned.digest,
                    num_rows=min(left, scanned.num_rows),
                    file_rows=scanned.num_rows,
                    num_row_groups=scanned.num_row_groups,
                    blocks=scanned.blocks,
                    passthrough=schema,
                    columns=tuple(columns.items()),
                )
            )
            left -= files[-1].num_rows
            if not left:
                break
    assert schema is not None
    if not any(file.num_rows for file in files):
        raise PromptsError(f"{_and_others(files)} no rows; there is nothing to make")
    _writable(schema, files[0].path)
    _distinct_stems(files)
    return FileList.of(files, schema)


def _in_threads(work: Callable[[_In], _Out], items: Iterable[_In]) -> Generator[_Out]:
    """`map` over files in threads, in order, at most `_AHEAD` files ahead of who asks."""
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="prompts")
    try:
        futures: deque[Future[_Out]] = deque()
        for item in items:
            futures.append(pool.submit(work, item))
            if len(futures) >= _AHEAD:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Source:
    """A file before its footer is read."""

    found: Found
    relpath: str
    format: Format


def _sources(spec: JobSpec) -> list[_Source]:
    expanded = [expand(path, **_server(spec)) for path in spec.prompts.path]
    kept: dict[str, tuple[Found, Format]] = {}
    for some in expanded:
        files = _of_format(some, spec.prompts.format) if some.is_folder else some.files
        for found in files:
            kept.setdefault(found.path, (found, _format(spec, found.path)))
    relpaths = relative_names([some.base for some in expanded], list(kept))
    return [
        _Source(found, name, format) for (found, format), name in zip(kept.values(), relpaths, strict=True)
    ]


def _of_format(folder: Expanded, format: str) -> list[Found]:
    wanted = "parquet" if format == "auto" else format
    files = [found for found in folder.files if _ending(found.path) == wanted]
    if not files:
        kinds = sorted({kind for found in folder.files if (kind := _ending(found.path))})
        hint = f"; set prompts.format to {' or '.join(kinds)}" if kinds else ""
        raise PromptsError(f"prompts.path: there is no {wanted} file in {folder.base}{hint}")
    return files


def _ending(path: str) -> Format | None:
    return ENDINGS.get(posixpath.splitext(path)[1].lower())


def _format(spec: JobSpec, path: str) -> Format:
    if spec.prompts.format != "auto":
        return spec.prompts.format
    ending = _ending(path)
    if ending is None:
        raise PromptsError(
            f"prompts.path: {path} ends in none of {', '.join(ENDINGS)}; set prompts.format, unpack it, or "
            "name only the files that hold prompts"
        )
    return ending


def _server(spec: JobSpec) -> dict[str, Any]:
    return {
        "endpoint_url": spec.prompts.endpoint_url or spec.output.endpoint_url,
        "region": spec.prompts.region or spec.output.region,
    }


def _scanned(spec: JobSpec, source: _Source, small: bool) -> tuple[Scan, str]:
    """(scan, etag). A local file's etag is a hash of its contents where that is cheap: a copy is the same."""
    path = source.found.path
    place = place_of(path, **_server(spec))
    try:
        scanned = scan(place, source.found, source.format)
        etag = source.found.etag
        if not is_url(path) and small:
            etag = _content_hash(place, path)
    except (StoreError, OSError) as error:
        raise PromptsError(f"prompts.path: {error}") from error
    return scanned, etag


def _content_hash(place: Place, path: str) -> str:
    sha = sha256()
    with place.open(path) as file:
        while chunk := file.read(1024**2):
            sha.update(chunk)
    return sha.hexdigest()


def _columns(spec: JobSpec, scanned: Scan, path: str, format: Format) -> dict[str, str]:
    """Which column of this file holds each of `COLUMNS` that it has."""
    names, columns = scanned.schema.names, {}
    for meaning in COLUMNS:
        mapped = spec.prompts.columns.get(meaning)  # type: ignore[call-overload]
        if mapped is not None and mapped not in names and format != "jsonl":
            raise PromptsError(
                f"{path} has no column {mapped!r}, which prompts.columns names for {meaning}; "
                f"it has {_listed(names)}"
            )
        if (mapped or meaning) in names:
            columns[meaning] = mapped or meaning
    if "row_id" not in columns and "row_id" not in spec.prompts.columns and "id" in names:
        columns["row_id"] = "id"
    if "prompt" not in columns and scanned.num_rows:
        wanted = spec.prompts.column("prompt")
        like = get_close_matches(wanted.lower(), [name.lower() for name in names], 1, 0.6)
        guess = next((name for name in names if name.lower() in like), None)
        guess = guess or next((name for name in _USUAL_PROMPTS if name in names), "caption")
        raise PromptsError(
            f"{path} has no column {wanted!r}, it has {_listed(names)}; "
            f"say which one holds the prompts, as in `columns: {{prompt: {guess}}}` under `prompts`"
        )
    if format == "parquet":
        for meaning, name in columns.items():
            _check_type(meaning, name, scanned.schema.field(name).type, path)
    return columns


def _check_type(meaning: str, name: str, type: pa.DataType, path: str) -> None:
    kinds = {
        "text": is_text(type),
        "whole numbers": pa.types.is_integer(type) or pa.types.is_decimal(type),
        "fractions": pa.types.is_floating(type),
    }
    allowed = _TYPES[meaning]
    if pa.types.is_null(type) or any(kinds[kind] for kind in allowed):
        return
    called = name if name == meaning else f"{name} ({meaning})"
    raise PromptsError(
        f"{path}: column {called} has type {type}, but must hold {allowed[0]}; convert it, or name another "
        "column under `prompts.columns`"
    )


def _passthrough(spec: JobSpec, scanned: Scan, columns: dict[str, str], path: str) -> pa.Schema:
    keep, used = spec.prompts.keep, set(columns.values())
    rest = [column for column in scanned.schema if column.name not in used]
    if keep is not None:
        missing = [name for name in keep if name not in scanned.schema.names and not scanned.mixed]
        if missing:
            raise PromptsError(f"{path} has no column {missing[0]!r}, which prompts.keep names")
        rest = [column for column in rest if column.name in keep]
    for column in rest:
        if column.name in OUTPUT_COLUMNS:
            raise PromptsError(
                f"{path}: column {column.name!r} would pass through to the output, which has one of "
                "that name itself; rename it, or name those to pass through, without it, in `prompts.keep`"
            )
        if column.name in scanned.mixed:
            raise PromptsError(scanned.mixed[column.name])
    metadata = scanned.schema.metadata  # what `datasets` knows of the columns: a column of pictures stays one
    return pa.schema([pa.field(column.name, column.type) for column in rest], metadata=metadata)


def _same_columns(
    known: pa.Schema | None, schema: pa.Schema, source: _Source, files: list[InputFile]
) -> pa.Schema:
    """The pass-through columns of all files so far. Null columns take any type; only jsonl may lack one."""
    if known is None:
        return schema
    if known.equals(schema):
        return known
    path, loose = source.found.path, source.format == "jsonl"
    types = {column.name: column.type for column in known}
    for name in types:
        if name not in schema.names and not loose:
            raise _other_columns(path, f"lacks the column {name!r}", files)
    for column in schema:
        if column.name not in types and not all(file.format == "jsonl" for file in files):
            raise _other_columns(path, f"has a column {column.name!r} more", files)
        before = types.get(column.name, pa.null())
        if loose and all(file.format == "jsonl" for file in files):
            types[column.name] = merged(before, column.type, f"{path} and others: column {column.name!r}")
        elif pa.types.is_null(before) or before.equals(column.type):
            types[column.name] = column.type
        elif not pa.types.is_null(column.type):
            raise _other_columns(
                path, f"has type {column.type} in its column {column.name!r}, not {before}", files
            )
    return pa.schema(list(types.items()), metadata=known.metadata)


def _other_columns(path: str, what: str, files: list[InputFile]) -> PromptsError:
    return PromptsError(
        f"{path} {what}, unlike {files[0].path}; make them alike, or name the columns to pass through in "
        "`prompts.keep`"
    )


def _writable(schema: pa.Schema, path: str) -> None:
    """Parquet cannot hold all types of Arrow; better known now than at the first part."""
    try:
        pq.write_table(schema.empty_table(), io.BytesIO())
    except (pa.ArrowException, OSError) as error:
        raise PromptsError(
            f"{path}: a column cannot pass through to the output: {error}; leave it out of `prompts.keep`"
        ) from error


def _distinct_stems(files: list[InputFile]) -> None:
    """Rows without a row_id are named after their file: two names alike would give two rows one name."""
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(_stem(file.relpath), file.path)
        if other != file.path:
            raise PromptsError(
                f"{other} and {file.path} differ only in their endings, which row_ids leave out; rename one"
            )


def _and_others(files: list[InputFile]) -> str:
    first, others = files[0].path, len(files) - 1
    return f"{first} and {others:,} other files have" if others else f"{first} has"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return (shown or "no columns") + (f" and {len(names) - 20} more" if len(names) > 20 else "")


# Reading: from a run of rows to samples


def read_shard(spec: JobSpec, file: InputFile, first_row: int, num_rows: int) -> ShardRows:
    """The rows [first_row, first_row + num_rows) of a file: each ends in `rows` or `rejects`.

    PromptsError where the file is damaged, gone, or not what it was when the job was planned; StoreError
    where it cannot be reached.
    """
    rows: list[Row] = []
    rejects: list[Reject] = []
    tables = []
    source = first_row
    for batch in _batches(spec, file, COLUMNS, file.passthrough, first_row, num_rows):
        for i in range(batch.num_rows):
            values = {meaning: column[i] for meaning, column in batch.values.items()}
            some_rows, some_rejects = samples(
                spec.seed, _default_id(file, source), source, values, batch.problems.get(i)
            )
            rows += some_rows
            rejects += some_rejects
            source += 1
        tables.append(batch.others)
    if not len(file.passthrough):
        passthrough = rows_without_columns(num_rows)
    else:
        passthrough = pa.concat_tables(tables) if tables else file.passthrough.empty_table()
    return ShardRows(rows, rejects, passthrough, first_row)


def _batches(
    spec: JobSpec,
    file: InputFile,
    meanings: Sequence[str],
    others: pa.Schema,
    first_row: int,
    num_rows: int,
) -> Iterator[Batch]:
    """The rows in batches, their values by meaning instead of by column name."""
    place = place_of(file.path, **_server(spec))
    columns = {meaning: name for meaning, name in file.columns if meaning in meanings}
    if not num_rows:
        return
    for batch in read(
        place,
        Found(file.path, file.size_bytes, file.etag),
        file.format,
        values=list(columns.values()),
        others=others,
        first_row=first_row,
        num_rows=num_rows,
        blocks=file.blocks,
        digest=file.footer_digest,
    ):
        values = {meaning: batch.values[name] for meaning, name in columns.items()}
        yield Batch(values, batch.others, batch.problems)


def _default_id(file: InputFile, source: int) -> str:
    return f"{_stem(file.relpath)}:{source}"


def _stem(relpath: str) -> str:
    stem, ending = posixpath.splitext(relpath)
    return stem if ending.lower() in ENDINGS else relpath


# Identities: which samples the job owes


def expected_row_ids(spec: JobSpec, plan: JobPlan) -> Iterator[tuple[int, list[str]]]:
    """(shard, row_ids of all its samples) for every shard in order: those in `data` and in `rejects` alike.

    Streams the row_id and num_images columns alone; of tables without these it reads nothing.
    """
    shard = 0
    for file in plan.files:
        ids: list[str] = []  # of the shard in hand
        row = 0
        for some, counts in _named_rows(spec, file):
            ends = list(accumulate(counts)) if counts else range(1, len(some) + 1)
            done, taken = 0, 0  # rows and ids of this batch that are in shards
            while done < len(ends):
                n = min(len(ends) - done, plan.shard_rows - row % plan.shard_rows)
                done, row = done + n, row + n
                ids += some[taken : ends[done - 1]]
                taken = ends[done - 1]
                if row % plan.shard_rows == 0 or row == file.num_rows:
                    yield shard, ids
                    shard, ids = shard + 1, []


def _named_rows(spec: JobSpec, file: InputFile) -> Iterator[tuple[list[str], list[int] | None]]:
    """The names of all samples of a file in batches: (names, how many each row has); None: each has one."""
    if not {"row_id", "num_images"} & set(dict(file.columns)):
        stem = _stem(file.relpath)
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
    """[samples] int64, in no order that means anything: `hash` of each name in a file."""
    names = [np.fromiter(map(hash, some), np.int64, len(some)) for some, _ in _named_rows(spec, file)]
    return np.concatenate([np.empty(0, np.int64), *names])


def check_row_ids(spec: JobSpec, plan: JobPlan) -> None:
    """PromptsError where two samples of the job have one name. For a driver, before any GPU work.

    Reads files in parallel. Memory: 8 bytes a sample, and twice that for a moment.
    """
    if not any("row_id" in dict(file.columns) for file in plan.files):
        return  # named after file and index: distinct by construction
    with closing(_in_threads(lambda i: _hashes(spec, plan.files[i]), range(len(plan.files)))) as some:
        hashes = np.concatenate([*some])
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not twice:
        return
    seen: dict[str, tuple[str, int]] = {}
    for file in plan.files:
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
                        f"of {file.path} (counted from 0); make row_ids unique, or leave the column out"
                    )
                seen[row_id] = (file.path, source)
