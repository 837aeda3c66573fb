"""One stage of one chunk of rows through the pipeline's own call. Knows no expansions and no other stages.

Whatever speeds up or guards this call is a `StageRunner` around another one: `PipelineRunner` calls the
pipeline plainly, `progressive.compile.CompiledRunner` wraps it, and a caller's own may wrap either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from overtone.progressive import layouts, library
from overtone.progressive.caches import step_cache
from overtone.progressive.engine.call import OnStep, PipelineCall
from overtone.progressive.engine.callbacks import Callback, Carried
from overtone.progressive.engine.step_arguments import of_stage
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
    carried: Carried = field(default_factory=Carried)
    """What callbacks have changed for these rows; what they change now is added to it."""

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
    """The pipeline's own call on the stage's grid and steps; all rows together, but where a row would depend
    on those beside it."""

    def __init__(self, call: PipelineCall) -> None:
        self._call = call

    def chunks(
        self, plan: SamplingPlan, index: int, rows: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """One chunk, or one a row."""
        if self._call.row_by_row(sampling):
            return [[row] for row in rows]
        return [list(rows)]

    def run(self, given: StageInput) -> Tensor:
        """One call of the pipeline, or one for each part that is guided or is not where the rows are."""
        guided = any(text is not None for text in given.encoded.negative)
        for part in given.stage.parts if guided else (given.stage,):
            latents = self._run_part(given, part, unguided=guided and not part.guided_steps)
            if given.carried.interrupted:
                break
            given = replace(given, latents=latents, encoded=given.carried.encoded or given.encoded)
        return latents

    def _run_part(self, given: StageInput, part: Stage, *, unguided: bool) -> Tensor:
        """The caller's pipeline is called with another scheduler, which is taken away again."""
        call, scheduler, steps = self._call, given.scheduler, given.plan.num_steps
        sampling = call.at_stage(given.carried.changed(given.sampling), given.plan, part)
        callback = self._callback(given, part)
        arguments = self._arguments(given, part, callback)
        if unguided:
            arguments |= call.unguided()
        scheduler.show(part.first, part.last)
        call.reset_caches(part.steps)
        with swapped(call.pipe, scheduler), step_cache(call.pipe, sampling, scheduler, part, steps):
            call.pipe(
                # float32; the pipeline casts to its model's dtype, as it does for any caller's latents.
                latents=call.pack(given.latents),
                **call.size(part.grid, given.plan.num_frames, part.steps),
                **text_arguments(call, given.encoded, sampling, unguided=unguided),
                **arguments,
            )
        given.carried.interrupted = library.interrupted(call.pipe)
        given.carried.encoded = callback.encoded
        if scheduler.latents is None:  # interrupted before its first step
            return given.latents
        # Not the call's result: FLUX.2 hands that out converted for its VAE, which cannot be undone exactly.
        return layouts.unpack(call.family, scheduler.latents, *part.grid)

    def _callback(self, given: StageInput, part: Stage) -> Callback:
        theirs = self._call.arguments(given.sampling).get("callback_on_step_end")
        scheduler, plan, steps = given.scheduler, given.plan, given.stage.steps
        encoded, carried = given.encoded, given.carried
        return Callback(self._call, theirs, given.on_step, scheduler, plan, part, steps, encoded, carried)

    def _arguments(self, given: StageInput, part: Stage, callback: Callback) -> dict[str, Any]:
        """The arguments of the call that are neither text nor size."""
        call = self._call
        arguments = call.arguments(given.sampling) | given.carried.arguments
        arguments = of_stage(call.family, given.plan, part, arguments, call.defaults)
        arguments.pop("callback_on_step_end", None)
        wanted = callback.theirs is not None or given.on_step is not None
        if wanted and "callback_on_step_end" in call.defaults:
            arguments["callback_on_step_end"] = callback
            inputs = getattr(callback.theirs, "tensor_inputs", None)
            if inputs:  # a callback of diffusers' own kind says by itself what it wants to be given
                arguments["callback_on_step_end_tensor_inputs"] = inputs
        if "generator" in call.defaults:
            arguments["generator"] = given.generators
        return arguments
