"""A store under an S3 prefix, on AWS or any server that speaks S3. Knows HTTP's failures, nothing of parts.

Every request is sent once by boto3 (its own retries are off) and tried again here, because what may be tried
again depends on what is being done: an answer lost on the way leaves open whether an object was created, and
only the attempt stored beside the object can tell.

    answer to a create             what it means                        what follows
    200                            created                              ours
    412                            an object is there                   its attempt says whose
    409                            another writer is at it              its attempt says whose; absent: again
    404 NoSuchUpload               completed, or aborted by a sweeper   the attempt says whose; absent: again
    5xx, 429, timeout, cut line    unknown                              again; last, the attempt says whose
    anything else                  refused                              StoreError, at once
"""

from __future__ import annotations

import io
import logging
import math
import os
import random
import re
import threading
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

import boto3
from botocore import exceptions as boto
from botocore.config import Config

from overtone.jobs.errors import StoreError, StoreUnsafe, UserError
from overtone.jobs.store.base import (
    NoSuchObject,
    ObjectInfo,
    Store,
    StoreConfig,
    check_attempt,
    check_key,
    check_prefix,
)
from overtone.jobs.store.s3_client import ADVICE, CAUGHT, CONDITION_UNKNOWN, error_code, http_status, passing
from overtone.jobs.store.s3_upload import MAX_PARTS, PART_THREADS, Body, UploadGone

_T = TypeVar("_T")

_log = logging.getLogger(__name__)
MAX_SINGLE_BYTES = 5 * 1024**3  # one PutObject, and one part of a multipart upload
_MAX_KEY_BYTES = 1024
_ATTEMPT_METADATA = "overtone-attempt"
_READ_AHEAD_BYTES = 64 * 1024
_MAX_WAIT_S = 10.0
_SWEEP_AFTER_S = 86_400.0  # no upload of a part takes a day


