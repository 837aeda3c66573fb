"""TODO: progressive/engine/trajectories.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from overtone.progressive import noise
from overtone.progressive.engine.call import OnStep
from overtone.progressive.engine.text import Encoded
from overtone.progressive.errors import NonFiniteLatents
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Sampling
from overtone.progressive.staged import Trajectory

if TYPE_CHECKING:
    from overtone.progressive.engine.engine import Engine


@dataclass(frozen=True)
class StageReport:
    """What one stage of one batch, or the expansion before it, took."""

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
    """For the whole batch, with the device idle at both ends."""
    sigma_start: float
    sigma_end: float
    rows: int
    """In the batch."""


class Trajectories:
    """Rows on their way from noise to latents. Between stages they wait on the device, which is little: what
    a transformer holds while it runs is far more.

        rows = engine.begin(plan, encoded, seeds, sampling)
        for stage in range(len(plan.stages)):
            rows.run(stage, range(len(rows)))          # or a few at a time, in any order
        images = engine.decode(plan, rows.latents(range(len(rows))))

    A row comes out the same however it is batched, within what a batched matrix product rounds. What a batch
    raises leaves its rows where they were, to be run again.
    """

    def __init__(
        self,
        engine: Engine,
        plan: SamplingPlan,
        encoded: Encoded,
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> None:
        self.plan = plan
        self._engine, self._encoded, self._seeds, self._sampling = engine, encoded, list(seeds), sampling
        self._schedule = engine._schedule(
            plan.num_steps, plan.height_px, plan.width_px, plan.num_frames, sampling
        )
        full = plan.stages[-1]
        # On the full grid, for all stages: [C, H, W] each, float32.
        self._base = list(engine._noise(self._seeds, noise.BASE, full.frames, full.grid))
        self._latents = list(self._base)
        self._walks: dict[tuple[int, ...], Trajectory] = {}

    def __len__(self) -> int:
        return len(self._seeds)

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Where these rows, on one grid, are now: [B, C, H, W] or [B, C, T, H, W]."""
        return torch.stack([self._latents[row] for row in rows])

    def run(self, index: int, rows: Sequence[int], *, on_step: OnStep | None = None) -> list[StageReport]:
        """Take rows that have stage `index` next through it, all at once.

        Consecutive stages on one grid, which only a plan made by hand has, must be run with the same rows.
        Raises NonFiniteLatents where rows went wrong; whatever the pipeline raises goes through. `on_step`
        counts the steps of this batch.
        """
        batches = self._engine._batches(self.plan, index, rows, self._sampling)
        steps, reports = self.plan.stages[index].steps, []
        for number, batch in enumerate(batches):
            told = on_step and counting(on_step, number * steps, len(batches) * steps)
            reports += self._together(index, batch, told)
        return reports

    def _together(self, index: int, rows: Sequence[int], on_step: OnStep | None) -> list[StageReport]:
        engine, plan, count = self._engine, self.plan, len(set(rows))
        stage, before = plan.stages[index], plan.stages[index - 1] if index else None
        seeds = [self._seeds[row] for row in rows]
        reports: list[StageReport] = []
        start = engine._now()
        latents = self.latents(rows)
        if before is None and stage.grid != plan.stages[-1].grid:
            latents = engine._corner(plan, stage.grid, latents)
        elif before is not None and stage.grid != before.grid:
            base = torch.stack([self._base[row] for row in rows])
            latents = engine._expand(plan, index, latents, base, seeds)
            sigmas = before.sigma_end, stage.sigma_start
            reports.append(_report("expand", stage, 0, engine._now() - start, sigmas, count))
            start = engine._now()
        if stage.steps:
            generators = [noise.row_generator(seed, noise.sampler(index)) for seed in seeds]
            walk = self._walks.setdefault(tuple(rows), Trajectory(self._schedule, plan))
            scheduler, encoded = walk.stage(index, generators), self._encoded[list(rows)]
            latents = engine._run(
                plan, index, scheduler, latents, encoded, generators, self._sampling, on_step
            )
        finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()  # [B]
        if not all(finite):
            bad = {row for row, ok in zip(rows, finite, strict=True) if not ok}
            raise NonFiniteLatents(sorted(bad), index)
        for row, own in zip(rows, latents, strict=True):
            self._latents[row] = own
        sigmas = stage.sigma_start, stage.sigma_end
        reports.append(_report("denoise", stage, stage.steps, engine._now() - start, sigmas, count))
        return reports


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
    """Told the steps of one batch, tells those of all."""
    return lambda done, _: on_step(before + done, total)


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
