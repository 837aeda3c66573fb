"""The equations of the method: pure functions of numbers. Knows no plan, no tensor and no settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Grid = tuple[int, int]
"""Rows and columns of a latent grid, in the cells that the pipeline counts."""


@dataclass(frozen=True)
class Spectrum:
    """P(w) = amplitude * w^-beta, the mean square of an orthonormal DCT or Fourier coefficient.

    w counts cycles over the shorter side of the full grid: DCT-II index k is w = k / 2, FFT index k is w = k.
    """

    amplitude: float
    beta: float

    def __post_init__(self) -> None:
        if not (self.amplitude > 0 and math.isfinite(self.amplitude) and self.beta > 0):
            raise ValueError(f"spectrum is {(self.amplitude, self.beta)}; both numbers must be above 0")

    def power(self, w: float) -> float:
        """P(w) for w > 0."""
        return self.amplitude * w**-self.beta


def t_w(w: float, spectrum: Spectrum, delta: float) -> float:
    """Noise level above which frequency w is noise-dominated within `delta`, in (0, 1).

    t_w = 1 / (1 + sqrt(delta / (P (1 + P - delta)))), P = spectrum.power(w). ValueError unless w > 0 and
    0 < delta < 1, for which 1 + P - delta is positive. Falls as delta or w grows.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; it must be above 0 and below 1")
    if not w > 0:
        raise ValueError(f"frequency w is {w}; it must be above 0")
    power = spectrum.power(w)
    return 1 / (1 + math.sqrt(delta / (power * (1 + power - delta))))


def rewind(sigma: float, ratio: float) -> tuple[float, float]:
    """(kappa, sigma~) of an expansion by side ratio r >= 1 at noise level sigma in [0, 1].

    kappa = r / (1 + (r - 1) sigma) and sigma~ = kappa sigma, so that kappa (1 - sigma) = r (1 - sigma~):
    signal that was 1/r of what the finer grid expects, and noise, are then both right at sigma~ >= sigma.
    """
    if not ratio >= 1:
        raise ValueError(f"side ratio is {ratio}; an expansion has a ratio of at least 1")
    kappa = ratio / (1 + (ratio - 1) * sigma)
    return kappa, kappa * sigma


def matched(sigma: float, ratio: float) -> float:
    """Noise level on a grid `ratio` times coarser with the low band's signal-to-noise ratio at `sigma`.

    sigma / (r - (r - 1) sigma) <= sigma: the inverse of `rewind`'s sigma~, and the timestep shift between
    resolutions of Esser et al. 2024, equation 23. In these levels an Euler step on the coarse grid, times
    kappa, is the full-resolution Euler step on the coefficients that both grids have.
    """
    return sigma / (ratio - (ratio - 1) * sigma)


def side_ratio(coarse: Grid, fine: Grid) -> float:
    """r of an expansion: the square root of the ratio of cell counts, as orthonormal coefficients scale."""
    return math.sqrt(fine[0] * fine[1] / (coarse[0] * coarse[1]))


def first_at_or_below(sigmas: Sequence[float], threshold: float) -> int:
    """Index of the first step whose noise level is at or below `threshold`.

    `sigmas` has one more value than there are steps. At most num_steps - 1, so that the last step is always
    left for the full grid.
    """
    last = len(sigmas) - 2
    return next((i for i in range(last) if sigmas[i] <= threshold), last)