class S3Store(Store):
    """A bucket, or a prefix in one. The client is made on first use, once a process."""

    def __init__(self, config: StoreConfig) -> None:
        super().__init__(config)
        rest = config.url.removeprefix("s3://")
        # An access point's ARN has one "/" of its own.
        match = re.fullmatch(r"(arn:[^/]*:accesspoint/[^/]+|[^/]+)(?:/(.*))?", rest)
        assert match, config.url
        self._bucket, self._prefix = match[1], f"{match[2]}/" if match[2] else ""
        self._lock = threading.Lock()
        self._made: tuple[int, Any, Any] | None = None  # (process id, session, client)

    # Reading

    def read(self, key: str, start: int | None = None, length: int | None = None) -> bytes:
        return self._get(key, start or 0, length)[0]

    def open(self, key: str) -> BinaryIO:
        info = self.head(key)
        if info is None:
            raise NoSuchObject(f"{self.where(key)} does not exist")
        return io.BufferedReader(_Ranges(self, info), _READ_AHEAD_BYTES)

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        asked: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix + check_prefix(prefix)}
        if after:
            asked["StartAfter"] = self._prefix + after
        while True:
            page = self._retried(prefix, lambda client: client.list_objects_v2(**asked))
            for found in page.get("Contents", ()):
                key = found["Key"][len(self._prefix) :]
                if key and not key.endswith("/"):  # consoles mark folders by empty objects
                    yield ObjectInfo(key, found["Size"], _etag(found), None, _moment(found))
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def head(self, key: str) -> ObjectInfo | None:
        name = self._name(key)

        def ask(client: Any) -> ObjectInfo | None:
            try:
                found = client.head_object(Bucket=self._bucket, Key=name)
            except boto.ClientError as error:
                if http_status(error) == 404:
                    return None
                raise
            # Some servers change the case of metadata names.
            metadata = {name.lower(): value for name, value in found.get("Metadata", {}).items()}
            attempt = metadata.get(_ATTEMPT_METADATA)
            return ObjectInfo(key, found["ContentLength"], _etag(found), attempt, _moment(found))

        return self._retried(key, ask)

    def _get(self, key: str, start: int, length: int | None) -> tuple[bytes, str]:
        """(bytes, etag) of a range as `read` has it; an answer cut short is asked for again."""
        asked: dict[str, Any] = {"Bucket": self._bucket, "Key": self._name(key)}
        if length == 0:
            start, length, empty = 0, 1, True  # HTTP has no empty range
        else:
            empty = False
        if start < 0:
            asked["Range"] = f"bytes={start}"
        elif start or length is not None:
            asked["Range"] = f"bytes={start}-" + ("" if length is None else f"{start + length - 1}")

        def get(client: Any) -> tuple[bytes, str]:
            try:
                found = client.get_object(**asked)
                data = found["Body"].read()
            except boto.ClientError as error:
                if http_status(error) == 416:  # the range starts behind the end
                    return b"", ""
                raise
            if found["ResponseMetadata"]["HTTPStatusCode"] != 206:  # no range asked, or the server ignored it
                data = data[start:]
            return data if length is None else data[:length], _etag(found)

        data, etag = self._retried(key, get)
        return (b"" if empty else data), etag

    # Writing

    def create(self, key: str, data: bytes | Path, *, attempt: str, content_type: str | None = None) -> bool:
        check_attempt(attempt)
        body = Body(data)
        found = self.config.guarantees
        single, multipart = (found.single, found.multipart) if found else (True, True)
        limit = found.max_single_bytes if found else MAX_SINGLE_BYTES
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
            return there.attempt == attempt if there else self._put_parts(key, body, attempt, content_type)
        return self._put_whole(key, body, attempt, content_type)

    def put(
        self, key: str, data: bytes | Path, *, content_type: str | None = None, durable: bool = True
    ) -> None:
        body = Body(data)
        if body.size > 2 * self.config.part_bytes:
            self._put_parts(key, body, None, content_type)
        else:
            self._put_whole(key, body, None, content_type)

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._retried(key, lambda client: client.delete_object(Bucket=self._bucket, Key=name))

    def sweep(self, *, older_than_s: float | None = None) -> int:
        oldest_s = _SWEEP_AFTER_S if older_than_s is None else older_than_s
        asked: dict[str, Any] = {"Bucket": self._bucket, "Prefix": self._prefix}
        swept = 0
        while True:
            page = self._retried("", lambda client: client.list_multipart_uploads(**asked))
            for upload in page.get("Uploads", ()):
                if (datetime.now(UTC) - upload["Initiated"]).total_seconds() >= oldest_s:
                    self._abort(upload["Key"], upload["UploadId"])
                    swept += 1
            if not page.get("IsTruncated"):
                return swept
            asked["KeyMarker"] = page["NextKeyMarker"]
            asked["UploadIdMarker"] = page["NextUploadIdMarker"]

    def _probe_limits(self) -> tuple[bool, int]:
        return True, MAX_SINGLE_BYTES

    def _create_as(self, key: str, data: bytes, *, attempt: str, multipart: bool) -> bool:
        create = self._put_parts if multipart else self._put_whole
        return create(key, Body(data), attempt, None)

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
        put = self._put_parts if body.size > 2 * self.config.part_bytes else self._put_whole
        return put(key, body, attempt, content_type, conditional=False)

    def _put_whole(
        self,
        key: str,
        body: Body,
        attempt: str | None,
        content_type: str | None,
        *,
        conditional: bool | None = None,
    ) -> bool:
        """One PutObject; with an attempt, on the condition (unless told otherwise) that there is no
        object."""
        name = self._name(key)
        conditional = attempt is not None if conditional is None else conditional

        def send(client: Any) -> None:
            extra = _properties(attempt, content_type) | _condition(conditional)
            if _checksums(client):
                extra["ChecksumCRC32"] = _base64(body.crc32)
            with body.opened() as stream:
                client.put_object(Bucket=self._bucket, Key=name, Body=stream, **extra)

        if not conditional:
            self._retried(key, send)
            return True
        assert attempt is not None
        settled = self._settled(key, attempt, send, start_again=False)
        assert settled is not None
        return settled

    def _put_parts(
        self,
        key: str,
        body: Body,
        attempt: str | None,
        content_type: str | None,
        *,
        conditional: bool | None = None,
    ) -> bool:
        """The same as a multipart upload, whose last request carries the condition."""
        conditional = attempt is not None if conditional is None else conditional
        for wait_s in self._waits():
            ours = self._upload(key, body, attempt, content_type, conditional)
            if ours is not None:
                return ours
            if wait_s is not None:
                time.sleep(wait_s)
        raise StoreError(
            f"{self.where(key)}: {self.config.retries + 1} uploads were each interrupted by another writer "
            "or a clean-up of unfinished uploads; see who else writes there"
        )

    def _upload(
        self, key: str, body: Body, attempt: str | None, content_type: str | None, conditional: bool
    ) -> bool | None:
        """One multipart upload; aborted unless it became the object. None: it was lost, start again."""
        name = self._name(key)
        where = {"Bucket": self._bucket, "Key": name}
        properties = _properties(attempt, content_type)

        def begin(client: Any) -> str:
            kind = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"} if _checksums(client) else {}
            return client.create_multipart_upload(**where, **properties, **kind)["UploadId"]

        upload = {**where, "UploadId": self._retried(key, begin)}
        ours = None
        try:
            parts = self._upload_parts(key, body, upload)

            def complete(client: Any) -> None:
                whole = _condition(conditional)
                if _checksums(client):
                    whole |= {"ChecksumCRC32": _base64(body.crc32), "ChecksumType": "FULL_OBJECT"}
                client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **whole)

            if attempt is None:
                self._retried(key, complete)
                ours = True
            else:
                ours = self._settled(key, attempt, complete, start_again=True)
            return ours
        except UploadGone:
            return None
        finally:
            if ours is not True:
                self._abort(name, upload["UploadId"])

    def _upload_parts(self, key: str, body: Body, upload: dict[str, str]) -> Sequence[dict[str, Any]]:
        """Uploads the pieces from a few threads; [{PartNumber, ETag, ChecksumCRC32}] in order."""
        part_bytes = max(self.config.part_bytes, math.ceil(body.size / MAX_PARTS))
        starts = range(0, max(body.size, 1), part_bytes)

        def send(number: int, start: int) -> dict[str, Any]:
            piece = body.piece(start, part_bytes)

            def send_piece(client: Any) -> dict[str, Any]:
                part: dict[str, Any] = {"PartNumber": number}
                if _checksums(client):
                    part["ChecksumCRC32"] = _base64(zlib.crc32(piece))
                return {**part, "ETag": client.upload_part(**upload, **part, Body=piece)["ETag"]}

            return self._retried(key, send_piece)

        with ThreadPoolExecutor(min(PART_THREADS, len(starts)), "upload") as pool:
            futures = [pool.submit(send, *numbered) for numbered in enumerate(starts, 1)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                pool.shutdown(cancel_futures=True)  # waits for those under way: an abort must come after them
            failed = [future for future in futures if not future.cancelled() and future.exception()]
            return [future.result() for future in failed or futures]

    def _abort(self, name: str, upload_id: str) -> None:
        try:
            self._retried(
                name,
                lambda client: client.abort_multipart_upload(
                    Bucket=self._bucket, Key=name, UploadId=upload_id
                ),
            )
        except UploadGone:
            pass
        except StoreError as error:
            _log.warning("an unfinished upload stays behind until the next sweep: %s", error)

    # Failures

    def _waits(self) -> Iterator[float | None]:
        """How long to wait after each try; None after the last."""
        for n in range(self.config.retries):
            yield random.uniform(0, min(_MAX_WAIT_S, self.config.backoff_s * 2**n))
        yield None

    def _retried(self, key: str, ask: Callable[[Any], _T]) -> _T:
        """What `ask(client)` returns, asked again while it fails for a passing reason."""
        problem: Exception | None = None
        for wait_s in self._waits():
            try:
                return ask(self._client())
            except CAUGHT as error:
                problem = error
            if wait_s is None or not passing(problem):
                break
            time.sleep(wait_s)
        raise self._refusal(key, problem)  # outside `except`: no secret of boto's may hang on as context

    def _settled(
        self, key: str, attempt: str, send: Callable[[Any], None], *, start_again: bool
    ) -> bool | None:
        """Sends a conditional create until it is certain whose object is there: ours (True) or not (False).

        None, with `start_again` only: there is none, and this request cannot make one any more.
        """
        problem: Exception | None = None
        for wait_s in self._waits():
            try:
                send(self._client())
                return True
            except CAUGHT as error:
                problem = error
            status = http_status(problem)
            lost = status == 409 or error_code(problem) == "NoSuchUpload"
            if lost or status == 412 or (wait_s is None and passing(problem)):
                there = self.head(key)
                if there is not None:
                    return there.attempt == attempt
                if lost and start_again:
                    return None
            elif status == 501 or error_code(problem) in CONDITION_UNKNOWN:
                raise StoreUnsafe(
                    f"{self.where(key)}: the store cannot create an object only if it is absent "
                    f"({self._text(problem)}); use another, or accept that two workers may both write one "
                    "shard with `output.unsafe_overwrite: true`"
                )
            elif not passing(problem):
                break
            if wait_s is not None:
                time.sleep(wait_s)
        raise self._refusal(key, problem)

    def _refusal(self, key: str, problem: Exception | None) -> StoreError:
        where, text, code = self.where(key), self._text(problem), error_code(problem)
        if http_status(problem) == 404 and code != "NoSuchBucket":
            if code == "NoSuchUpload":
                return UploadGone(f"{where}: the upload was aborted")
            return NoSuchObject(f"{where} does not exist")
        if isinstance(problem, (boto.NoCredentialsError, boto.PartialCredentialsError)):
            advice = (
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role"
            )
        elif passing(problem):
            text = f"{self.config.retries + 1} tries failed, the last with: {text}"
            advice = (
                f"see that {self.config.endpoint_url or 'S3'} can be reached, then run again: the job resumes"
            )
        else:
            advice = ADVICE.get(code, "see that the URL, endpoint, region and credentials belong together")
        return StoreError(f"{where}: {text}; {advice}")

    def _text(self, problem: Exception | None) -> str:
        """The problem in one line, without secrets that a server, a proxy or boto may have put there."""
        if isinstance(problem, boto.ClientError):
            message = problem.response.get("Error", {}).get("Message", "")
            text = f"{problem.operation_name} answered {http_status(problem)} {error_code(problem)} {message}"
        else:
            text = str(problem)
        for secret in self._secrets():
            for written in (secret, quote(secret), quote(secret, safe="")):
                text = text.replace(written, "***")
        text = re.sub(r"//[^/@\s]+@", "//***@", text)
        return " ".join(text.split())[:500]

    def _secrets(self) -> Sequence[str]:
        if self._made is None:
            return []
        try:
            found = self._made[1].get_credentials()
            frozen = found and found.get_frozen_credentials()
        except boto.BotoCoreError:  # they could not be found or renewed; then there are none to hide
            return []
        return [secret for secret in frozen or () if isinstance(secret, str) and secret]

    def _client(self) -> Any:
        """The boto3 client, which threads may share but processes may not."""
        made = self._made
        if made is not None and made[0] == os.getpid():
            return made[2]
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), *self._connect())
            return self._made[2]

    def _connect(self) -> tuple[Any, Any]:
        config = self.config
        settings = Config(
            connect_timeout=config.connect_timeout_s,
            read_timeout=config.read_timeout_s,
            max_pool_connections=32,
            retries={"mode": "standard", "total_max_attempts": 1},  # trying again is our business
            user_agent_extra="overtone",
        )
        session = boto3.session.Session(region_name=config.region)
        try:
            return session, session.client("s3", endpoint_url=config.endpoint_url, config=settings)
        except ValueError as error:  # an endpoint or region that is none
            raise UserError(f"{self.url} cannot be reached: {error}") from None

    def _name(self, key: str) -> str:
        name = self._prefix + check_key(key)
        try:
            size_bytes = len(name.encode())
        except UnicodeEncodeError:
            raise ValueError(f"an S3 key is valid Unicode, not {key[:200]!r}") from None
        if size_bytes > _MAX_KEY_BYTES:
            raise ValueError(
                f"an S3 key has at most {_MAX_KEY_BYTES} bytes, not {size_bytes}: {key[:200]!r}..."
            )
        return name


