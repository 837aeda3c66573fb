"""One small interface to the place that holds a job: a folder or an S3 prefix. Knows objects, not parts.

    store = open_store("s3://bucket/run-7", endpoint_url="http://minio:9000")
    store = probed(store)                                  # a driver, once: refuses an unsafe store
    store.create("data/train-00000-of-00010.parquet", data, attempt="a1")   # True: ours; False: another's

`create` is what exactly-once rests on: of any number of writers of one key, in any processes and through any
network failure, one gets True. A store pickles as its settings (`StoreConfig`), never with credentials, so a
driver hands its probed store to its workers.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from overtone.jobs.errors import StoreError, StoreUnsafe

PROBE_PREFIX = "_job/probe/"
_ATTEMPT = re.compile(r"[!-~]{1,256}")  # printable ASCII without spaces: it travels in an HTTP header


class NoSuchObject(StoreError):
    """There is no object under the key."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object. `etag` has no quotes and changes whenever the content does; on local disk it is made of the
    modification time and the size. `attempt` is what `create` was given; None after `put`, and in listings.
    `modified_s` is when the object was made, in seconds since 1970 by the store's clock."""

    key: str
    size_bytes: int
    etag: str
    attempt: str | None = None
    modified_s: float | None = None


@dataclass(frozen=True)
class StoreGuarantees:
    """What a probe found: does the store refuse a second create, in one request and in several?"""

    single: bool
    """A create of up to `max_single_bytes` in one request is refused where the object exists."""
    multipart: bool
    """So is a create in several requests (S3 multipart uploads)."""
    max_single_bytes: int
    """Largest object that one request can create, bytes."""


@dataclass(frozen=True)
class StoreConfig:
    """Everything needed to open a store elsewhere, and no secret: boto3 finds credentials by itself."""

    url: str
    """`s3://bucket/prefix`, or the absolute path of a folder."""
    endpoint_url: str | None = None
    """S3 server other than AWS; None: what boto3 finds in its environment and files."""
    region: str | None = None
    """S3 region; None: what boto3 finds."""
    retries: int = 8
    """Further tries of a request that failed for a passing reason."""
    unsafe_overwrite: bool = False
    """Continue without create-if-absent: two workers that finish one shard at the same time may both write
    it."""
    guarantees: StoreGuarantees | None = None
    """What `probed` found; None: not probed, both kinds of create are trusted."""
    part_bytes: int = 32 * 1024**2
    """Size of one piece of a multipart upload; data above twice this is uploaded in pieces."""
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    backoff_s: float = 0.1
    """The wait before retry n is random in [0, backoff_s * 2**n], 10 s at most."""
    foreign_keys: bool = False
    """For reading what others wrote: an S3 key may then have empty segments, as in `in//x`."""

    def where(self, key: str) -> str:
        """The full name of an object, for people."""
        return f"{self.url}/{key}"


