"""The input files of a job, as planning found them, one by one and as a list. Reads nothing."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar, overload

import numpy as np
import pyarrow as pa

from overtone.jobs.prompts.places import Found
from overtone.jobs.prompts.scan import Format, TextStyle
from overtone.jobs.spec import JobSpec

_LEFT_OUT = (".parquet", ".pq", ".csv", ".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the prompt table, as it was when the job was planned. Small, and pickles."""

    path: str
    """Absolute path or URL; never with credentials."""
    relpath: str
    """Relative to the deepest folder that holds all that `prompts.path` names. The row_ids and the
    fingerprint use this path, so that a job can move with its inputs."""
    format: Format
    size_bytes: int
    etag: str
    """What the store reports for the contents. On local disk it is a hash of the contents where all files
    together are small (256 MiB), so that a copy is the same input; otherwise it is made of the modification
    time and the size."""
    footer_digest: str
    """Hash of the Parquet footer; of the whole text for csv and jsonl."""
    num_rows: int
    """The job uses this many rows from the beginning of the file: all of them, unless `prompts.limit`
    cuts."""
    file_rows: int
    """Rows in the file."""
    num_row_groups: int
    """Of Parquet; 0 for csv and jsonl."""
    blocks: tuple[int, ...]
    """Where in a csv or jsonl file, in bytes of its text, each block of rows begins; empty for Parquet."""
    passthrough: pa.Schema
    """Columns that pass through to the output, the same for all files, under their output names."""
    columns: tuple[tuple[str, str], ...] = ()
    """(one of `COLUMNS`, the column of this file that holds it), for those that it has."""


class FileList(Sequence[InputFile]):
    """The input files in order, kept as a table: 100,000 of them take tens of megabytes."""

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

    def gives(self, *meanings: str) -> bool:
        """Whether any file has a column of one of these meanings."""
        keys = (chunk.keys.unique() for chunk in self.table["columns"].chunks)
        return any(not set(meanings).isdisjoint(some.to_pylist()) for some in keys)

    def identities(self) -> dict[str, tuple]:
        """The values that would show that a file changed, by relpath and in order."""
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
class Source:
    """A file before its footer is read."""

    found: Found
    relpath: str
    format: Format


def server_of(spec: JobSpec) -> dict[str, Any]:
    """The server and region of the prompt files, as keyword arguments of `place_of`."""
    return {
        "endpoint_url": spec.prompts.endpoint_url or spec.output.endpoint_url,
        "region": spec.prompts.region or spec.output.region,
    }


def style_of(spec: JobSpec) -> TextStyle:
    """How the csv and jsonl files of a job are written."""
    encoding, delimiter = (
        None if value == "auto" else value for value in (spec.prompts.encoding, spec.prompts.delimiter)
    )
    return TextStyle(encoding, delimiter, spec.prompts.column("prompt") or "prompt")


def stem_of(relpath: str) -> str:
    """The path without a known ending; rows without a row_id are named after it. That of a compressed file
    stays: the names of rows never change."""
    stem, ending = posixpath.splitext(relpath)
    return stem if ending.lower() in _LEFT_OUT else relpath