class _Ranges(io.RawIOBase):
    """A file over ranged GETs. Fetches a little more than asked for: small reads follow each other."""

    def __init__(self, store: S3Store, info: ObjectInfo) -> None:
        super().__init__()
        self._store, self._info = store, info
        self._at = 0
        self._fetched, self._fetched_at = b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._info.size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._fetch(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        parts = []
        while part := self._fetch(self._info.size_bytes):
            parts.append(part)
        return b"".join(parts)

    def _fetch(self, length: int) -> bytes:
        """Up to `length` bytes from here on, from what is already fetched if possible; b"" at the end."""
        if self._at >= self._info.size_bytes or length <= 0:
            return b""
        skip = self._at - self._fetched_at
        if not 0 <= skip < len(self._fetched):
            wanted = min(length + _READ_AHEAD_BYTES, self._info.size_bytes - self._at)
            self._fetched, etag = self._store._get(self._info.key, self._at, wanted)
            self._fetched_at, skip = self._at, 0
            if etag != self._info.etag or len(self._fetched) != wanted:
                raise StoreError(
                    f"{self._store.where(self._info.key)} was replaced while it was being read; run again, "
                    "and let nobody write there meanwhile"
                )
        data = self._fetched[skip : skip + length]
        self._at += len(data)
        return data


def _properties(attempt: str | None, content_type: str | None) -> dict[str, Any]:
    properties: dict[str, Any] = {"ContentType": content_type or "application/octet-stream"}
    if attempt is not None:
        properties["Metadata"] = {_ATTEMPT_METADATA: attempt}
    return properties


def _condition(conditional: bool) -> dict[str, Any]:
    return {"IfNoneMatch": "*"} if conditional else {}


def _checksums(client: Any) -> bool:
    """Whether to send checksums: yes, unless boto3 was told
    AWS_REQUEST_CHECKSUM_CALCULATION=when_required."""
    return client.meta.config.request_checksum_calculation != "when_required"


def _base64(crc32: int) -> str:
    return b64encode(crc32.to_bytes(4, "big")).decode()


def _etag(answer: dict[str, Any]) -> str:
    return answer.get("ETag", "").strip('"')


def _moment(answer: dict[str, Any]) -> float | None:
    modified = answer.get("LastModified")
    return None if modified is None else modified.timestamp()
