"""TODO: jobs/store/s3_upload.py."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from overtone.jobs.errors import StoreError

MAX_PARTS = 10_000
PART_THREADS = 4
_CHUNK_BYTES = 1024**2


class UploadGone(StoreError):
    """The multipart upload was completed or aborted, by us or by somebody who cleaned up."""


class Body:
    """The bytes of an object, in memory or in a file."""

    def __init__(self, data: bytes | Path) -> None:
        self._data = data
        try:
            self.size = data.stat().st_size if isinstance(data, Path) else len(data)
        except OSError as error:
            raise StoreError(f"{error.filename} cannot be read: {error.strerror}") from error

    @contextmanager
    def opened(self) -> Iterator[bytes | BinaryIO]:
        if isinstance(self._data, Path):
            with self._data.open("rb") as file:
                yield file
        else:
            yield self._data

    def piece(self, start: int, length: int) -> bytes:
        if not isinstance(self._data, Path):
            return self._data[start : start + length]
        with self._data.open("rb") as file:
            file.seek(start)
            return file.read(length)

    @cached_property
    def crc32(self) -> int:
        if not isinstance(self._data, Path):
            return zlib.crc32(self._data)
        crc = 0
        with self._data.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                crc = zlib.crc32(chunk, crc)
        return crc
