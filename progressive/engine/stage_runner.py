"""One stage of one chunk of rows through the pipeline's own call. Knows no expansions and no other stages.

Whatever speeds up or guards this call is a `StageRunner` around another one: `PipelineRunner` calls the
pipeline plainly, `progressive.compile.CompiledRunner` wraps it, and a caller's own may wrap either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from overtone.progressive import layouts
from overtone.progressive.caches import row_by_row, step_cache
from overtone.progressive.engine.call import OnStep, PipelineCall
from overtone.progressive.engine.text import Encoded, text_arguments
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Sampling
from overtone.progressive.staged import StageScheduler, swapped


@dataclass(frozen=True)
class StageInput:
    """All that one chunk of rows goes into one stage with."""

    plan: SamplingPlan
    index: int
    """The stage's, in the plan."""
    scheduler: StageScheduler
    """It steps through this stage alone."""
    latents: Tensor
    """[B, C, H, W] or [B, C, T, H, W] on the stage's grid, at its first noise level; float32 after an
    expansion and at the start."""
    encoded: Encoded
    generators: list[torch.Generator]
    """One a row, for a scheduler that draws noise as it steps."""
    sampling: Sampling
    on_step: OnStep | None

    @property
    def stage(self) -> Stage:
        return self.plan.stages[self.index]


class StageRunner(Protocol):
    """The way in which rows go through a stage, called once a stage and once a chunk."""

    def chunks(
        self, plan: SamplingPlan, index: int, rows: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """The rows as they go through stage `index` together. A row that is listed again fills its chunk up,
        and its copy is dropped afterwards."""

    def run(self, given: StageInput) -> Tensor:
        """The latents after the stage's last step, in the layout that they came in."""


class PipelineRunner:
    """The pipeline's own call on the stage's grid and steps; all rows together, but for caches that look at
    the whole batch."""

    def __init__(self, call: PipelineCall) -> None:
        self._call = call

    def chunks(
        self, plan: SamplingPlan, index: int, rows: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """One chunk, or one a row."""
        if row_by_row(sampling) or self._call.family.alone:
            return [[row] for row in rows]
        return [list(rows)]

    def run(self, given: StageInput) -> Tensor:
        """The caller's pipeline is called with another scheduler, which is taken away again."""
        call, stage, sampling = self._call, given.stage, given.sampling
        arguments = self._arguments(given)
        call.reset_caches(stage.steps)
        with swapped(call.pipe, given.scheduler), step_cache(call.pipe, sampling, given.scheduler):
            call.pipe(
                # float32; the pipeline casts to its model's dtype, as it does for any caller's latents.
                latents=layouts.pack(call.family, given.latents),
                **call.size(stage.grid, given.plan.num_frames, stage.steps),
                **text_arguments(call, given.encoded, sampling),
                **arguments,
            )
        # Not the call's result: FLUX.2 hands that out converted for its VAE, which cannot be undone exactly.
        assert given.scheduler.latents is not None
        return layouts.unpack(call.family, given.scheduler.latents, *stage.grid)

    def _arguments(self, given: StageInput) -> dict[str, Any]:
        """The arguments of the call that are neither text nor size."""
        call, stage = self._call, given.stage
        arguments = call.arguments(given.sampling)
        for name in call.family.per_step:
            values = arguments.get(name, call.defaults[name])
            if values is not None:
                arguments[name] = list(values)[stage.first : stage.last]
        theirs = arguments.pop("callback_on_step_end", None)
        if theirs is not None or given.on_step is not None:
            arguments["callback_on_step_end"] = _callback(theirs, given.on_step, given.scheduler, stage.steps)
        if "generator" in call.defaults:
            arguments["generator"] = given.generators
        return arguments


def _callback(
    theirs: Any, on_step: OnStep | None, scheduler: StageScheduler, total: int
) -> Callable[..., dict[str, Any]]:
    """The caller's own callback, whose latents count, and then `on_step`."""

    def call(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if theirs is not None:
            values = theirs(pipe, step, timestep, values)
            scheduler.latents = values.get("latents", scheduler.latents)
        if on_step is not None:
            on_step(step + 1, total)
        return values

    return call
