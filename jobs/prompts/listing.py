"""Planning of the prompt table: from a spec's paths to a list of files. Knows no rows and no models."""

from __future__ import annotations

import os
import posixpath
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from typing import TypeVar

import pyarrow as pa

from overtone.jobs.errors import PromptsError, StoreError
from overtone.jobs.prompts.column_names import folder_values, with_folders
from overtone.jobs.prompts.columns import (
    check_mapping,
    named_columns,
    passthrough,
    same_columns,
    writable,
)
from overtone.jobs.prompts.globs import Expanded, expand, relative_names
from overtone.jobs.prompts.input_file import FileList, InputFile, Source, server_of, stem_of, style_of
from overtone.jobs.prompts.places import Found, Place, place_of
from overtone.jobs.prompts.scan import ENDINGS, Format, Scan
from overtone.jobs.prompts.table import scan
from overtone.jobs.spec import JobSpec, is_url

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_THREADS = 32  # that read files at once: most wait for an answer
_AHEAD = 4 * _THREADS
_HASHED_BYTES = 256 * 1024**2
_COMPRESSED = {".gz", ".bz2", ".zst", ".zstd", ".lz4", ".xz"}


def list_files(spec: JobSpec) -> FileList:
    """The job's input files. Of a Parquet file only the footer is read, csv and jsonl files are read once,
    and local files are hashed where all of them together are small.

    PromptsError, which names the file and the column, where a file is missing, unreadable or damaged; where
    it has no prompts, or a column of another type than its meaning asks for; and where it has a column that
    the output has itself, or one of a type that does not go together with the other files'.
    """
    sources = _sources(spec)
    limit = spec.prompts.limit
    left = limit if limit is not None else sys.maxsize
    small = sum(source.found.size_bytes for source in sources) <= _HASHED_BYTES
    files: list[InputFile] = []
    schema: pa.Schema | None = None
    names: set[str] = set()
    all_folders: set[str] = set()
    first_path = ""
    with closing(in_threads(lambda source: _scanned(spec, source, small), sources)) as scans:
        for source, (scanned, etag) in zip(sources, scans, strict=True):
            path = source.found.path
            folders = folder_values(path, source.relpath)
            scanned = replace(scanned, schema=with_folders(scanned.schema, folders))
            names |= set(scanned.schema.names)
            all_folders |= set(folders)
            columns = named_columns(spec, scanned, path, source.format)
            if scanned.num_rows:  # what a file without rows says of its columns means nothing
                own = passthrough(spec, scanned, columns, path, folders)
                schema = own if schema is None else same_columns(schema, own, path, first_path, all_folders)
                first_path = first_path or path
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
                    passthrough=schema or pa.schema([]),
                    columns=tuple(columns.items()),
                )
            )
            left -= files[-1].num_rows
            if not left:
                break
    if schema is None:
        raise PromptsError(f"{_and_others(files)} no rows; there is nothing to make")
    if not any(file.format == "jsonl" for file in files):  # of which a key may be in no row
        check_mapping(spec, names, files[0].path, len(files))
    writable(schema, files[0].path)
    _distinct_stems(files)
    return FileList.of(files, schema)


def in_threads(work: Callable[[_In], _Out], items: Iterable[_In]) -> Generator[_Out]:
    """`map` over files in threads and in order, at most `_AHEAD` files ahead of the consumer."""
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


def _sources(spec: JobSpec) -> list[Source]:
    expanded = [expand(path, **server_of(spec)) for path in spec.prompts.path]
    kept: dict[str, tuple[Found, Format]] = {}
    for some in expanded:
        _check_apart(spec, some)
        files = _of_format(some, spec.prompts.format) if some.is_folder else some.files
        for found in files:
            kept.setdefault(found.path, (found, _format(spec, found.path)))
    relpaths = relative_names([some.base for some in expanded], list(kept))
    return [
        Source(found, name, format) for (found, format), name in zip(kept.values(), relpaths, strict=True)
    ]


def _check_apart(spec: JobSpec, prompts: Expanded) -> None:
    """PromptsError where the job's own tables would be among its prompts: once it has begun, it would be
    another job, which nothing could go on with."""
    output = spec.output.path if is_url(spec.output.path) else os.path.abspath(spec.output.path)
    same_server = spec.prompts.endpoint_url in (None, spec.output.endpoint_url)
    skipped = prompts.is_folder and spec.prompts.format not in ("auto", "parquet")
    tables = [f"{output.rstrip('/')}/timings/part-00000.parquet"]
    if spec.output.format == "parquet":
        tables.append(f"{output.rstrip('/')}/data/train-00000-of-00001.parquet")
    if same_server and not skipped and any(map(prompts.takes, tables)):
        raise PromptsError(
            f"output.path: the tables that the job writes into {output} would be read as prompts from "
            f"{prompts.base}; choose an `output` elsewhere, or name the prompt files by a glob such as "
            f"{prompts.base.rstrip('/')}/*.parquet"
        )


def _of_format(folder: Expanded, format: str) -> list[Found]:
    wanted = "parquet" if format == "auto" else format
    files = [found for found in folder.files if _ending(found.path) == wanted]
    if not files and format != "auto":  # what its names do not say, the spec does
        files = [found for found in folder.files if _ending(found.path) is None]
    paths = {found.path for found in files}
    for found in files:
        stem, ending = posixpath.splitext(found.path)
        if ending.lower() in _COMPRESSED and stem in paths:
            raise PromptsError(
                f"prompts.path: {stem} and {found.path} are in one folder, and both would be read; remove "
                "one, or name the files that hold prompts"
            )
    if not files:
        kinds = sorted({kind for found in folder.files if (kind := _ending(found.path))})
        hint = f"; set prompts.format to {' or '.join(kinds)}" if kinds else ""
        raise PromptsError(f"prompts.path: there is no {wanted} file in {folder.base}{hint}")
    return files


def _ending(path: str) -> Format | None:
    """The format that a name says, whether the file is compressed or not; a Parquet file never is as a
    whole."""
    stem, ending = posixpath.splitext(path)
    if ending.lower() in _COMPRESSED:
        inner = ENDINGS.get(posixpath.splitext(stem)[1].lower())
        return None if inner == "parquet" else inner
    return ENDINGS.get(ending.lower())


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


def _scanned(spec: JobSpec, source: Source, small: bool) -> tuple[Scan, str]:
    """(scan, etag). Where all files are `small`, a local file's etag is a hash of its contents, so that a
    copy is the same input."""
    path = source.found.path
    place = place_of(path, **server_of(spec))
    try:
        scanned = scan(place, source.found, source.format, style_of(spec))
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


def _distinct_stems(files: list[InputFile]) -> None:
    """PromptsError where two files have one stem: rows without a row_id are named after their file, so two
    rows would have one name."""
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(stem_of(file.relpath), file.path)
        if other != file.path:
            raise PromptsError(
                f"{other} and {file.path} differ only in their endings, which row_ids leave out; rename one"
            )


def _and_others(files: list[InputFile]) -> str:
    first, others = files[0].path, len(files) - 1
    return f"{first} and {others:,} other files have" if others else f"{first} has"
