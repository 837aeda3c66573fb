"""A pipeline's schedule cut into stages: what stands in for its scheduler. Knows no model and no layout.

A pipeline asks its scheduler for timesteps once and then steps through them. During a stage it gets a
`StageScheduler` instead: `set_timesteps` does nothing, `timesteps` are the stage's, `step` goes on at the
stage's first step in a copy of the caller's scheduler, which itself is never touched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from overtone.progressive import library
from overtone.progressive.schedule import SamplingPlan


class _Captured(Exception):
    """Ends a pipeline's call once its scheduler is set up: a way out, not an error."""


class _Recorder:
    """Stands in for a scheduler until `set_timesteps`, which it passes on to a copy."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        signature = inspect.signature(self.scheduler.set_timesteps)

        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            self.scheduler.set_timesteps(*args, **kwargs)
            raise _Captured

        set_timesteps.__signature__ = signature  # type: ignore[attr-defined]  # pipelines look at it
        self.set_timesteps = set_timesteps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["scheduler"], name)


def check_flow_matching(pipeline: str, scheduler: Any) -> None:
    """ValueError unless `scheduler` walks x = (1 - sigma) x0 + sigma eps with one call a step."""
    config = scheduler.config
    name = type(scheduler).__name__
    if not (name.startswith("FlowMatch") or config.get("use_flow_sigmas")):
        raise ValueError(
            f"{pipeline} has the scheduler {name}, which is not a flow-matching one: progressive generation "
            "needs a model trained with flow matching (give the pipeline a FlowMatch scheduler, or one with "
            "use_flow_sigmas=True, if the model is)"
        )
    if scheduler.order != 1 or config.get("invert_sigmas"):
        raise ValueError(
            f"{pipeline} has the scheduler {name} with "
            + ("inverted sigmas" if config.get("invert_sigmas") else f"{scheduler.order} calls a step")
            + "; use FlowMatchEulerDiscreteScheduler"
        )


class Schedule:
    """A pipeline's own full-resolution schedule, set up by the pipeline itself."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        """A copy of the pipeline's scheduler after `set_timesteps`."""
        self.sigmas: tuple[float, ...] = tuple(scheduler.sigmas.tolist())
        """num_steps + 1 noise levels, falling, the last 0."""

    @classmethod
    def of(cls, pipe: Any, scheduler: Any, **call: Any) -> Schedule:
        """Let `pipe` set up the schedule of `scheduler`, which stays as it is, for a call with these
        arguments, and stop before its first step."""
        recorder = _Recorder(scheduler)
        with swapped(pipe, recorder), suppress(_Captured):
            pipe(**call)
            raise ValueError(f"{type(pipe).__name__} never asked its scheduler for timesteps")
        return cls(recorder.scheduler)


class swapped:  # noqa: N801  (reads as a verb: with swapped(...))
    """Within it, `pipe` has another scheduler and no progress bar; afterwards, its own again."""

    def __init__(self, pipe: Any, scheduler: Any) -> None:
        self.pipe, self.scheduler = pipe, scheduler

    def __enter__(self) -> None:
        self.own = self.pipe.scheduler
        self.bar = library.progress_bar(self.pipe)
        self.pipe.__dict__["scheduler"] = self.scheduler  # past the pipeline's own bookkeeping of components
        self.pipe.set_progress_bar_config(disable=True)

    def __exit__(self, *_: Any) -> None:
        self.pipe.__dict__["scheduler"] = self.own
        library.restore_progress_bar(self.pipe, self.bar)


class StageScheduler:
    """Steps [first, last) of a schedule, as a pipeline sees a scheduler."""

    def __init__(
        self, scheduler: Any, first: int, last: int, generators: Sequence[torch.Generator] | None = None
    ) -> None:
        self._scheduler = scheduler
        self.timesteps: Tensor = scheduler.timesteps[first:last]
        self.sigmas: Tensor = scheduler.sigmas[first : last + 1]
        self.num_inference_steps = last - first
        self.latents: Tensor | None = None
        """What the last `step` gave; unlike the pipeline's result, never converted."""
        self.on_step: Callable[[int], None] = lambda done: None
        """Told after each step how many are done."""
        self._done = 0
        takes_noise = generators and "generator" in inspect.signature(scheduler.step).parameters
        self._step_kwargs = {"generator": list(generators or ())} if takes_noise else {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_scheduler"], name)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: Any = None,
        **kwargs: Any,
    ) -> None:
        """Does nothing: the stage's timesteps are fixed."""

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Does nothing: the stage begins where the one before it ended."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's own step."""
        result = self._scheduler.step(*args, **(self._step_kwargs | kwargs))
        self.latents = result[0]
        self._done += 1
        self.on_step(self._done)
        return result


class Trajectory:
    """One walk through the stages of a plan, in order."""

    def __init__(self, schedule: Schedule, plan: SamplingPlan) -> None:
        self._schedule, self._plan = schedule, plan
        self._scheduler: Any = None

    def stage(self, index: int, generators: Sequence[torch.Generator] | None = None) -> StageScheduler:
        """The scheduler of stage `index`; `generators`: one a row, for one that draws noise as it steps.

        After an expansion a fresh copy: what a multistep solver remembers is of the coarser grid. Between
        stages on one grid nothing is forgotten, so that a cut alone changes no bit.
        """
        stage = self._plan.stages[index]
        if index == 0 or self._plan.stages[index - 1].grid != stage.grid:
            self._scheduler = copy.deepcopy(self._schedule.scheduler)
            self._scheduler.set_begin_index(stage.first)
        assert self._scheduler is not None, "a stage on the grid of the one before goes on with its scheduler"
        _install(self._scheduler, stage.first, stage.sigmas)
        return StageScheduler(self._scheduler, stage.first, stage.last, generators)


def _install(scheduler: Any, first: int, sigmas: Sequence[float]) -> None:
    """Noise levels of a stage, with their timesteps, where they differ from the scheduler's own."""
    levels, timesteps = scheduler.sigmas.clone(), scheduler.timesteps.clone()
    own = levels.tolist()
    count = scheduler.config.num_train_timesteps
    # Nearly always a timestep is its noise level in another unit; CogView4 gives the two apart.
    apart = bool(((timesteps - levels[: len(timesteps)].to(timesteps) * count).abs() > 1).any())
    known = [*reversed(own)], [0.0, *reversed(timesteps.tolist())]
    for index, sigma in enumerate(sigmas, start=first):
        if abs(own[index] - sigma) > 1e-6:  # a plan computed elsewhere may differ in the last bits
            levels[index] = sigma
            if index < len(timesteps):
                # Cast as the scheduler casts its own: UniPC keeps whole timesteps.
                timesteps[index] = float(np.interp(sigma, *known)) if apart else sigma * count
    scheduler.sigmas, scheduler.timesteps = levels, timesteps
