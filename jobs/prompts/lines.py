"""The lines of a text file, compressed or not, from any remembered place on. Knows no formats of tables.

    with opened(place, found, None, start) as file: ...        # at byte `start` of the text in UTF-8

Whether a file is compressed is seen from its first bytes: gzip, bzip2, zstd, lz4 and xz. None of them can be
entered in the middle, and no text of another encoding than UTF-8. A place in the first 64 MiB of the text is
reached by unpacking what is before it; for one behind that the text is unpacked once, into the folder for
temporary files, and kept there while the process has no use for two others.
"""

from __future__ import annotations

import io
import lzma
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from itertools import islice
from typing import Any, BinaryIO, TypeVar, cast

import pyarrow as pa

from overtone.jobs.errors import PromptsError, StoreError
from overtone.jobs.prompts.encodings import Utf8Check
from overtone.jobs.prompts.places import Found, Place
from overtone.jobs.prompts.scan import BATCH_ROWS, BLOCK_ROWS

_T = TypeVar("_T")
_Packing = tuple[str | None, str | None]  # how a text is compressed, and its encoding where it is not UTF-8
MAX_LINE_BYTES = 256 * 1024**2
SKIPPED_BYTES = 64 * 1024**2
"""Of a compressed text: so much is unpacked again for each shard rather than kept on disk."""
_KEPT_TEXTS = 2
_CHUNK_BYTES = 1024**2
_CODECS = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xfd7zXZ\0": "xz",
    **{b"BZh%d1AY&SY" % level: "bz2" for level in range(1, 10)},
}


@contextmanager
def opened(place: Place, found: Found, encoding: str | None, start: int = 0) -> Iterator[BinaryIO]:
    """The text of a file, in UTF-8, from its byte `start` on. `encoding`: the file's; None: it is UTF-8.
    OSError without a number where it is damaged, UnicodeDecodeError where it is not in that encoding."""
    with place.open(found.path) as raw:
        packing = (_codec(raw), None if encoding == "utf-8" else encoding)
        if packing == (None, None):
            raw.seek(start)
            yield raw
        elif start < SKIPPED_BYTES:
            with _unpacked(raw, packing) as text:
                _skip(text, start)
                yield text
        else:
            with _kept_text(found, raw, packing) as text:
                text.seek(start)
                yield text


class Lines:
    """The lines of a file, decoded, and the place where the next one begins. Bad UTF-8 is kept as
    surrogates."""

    def __init__(self, file: BinaryIO, path: str, start: int = 0, *, check: Utf8Check | None = None) -> None:
        """`check` is shown every line."""
        self._file, self._path, self._check = file, path, check
        self.position = start
        self.number = 0
        self.sha = sha256()

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        return self.next_bytes().decode("utf-8", "surrogateescape")

    def next_bytes(self) -> bytes:
        line = self._file.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        if len(line) == MAX_LINE_BYTES:
            raise PromptsError(f"{self._path}:{self.number + 1}: a line of over {MAX_LINE_BYTES:,} bytes")
        first = self.position == 0
        self.position += len(line)
        self.number += 1
        self.sha.update(line)
        if self._check is not None:
            if first:
                self._check.first(line)
            self._check.add(self.number, line)
        return line.removeprefix(b"\xef\xbb\xbf") if first else line


def chunks(rows: Iterator[_T], first_row: int, num_rows: int) -> Iterator[list[_T]]:
    """`num_rows` rows from `first_row` on, a batch at a time; `rows` begin at the block that holds
    `first_row`."""
    rows = islice(rows, first_row % BLOCK_ROWS, None)
    while num_rows and (chunk := list(islice(rows, min(num_rows, BATCH_ROWS)))):
        num_rows -= len(chunk)
        yield chunk


def encodable(text: str) -> bool:
    """Whether UTF-8 can write a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _codec(raw: BinaryIO) -> str | None:
    head = raw.read(max(map(len, _CODECS)))
    raw.seek(0)
    return next((codec for magic, codec in _CODECS.items() if head.startswith(magic)), None)


@contextmanager
def _unpacked(raw: BinaryIO, packing: _Packing) -> Iterator[BinaryIO]:
    codec, encoding = packing
    try:
        with ExitStack() as stack:
            stream: Any = raw
            if codec == "xz":
                stream = stack.enter_context(lzma.LZMAFile(raw))
            elif codec is not None:
                stream = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec))
            if encoding is not None:
                whole = stream if isinstance(stream, pa.NativeFile) else pa.PythonFile(stream, "r")
                stream = stack.enter_context(pa.transcoding_input_stream(whole, encoding, "utf-8"))
            if isinstance(stream, pa.NativeFile):
                stream = io.BufferedReader(cast(Any, stream), _CHUNK_BYTES)
            yield cast(BinaryIO, stream)
    except (lzma.LZMAError, EOFError) as error:
        raise OSError(f"the {codec} file is damaged: {error}") from error


def _skip(text: BinaryIO, num_bytes: int) -> None:
    while num_bytes and (skipped := len(text.read(min(num_bytes, _CHUNK_BYTES)))):
        num_bytes -= skipped


_texts: OrderedDict[tuple[str, int, str, _Packing], BinaryIO] = OrderedDict()
_unpacking = threading.Lock()


@contextmanager
def _kept_text(found: Found, raw: BinaryIO, packing: _Packing) -> Iterator[BinaryIO]:
    """The whole text as a file without a name, which goes when nobody has it open any more."""
    key = (found.path, found.size_bytes, found.etag, packing)
    with _unpacking:
        if key not in _texts:
            with _unpacked(raw, packing) as text:
                _texts[key] = _on_disk(found.path, text)
        _texts.move_to_end(key)
        while len(_texts) > _KEPT_TEXTS:
            _texts.popitem(last=False)
        kept = _texts[key]
    yield cast(BinaryIO, io.BufferedReader(_At(kept), _CHUNK_BYTES))


def _on_disk(path: str, text: BinaryIO) -> BinaryIO:
    file = cast(BinaryIO, tempfile.TemporaryFile(prefix="overtone-"))
    while chunk := text.read(_CHUNK_BYTES):
        try:
            file.write(chunk)
            file.flush()
        except OSError as error:
            raise StoreError(
                f"{path} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}; make room there, "
                "or set TMPDIR to a folder that has it"
            ) from error
    return file


class _At(io.RawIOBase):
    """A place of its own in a file that several threads read."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, "all places are counted from the beginning"
        self._position = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._file.fileno(), len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
