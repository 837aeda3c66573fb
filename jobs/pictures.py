"""Pictures and videos of a data set, one after the other, for whoever measures them. Knows no model.

for picture in pictures(["photos/", "set/data"]): ...      # PIL images; videos as uint8 [T, H, W, 3]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from overtone.jobs.errors import UserError
from overtone.jobs.media import decode_video, still

_VIDEOS = {".mp4", ".m4v", ".mov", ".webm", ".mkv"}
_COLUMNS = ("image", "video")
_TEXTS = ("prompt", "caption", "text")


def pictures(places: Iterable[str | Path]) -> Iterator[Image.Image | np.ndarray]:
    """The pictures and videos in files and folders (at any depth), in the order of their names. They may be
    image files, videos, and Parquet tables with an `image` or `video` column of bytes, as Overtone and
    Hugging Face write them.

    Each is read when it is asked for, so that no data set is too large. Files of other kinds in a folder are
    passed over. UserError for a place that does not exist, a named file of another kind, and what cannot be
    decoded.
    """
    return (picture for picture, _ in captioned(places))


def captioned(places: Iterable[str | Path]) -> Iterator[tuple[Image.Image | np.ndarray, str]]:
    """`pictures`, each with its text: of a table's column `prompt`, `caption` or `text`, else empty."""
    images = set(Image.registered_extensions())
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"there is no file or folder {place}")
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            kind = file.suffix.lower()
            if kind == ".parquet":
                yield from _of_table(file)
            elif kind in images:
                yield _image(_bytes(file), str(file)), ""
            elif kind in _VIDEOS:
                yield _video(_bytes(file), str(file)), ""
            elif file == place:
                raise UserError(f"{file} is no image, video or Parquet file")


def _of_table(file: Path) -> Iterator[tuple[Image.Image | np.ndarray, str]]:
    try:
        table = pq.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    with table:
        has = table.schema_arrow.names
        names = [name for name in _COLUMNS if name in has]
        if not names:
            raise UserError(f"{file} has no column `image` or `video`; it has {has}")
        texts = [name for name in _TEXTS if name in has][:1]
        read = _image if names[0] == "image" else _video
        for batch in table.iter_batches(batch_size=16, columns=[names[0], *texts]):
            for row, values in enumerate(batch.to_pylist()):
                value = values[names[0]]
                data = value.get("bytes") if isinstance(value, dict) else value
                if data is None:
                    continue
                if not isinstance(data, bytes):
                    raise UserError(f"{file}: column `{names[0]}` holds no bytes")
                text = values[texts[0]] if texts else None
                yield read(data, f"{file}, row {row} of a batch"), text if isinstance(text, str) else ""


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def _image(data: bytes, where: str) -> Image.Image:
    try:
        return still(data)
    except ValueError as error:
        raise UserError(f"{where}: cannot be decoded as an image: {error}") from None


def _video(data: bytes, where: str) -> np.ndarray:
    try:
        return decode_video(data)
    except ValueError as error:
        raise UserError(f"{where}: cannot be decoded as a video: {error}") from None
