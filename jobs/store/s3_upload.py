"""Sends objects to S3, in one request or in several, and settles whose they are. Knows HTTP's failures, and
nothing of what is in an object.

Every request is sent once by boto3 (its own retries are off) and tried again here or in `s3_client`, because
what may be tried again depends on what is being done: an answer lost on the way leaves open whether an object
was created, and only the attempt stored beside the object can tell.

    answer to a create             what it means                        what follows
    200                            created                              ours
    412                            an object is there                   its attempt says whose
    409                            another writer is at it              its attempt says whose; absent: again
    404 NoSuchUpload               completed, or aborted by a sweeper   the attempt says whose; absent: again
    5xx, 429, timeout, cut line    unknown                              again; last, the attempt says whose
    anything else                  refused                              StoreError, at once
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from overtone.jobs.errors import StoreError, StoreUnsafe
from overtone.jobs.store.s3_client import (
    ATTEMPT_METADATA,
    CAUGHT,
    S3Client,
    UploadGone,
    error_code,
    http_status,
)

_log = logging.getLogger(__name__)
_CONDITION_UNKNOWN = {"NotImplemented", "InvalidArgument", "InvalidRequest"}
_MAX_PARTS = 10_000
_PART_THREADS = 4
_CHUNK_BYTES = 1024**2


def put_whole(
    s3: S3Client,
    key: str,
    body: Body,
    attempt: str | None,
    content_type: str | None,
    *,
    conditional: bool | None = None,
) -> bool:
    """One PutObject; with an attempt, on the condition (unless `conditional` is False) that there is no
    object. True: the object is ours. False: another's was first."""
    name = s3.name(key)
    conditional = attempt is not None if conditional is None else conditional

    def send(client: Any) -> None:
        extra = _properties(attempt, content_type) | _condition(conditional)
        if _checksums(client):
            extra["ChecksumCRC32"] = _base64(body.crc32)
        with body.opened() as stream:
            client.put_object(Bucket=s3.bucket, Key=name, Body=stream, **extra)

    if not conditional:
        s3.retried(key, send, size_bytes=body.size)
        return True
    assert attempt is not None
    with s3.watched(key, body.size):
        ours = _settled(s3, key, attempt, send, start_again=False)
    assert ours is not None
    return ours


def put_parts(
    s3: S3Client,
    key: str,
    body: Body,
    attempt: str | None,
    content_type: str | None,
    *,
    conditional: bool | None = None,
) -> bool:
    """The same as a multipart upload, whose last request carries the condition."""
    conditional = attempt is not None if conditional is None else conditional
    for wait_s in s3.waits():
        ours = _upload(s3, key, body, attempt, content_type, conditional)
        if ours is not None:
            return ours
        if wait_s is not None:
            time.sleep(wait_s)
    raise StoreError(
        f"{s3.config.where(key)}: {s3.config.retries + 1} uploads were each interrupted by another writer "
        "or a clean-up of unfinished uploads; see who else writes there"
    )


def _settled(
    s3: S3Client, key: str, attempt: str, send: Callable[[Any], None], *, start_again: bool
) -> bool | None:
    """Sends a conditional create until it is certain whose object is there: ours (True) or not (False).

    None, with `start_again` only: there is none, and this request cannot make one any more.
    """
    problem: Exception | None = None
    for wait_s in s3.waits():
        try:
            s3.sent(send)
            return True
        except CAUGHT as error:
            problem = error
        status = http_status(problem)
        lost = status == 409 or error_code(problem) == "NoSuchUpload"
        may_pass = s3.may_pass(problem)
        if lost or status == 412 or (wait_s is None and may_pass):
            there = s3.head(key)
            if there is not None:
                return there.attempt == attempt
            if lost and start_again:
                return None
        elif status == 501 or error_code(problem) in _CONDITION_UNKNOWN:
            raise StoreUnsafe(
                f"{s3.config.where(key)}: the store cannot create an object only if it is absent "
                f"({s3.text(problem)}); use another, or accept that two workers may both write one "
                "shard with `output.unsafe_overwrite: true`"
            )
        elif not may_pass:
            break
        if wait_s is not None:
            time.sleep(wait_s)
    raise s3.refusal(key, problem)


