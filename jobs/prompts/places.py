"""Where prompt files lie: their names, sizes and bytes. Knows no formats and no patterns.

    place = place_of("s3://bucket/prompts/a.parquet")
    place.stat("s3://bucket/prompts/a.parquet"), place.open("s3://bucket/prompts/a.parquet")

Local files are read directly, `s3://` through the project's own store, which retries and finds credentials in
its own ways, and every other URL through fsspec.
"""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from overtone.jobs.errors import PromptsError, StoreError, UserError
from overtone.jobs.spec import is_url
from overtone.jobs.store import NoSuchObject, Store, open_store
from overtone.jobs.words import one_line

_IDENTITIES = ("ETag", "etag", "blob_id", "sha256", "md5Hash", "md5", "content_md5", "checksum", "mtime")
_IDENTITIES_OF_TIME = ("LastModified", "last_modified", "modified", "updated", "created")


@dataclass(frozen=True, slots=True)
class Found:
    """A file that exists. `etag` changes when the contents do; it is "" where the place reports no such
    value."""

    path: str
    size_bytes: int
    etag: str


class Place(ABC):
    """One file system. Paths are absolute, or URLs. Failures are StoreError, or OSError of the local disk."""

    @abstractmethod
    def stat(self, path: str) -> Found | None:
        """The file; None where there is none, or a folder."""

    @abstractmethod
    def walk(self, folder: str, start: str, depth: int | None) -> Iterator[Found]:
        """The files under a folder, at most `depth` names deep. A place may leave out the files whose path in
        the folder does not begin with `start`."""

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """A seekable file. PromptsError where there is none any more."""

    def tail(self, found: Found, length: int) -> bytes:
        """The last `length` bytes, or all where there are fewer. PromptsError where the file is gone."""
        with self.open(found.path) as file:
            file.seek(max(0, found.size_bytes - length))
            return file.read(length)


def place_of(path: str, *, endpoint_url: str | None = None, region: str | None = None) -> Place:
    """The file system of a path or URL. Connects to nothing."""
    if path.startswith("s3://"):
        return _S3(endpoint_url, region)
    return _Fsspec() if is_url(path) else Disk()


class Disk(Place):
    def stat(self, path: str) -> Found | None:
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return Found(path, status.st_size, f"{status.st_mtime_ns}-{status.st_size}")

    def walk(self, folder: str, start: str, depth: int | None) -> Iterator[Found]:
        seen = set()
        for at, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
            real = os.path.realpath(at)
            if real in seen:  # a link to a folder above
                folders.clear()
                continue
            seen.add(real)
            level = 0 if at == folder else len(Path(at).relative_to(folder).parts)
            if depth is not None and level + 1 >= depth:
                folders.clear()
            for name in names:
                found = self.stat(os.path.join(at, name))
                if found is not None:
                    yield found

    def open(self, path: str) -> BinaryIO:
        try:
            return open(path, "rb")
        except FileNotFoundError:
            raise gone(path) from None


class _S3(Place):
    def __init__(self, endpoint_url: str | None, region: str | None) -> None:
        self._endpoint_url, self._region = endpoint_url, region

    def stat(self, path: str) -> Found | None:
        store, key = self._split(path)
        if not key:
            return None
        with _s3_names(path):
            info = store.head(key)
        return None if info is None else Found(path, info.size_bytes, info.etag)

    def walk(self, folder: str, start: str, depth: int | None) -> Iterator[Found]:
        store, key = self._split(folder)
        below = "/" in folder.removeprefix("s3://")  # else it is the bucket
        prefix = f"{key}/{start}" if below else start
        with _s3_names(folder):
            for info in store.list(prefix):
                yield Found(f"{store.url}/{info.key}", info.size_bytes, info.etag)

    def open(self, path: str) -> BinaryIO:
        store, key = self._split(path)
        try:
            with _s3_names(path):
                return store.open(key)
        except NoSuchObject:
            raise gone(path) from None

    def tail(self, found: Found, length: int) -> bytes:
        store, key = self._split(found.path)
        try:
            with _s3_names(found.path):
                return store.read(key, -min(length, found.size_bytes)) if found.size_bytes else b""
        except NoSuchObject:
            raise gone(found.path) from None

    def _split(self, path: str) -> tuple[Store, str]:
        bucket, _, key = path.removeprefix("s3://").partition("/")
        return _bucket(bucket, self._endpoint_url, self._region), key


@lru_cache(maxsize=64)
def _bucket(name: str, endpoint_url: str | None, region: str | None) -> Store:
    """One client for each bucket and process: threads share it, and no pickle holds it."""
    try:
        return open_store(f"s3://{name}", endpoint_url=endpoint_url, region=region, foreign_keys=True)
    except UserError as error:
        raise PromptsError(f"prompts.path: {error}") from None


@contextmanager
def _s3_names(path: str) -> Iterator[None]:
    """Names that an S3 key may have but that no request can ask for, such as `../a`."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise PromptsError(f"{path}: {error}") from None


class _Fsspec(Place):
    """Any file system that fsspec knows. Each raises exceptions of its own, so this class catches all
    kinds."""

    def stat(self, path: str) -> Found | None:
        fs, name = self._fs(path)
        with _any_failure(path):
            try:
                info = fs.info(name)
            except FileNotFoundError:
                return None
        return _found(path, info) if info.get("type", "file") == "file" else None

    def walk(self, folder: str, start: str, depth: int | None) -> Iterator[Found]:
        fs, name = self._fs(folder)
        with _any_failure(folder):
            found = fs.find(name, maxdepth=depth, detail=True)
        scheme = folder.partition("://")[0]
        for path, info in found.items():
            path = path if "://" in path else f"{scheme}://{path.lstrip('/')}"
            yield _found(path, info)

    def open(self, path: str) -> BinaryIO:
        fs, name = self._fs(path)
        with _any_failure(path):
            try:
                file = fs.open(name, "rb")
            except FileNotFoundError:
                raise gone(path) from None
        # Most of its files lack what Python's own have, such as a limit of `readline`.
        return cast(BinaryIO, file if isinstance(file, io.BufferedIOBase) else io.BufferedReader(file))

    def _fs(self, path: str) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            return url_to_fs(path)
        except (ImportError, ValueError) as error:  # a scheme nobody knows, or whose package is missing
            raise PromptsError(f"{path}: {one_line(error, 500)}") from None


def _found(path: str, info: dict[str, Any]) -> Found:
    known = [str(info[key]) for key in (*_IDENTITIES, *_IDENTITIES_OF_TIME) if info.get(key)]
    return Found(path, int(info.get("size") or 0), known[0].strip('"') if known else "")


@contextmanager
def _any_failure(path: str) -> Iterator[None]:
    try:
        yield
    except (StoreError, UserError):
        raise
    except Exception as error:  # file systems of all kinds raise what they like
        raise StoreError(f"{path}: {type(error).__name__}: {one_line(error, 500)}") from error


def gone(path: str) -> PromptsError:
    """What to raise where a prompt file has been removed since the job was planned."""
    return PromptsError(f"{path} is no longer there; the job's prompt files must stay until it is done")


def _raise(error: OSError) -> NoReturn:
    raise error
