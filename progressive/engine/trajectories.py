"""Rows on their way from noise to latents, stage by stage. Knows no pixels, no jobs and no compiling.

`Trajectories.run` takes rows through one stage and splits them into chunks; `run_stage` is the story of one
chunk: coarsen or expand, set the scheduler, run, check that all is finite, report. What rows start from is in
engine/starts.py, how the pipeline is called in engine/stage_runner.py (`StageRunner`); the mathematics is in
spectral.py, noise.py and staged.py.

The tour goes on in cluster/worker/pictures.py, where a batch's latents become encoded pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from overtone.progressive import noise, spectral
from overtone.progressive.engine.call import OnStep, PipelineCall
from overtone.progressive.engine.callbacks import Carried
from overtone.progressive.engine.stage_runner import StageInput, StageRunner
from overtone.progressive.engine.starts import Starts, exact
from overtone.progressive.engine.text import Encoded
from overtone.progressive.errors import NonFiniteLatents
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Sampling
from overtone.progressive.staged import Trajectory


class Trajectories:
    """Rows on their way from noise to latents. Between stages they wait on the device, which is little: what
    a transformer holds while it runs is far more.

        rows = engine.begin(plan, encoded, seeds, sampling)
        for stage in range(len(plan.stages)):
            rows.run(stage, range(len(rows)))          # or a few at a time, in any order
        images = engine.decode(plan, rows.latents(range(len(rows))))

    A row comes out the same however it is batched, within what a batched matrix product rounds. Where a chunk
    raises, all rows of that `run` stay where they were, to be run again.
    """

    def __init__(
        self,
        call: PipelineCall,
        plan: SamplingPlan,
        encoded: Encoded,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        runner: StageRunner,
    ) -> None:
        self.plan = plan
        self._call, self._encoded, self._seeds, self._sampling = call, encoded, list(seeds), sampling
        self._runner = runner
        self._schedule = call.schedule(
            plan.num_steps, plan.height_px, plan.width_px, plan.num_frames, sampling
        )
        self._starts = Starts(call, plan, encoded.pictures, self._seeds, sampling.fit)
        self._latents = list(self._starts.full())  # [C, H, W] each, float32
        self._carried = [Carried() for _ in self._seeds]
        # Schedulers that continue from one stage to the next, by the rows that walk together. Only plans made
        # by hand need them, for these may have consecutive stages on one grid; after an expansion every chunk
        # takes a fresh copy of the schedule's scheduler, whatever is kept here.
        self._walks: dict[tuple[int, ...], Trajectory] = {}

    def __len__(self) -> int:
        return len(self._seeds)

    def run(self, index: int, rows: Sequence[int], *, on_step: OnStep | None = None) -> list[StageReport]:
        """Take rows that have stage `index` next through it, as one batch.

        Consecutive stages on one grid, which only a plan made by hand has, must be run with the same rows.
        Raises NonFiniteLatents where rows went wrong; an error of the pipeline goes through. `on_step` counts
        the steps of this batch.
        """
        # Rows with a negative prompt and rows without, where both may be, are called in another way.
        plain = [row for row in rows if self._encoded.negative[row] is None]
        guided = [row for row in rows if self._encoded.negative[row] is not None]
        chunks = [
            part
            for group in (plain, guided)
            if group
            for chunk in self._runner.chunks(self.plan, index, group, self._sampling)
            for part in self._alike(chunk)
        ]
        steps, reports = self.plan.stages[index].steps, list[StageReport]()
        after: dict[int, tuple[Tensor, Carried, Encoded]] = {}
        for number, chunk in enumerate(chunks):
            counted = on_step and counting(on_step, number * steps, len(chunks) * steps)
            latents, carried, of_chunk = self.run_stage(index, chunk, counted)
            encoded = carried.encoded or self._encoded[list(chunk)]
            for place, row in enumerate(chunk):
                after[row] = latents[place], carried, encoded[[place]]
            reports += of_chunk
        texts = [self._encoded[[row]] for row in range(len(self))]
        for row in after:  # all or none: no row goes through a stage twice
            self._latents[row], self._carried[row], texts[row] = after[row]
        self._encoded = Encoded.cat(texts)
        return reports

    def _alike(self, chunk: Sequence[int]) -> list[list[int]]:
        """A chunk's rows, apart where callbacks have changed different things for them."""
        parts: dict[str, list[int]] = {}
        for row in chunk:
            parts.setdefault(self._carried[row].key, []).append(row)
        return list(parts.values())

    def run_stage(
        self, index: int, chunk: Sequence[int], on_step: OnStep | None = None
    ) -> tuple[Tensor, Carried, list[StageReport]]:
        """One chunk of rows through stage `index`: their latents after it, and what callbacks have changed
        for them."""
        plan, call, count = self.plan, self._call, len(set(chunk))
        stage, before = plan.stages[index], plan.stages[index - 1] if index else None
        reports: list[StageReport] = []
        start = call.now()
        latents = self.latents(chunk)
        if before is None and stage.grid != plan.stages[-1].grid:
            latents = self._starts.coarse(stage, chunk)
        elif before is not None and stage.grid != before.grid:
            latents = expand(call, plan, index, latents, self._starts.base(index, chunk))
            sigmas = before.sigma_end, stage.sigma_start
            reports.append(_report("expand", stage, 0, call.now() - start, sigmas, count))
            start = call.now()
        carried, steps = self._carried[chunk[0]].copy(), 0
        if stage.steps and not carried.interrupted:
            given = self._given(index, chunk, latents, carried, on_step)
            latents, steps = self._runner.run(given), given.scheduler.done
        _check_finite(latents, chunk, index)
        sigmas = stage.sigma_start, stage.sigma_end
        reports.append(_report("denoise", stage, steps, call.now() - start, sigmas, count))
        return latents, carried, reports

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Where these rows, on one grid, are now: [B, C, H, W] or [B, C, T, H, W]."""
        return torch.stack([self._latents[row] for row in rows])

    def _given(
        self, index: int, chunk: Sequence[int], latents: Tensor, carried: Carried, on_step: OnStep | None
    ) -> StageInput:
        """The stage's scheduler, and the rows' own generators and texts beside their latents."""
        generators = [noise.row_generator(self._seeds[row], noise.sampler(index)) for row in chunk]
        walk = self._walks.setdefault(tuple(chunk), Trajectory(self._schedule, self.plan))
        scheduler, encoded = walk.stage(index, generators), self._encoded[list(chunk)]
        scheduler.keep = self._starts.keep(index, chunk)
        sampling = carried.changed(self._sampling)
        return StageInput(
            self.plan, index, scheduler, latents, encoded, generators, sampling, on_step, carried
        )


@dataclass(frozen=True)
class StageReport:
    """What one stage of one chunk, or the expansion before it, took."""

    kind: Literal["denoise", "expand"]
    height: int
    """Latent rows; of the finer grid for an expansion."""
    width: int
    frames: int
    """Latent frames; 1 for images."""
    tokens: int
    """Image tokens of one row."""
    steps: int
    """Transformer steps; 0 for an expansion."""
    seconds: float
    """For the whole chunk, with the device idle at both ends."""
    sigma_start: float
    sigma_end: float
    rows: int
    """In the chunk, without the copies that fill it up."""


def expand(call: PipelineCall, plan: SamplingPlan, index: int, latents: Tensor, base: Tensor) -> Tensor:
    """Latents after stage `index` - 1 on the grid of stage `index`, float32; `base`: see `Starts.base`."""
    stage = plan.stages[index]
    with exact(call.device):
        return spectral.expand(
            latents,
            base,
            plan.stages[index - 1].sigma_end,
            *stage.grid,
            kappa=plan.kappa(index - 1),
            transform=plan.transform,
            patch=call.family.subcells,
            fill=plan.fill(index - 1),
        )


def _check_finite(latents: Tensor, chunk: Sequence[int], index: int) -> None:
    """NonFiniteLatents that names the rows whose latents are NaN or infinite."""
    finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()  # [B]
    if not all(finite):
        bad = {row for row, ok in zip(chunk, finite, strict=True) if not ok}
        raise NonFiniteLatents(sorted(bad), index)


def _report(
    kind: Literal["denoise", "expand"],
    stage: Stage,
    steps: int,
    seconds: float,
    sigmas: tuple[float, float],
    rows: int,
) -> StageReport:
    return StageReport(kind, *stage.grid, stage.frames, stage.tokens, steps, seconds, *sigmas, rows)


def counting(on_step: OnStep, before: int, total: int) -> OnStep:
    """A callback for the steps of one chunk that counts on from `before` and reports `total` steps in all."""
    return lambda done, _: on_step(before + done, total)
