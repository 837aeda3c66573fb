"""A store in a folder, atomic and durable by write, fsync, link. Knows POSIX, and nothing of S3.

An object is written under a hidden name in the same file system, synced, then linked to its final name:
link(2) fails where the name exists, on NFS too, and a reader sees the whole file or none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from overtone.jobs.errors import StoreError, StoreRefused, StoreUnsafe
from overtone.jobs.store.base import (
    NoSuchObject,
    ObjectInfo,
    Store,
    StoreConfig,
    check_attempt,
    check_key,
    check_prefix,
)

TEMPORARY = "_job/.tmp"
_ATTEMPT_XATTR = "user.overtone.attempt"
_SWEEP_AFTER_S = 60.0
_SWEEP_UNLOCKED_AFTER_S = 86_400.0  # where the file system has no locks to tell a live writer by
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_CHUNK_BYTES = 1024**2

_PASSING = {errno.ENOSPC, errno.EDQUOT}
_ADVICE = {
    errno.ENOSPC: "free some space, then run again: the job resumes",
    errno.EDQUOT: "the quota is used up; free some space, then run again: the job resumes",
    errno.EACCES: "give this user the right to it",
    errno.EPERM: "give this user the right to it",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another place",
    errno.EEXIST: "a file stands where a folder is needed; choose another place",
    errno.EISDIR: "a folder stands where a file is needed; choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EXDEV: f"the folder and its {TEMPORARY} must be on one file system; do not mount another inside it",
}


class LocalStore(Store):
    """A folder, made on the first write. Attempts are kept in an extended attribute if the disk has them."""

    def __init__(self, config: StoreConfig) -> None:
        super().__init__(config)
        self._root = Path(config.url)
        self._temporary = self._root / TEMPORARY

    def read(self, key: str, start: int | None = None, length: int | None = None) -> bytes:
        with self.open(key) as file, self._errors(key):
            begin = start or 0
            if begin < 0:
                begin = max(0, os.fstat(file.fileno()).st_size + begin)
            file.seek(begin)
            return file.read() if length is None else file.read(length)

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        with self._errors(key):
            try:
                return path.open("rb")
            except (IsADirectoryError, NotADirectoryError) as error:
                raise FileNotFoundError(error.errno, error.strerror, str(path)) from error

    def list(self, prefix: str = "", *, after: str = "") -> Iterator[ObjectInfo]:
        folder = check_prefix(prefix).rpartition("/")[0]
        yield from (info for info in self._walk(folder, prefix, frozenset()) if info.key > after)

    def _walk(self, folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[ObjectInfo]:
        """Depth first in key order; `above` (device, inode) of the folders passed ends loops of links."""
        path = self._root / folder
        with self._errors(folder or "."):
            try:
                status = path.stat()
                with os.scandir(path) as scan:
                    # "/" sorts a folder where its objects' keys belong: "a-b" < "a/b" < "ab".
                    entries = sorted((entry.name + "/" * entry.is_dir(), entry) for entry in scan)
            except (FileNotFoundError, NotADirectoryError):
                return
        this = (status.st_dev, status.st_ino)
        if this in above:
            return
        for name, entry in entries:
            key = f"{folder}/{name}" if folder else name
            if name.endswith("/"):
                if key.startswith(prefix) and key != f"{TEMPORARY}/":
                    yield from self._walk(key[:-1], prefix, above | {this})
            elif key.startswith(prefix) and entry.is_file():
                with suppress(FileNotFoundError):  # deleted while we listed
                    yield _info(key, entry.stat())

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            with self._errors(key):
                if not path.is_file():
                    return None
                return _info(key, path.stat(), _attempt_of(path))
        except NoSuchObject:
            return None

    def create(self, key: str, data: bytes | Path, *, attempt: str, content_type: str | None = None) -> bool:
        check_attempt(attempt)
        return self._publish(key, data, attempt, self._link)

    def put(
        self, key: str, data: bytes | Path, *, content_type: str | None = None, durable: bool = True
    ) -> None:
        self._publish(key, data, None, self._rename, durable=durable)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            with self._errors(key):
                path.unlink()
                _sync_folder(path.parent)
        except NoSuchObject:
            pass

    def sweep(self, *, older_than_s: float | None = None) -> int:
        age_s = _SWEEP_AFTER_S if older_than_s is None else older_than_s
        swept = 0
        with self._errors(TEMPORARY):
            for path in self._temporary.iterdir() if self._temporary.is_dir() else ():
                with suppress(FileNotFoundError, PermissionError):  # gone meanwhile, or another user's
                    if _is_left_behind(path, age_s):
                        path.unlink()
                        swept += 1
        return swept

    def probe_limits(self) -> tuple[bool, int]:
        return False, 2**63 - 1

    def _publish(
        self,
        key: str,
        data: bytes | Path,
        attempt: str | None,
        name: Callable[[Path, Path, str], bool],
        *,
        durable: bool = True,
    ) -> bool:
        """Write the bytes under a hidden name, then let `name(hidden, final, attempt)` make them visible."""
        path = self._path(key)
        with self._errors(key):
            for tries_left in (2, 1, 0):
                try:
                    _make_folder(self._temporary)
                    _make_folder(path.parent)
                    with self.hidden(data, attempt, durable) as hidden:
                        ours = name(hidden, path, attempt or "")
                        if durable:
                            _sync_folder(path.parent)
                        return ours
                except FileNotFoundError:
                    # Somebody removed our folder or our hidden file (a sweeper that sees no locks).
                    if not tries_left or (isinstance(data, Path) and not data.exists()):
                        raise
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def hidden(self, data: bytes | Path, attempt: str | None, durable: bool = True) -> Iterator[Path]:
        """A file that no reader sees, synced if it is to be durable, removed at the end. It is locked, so
        that a sweeper leaves it alone while its writer lives."""
        path = self._temporary / f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                with suppress(OSError):  # no locks on this file system
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, file, _CHUNK_BYTES)
                else:
                    _write_all(file, data)
                if attempt is not None and hasattr(os, "setxattr"):
                    with suppress(OSError):  # no extended attributes on this file system
                        os.setxattr(descriptor, _ATTEMPT_XATTR, attempt.encode())
                if durable:
                    os.fsync(descriptor)
                yield path
        finally:
            path.unlink(missing_ok=True)

    def _link(self, hidden: Path, path: Path, attempt: str) -> bool:
        try:
            os.link(hidden, path)
        except FileExistsError:
            # Over NFS a link may be made and its answer lost; then both names are one file.
            return os.path.samefile(hidden, path) or _attempt_of(path) == attempt
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            return True
        if not self.config.unsafe_overwrite:
            raise StoreUnsafe(
                f"the file system of {self.url} has no hard links, so a file cannot be created only if "
                "absent: choose another place, or accept that two workers may both write one shard with "
                "`output.unsafe_overwrite: true`"
            )
        if path.exists():
            return _attempt_of(path) == attempt
        return self._rename(hidden, path, attempt)

    def _rename(self, hidden: Path, path: Path, attempt: str) -> bool:
        hidden.rename(path)
        return True

    def _path(self, key: str) -> Path:
        if f"{check_key(key)}/".startswith(f"{TEMPORARY}/"):
            raise ValueError(f"{TEMPORARY} is for files that are being written, not for {key!r}")
        return self._root / key

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """OSErrors as StoreErrors that name the object and say what to do."""
        try:
            yield
        except FileNotFoundError as error:
            raise NoSuchObject(f"{error.filename or self.where(key)} does not exist") from error
        except OSError as error:
            advice = _ADVICE.get(
                error.errno or 0, "see that the disk is well, then run again: the job resumes"
            )
            refused = error.errno in _ADVICE.keys() - _PASSING
            kind = StoreRefused if refused else StoreError
            raise kind(f"{self.where(key)}: {error.strerror or error}; {advice}") from error


def _info(key: str, status: os.stat_result, attempt: str | None = None) -> ObjectInfo:
    etag = f"{status.st_mtime_ns:x}-{status.st_size:x}"
    return ObjectInfo(key, status.st_size, etag, attempt, status.st_mtime)


def _attempt_of(path: Path) -> str | None:
    if not hasattr(os, "getxattr"):
        return None
    try:
        return os.getxattr(path, _ATTEMPT_XATTR).decode()
    except OSError:  # not there, or no extended attributes on this file system
        return None


def _write_all(file: RawIOBase, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]  # one write(2) takes 2 GiB at most


def _make_folder(path: Path) -> None:
    """The folder and those above it, each made durable in its parent."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def _is_left_behind(path: Path, age_s: float) -> bool:
    """Whether a hidden file's writer is dead: the lock that died with it can be had."""
    file_age_s = time.time() - path.stat().st_mtime
    if file_age_s < age_s:
        return False
    with path.open("r+b") as file:  # NFS gives no exclusive lock on a file opened for reading
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return file_age_s > _SWEEP_UNLOCKED_AFTER_S
    return True
