"""The pictures that rows start from: from the cells of a prompt table to bytes on this machine's disk. It
decodes none: of a picture's file it reads the header.

    pictures = GivenPictures(spec, file.path)
    image, mask, problem = pictures.of({"image": {"bytes": ..., "path": None}})

A cell holds bytes, a path, or both as `datasets` writes them. A path counts from the folder of the table's
file and never leaves it, for a table may come from anybody; http and https URLs, which the spec has to allow,
are jobs/prompts/web.py's. What is wrong with a cell is the row's problem; a store that does not answer is a
StoreError like any other.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, UnidentifiedImageError

from overtone.jobs.errors import PromptsError, StoreError
from overtone.jobs.media import opened
from overtone.jobs.prompts.input_file import server_of
from overtone.jobs.prompts.places import place_of
from overtone.jobs.prompts.values import shown_value
from overtone.jobs.prompts.web import WebError, fetch
from overtone.jobs.rows import Given
from overtone.jobs.spec import PICTURES, JobSpec, is_url

MAX_FILE_BYTES = 64 * 1024**2
MAX_PIXELS = 64 * 1000**2
"""A header may claim any size, and decoding takes memory for all of it."""
_THREADS = 16
"""That wait for files."""
_NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EILSEQ)
"""What a disk answers to a path that can be no file's, however often it is asked."""
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap the sides."""


class GivenPictures:
    """The pictures of some rows of one file, or of a batch that is in no file."""

    def __init__(
        self, spec: JobSpec, path: str | None, from_web: Callable[[str, int], bytes] = fetch
    ) -> None:
        """`path`: the file's, from whose folder paths count; None: there is none, and paths are refused."""
        self._fetch = from_web
        self._spec, self._server = spec, server_of(spec)
        self._folder = None if path is None else posixpath.dirname(path)
        self._spool = Spool()

    def of_all(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> list[tuple[Given | None, Given | None, str | None]]:
        """`of` each row; where there are paths, several rows are waited for at once."""
        if not any(isinstance(_path(row.get(name)), str) for row in rows for name in PICTURES):
            return [self.of(row) for row in rows]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures") as threads:
            return list(threads.map(self.of, rows))

    def of(self, values: Mapping[str, Any]) -> tuple[Given | None, Given | None, str | None]:
        """(picture, mask, what is wrong with them) of a row, from its values by meaning."""
        found: dict[str, Given | None] = {}
        for meaning in PICTURES:
            try:
                found[meaning] = self._given(values.get(meaning))
            except _BadPicture as bad:
                return None, None, f"{meaning} {bad}"
        image, mask = found["image"], found["mask"]
        if image is None:
            return None, None, "image is null, and rows start from pictures"
        if mask is None and self._spec.sampling.strength is None:
            return None, None, "mask is null, and sampling.strength is unset: the picture would not change"
        return image, mask, None

    def _given(self, value: Any) -> Given | None:
        data, name = _path(value), value.get("path") if isinstance(value, Mapping) else None
        if data is None:
            return None
        if isinstance(data, str):
            name, data = data, self._fetched(data)
        if not isinstance(data, bytes):
            raise _BadPicture(f"is no picture but {shown_value(value)}")
        if len(data) > MAX_FILE_BYTES:
            raise _BadPicture(f"has {len(data):,} bytes; at most {MAX_FILE_BYTES:,}")
        height_px, width_px = header(data)
        digest = self._spool.add(data)
        name = posixpath.basename(urlsplit(name).path if is_url(name) else name) if name else None
        return Given(digest, name, height_px, width_px, len(data), lambda: self._spool.read(digest))

    def _fetched(self, path: str) -> bytes:
        """The bytes of a file in the table's folder."""
        shown = shown_value(path)
        if "\0" in path or not path:
            raise _BadPicture(f"is no path: {shown}")
        if is_url(path):
            return self._from_web(path)
        if self._folder is None:
            raise _BadPicture(
                f"is the path {shown}, and there is no folder that it could count from; give bytes"
            )
        whole = posixpath.normpath(posixpath.join(self._folder, path)) if not is_url(self._folder) else ""
        if is_url(self._folder):
            inner = posixpath.normpath(path)
            whole = f"{self._folder}/{inner}"
            outside = inner.startswith(("..", "/"))
        else:
            home = os.path.realpath(self._folder)
            outside = os.path.commonpath([home, os.path.realpath(whole)]) != home
        if outside:
            raise _BadPicture(f"{shown} leads out of the folder of the table")
        place = place_of(whole, **self._server)
        try:
            found = place.stat(whole)
            if found is None:
                raise _BadPicture(f"{shown} is not there")
            if found.size_bytes > MAX_FILE_BYTES:
                raise _BadPicture(f"has {found.size_bytes:,} bytes; at most {MAX_FILE_BYTES:,}")
            with place.open(whole) as file:
                return file.read(MAX_FILE_BYTES + 1)
        except PromptsError:
            raise _BadPicture(f"{shown} is not there") from None
        except OSError as error:
            if error.errno in _NO_PATH:
                raise _BadPicture(f"{shown} can be no file's: {error.strerror}") from None
            raise StoreError(f"{whole} cannot be read: {error.strerror or error}") from error

    def _from_web(self, url: str) -> bytes:
        if not url.lower().startswith(("http://", "https://")):
            raise _BadPicture("is a URL that is neither http nor https; give bytes, or a path")
        if not self._spec.prompts.urls:
            raise _BadPicture("is a URL, and `prompts.urls` is not set; set it, or give bytes or a path")
        try:
            return self._fetch(url, MAX_FILE_BYTES)
        except WebError as error:
            raise _BadPicture(str(error)) from None


def _path(value: Any) -> Any:
    """What a cell gives: bytes, or a path where it has none."""
    if not isinstance(value, Mapping):
        return value
    return value.get("path") if value.get("bytes") is None else value["bytes"]


def header(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels of a picture as people see it, by its header. `_BadPicture` for what is none,
    or too large."""
    if not data:
        raise _BadPicture("is empty")
    try:
        with opened(data) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise _BadPicture(f"has {width}x{height} pixels; at most {MAX_PIXELS:,}")
            # A PNG without EXIF before its pixels would be decoded in search of some behind them.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(0x0112) in _TURNED
    except _BadPicture:
        raise
    except UnidentifiedImageError:
        raise _BadPicture(f"is of no known format of pictures; it begins with {data[:16]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _BadPicture(f"has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # noqa: BLE001 - a decoder's, each of which raises what it likes
        raise _BadPicture(f"cannot be opened: {shown_value(str(error))}") from None
    return (width, height) if turned else (height, width)


class Spool:
    """Files in one file on this machine's disk, each once, which is gone when nobody has it any more."""

    def __init__(self) -> None:
        file = tempfile.TemporaryFile(prefix="overtone-pictures-")  # closed by its finalizer
        weakref.finalize(self, file.close)
        self._file, self._lock = file, threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}

    def add(self, data: bytes) -> str:
        """Keep a file's bytes. Its SHA-256 in hex, by which `read` finds them. StoreError where the disk has
        no room."""
        digest = sha256(data).hexdigest()
        with self._lock:
            if digest not in self._places:
                start = self._file.seek(0, io.SEEK_END)
                try:
                    self._file.write(data)
                    self._file.flush()
                except OSError as error:
                    raise StoreError(
                        f"pictures do not fit on this machine's disk: {error.strerror}"
                    ) from error
                self._places[digest] = start, len(data)
        return digest

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(length for _, length in self._places.values())

    def read(self, digest: str) -> bytes:
        """The bytes again, from any thread."""
        start, length = self._places[digest]
        return os.pread(self._file.fileno(), length, start)


class _BadPicture(ValueError):
    """Why a row's picture cannot be one to start from."""
