"""Sets of pixels: grown, shrunk, and taken apart into connected pieces. Knows no colours and no shapes.

All masks are bool [H, W]; what lies beyond the border counts as what lies at it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pieces(mask: np.ndarray, least_area: int) -> list[np.ndarray]:
    """Connected pieces (4 neighbours) of at least `least_area` pixels, as masks, top to bottom."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # the least label flows along whole runs, rows and columns in turn
        flowed = _flow(_flow(labels).T).T
        if np.array_equal(flowed, labels):
            break
        labels = flowed
    names, areas = np.unique(labels[mask], return_counts=True)
    return [labels == name for name, area in zip(names, areas, strict=True) if area >= least_area]


def _flow(labels: np.ndarray) -> np.ndarray:
    """Each run of labels along a row gets its least one."""
    flat = np.pad(labels, ((0, 0), (0, 1))).ravel()  # a zero ends each row
    starts = np.flatnonzero((flat > 0) & (np.concatenate([[0], flat[:-1]]) == 0))
    if len(starts) == 0:
        return labels
    run = np.cumsum(np.isin(np.arange(len(flat)), starts, assume_unique=True)) - 1
    least = np.full(len(starts), np.iinfo(labels.dtype).max, labels.dtype)
    np.minimum.at(least, run[flat > 0], flat[flat > 0])
    flat[flat > 0] = least[run[flat > 0]]
    return flat.reshape(labels.shape[0], -1)[:, :-1]


def opened(mask: np.ndarray) -> np.ndarray:
    """Without what is at most two pixels thin: edges between tones and colours, noise."""
    return grown(eroded(mask, 1), 1)


def eroded(mask: np.ndarray, px: int) -> np.ndarray:
    """The pixels whose square of `px` pixels to each side lies in the mask."""
    return ~grown(~mask, px)


def grown(mask: np.ndarray, px: int) -> np.ndarray:
    """The pixels with a pixel of the mask within `px` pixels in both directions."""
    for axis in (0, 1):
        padded = np.pad(mask, [(px + 1, px) if k == axis else (0, 0) for k in (0, 1)])
        counted = np.cumsum(padded, axis, dtype=np.int32)
        length, wide = mask.shape[axis], 2 * px + 1
        ends = np.take(counted, np.arange(wide, wide + length), axis)
        mask = ends > np.take(counted, np.arange(length), axis)
    return mask


def outline(mask: np.ndarray, px: int) -> np.ndarray:
    """The pixels within `px` pixels of the mask's edge, on both sides of it."""
    return grown(mask, px) & ~eroded(mask, px)


def away_from(some: Sequence[np.ndarray], px: int, shape: tuple[int, int]) -> np.ndarray:
    """The pixels more than `px` pixels from each of some masks of that `shape`: all where there is none."""
    return ~grown(np.logical_or.reduce([np.zeros(shape, bool), *some]), px)
