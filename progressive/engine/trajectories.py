"""Rows on their way from noise to latents, stage by stage. Knows no pictures, no jobs and no compiling.

`Trajectories.run` takes rows through one stage and splits them into chunks; `run_stage` is the story of one
chunk: coarsen or expand, set the scheduler, run, check that all is finite, report. How the pipeline is called
is the `StageRunner`'s (engine/stage_runner.py); the mathematics is in spectral.py, noise.py and staged.py.

The tour goes on in cluster/worker/pictures.py, where a batch's latents become encoded pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from overtone.progressive import layouts, noise, spectral
from overtone.progressive.engine.call import OnStep, PipelineCall
from overtone.progressive.engine.callbacks import Carried
from overtone.progressive.engine.stage_runner import StageInput, StageRunner
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
        full = plan.stages[-1]
        # On the full grid, for all stages: [C, H, W] each, float32.
        self._base = list(stage_noise(call, self._seeds, noise.BASE, full))
        self._latents = list(self._base)
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
            latents = corner(call, plan, stage, latents)
        elif before is not None and stage.grid != before.grid:
            base, seeds = torch.stack([self._base[row] for row in chunk]), [self._seeds[row] for row in chunk]
            latents = expand(call, plan, index, latents, base, seeds)
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


def stage_noise(call: PipelineCall, seeds: Sequence[int], purpose: str, stage: Stage) -> Tensor:
    """The rows' noise for one purpose on the stage's grid, float32 on the pipeline's device."""
    shape = layouts.shape(call.family, call.channels, stage.frames, *stage.grid)
    return noise.batch_noise(seeds, purpose, shape).to(call.device)


def corner(call: PipelineCall, plan: SamplingPlan, stage: Stage, base: Tensor) -> Tensor:
    """The noise that a coarse trajectory starts from, as white as the full grid's."""
    with exact(call.device):
        return spectral.corner(base, *stage.grid, transform=plan.transform, patch=call.family.subcells)


def expand(
    call: PipelineCall, plan: SamplingPlan, index: int, latents: Tensor, base: Tensor, seeds: Sequence[int]
) -> Tensor:
    """Latents after stage `index` - 1 on the grid of stage `index`, float32."""
    stage = plan.stages[index]
    if plan.noise == "fresh":
        base = stage_noise(call, seeds, noise.expansion(index - 1), stage)
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


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32, whatever the caller allows: TF32 keeps 10 bits, autocast 8."""
    before = torch.get_float32_matmul_precision()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


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
