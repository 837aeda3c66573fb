"""Which steps run on which grid. Plain arithmetic on numbers: knows no tensor, no pipeline, no file.

The method: P(w) = A w^-beta is the mean square of a latent's orthonormal spectral coefficients at w cycles
over the shorter side of the full grid. In x = (1 - sigma) x0 + sigma eps a frequency is noise-dominated
while sigma > t_w (`t_w`), so a grid that cannot carry it loses nothing. A stage at scale s carries
w <= s * min(H, W) / 2 and ends at the first step whose sigma is at or below t_w of that frequency.
An expansion by a side ratio r keeps orthonormal coefficients, which the finer grid expects r times larger:
multiplying by kappa puts the latent at the higher noise level sigma~ of the finer grid (`rewind`).

Mode `dct_rewind` is that method as published: a coarse stage walks the full schedule's own noise levels, so
each expansion falls back to sigma~ and the next step is a long one. Mode `dct_matched` walks each stage at
the levels with the full schedule's signal-to-noise ratios (`matched`): the coarse latent then *is* the low
band of the full-resolution trajectory, step by step, and an expansion lands on the schedule itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from progressive.settings import Mode, Noise, Sampling, Transform

if TYPE_CHECKING:
    from progressive.families import Family

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


@dataclass(frozen=True)
class Stage:
    """Steps [first, last) of the full schedule, all on one grid."""

    height: int
    """Latent rows, as the pipeline counts them."""
    width: int
    """Latent columns."""
    frames: int
    """Latent frames; 1 for images. Never changes between stages."""
    first: int
    last: int
    tokens: int
    sigmas: tuple[float, ...]
    """Noise levels that the stage's steps go through, last - first + 1 of them: the full schedule's, but for
    the first after a rewind (mode `dct_rewind`), or all of them matched to the grid (`dct_matched`)."""

    @property
    def sigma_start(self) -> float:
        """Noise level that the stage starts from, after the rewind."""
        return self.sigmas[0]

    @property
    def sigma_end(self) -> float:
        """Noise level that the stage ends at, before the next expansion."""
        return self.sigmas[-1]

    @property
    def grid(self) -> Grid:
        return self.height, self.width

    @property
    def steps(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class SamplingPlan:
    """All that is decided before a sample is made. The same inputs give the same plan anywhere."""

    family: str
    mode: Mode
    height_px: int
    width_px: int
    num_frames: int | None
    delta: float
    num_steps: int
    """Steps of the schedule; never fewer than the steps of all stages together."""
    scales: tuple[float, ...]
    """The ladder as run, one a stage; the last is 1. A rung that would get no step is left out."""
    sigmas: tuple[float, ...]
    """The full-resolution schedule, num_steps + 1 values, the last is 0."""
    stages: tuple[Stage, ...]
    transform: Transform
    noise: Noise
    spectrum: Spectrum

    @property
    def steps(self) -> int:
        """Transformer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def token_steps(self) -> int:
        """Image tokens times steps, summed over stages."""
        return sum(stage.tokens * stage.steps for stage in self.stages)

    @property
    def fullres_token_steps(self) -> int:
        """The same, had every step run on the full grid."""
        return self.stages[-1].tokens * self.steps

    @property
    def saving(self) -> float:
        """Full-resolution token-steps over this plan's: the saving if all tokens cost the same."""
        return self.fullres_token_steps / self.token_steps

    @property
    def split(self) -> str:
        """`13 @ 16x16 + 17 @ 32x32`: steps @ latent grid of each stage."""
        return " + ".join(f"{stage.steps} @ {stage.height}x{stage.width}" for stage in self.stages)

    def one_step_each(self) -> SamplingPlan:
        """Each stage cut to its first step: every grid and expansion once, to warm up."""
        stages = tuple(replace(s, last=s.first + 1, sigmas=s.sigmas[:2]) for s in self.stages)
        return replace(self, stages=stages)

    def kappa(self, index: int) -> float:
        """Factor on the latent at the expansion from stage `index` to the next; 1 in mode `dct`."""
        here, there = self.stages[index], self.stages[index + 1]
        return 1.0 if self.mode == "dct" else rewind(here.sigma_end, side_ratio(here.grid, there.grid))[0]

    def fill(self, index: int) -> Spectrum | None:
        """Signal spectrum, on the grid of stage `index` + 1, that the noise filled in at the expansion there
        makes room for; None: white noise of the stage's noise level, as published."""
        if self.mode != "dct_matched":
            return None
        ratio = side_ratio(self.stages[index + 1].grid, self.stages[-1].grid)
        return Spectrum(self.spectrum.amplitude / ratio**2, self.spectrum.beta)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, derived figures included."""
        plan = asdict(self)
        for stage, shown in zip(self.stages, plan["stages"], strict=True):
            shown |= {
                "steps": stage.steps,
                "sigma_start": stage.sigma_start,
                "sigma_end": stage.sigma_end,
                "sigmas": list(stage.sigmas),
            }
        return plan | {
            "scales": list(self.scales),
            "sigmas": list(self.sigmas),
            "stages": list(plan["stages"]),
            "steps": self.steps,
            "token_steps": self.token_steps,
            "fullres_token_steps": self.fullres_token_steps,
            "saving": self.saving,
        }


# ---------------------------------------------------------------------------------------- the formulas


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


# ---------------------------------------------------------------------------------------------- grids


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


# -------------------------------------------------------------------------------------------- ladders


@dataclass(frozen=True)
class _Rung:
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
            raise ValueError(
                f"levels is {levels}; a latent grid of {full[0]}x{full[1]} allows 0 to {most} halvings"
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


def _rungs(
    sampling: Sampling, full: Grid, multiple: int, height_px: int, sigmas: Sequence[float], ends: Ends
) -> list[_Rung]:
    """The ladder asked for, as rungs with their last steps, the full grid included."""
    scales = ladder_scales(sampling, full, multiple, height_px)
    grids = [coarse_grid(full, scale, multiple) for scale in scales[:-1]] + [full]
    for (a, small), (b, large) in zip(
        zip(scales, grids, strict=True), zip(scales[1:], grids[1:], strict=True), strict=False
    ):
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
        rungs.append(_Rung(scale, grid, end))
    return [*rungs, _Rung(1.0, full, len(sigmas) - 1)]


class Ends:
    """Where a stage ends by the spectrum: the first step at or below t_w of what its grid carries."""

    def __init__(self, full: Grid, sigmas: Sequence[float], spectrum: Spectrum, delta: float) -> None:
        self.full, self.sigmas, self.spectrum, self.delta = full, sigmas, spectrum, delta

    def __call__(self, scale: float, grid: Grid) -> int:
        w = carried(self.full, scale, grid)
        return first_at_or_below(self.sigmas, t_w(w, self.spectrum, self.delta)) if w else 0


def _auto(
    sampling: Sampling, full: Grid, multiple: int, frames_tokens: float, cost: Cost, ends: Ends
) -> list[_Rung]:
    """The ladder with the fewest estimated FLOPs, exactly, over all grids that the family can make.

    A rung's last step depends on its own grid alone, so the best ladder that ends at a rung builds on the
    best shorter one: dynamic programming over (rung, number of rungs). Of equals, the one with fewer rungs.
    """
    num_steps = len(ends.sigmas) - 1
    rungs = [_Rung(scale, grid, ends(scale, grid)) for scale, grid in _candidates(sampling, full, multiple)]
    rungs = [rung for rung in rungs if rung.end > 0] + [_Rung(1.0, full, num_steps)]
    flops = [cost.step(round(rung.grid[0] * rung.grid[1] * frames_tokens)) for rung in rungs]
    best: list[tuple[float, tuple[int, ...]]] = [
        (flops[i] * rung.end, (i,)) for i, rung in enumerate(rungs)
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
    smallest = max(sampling.min_scale, _smallest_scale(full, multiple)) - 1e-9
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


# ----------------------------------------------------------------------------------------------- plan


def plan_sampling(
    sampling: Sampling,
    family: Family,
    sigmas: Sequence[float],
    *,
    height_px: int | None = None,
    width_px: int | None = None,
    num_frames: int | None = None,
    cost: Cost | None = None,
) -> SamplingPlan:
    """Stages of one sample.

    `sigmas` is the pipeline's own full-resolution schedule for this size: num_steps + 1 noise levels that
    never rise, the last 0. A size given here comes before the settings', which come before the family's.
    `cost` is used by `scales: auto` alone; a job leaves it out, so that workers and `overtone plan` agree.
    ValueError that names the value and the allowed range for whatever cannot be done.
    """
    sigmas = tuple(float(sigma) for sigma in sigmas)
    if len(sigmas) < 2 or sigmas[-1] != 0 or any(b > a for a, b in pairwise(sigmas)):
        raise ValueError(
            f"sigmas must fall to 0 over at least one step; got {list(sigmas[:3])}...{sigmas[-1:]}"
        )
    height_px = height_px or sampling.height or family.default_height
    width_px = width_px or sampling.width or family.default_width
    num_frames = num_frames or sampling.num_frames or family.default_frames
    full = grid_for(family, height_px, width_px)
    frames = latent_frames(family, num_frames)
    spectrum = Spectrum(*sampling.spectrum) if sampling.spectrum else family.spectrum
    delta = family.default_delta if sampling.delta is None else sampling.delta
    tokens_per_cell = frames / family.patch**2

    if sampling.mode == "fullres":
        rungs = [_Rung(1.0, full, len(sigmas) - 1)]
    else:
        ends = Ends(full, sigmas, spectrum, delta)
        if sampling.scales == "auto":
            if sampling.transition_sigmas is not None:
                raise ValueError(
                    "transition_sigmas needs a ladder: give `levels`, or `scales` other than auto"
                )
            rungs = _auto(sampling, full, family.grid_multiple, tokens_per_cell, cost or Cost(), ends)
        else:
            rungs = _rungs(sampling, full, family.grid_multiple, height_px, sigmas, ends)

    stages: list[Stage] = []
    scales: list[float] = []
    first = 0
    for rung in rungs:
        if rung.end <= first:
            continue
        levels = list(sigmas[first : rung.end + 1])
        if stages and sampling.mode == "dct_rewind":
            levels[0] = rewind(levels[0], side_ratio(stages[-1].grid, rung.grid))[1]
        if sampling.mode == "dct_matched":
            levels = [matched(level, side_ratio(rung.grid, full)) for level in levels]
        tokens = round(rung.grid[0] * rung.grid[1] * tokens_per_cell)
        stages.append(Stage(*rung.grid, frames, first, rung.end, tokens, tuple(levels)))
        scales.append(rung.scale)
        first = rung.end
    if sampling.transform == "haar":
        _check_haar(stages)
    return SamplingPlan(
        family=family.name,
        mode=sampling.mode,
        height_px=height_px,
        width_px=width_px,
        num_frames=num_frames if family.default_frames is not None else None,
        delta=delta,
        num_steps=len(sigmas) - 1,
        scales=tuple(scales),
        sigmas=sigmas,
        stages=tuple(stages),
        transform=sampling.transform,
        noise=sampling.noise,
        spectrum=spectrum,
    )


def _check_haar(stages: Sequence[Stage]) -> None:
    for small, large in pairwise(stages):
        ratio = large.height // small.height
        same_shape = (small.height * ratio, small.width * ratio) == (large.height, large.width)
        if ratio.bit_count() != 1 or not same_shape:
            raise ValueError(
                f"transform `haar` can only double a grid; the ladder goes from "
                f"{small.height}x{small.width} to {large.height}x{large.width} latent cells "
                "(use `dct`, or `levels` with sides that halve evenly)"
            )