class Store(ABC):
    """Objects by key under one URL. Keys are relative paths with "/"; a bad one is a ValueError. Every other
    failure is a StoreError that names the object and says what to do. Safe to use from several threads."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config

    @property
    def url(self) -> str:
        """Where the store is, without a trailing "/"."""
        return self.config.url

    @abstractmethod
    def read(self, key: str, start: int | None = None, length: int | None = None) -> bytes:
        """The bytes [start, start + length), cut at the end of the object; a negative `start` counts from the
        end. NoSuchObject where the key has no object."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A seekable, buffered file that reads ranges as they are asked for. NoSuchObject where there is
        none; StoreError from its `read` if the object was replaced meanwhile."""

    @abstractmethod
    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        """The objects whose keys start with `prefix` and sort after `after`, in key order. `attempt` is not
        filled in."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """The object without its bytes; None where there is none."""

    @abstractmethod
    def create(self, key: str, data: bytes | Path, *, attempt: str, content_type: str | None = None) -> bool:
        """Create the object, whole and durable, if there is none. True: it is ours. False: another's was
        first.

        `attempt` names the writer (printable ASCII, unique to it): it decides who won where the network hid
        the answer, and makes a repeated call by the same writer return True again. After a StoreError nothing
        is certain: the object may be there, or may still appear; calling again, here or elsewhere, settles
        it. Readers never see a part of the object.
        """

    @abstractmethod
    def put(
        self, key: str, data: bytes | Path, *, content_type: str | None = None, durable: bool = True
    ) -> None:
        """Create or replace the object; readers see the old bytes or the new, never a mixture.

        `durable=False`: for what can be made again. On a disk it may be gone, or empty, after the machine
        lost its power, and takes a fraction of the time.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; it is no error if there is none."""

    @abstractmethod
    def sweep(self, *, older_than_s: float | None = None) -> int:
        """Remove what writers that died left behind and no reader sees (temporary files, unfinished uploads).
        Safe beside live writers. Returns how many; `older_than_s` None: an age that suits the store."""

    @abstractmethod
    def probe_limits(self) -> tuple[bool, int]:
        """For the probe: (whether a create in several requests is another thing than one in a single request,
        `max_single_bytes`)."""

    def create_as(self, key: str, data: bytes, *, attempt: str, multipart: bool) -> bool:
        """For the probe: `create` in one request or in several, whatever was found before."""
        return self.create(key, data, attempt=attempt)

    def probe(self) -> StoreGuarantees:
        """Try it: create an object twice in each way and see whether the second is refused and harmless.
        Writes a few bytes under `_job/probe/` and removes them. StoreError where the store cannot be used."""
        differs, limit = self.probe_limits()
        single = self._refuses_second(multipart=False)
        multipart = self._refuses_second(multipart=True) if differs else single
        return StoreGuarantees(single=single, multipart=multipart, max_single_bytes=limit)

    def _refuses_second(self, *, multipart: bool) -> bool:
        key = f"{PROBE_PREFIX}{uuid4().hex}-{'multipart' if multipart else 'single'}"
        try:
            first = self.create_as(key, b"first", attempt=uuid4().hex, multipart=multipart)
            second = self.create_as(key, b"second", attempt=uuid4().hex, multipart=multipart)
            return first and not second and self.read(key) == b"first"
        except StoreUnsafe:
            return False  # the store says itself that it does not know the condition
        finally:
            with suppress(StoreError):  # writers need no right to delete; a few bytes stay behind
                self.delete(key)

    def where(self, key: str) -> str:
        """The full name of an object, for people."""
        return self.config.where(key)

    def __reduce__(self):
        return (type(self), (self.config,))

    def __repr__(self) -> str:
        endpoint = f", endpoint_url={self.config.endpoint_url!r}" if self.config.endpoint_url else ""
        return f"{type(self).__name__}({self.url!r}{endpoint})"


def check_key(key: str, *, foreign: bool = False) -> str:
    """The key itself; ValueError if it could mean anything but one object inside the store. `foreign`: empty
    segments, which only S3 tells apart, are allowed."""
    bad = (".", "..") if foreign else ("", ".", "..")
    if not key or "\0" in key or any(segment in bad for segment in key.split("/")):
        segments = "" if foreign else "empty, "
        raise ValueError(
            f"not an object key: {key[:200]!r}; a key is a relative path without {segments}'.' or '..' "
            "segments"
        )
    return key


def check_prefix(prefix: str, *, foreign: bool = False) -> str:
    """The prefix itself, held to the rule of `check_key`; it may also be empty or end in "/"."""
    if prefix and prefix != "/":
        check_key(prefix[:-1] if prefix.endswith("/") else prefix, foreign=foreign)
    elif prefix and not foreign:
        check_key(prefix)
    return prefix


def check_attempt(attempt: str) -> str:
    """The attempt itself; ValueError where it could not be stored beside the object."""
    if not _ATTEMPT.fullmatch(attempt):
        raise ValueError(f"an attempt is 1 to 256 printable ASCII characters, not {attempt[:300]!r}")
    return attempt
