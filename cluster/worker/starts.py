"""What rows start from, as an engine takes it: pictures decoded, and fitted to the size that each row will
have. Knows no attempts.

    rows = sized(rows, engine.family, sampling)      # sizes that follow from pictures, filled in
    encoded = encode_rows(engine, rows, sampling)    # prompts, and pictures where there are any

Pixels are made here and nowhere else, a batch at a time, in the thread that encodes prompts.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from overtone.cluster.worker.protocol import Engine
from overtone.jobs.errors import PictureError
from overtone.jobs.media import opened
from overtone.jobs.rows import Given, Row
from overtone.progressive.families import Family
from overtone.progressive.pictures import Pictures, upright
from overtone.progressive.schedule import size_from, size_of
from overtone.progressive.settings import Sampling


def encode_rows(
    engine: Engine,
    rows: Sequence[Row],
    sampling: Sampling,
    known: MutableMapping[str, Any] | None = None,
) -> Any:
    """The rows' prompts and pictures for `Engine.begin`. PictureError for the first picture that cannot be
    decoded. `known`: see `progressive.engine.Engine.encode`."""
    prompts, negatives = [row.prompt for row in rows], [row.negative_prompt for row in rows]
    more: dict[str, Any] = {} if known is None else {"known": known}
    if any(row.image for row in rows):
        more["pictures"] = _pictures(rows, engine.family, sampling)
    return engine.encode(prompts, negatives, sampling, **more)


def sized(rows: Sequence[Row], family: Family, sampling: Sampling) -> list[Row]:
    """The rows, those with a size that follows from their picture where neither they nor the job give one."""
    if sampling.height or sampling.width:
        return list(rows)
    return [_sized(row, row.image, family) if row.image else row for row in rows]


def _sized(row: Row, image: Given, family: Family) -> Row:
    if row.height or row.width:
        return row
    height_px, width_px = size_from(family, image.height_px, image.width_px)
    return replace(row, height=height_px, width=width_px)


def _pictures(rows: Sequence[Row], family: Family, sampling: Sampling) -> list[Pictures | None]:
    """One for each row; rows with the same files at one size share one."""
    made: dict[tuple[Any, ...], Pictures] = {}
    for place, row in enumerate(rows):
        key = _key(row)
        if row.image is None or key in made:
            continue
        try:
            mask = _decoded(row.mask) if row.mask else None
            height_px, width_px, _ = size_of(sampling, family, row.height, row.width)
            pictures = Pictures(_decoded(row.image), mask).fitted(height_px, width_px, sampling.fit)
        except ValueError as error:
            raise PictureError(f"its picture: {error}", row_id=row.row_id, row=place) from error
        made[key] = pictures
    return [made.get(_key(row)) for row in rows]


def _key(row: Row) -> tuple[Any, ...]:
    return row.image, row.mask, row.height, row.width


def _decoded(given: Given) -> Image.Image:
    """ValueError for a file that is broken, whatever its decoder raises."""
    data = given.read()
    try:
        with opened(data) as image:
            image.load()
            return upright(image)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # decoders raise what they like, OSError and SyntaxError for one
        raise ValueError(f"it cannot be decoded: {error}") from error
