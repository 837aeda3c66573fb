"""Sizes, the grids that a family can make of them, and the ladders that climb through those grids. Knows no
stages and no noise levels but those at which a rung ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from overtone.progressive.formulas import Grid, Spectrum, first_at_or_below, rewind, side_ratio, t_w
from overtone.progressive.schedule.drift import Drift
from overtone.progressive.settings import Mode, Sampling

if TYPE_CHECKING:
    from overtone.progressive.families import Family


@dataclass(frozen=True)
class Cost:
    """FLOPs of one transformer call on n image tokens: linear * m + attention * m^2 with m = n + text_tokens.

    The default is a block of width 3072 in units of its linear FLOPs a token: 24 D^2 for the projections
    and the MLP, 4 D m for scores and values, hence 1 / (6 D).
    """

    linear: float = 1.0
    attention: float = 1 / (6 * 3072)
    text_tokens: int = 512

    def step(self, tokens: int) -> float:
        """FLOPs of one step on `tokens` image tokens."""
        total = tokens + self.text_tokens
        return self.linear * total + self.attention * total**2


def size_of(
    sampling: Sampling,
    family: Family,
    height_px: int | None = None,
    width_px: int | None = None,
    num_frames: int | None = None,
) -> tuple[int, int, int | None]:
    """(height, width, frames) of a sample: a size given here comes before the settings', which come before
    the family's."""
    return (
        height_px or sampling.height or family.default_height,
        width_px or sampling.width or family.default_width,
        num_frames or sampling.num_frames or family.default_frames,
    )


_SIDES_PX = 64
"""Sides of samples whose size follows from a picture are multiples of this: few sizes, so that rows of a size
are many, and halves of them that every family's grid can make."""


def size_from(family: Family, height_px: int, width_px: int) -> tuple[int, int]:
    """(height, width) of a sample that starts from a picture of this size: in the ratio of its sides, and
    with as many pixels as the family usually makes, or as the picture has if these are fewer; each side at
    the nearest multiple of 64 px."""
    unit = math.lcm(_SIDES_PX, family.cell_px * family.grid_multiple)
    area = min(height_px * width_px, family.default_height * family.default_width)
    scale = math.sqrt(area / (height_px * width_px))
    height, width = (
        max(unit, math.floor(side * scale / unit + 0.5) * unit) for side in (height_px, width_px)
    )
    return height, width


def steps_of(sampling: Sampling, family: Family, recommended: int | None = None) -> int:
    """Steps of the full schedule: the settings' number comes before the one that the checkpoint's authors
    recommend, which comes before the family's."""
    return sampling.num_steps or recommended or family.default_steps


def grid_for(family: Family, height_px: int, width_px: int) -> Grid:
    """Full latent grid of a size in pixels. ValueError that names the nearest sizes if it cannot be made."""
    unit = family.cell_px * family.grid_multiple
    if height_px % unit or width_px % unit or height_px < unit or width_px < unit:
        heights, widths = _nearest(height_px, unit), _nearest(width_px, unit)
        near = ", ".join(f"{h}x{w}" for h in heights for w in widths)
        raise ValueError(
            f"height x width is {height_px}x{width_px} px; {family.name} makes multiples of {unit} px; "
            f"the nearest sizes are {near}"
        )
    return height_px // family.cell_px, width_px // family.cell_px


def _nearest(size: int, unit: int) -> list[int]:
    below = size // unit * unit
    return [size] if below == size and size else [s for s in (below, below + unit) if s]


def latent_frames(family: Family, num_frames: int | None) -> int:
    """Latent frames of a video of `num_frames`; 1 for image families. ValueError for an impossible number."""
    if family.default_frames is None:
        if num_frames not in (None, 1):
            raise ValueError(f"num_frames is {num_frames}; {family.name} makes images, leave it unset")
        return 1
    num_frames = num_frames or family.default_frames
    step = family.frames_per_latent
    if (num_frames - 1) % step or num_frames < 1:
        below = (num_frames - 1) // step * step + 1
        raise ValueError(
            f"num_frames is {num_frames}; {family.name} makes {step}k + 1 frames; "
            f"the nearest are {below} and {below + step}"
        )
    return (num_frames - 1) // step + 1


