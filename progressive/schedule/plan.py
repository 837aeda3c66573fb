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

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from overtone.progressive.cost import BY_TOKENS, StepCost
from overtone.progressive.formulas import Grid, Spectrum, matched, rewind, side_ratio
from overtone.progressive.schedule.drift import Drift
from overtone.progressive.schedule.ladders import (
    Cost,
    Ends,
    Rung,
    auto,
    grid_for,
    latent_frames,
    rungs_of,
    size_of,
)
from overtone.progressive.settings import Mode, Noise, Sampling, Transform

if TYPE_CHECKING:
    from overtone.progressive.families import Family


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
    unguided: tuple[int, ...] = ()
    """Those of the stage's steps, by their numbers in the full schedule, that run no negative prompt though
    the others do: they start from noise levels outside `guidance_interval`."""

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

    @property
    def guided_steps(self) -> int:
        """Steps that are not `unguided`."""
        return self.steps - len(self.unguided)

    @property
    def parts(self) -> tuple[Stage, ...]:
        """The stage cut where guidance begins and ends: each part's steps are all guided, or all are not."""
        runs = [list(run) for _, run in groupby(range(self.first, self.last), self.unguided.__contains__)]
        return tuple(self.cut(run[0], run[-1] + 1) for run in runs)

    def cut(self, first: int, last: int) -> Stage:
        """Steps [first, last) of the stage, by their numbers in the full schedule."""
        sigmas = self.sigmas[first - self.first : last - self.first + 1]
        unguided = tuple(step for step in self.unguided if first <= step < last)
        return replace(self, first=first, last=last, sigmas=sigmas, unguided=unguided)

    def one_step(self) -> Stage:
        """The stage cut to the first of its steps that cost the most."""
        steps = range(self.first, self.last)
        first = next((step for step in steps if step not in self.unguided), self.first)
        return self.cut(first, first + 1)


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
    step_cost: StepCost = BY_TOKENS
    """What a step costs on each grid."""
    start: int = 0
    """The step of the schedule that the first stage begins with; above 0 a row starts from a picture, noisy
    as `sigmas` have it there."""

    @property
    def steps(self) -> int:
        """Transformer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def guided_steps(self) -> int:
        """Those of them that run a negative prompt, where the row has one to run."""
        return sum(stage.guided_steps for stage in self.stages)

    @property
    def token_steps(self) -> int:
        """Image tokens times steps, summed over stages."""
        return sum(stage.tokens * stage.steps for stage in self.stages)

    @property
    def fullres_token_steps(self) -> int:
        """The same, had every step run on the full grid."""
        return self.stages[-1].tokens * self.steps

    @property
    def token_saving(self) -> float:
        """Full-resolution token-steps over this plan's: the saving if all that a step costs were its image
        tokens."""
        return self.fullres_token_steps / self.token_steps

    @property
    def cost(self) -> float:
        """All steps together, in full-size steps of the same model, guided where rows are: full resolution
        with as many steps costs about as much."""
        stages = [(stage.tokens, stage.guided_steps) for stage in self.stages]
        unguided = [(stage.tokens, len(stage.unguided)) for stage in self.stages]
        return self.step_cost.full_size_steps(stages, self.stages[-1].tokens, unguided=unguided)

    @property
    def saving(self) -> float:
        """Cost of as many steps at full resolution, over this plan's. In FLOPs, unless `step_cost` counts
        image tokens alone."""
        return self.steps / self.cost

    @property
    def split(self) -> str:
        """`13 @ 16x16 + 17 @ 32x32`: steps @ latent grid of each stage."""
        return " + ".join(f"{stage.steps} @ {stage.height}x{stage.width}" for stage in self.stages)

    def one_step_each(self) -> SamplingPlan:
        """Each stage cut to one step, a guided one where there is any: every grid and expansion once, to warm
        up."""
        return replace(self, stages=tuple(stage.one_step() for stage in self.stages))

    def kappa(self, index: int) -> float:
        """Factor on the latent at the expansion from stage `index` to the next; 1 in mode `dct`."""
        here, there = self.stages[index], self.stages[index + 1]
        return 1.0 if self.mode == "dct" else rewind(here.sigma_end, side_ratio(here.grid, there.grid))[0]

    def fill(self, index: int) -> Spectrum | None:
        """Signal spectrum, on the grid of stage `index` + 1, that the noise filled in at the expansion there
        makes room for; None: white noise of the stage's noise level, as published."""
        return self.spectrum_on(self.stages[index + 1]) if self.mode == "dct_matched" else None

    def spectrum_on(self, stage: Stage) -> Spectrum:
        """The latents' spectrum on a stage's grid, where coefficients are smaller."""
        ratio = side_ratio(stage.grid, self.stages[-1].grid)
        return Spectrum(self.spectrum.amplitude / ratio**2, self.spectrum.beta)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, derived figures included."""
        plan = asdict(self)
        del plan["step_cost"]
        for stage, shown in zip(self.stages, plan["stages"], strict=True):
            shown |= {
                "steps": stage.steps,
                "sigma_start": stage.sigma_start,
                "sigma_end": stage.sigma_end,
                "sigmas": list(stage.sigmas),
                "unguided": list(stage.unguided),
            }
        return plan | {
            "scales": list(self.scales),
            "sigmas": list(self.sigmas),
            "stages": list(plan["stages"]),
            "steps": self.steps,
            "guided_steps": self.guided_steps,
            "token_steps": self.token_steps,
            "fullres_token_steps": self.fullres_token_steps,
            "cost": self.cost,
            "cost_counts": self.step_cost.counts,
            "text_tokens": self.step_cost.text_tokens,
            "saving": self.saving,
            "token_saving": self.token_saving,
        }


def plan_sampling(
    sampling: Sampling,
    family: Family,
    sigmas: Sequence[float],
    *,
    height_px: int | None = None,
    width_px: int | None = None,
    num_frames: int | None = None,
    cost: Cost | None = None,
    step_cost: StepCost = BY_TOKENS,
) -> SamplingPlan:
    """Stages of one sample.

    `sigmas` is the pipeline's own full-resolution schedule for this size: num_steps + 1 noise levels that
    never rise, the last 0. A size given here comes before the settings', which come before the family's.
    `cost` is used by `scales: auto` alone; a job leaves it out, so that workers and `overtone plan` agree.
    `step_cost` decides nothing: it is what the plan's cost and saving are counted in.
    ValueError that names the value and the allowed range for whatever cannot be done.
    """
    sigmas = tuple(float(sigma) for sigma in sigmas)
    if len(sigmas) < 2 or sigmas[-1] != 0 or any(b > a for a, b in pairwise(sigmas)):
        raise ValueError(
            f"sigmas must fall to 0 over at least one step; got {list(sigmas[:3])}...{sigmas[-1:]}"
        )
    height_px, width_px, num_frames = size_of(sampling, family, height_px, width_px, num_frames)
    full = grid_for(family, height_px, width_px)
    frames = latent_frames(family, num_frames)
    spectrum = Spectrum(*sampling.spectrum) if sampling.spectrum else family.spectrum
    delta = family.default_delta if sampling.delta is None else sampling.delta
    tokens_per_cell = frames / family.patch**2

    if sampling.mode == "fullres":
        rungs = [Rung(1.0, full, len(sigmas) - 1)]
    else:
        drift = Drift(sampling.consistency) if sampling.consistency else None
        ends = Ends(full, sigmas, spectrum, delta, family.waves_per_cell, drift, sampling.mode)
        if sampling.scales == "auto":
            if sampling.transition_sigmas is not None:
                raise ValueError(
                    "transition_sigmas needs a ladder: give `levels`, or `scales` other than auto"
                )
            rungs = auto(sampling, full, family.grid_multiple, tokens_per_cell, cost or Cost(), ends)
        else:
            rungs = rungs_of(sampling, full, family.grid_multiple, height_px, sigmas, ends)

    stages: list[Stage] = []
    scales: list[float] = []
    first = start = sampling.first_step(len(sigmas) - 1)
    for rung in rungs:
        if rung.end <= first:
            continue
        levels = list(sigmas[first : rung.end + 1])
        if stages and sampling.mode == "dct_rewind":
            levels[0] = rewind(levels[0], side_ratio(stages[-1].grid, rung.grid))[1]
        if sampling.mode == "dct_matched":
            levels = [matched(level, side_ratio(rung.grid, full)) for level in levels]
        tokens = round(rung.grid[0] * rung.grid[1] * tokens_per_cell)
        # By the full schedule's level, not the stage's own: so every ladder guides the same steps.
        unguided = tuple(k for k in range(first, rung.end) if not sampling.guides_from(sigmas[k]))
        stages.append(Stage(*rung.grid, frames, first, rung.end, tokens, tuple(levels), unguided))
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
        step_cost=step_cost,
        start=start,
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
