"""How sure a difference between two settings is, from the rows that both made. Knows numbers alone.

The paired bootstrap (Efron and Tibshirani 1993, chapter 8 and 13.3): rows are drawn again with replacement,
the same for both settings, and the middle of what comes out is the interval. It knows only of the rows that
there are: where all of them are equal it is sure, and with ten rows it is surer than it should be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from overtone.progressive.scoring.measures import SetDistance

_CELLS = 1_000_000
"""Numbers held at a time."""


@dataclass(frozen=True)
class Difference:
    """Of one setting to another, in the scorer's units: above 0 the one is better."""

    mean: float
    low: float
    """End of the interval; minus infinity for a single row, which says nothing of others."""
    high: float
    rows: int

    @property
    def half_width(self) -> float:
        """Half the interval."""
        return (self.high - self.low) / 2


def paired_difference(
    scores: np.ndarray,
    others: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Mean of `scores` minus that of `others` over the same rows, float [N] each, with its interval.

    The same seed draws the same rows for any scores of as many rows, so that intervals of several settings
    can be compared. ValueError for different or no rows, NaN, and a confidence outside (0, 1).
    """
    scores, others = np.asarray(scores, np.float64), np.asarray(others, np.float64)
    if scores.shape != others.shape or scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores {scores.shape} and {others.shape} must be of the same rows, at least one")
    differences = scores - others
    if not np.isfinite(differences).all():
        raise ValueError("scores must be finite")
    mean, rows = float(differences.mean()), len(differences)
    drawn = np.concatenate(
        [differences[rows_drawn].mean(axis=1) for rows_drawn in _draws(rows, resamples, seed)]
    )
    return _interval(mean, drawn, confidence, rows)


def paired_distance_difference(
    distance: SetDistance,
    features: np.ndarray,
    others: np.ndarray,
    reference: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> Difference:
    """How much nearer `features` [N, D] are to the reference than `others` [N, D] of the same rows, in the
    units of the distance, with its interval: above 0 the first are better.

    Where the reference has as many rows they must be the same rows too, and are drawn with the others; else
    it stays as it is. Rows drawn twice make every distance larger, so the interval is moved to lie about the
    difference of all rows. ValueError for sets of different rows or features.
    """
    if features.shape != others.shape:
        raise ValueError(f"features {features.shape} and {others.shape} must be of the same rows")
    same_rows = len(reference) == len(features)

    def nearer(rows: np.ndarray) -> float:
        to = reference[rows] if same_rows else reference
        return distance.distance(others[rows], to) - distance.distance(features[rows], to)

    count = len(features)
    mean = nearer(np.arange(count))
    drawn = np.array([nearer(rows) for some in _draws(count, resamples, seed) for rows in some])
    return _interval(mean, drawn - drawn.mean() + mean, confidence, count)


def _draws(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Rows drawn with replacement, some samples at a time: int [S, rows]."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _CELLS // rows)
    for first in range(0, resamples, at_once):
        yield rng.integers(0, rows, (min(at_once, resamples - first), rows))


def _interval(mean: float, drawn: np.ndarray, confidence: float, rows: int) -> Difference:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1")
    if rows == 1:
        return Difference(mean, -np.inf, np.inf, 1)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(mean, float(low), float(high), rows)