def coarse_grid(full: Grid, scale: float, multiple: int) -> Grid:
    """Grid of a stage: each side scaled, then snapped to the nearest multiple (a tie goes up)."""
    height, width = (max(multiple, math.floor(scale * side / multiple + 0.5) * multiple) for side in full)
    return min(height, full[0]), min(width, full[1])


def carried(full: Grid, scale: float, grid: Grid) -> int:
    """Highest frequency w that a stage's grid is trusted with: floor(s * min(H, W) / 2) of the full grid.

    Where snapping made a side smaller than the scale asks, that side's share counts.
    """
    share = min(scale, grid[0] / full[0], grid[1] / full[1])
    return math.floor(share * min(full) / 2 + 1e-9)


@dataclass(frozen=True)
class Rung:
    """One grid of a ladder."""

    scale: float
    grid: Grid
    end: int
    """Step at which the stage at this rung ends."""


def _smallest_scale(full: Grid, multiple: int) -> float:
    return max(multiple, 2) / min(full)


def ladder_scales(sampling: Sampling, full: Grid, multiple: int, height_px: int) -> tuple[float, ...]:
    """The ladder that `levels` or `scales` ask for, as fractions ending at 1. Not for `scales: auto`."""
    smallest = _smallest_scale(full, multiple)
    if sampling.scales is None:
        levels = 1 if sampling.levels is None else sampling.levels
        most = max(0, math.floor(math.log2(1 / smallest) + 1e-9))
        if levels > most:
            if sampling.levels is None:
                return (1.0,)
            halved = (
                f"can be halved {most} times"
                if most > 1
                else "can be halved once"
                if most
                else "is too small"
            )
            raise ValueError(
                f"levels is {levels}; a latent grid of {full[0]}x{full[1]} {halved}: set levels to {most}"
            )
        return tuple(2.0**-level for level in range(levels, -1, -1))
    given = sampling.scales
    assert not isinstance(given, str)
    if given[-1] > 1:  # heights in pixels
        if given[-1] != height_px or any(s != int(s) for s in given):
            raise ValueError(
                f"scales is {list(given)}; heights in pixels must be whole numbers and end at the output's "
                f"height, {height_px} (use fractions ending at 1.0 for outputs of several sizes)"
            )
        scales = tuple(s / height_px for s in given)
    else:
        scales = tuple(float(s) for s in given)
    if scales[-1] != 1:
        raise ValueError(f"scales is {list(given)}; it must end at full size, 1.0 (or {height_px} px)")
    if any(b <= a for a, b in pairwise(scales)):
        raise ValueError(f"scales is {list(given)}; it must increase")
    if scales[0] < smallest - 1e-9:
        raise ValueError(
            f"scales starts at {given[0]}; a latent grid of {full[0]}x{full[1]} allows {smallest:.4g} to 1"
        )
    return scales


def rungs_of(
    sampling: Sampling, full: Grid, multiple: int, height_px: int, sigmas: Sequence[float], ends: Ends
) -> list[Rung]:
    """The ladder asked for, as rungs with their last steps, the full grid included."""
    scales = ladder_scales(sampling, full, multiple, height_px)
    grids = [coarse_grid(full, scale, multiple) for scale in scales[:-1]] + [full]
    for (a, small), (b, large) in pairwise(zip(scales, grids, strict=True)):
        if small == large:
            raise ValueError(
                f"scales {a:.4g} and {b:.4g} both give a latent grid of {small[0]}x{small[1]}; "
                f"sides must be multiples of {multiple} cells, so leave one of them out"
            )
    thresholds = sampling.transition_sigmas
    if thresholds is not None and len(thresholds) != len(scales) - 1:
        raise ValueError(
            f"transition_sigmas has {len(thresholds)} values; a ladder of {len(scales)} rungs "
            f"{[round(s, 4) for s in scales]} takes {len(scales) - 1}"
        )
    rungs = []
    for i, (scale, grid) in enumerate(zip(scales[:-1], grids[:-1], strict=True)):
        end = first_at_or_below(sigmas, thresholds[i]) if thresholds is not None else ends(scale, grid)
        rungs.append(Rung(scale, grid, end))
    return [*rungs, Rung(1.0, full, len(sigmas) - 1)]