def _upload(
    s3: S3Client, key: str, body: Body, attempt: str | None, content_type: str | None, conditional: bool
) -> bool | None:
    """One multipart upload; aborted unless it became the object. None: it was lost, start again."""
    name = s3.name(key)
    where = {"Bucket": s3.bucket, "Key": name}
    properties = _properties(attempt, content_type)

    def begin(client: Any) -> str:
        kind = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"} if _checksums(client) else {}
        return client.create_multipart_upload(**where, **properties, **kind)["UploadId"]

    upload = {**where, "UploadId": s3.retried(key, begin)}
    ours = None
    try:
        parts = _upload_parts(s3, key, body, upload)

        def complete(client: Any) -> None:
            whole = _condition(conditional)
            if _checksums(client):
                whole |= {"ChecksumCRC32": _base64(body.crc32), "ChecksumType": "FULL_OBJECT"}
            client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **whole)

        if attempt is None:
            s3.retried(key, complete)
            ours = True
        else:
            with s3.watched(key):
                ours = _settled(s3, key, attempt, complete, start_again=True)
        return ours
    except UploadGone:
        return None
    finally:
        if ours is not True:
            abort(s3, name, upload["UploadId"])


def _upload_parts(s3: S3Client, key: str, body: Body, upload: dict[str, str]) -> Sequence[dict[str, Any]]:
    """Uploads the pieces from a few threads; [{PartNumber, ETag, ChecksumCRC32}] in order."""
    part_bytes = max(s3.config.part_bytes, math.ceil(body.size / _MAX_PARTS))
    starts = range(0, max(body.size, 1), part_bytes)

    def send(number: int, start: int) -> dict[str, Any]:
        piece = body.piece(start, part_bytes)

        def send_piece(client: Any) -> dict[str, Any]:
            part: dict[str, Any] = {"PartNumber": number}
            if _checksums(client):
                part["ChecksumCRC32"] = _base64(zlib.crc32(piece))
            return {**part, "ETag": client.upload_part(**upload, **part, Body=piece)["ETag"]}

        return s3.retried(key, send_piece, size_bytes=len(piece))

    with ThreadPoolExecutor(min(_PART_THREADS, len(starts)), "upload") as pool:
        futures = [pool.submit(send, *numbered) for numbered in enumerate(starts, 1)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)  # waits for those under way: an abort must come after them
        failed = [future for future in futures if not future.cancelled() and future.exception()]
        return [future.result() for future in failed or futures]


def abort(s3: S3Client, name: str, upload_id: str) -> None:
    """Ends a multipart upload without an object. A failure is only logged: the next sweep aborts it again."""
    try:
        s3.retried(
            name,
            lambda client: client.abort_multipart_upload(Bucket=s3.bucket, Key=name, UploadId=upload_id),
        )
    except UploadGone:
        pass
    except StoreError as error:
        _log.warning("an unfinished upload stays behind until the next sweep: %s", error)


def _properties(attempt: str | None, content_type: str | None) -> dict[str, Any]:
    properties: dict[str, Any] = {"ContentType": content_type or "application/octet-stream"}
    if attempt is not None:
        properties["Metadata"] = {ATTEMPT_METADATA: attempt}
    return properties


def _condition(conditional: bool) -> dict[str, Any]:
    return {"IfNoneMatch": "*"} if conditional else {}


def _checksums(client: Any) -> bool:
    """Whether to send checksums: yes, unless boto3 was set to
    AWS_REQUEST_CHECKSUM_CALCULATION=when_required."""
    return client.meta.config.request_checksum_calculation != "when_required"


def _base64(crc32: int) -> str:
    return b64encode(crc32.to_bytes(4, "big")).decode()


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
