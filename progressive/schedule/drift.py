"""How far a coarse stage carries the low band of a sample away from where the full grid would have it: the
model's own inconsistency between grids, as `overtone calibrate --consistency` measured it. Knows no ladder,
no tensor and no model.

A flow moves by dx/dsigma = (x - D) / sigma, where D is what the model takes the picture to be. A coarse grid
whose D differs from the low band of the full grid's by the share e(scale, sigma) is therefore displaced at
every Euler step by at most e / sigma times the step, over the picture's own size; the sum over a stage's
steps is its drift. It bounds the error of the low band at the end of the stage by the triangle inequality:
later steps on finer grids repair some of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

Profile = tuple[tuple[float, float, float], ...]
"""(scale, sigma, error) of each measurement: the grid over the full one, the full grid's noise level, and the
relative distance of the coarse prediction from the low band of the full one."""


class Drift:
    """A profile, to be asked about any scale and noise level: linear between measurements, constant beyond
    the outermost noise levels, and zero on the full grid."""

    def __init__(self, profile: Profile) -> None:
        """ValueError unless every scale was measured at the same noise levels, each once."""
        self._scales = sorted({scale for scale, _, _ in profile})
        self._sigmas = sorted({sigma for _, sigma, _ in profile})
        found = {(scale, sigma): error for scale, sigma, error in profile}
        if not profile or len(found) != len(profile) or len(found) != len(self._scales) * len(self._sigmas):
            raise ValueError(
                f"consistency has {len(profile)} measurements of {len(self._scales)} scales at "
                f"{len(self._sigmas)} noise levels; each scale needs one at each of them"
            )
        errors = [[found[scale, sigma] for sigma in self._sigmas] for scale in self._scales]
        self._scales.append(1.0)
        self._errors = np.array([*errors, [0.0] * len(self._sigmas)])  # [scales, sigmas]

    @property
    def smallest(self) -> float:
        """The smallest scale that was measured; of smaller ones nothing is known."""
        return self._scales[0]

    def error(self, scale: float, sigma: float) -> float:
        """Relative distance of the prediction at `scale` from the low band of the full one, 0 or more."""
        at_sigma = [np.interp(sigma, self._sigmas, errors) for errors in self._errors]
        return float(np.interp(scale, self._scales, at_sigma))

    def along(self, scale: float, levels: Sequence[float]) -> list[float]:
        """The drift before each step of a walk through the full grid's noise levels `levels`, and after the
        last: one value a level, from 0, never falling. ValueError for a scale below the smallest."""
        if scale < self.smallest - 1e-9:
            raise ValueError(
                f"scale {scale:.4g} is smaller than the smallest that consistency was measured at, "
                f"{self.smallest:.4g}; measure that too (`overtone calibrate --consistency --scale "
                f"{scale:.4g}`), or begin the ladder there"
            )
        drift = [0.0]
        for sigma, lower in pairwise(levels):
            drift.append(
                drift[-1] + (sigma - lower) / sigma * self.error(scale, sigma) if sigma else drift[-1]
            )
        return drift


def consistency_profile(path: str | Path) -> Profile:
    """What a plan needs of the file that `overtone calibrate --consistency` wrote. ValueError that names the
    file for any other."""
    try:
        rows = json.loads(Path(path).read_text())["predictions"]
        found = tuple((float(row["scale"]), float(row["sigma"]), float(row["error"])) for row in rows)
        if not all(0 < scale < 1 and 0 < sigma < 1 and 0 <= e < math.inf for scale, sigma, e in found):
            raise ValueError("a scale or sigma is not between 0 and 1, or an error below 0")
        Drift(found)
    except (KeyError, TypeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a measurement of `calibrate --consistency`: {why}") from error
    return found