class Ends:
    """Where a stage ends: the first step at or below t_w of what its grid carries, w counted as
    `Family.waves_per_cell` says. With a measured `drift`, the square of what the stage has drifted by then is
    taken off delta: the two errors are powers over the signal's own and add up."""

    def __init__(
        self,
        full: Grid,
        sigmas: Sequence[float],
        spectrum: Spectrum,
        delta: float,
        waves_per_cell: int = 1,
        drift: Drift | None = None,
        mode: Mode = "dct_rewind",
    ) -> None:
        self.full, self.sigmas, self.spectrum, self.delta = full, sigmas, spectrum, delta
        self.waves_per_cell, self.drift, self.mode = waves_per_cell, drift, mode

    def __call__(self, scale: float, grid: Grid) -> int:
        finer = (self.waves_per_cell * self.full[0], self.waves_per_cell * self.full[1])
        w = carried(finer, scale, (self.waves_per_cell * grid[0], self.waves_per_cell * grid[1]))
        if not w:
            return 0
        end = first_at_or_below(self.sigmas, t_w(w, self.spectrum, self.delta))
        return end if self.drift is None else self._within(self.drift, w, scale, grid, end)

    def _within(self, drift: Drift, w: int, scale: float, grid: Grid, end: int) -> int:
        ratio = side_ratio(grid, self.full)
        levels = self.sigmas[: end + 1]
        if self.mode == "dct_rewind":  # the full grid's levels that the coarse grid's own mean
            levels = [rewind(sigma, ratio)[1] for sigma in levels]
        for step, drifted in enumerate(drift.along(scale, levels)):
            left = self.delta - drifted**2
            if left <= 0 or self.sigmas[step] <= t_w(w, self.spectrum, left):
                return step
        return end


def auto(
    sampling: Sampling, full: Grid, multiple: int, frames_tokens: float, cost: Cost, ends: Ends
) -> list[Rung]:
    """The ladder with the fewest estimated FLOPs, exactly, over all grids that the family can make, from the
    step that samples begin with.

    A rung's last step depends on its own grid alone, so the best ladder that ends at a rung builds on the
    best shorter one: dynamic programming over (rung, number of rungs). Of equals, the one with fewer rungs.
    """
    num_steps = len(ends.sigmas) - 1
    start = sampling.first_step(num_steps)
    rungs = [Rung(scale, grid, ends(scale, grid)) for scale, grid in _candidates(sampling, full, multiple)]
    rungs = [rung for rung in rungs if rung.end > start] + [Rung(1.0, full, num_steps)]
    flops = [cost.step(round(rung.grid[0] * rung.grid[1] * frames_tokens)) for rung in rungs]
    best: list[tuple[float, tuple[int, ...]]] = [
        (flops[i] * (rung.end - start), (i,)) for i, rung in enumerate(rungs)
    ]  # ladders of one rung that end here
    answer = best[-1]
    for _ in range(1, sampling.max_rungs):
        longer: list[tuple[float, tuple[int, ...]]] = []
        for i, rung in enumerate(rungs):
            options = [
                (best[j][0] + flops[i] * (rung.end - rungs[j].end), (*best[j][1], i))
                for j in range(i)
                if best[j][1] and rungs[j].end < rung.end and _inside(rungs[j].grid, rung.grid)
            ]
            longer.append(min(options, default=(math.inf, ())))
        best = longer
        if best[-1][0] < answer[0] * (1 - 1e-9):
            answer = best[-1]
    return [rungs[i] for i in answer[1]]


def _inside(small: Grid, large: Grid) -> bool:
    return small[0] <= large[0] and small[1] <= large[1] and small != large


def _candidates(sampling: Sampling, full: Grid, multiple: int) -> list[tuple[float, Grid]]:
    """Scales below 1 that `auto` may choose from, with their grids, increasing."""
    measured = Drift(sampling.consistency).smallest if sampling.consistency else 0.0
    smallest = max(sampling.min_scale, measured, _smallest_scale(full, multiple)) - 1e-9
    if sampling.transform == "haar":
        scales = [2.0**-level for level in range(16, 0, -1)]
        scales = [s for s in scales if all(side * s % multiple == 0 for side in full)]
    else:
        short = min(full)
        scales = [side / short for side in range(multiple, short, multiple)]
    found: dict[Grid, float] = {}
    for scale in scales:
        grid = coarse_grid(full, scale, multiple)
        if scale >= smallest and grid != full:
            found.setdefault(grid, scale)
    return [(scale, grid) for grid, scale in found.items()]
