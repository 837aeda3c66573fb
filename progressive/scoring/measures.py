"""What a measure of quality is, and how it is asked: every fault of one is an error that names it and the
row.

A `Scorer` gives each picture a number. A `SetDistance` gives each picture features, and two sets of features
their distance. Both are asked row by row and in any order, so that what is known of a row can be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from overtone.progressive.errors import ScorerError

_FRAMES = 8
"""Most frames of a video that are looked at, spread over it."""


class Scorer(Protocol):
    """Gives each picture a number. `score_rows` asks it."""

    @property
    def name(self) -> str:
        """What `named` makes it from."""
        ...

    @property
    def units(self) -> str:
        """Of its numbers, such as `points of 100`."""
        ...

    @property
    def needs_prompt(self) -> bool:
        """Whether the number depends on the prompt."""
        ...

    def check(self, prompts: Sequence[str], sizes_px: Sequence[tuple[int, int]]) -> None:
        """ScorerError where pictures of these prompts and sizes (height, width) cannot be scored: asked
        before anything is drawn."""
        ...

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[float]:
        """One number a picture (RGB), higher is better."""
        ...


class SetDistance(Protocol):
    """Distance between two sets of pictures. `features_of_rows` asks it."""

    @property
    def name(self) -> str:
        """What `named` makes it from."""
        ...

    @property
    def units(self) -> str:
        """Of the distance."""
        ...

    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """What it takes from each picture (RGB): float64 [N, D]."""
        ...

    def distance(self, features: np.ndarray, reference: np.ndarray) -> float:
        """Of the features [N, D] of a set to those [M, D] of the reference set: at least 0, lower is better.
        ValueError for fewer than two rows."""
        ...


def score_rows(
    scorer: Scorer, media: Sequence[Any], prompts: Sequence[str], row_ids: Sequence[str] | None = None
) -> np.ndarray:
    """One number a row, float64 [N], higher is better; of a video the mean over up to eight of its frames.

    Args:
        media: PIL pictures, or uint8 arrays [H, W, 3] and videos [T, H, W, 3].
        row_ids: what errors call the rows; unset: their numbers from 0.

    ScorerError where the scorer raises, and where it gives anything but one finite number a picture.
    """
    if len(media) != len(prompts):
        raise ValueError(f"{len(media)} rows, but {len(prompts)} prompts")

    def score(pictures: list[Image.Image], rows: Sequence[int]) -> np.ndarray:
        found = scorer.score(pictures, [prompts[row] for row in rows])
        return np.array([[float(value)] for value in found], np.float64).reshape(-1, 1)

    return _asked(scorer.name, score, media, row_ids)[:, 0]


def features_of_rows(
    distance: SetDistance, media: Sequence[Any], row_ids: Sequence[str] | None = None
) -> np.ndarray:
    """Features of each row, float64 [N, D]: media, videos, `row_ids` and errors as of `score_rows`."""

    def features(pictures: list[Image.Image], _: Sequence[int]) -> np.ndarray:
        return np.asarray(distance.features(pictures), np.float64)

    return _asked(distance.name, features, media, row_ids)


_Ask = Callable[[list[Image.Image], Sequence[int]], np.ndarray]
"""(pictures, the row of each) to [pictures, D]."""


def _asked(name: str, ask: _Ask, media: Sequence[Any], row_ids: Sequence[str] | None) -> np.ndarray:
    """Means over the pictures of each row: [N, D]."""
    ids = [str(k) for k in range(len(media))] if row_ids is None else row_ids
    pictures = [(row, still) for row, medium in enumerate(media) for still in _stills(medium)]
    if not pictures:
        raise ValueError("there is no picture to look at")
    rows = [row for row, _ in pictures]
    try:
        found = ask([still for _, still in pictures], rows)
    except Exception as error:  # whatever a user's function raises
        raise _raised(name, ask, pictures, ids, error) from error
    if found.ndim != 2 or len(found) != len(pictures):
        raise ScorerError(
            f"scorer {name!r} gave {len(found) if found.ndim else 'no'} values for {len(pictures)} pictures, "
            f"rows {ids[0]} to {ids[-1]}; it must give one a picture"
        )
    if not np.isfinite(found).all():
        row = rows[int(np.argwhere(~np.isfinite(found))[0][0])]
        raise ScorerError(f"scorer {name!r} gave NaN or infinity for row {ids[row]}")
    counts = np.bincount(rows, minlength=len(media))
    sums = np.zeros((len(media), found.shape[1]))
    np.add.at(sums, rows, found)
    return sums / counts[:, None]


def _raised(
    name: str,
    ask: _Ask,
    pictures: Sequence[tuple[int, Image.Image]],
    ids: Sequence[str],
    error: Exception,
) -> ScorerError:
    """The error to raise: it names the first row that fails alone too, or all of them."""
    for row, still in pictures:
        try:
            ask([still], [row])
        except Exception as alone:  # noqa: BLE001
            return ScorerError(f"scorer {name!r}, row {ids[row]}: {_told(alone)}")
    return ScorerError(f"scorer {name!r}, rows {ids[0]} to {ids[-1]} together: {_told(error)}")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _stills(medium: Any) -> list[Image.Image]:
    """The picture, or frames of the video, as RGB."""
    if isinstance(medium, Image.Image):
        return [medium.convert("RGB")]
    frames = np.asarray(medium)
    if frames.ndim == 3:
        frames = frames[None]
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _FRAMES)).round().astype(int))
    return [Image.fromarray(np.ascontiguousarray(frames[k][..., :3])) for k in chosen]
