"""A store under an S3 prefix, on AWS or any server that speaks S3. Knows which requests keep the
promises of `Store`; `s3_client` sends them, and `s3_upload` settles whose object a create made.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from botocore import exceptions as boto

from overtone.jobs.errors import StoreError, StoreUnsafe
from overtone.jobs.store.base import (
    NoSuchObject,
    ObjectInfo,
    Store,
    StoreConfig,
    check_attempt,
    check_prefix,
)
from overtone.jobs.store.s3_client import S3Client, etag_of, http_status, modified_s
from overtone.jobs.store.s3_upload import Body, abort, put_parts, put_whole

_MAX_SINGLE_BYTES = 5 * 1024**3  # one PutObject, and one part of a multipart upload
_READ_AHEAD_BYTES = 64 * 1024
_SWEEP_AFTER_S = 86_400.0  # no upload of a part takes a day


class S3Store(Store):
    """A bucket, or a prefix in one."""

    def __init__(self, config: StoreConfig) -> None:
        super().__init__(config)
        self._s3 = S3Client(config)

    def read(self, key: str, start: int | None = None, length: int | None = None) -> bytes:
        return self._get(key, start or 0, length)[0]

    def open(self, key: str) -> BinaryIO:
        info = self.head(key)
        if info is None:
            raise NoSuchObject(f"{self.where(key)} does not exist")

        def fetch(start: int, length: int) -> bytes:
            data, etag = self._get(key, start, length)
            if etag != info.etag or len(data) != length:
                raise StoreError(
                    f"{self.where(key)} was replaced while it was being read; run again, and let nobody "
                    "write there meanwhile"
                )
            return data

        return io.BufferedReader(Ranges(fetch, info.size_bytes), _READ_AHEAD_BYTES)

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        start = len(self._s3.prefix)
        request: dict[str, Any] = {
            "Bucket": self._s3.bucket,
            "Prefix": self._s3.prefix + check_prefix(prefix, foreign=self.config.foreign_keys),
        }
        if after:
            request["StartAfter"] = self._s3.prefix + after
        while True:
            page = self._s3.retried(prefix, lambda client: client.list_objects_v2(**request))
            for entry in page.get("Contents", ()):
                key = entry["Key"][start:]
                if key and not key.endswith("/"):  # consoles mark folders by empty objects
                    yield ObjectInfo(key, entry["Size"], etag_of(entry), None, modified_s(entry))
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def head(self, key: str) -> ObjectInfo | None:
        return self._s3.head(key)

    def create(self, key: str, data: bytes | Path, *, attempt: str, content_type: str | None = None) -> bool:
        check_attempt(attempt)
        body = Body(data)
        found = self.config.guarantees
        single, multipart = (found.single, found.multipart) if found else (True, True)
        limit = found.max_single_bytes if found else _MAX_SINGLE_BYTES
        if not (single or multipart):
            return self._create_unsafely(key, body, attempt, content_type)
        in_parts = multipart and (not single or body.size > min(limit, 2 * self.config.part_bytes))
        if body.size > limit and not in_parts:
            raise StoreError(
                f"{self.where(key)}: {body.size} bytes do not fit into the one request ({limit} bytes at "
                "most) that this store can make safely; make fewer rows a shard"
            )
        if in_parts:
            there = self.head(key)  # cheap beside an upload for nothing
            if there is not None:
                return there.attempt == attempt
            return put_parts(self._s3, key, body, attempt, content_type)
        return put_whole(self._s3, key, body, attempt, content_type)

    def put(
        self, key: str, data: bytes | Path, *, content_type: str | None = None, durable: bool = True
    ) -> None:
        body = Body(data)
        put = put_parts if body.size > 2 * self.config.part_bytes else put_whole
        put(self._s3, key, body, None, content_type)

    def delete(self, key: str) -> None:
        name = self._s3.name(key)
        self._s3.retried(key, lambda client: client.delete_object(Bucket=self._s3.bucket, Key=name))

    def sweep(self, *, older_than_s: float | None = None) -> int:
        oldest_s = _SWEEP_AFTER_S if older_than_s is None else older_than_s
        request: dict[str, Any] = {"Bucket": self._s3.bucket, "Prefix": self._s3.prefix}
        swept = 0
        while True:
            page = self._s3.retried("", lambda client: client.list_multipart_uploads(**request))
            for upload in page.get("Uploads", ()):
                if (datetime.now(UTC) - upload["Initiated"]).total_seconds() >= oldest_s:
                    abort(self._s3, upload["Key"], upload["UploadId"])
                    swept += 1
            if not page.get("IsTruncated"):
                return swept
            request["KeyMarker"] = page["NextKeyMarker"]
            request["UploadIdMarker"] = page["NextUploadIdMarker"]

    def probe_limits(self) -> tuple[bool, int]:
        return True, _MAX_SINGLE_BYTES

    def create_as(self, key: str, data: bytes, *, attempt: str, multipart: bool) -> bool:
        create = put_parts if multipart else put_whole
        return create(self._s3, key, Body(data), attempt, None)

    def _get(self, key: str, start: int, length: int | None) -> tuple[bytes, str]:
        """(bytes, etag) of a range as `read` has it; an answer cut short is asked for again."""
        request: dict[str, Any] = {"Bucket": self._s3.bucket, "Key": self._s3.name(key)}
        if length == 0:
            start, length, empty = 0, 1, True  # HTTP has no empty range
        else:
            empty = False
        if start < 0:
            request["Range"] = f"bytes={start}"
        elif start or length is not None:
            request["Range"] = f"bytes={start}-" + ("" if length is None else f"{start + length - 1}")

        def get(client: Any) -> tuple[bytes, str]:
            try:
                answer = client.get_object(**request)
                self._s3.answered()
                data = answer["Body"].read()
            except boto.ClientError as error:
                if http_status(error) == 416:  # the range starts behind the end
                    return b"", ""
                raise
            if (
                answer["ResponseMetadata"]["HTTPStatusCode"] != 206
            ):  # none asked for, or the server ignored it
                data = data[start:]
            return data if length is None else data[:length], etag_of(answer)

        data, etag = self._s3.retried(key, get)
        return (b"" if empty else data), etag

    def _create_unsafely(self, key: str, body: Body, attempt: str, content_type: str | None) -> bool:
        """Look, then put: two writers may both believe that they won."""
        if not self.config.unsafe_overwrite:
            raise StoreUnsafe(
                f"{self.url} does not refuse to create an object that exists; use another store, or accept "
                "that two workers may both write one shard with `output.unsafe_overwrite: true`"
            )
        there = self.head(key)
        if there is not None:
            return there.attempt == attempt
        put = put_parts if body.size > 2 * self.config.part_bytes else put_whole
        return put(self._s3, key, body, attempt, content_type, conditional=False)


class Ranges(io.RawIOBase):
    """A file of `size` bytes over `fetch(start, length)`, which returns exactly those bytes. Fetches a little
    more than is asked for, because small reads follow each other."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._fetch, self._size = fetch, size
        self._at = 0
        self._fetched, self._fetched_at = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        parts = []
        while part := self._next(self._size):
            parts.append(part)
        return b"".join(parts)

    def _next(self, length: int) -> bytes:
        """Up to `length` bytes from here on, from what is already fetched if possible; b"" at the end."""
        if self._at >= self._size or length <= 0:
            return b""
        skip = self._at - self._fetched_at
        if not 0 <= skip < len(self._fetched):
            self._fetched = self._fetch(self._at, min(length + _READ_AHEAD_BYTES, self._size - self._at))
            self._fetched_at, skip = self._at, 0
        data = self._fetched[skip : skip + length]
        self._at += len(data)
        return data
