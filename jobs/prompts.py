"""The prompt table: which files it is made of, and its rows one by one. Knows no models and no output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import ClassVar, Literal, overload

import numpy as np
import pyarrow as pa

from jobs.rows import Reject, Row

Format = Literal["parquet", "csv", "jsonl"]


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
    """What the store gives for the contents; on local disk made of the modification time and the size."""
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
        return InputFile(**{**row, "blocks": tuple(row["blocks"])}, passthrough=self.passthrough)

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
    """Input rows that cannot be made, in source order."""
    passthrough: pa.Table
    """All the input rows' pass-through columns: take `Row.source - first_row`."""
    first_row: int
    """Index in the file of the first input row."""

    @property
    def num_rows(self) -> int:
        """Input rows: every one is in `rows` or in `rejects`."""
        return self.passthrough.num_rows
