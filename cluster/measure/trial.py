"""One candidate of a search while it is measured: what each batch gave, and all figures from these. Knows no
engine and no race.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from overtone.cluster.measure.candidates import Candidate
from overtone.cluster.measure.pace import half_width
from overtone.cluster.measure.scorers import Judge
from overtone.jobs.rows import Row
from overtone.progressive import quality
from overtone.progressive.scoring import Scorer, score_rows

DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "psnr_db": quality.psnr,
    "ssim": quality.ssim,
    "perceptual_distance": quality.perceptual_distance,
    "high_frequency_ratio": quality.high_frequency_ratio,
}
"""Fidelity: of a picture to the reference's picture of the same row."""


@dataclass(frozen=True)
class Measured:
    """One batch at one setting. Keeps few pictures: a search over many rows needs no more memory."""

    rows: int
    seconds: float
    """Of denoising and expansions."""
    values: dict[str, list[float]]
    """Distances to the pictures of the reference, a value a row."""
    scores: list[float]
    """The scorer's numbers, one a row; empty without one."""
    right: list[int]
    """Things drawn right, a number a row; empty without a judge."""
    asked: list[int]
    """Things asked for."""
    stills: list[Image.Image]
    """The pictures of its first rows, for the report."""


def measure(
    rows: Sequence[Row],
    seconds: float,
    media: Sequence[Any],
    reference: Sequence[Any],
    *,
    judge: Judge | None = None,
    scorer: Scorer | None = None,
    shown: int = 0,
) -> Measured:
    """What a setting made of these rows, against the `reference`'s pictures of them; keeps `shown` pictures.
    ScorerError, which names the row, where the scorer fails."""
    values: dict[str, list[float]] = {name: [] for name in DISTANCES}
    pairs = zip(media, reference, strict=True)
    # Pictures all at once; a video's frames are a batch of their own.
    pictures = all(isinstance(made, Image.Image) for made in media)
    for made, wanted in [(media, reference)] if pictures else [([m], [r]) for m, r in pairs]:
        pair = quality.as_tensor(made), quality.as_tensor(wanted)
        for name, distance in DISTANCES.items():
            values[name] += distance(*pair).reshape(len(made), -1).mean(1).tolist()
    found = [judge(made, row.prompt) for row, made in zip(rows, media, strict=True)] if judge else []
    prompts, ids = [row.prompt for row in rows], [row.row_id for row in rows]
    scores = [float(score) for score in score_rows(scorer, media, prompts, ids)] if scorer else []
    return Measured(
        rows=len(rows),
        seconds=seconds,
        values=values,
        scores=scores,
        right=[right for right, _ in found],
        asked=[asked for _, asked in found],
        stills=[still(medium) for medium in media[: max(0, shown)]],
    )


def still(media: Any) -> Image.Image:
    """A picture, or the middle frame of a video."""
    return media if isinstance(media, Image.Image) else Image.fromarray(media[len(media) // 2])


@dataclass
class Trial:
    """One candidate and its batches so far, by their numbers, from the first on."""

    candidate: Candidate
    batches: dict[int, Measured] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that were drawn."""
        return sum(measured.rows for measured in self.batches.values())

    @property
    def judged(self) -> float:
        """Things drawn right, percent."""
        right, asked = (
            sum(sum(getattr(m, name)) for m in self.batches.values()) for name in ("right", "asked")
        )
        return 100 * right / max(1, asked)

    @property
    def pictures(self) -> list[Image.Image]:
        return [still for measured in self.batches.values() for still in measured.stills]

    def scores(self, *, fidelity: bool) -> np.ndarray:
        """Quality of each row, float64 [rows]: the scorer's number or, for `fidelity`, -100 x the perceptual
        distance, which is 0 for the reference."""
        if fidelity:
            return -100 * np.array(
                [v for m in self.batches.values() for v in m.values["perceptual_distance"]]
            )
        return np.array([score for m in self.batches.values() for score in m.scores])

    def means(self) -> dict[str, float]:
        """Each distance, over rows."""
        return {
            name: float(np.mean([v for m in self.batches.values() for v in m.values[name]]))
            for name in DISTANCES
        }

    @property
    def seconds_per_row(self) -> float:
        return sum(m.seconds for m in self.batches.values()) / self.rows

    def saving_over(self, full: Trial) -> tuple[float, float | None]:
        """Seconds of the reference over this one's, of the same batches; and half the 95 % interval of its
        logarithm, None where one batch alone was timed."""
        pairs = [(full.batches[number].seconds, m.seconds) for number, m in self.batches.items()]
        ratios = [math.log(other / own) for other, own in pairs]
        return sum(o for o, _ in pairs) / sum(s for _, s in pairs), half_width(ratios)
