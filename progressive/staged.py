"""A pipeline's schedule cut into stages: what stands in for its scheduler. Knows no model and no layout.

A pipeline asks its scheduler for timesteps once and then steps through them. During a stage it gets a
`StageScheduler` instead: `set_timesteps` does nothing, `timesteps` are the stage's, `step` begins at the
stage's first step in a copy of the caller's scheduler, which itself is never touched.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from overtone.progressive import library
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.settings import LAST_BITS


class StandIn:
    """What a pipeline takes for its scheduler: an instance of a subclass of the scheduler's own class, since
    pipelines ask with `isinstance`. All that a stand-in does not define itself is the scheduler's it is for.
    """

    _OWN: frozenset[str] = frozenset()
    """The names that are the stand-in's."""

    def __new__(cls, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        key = cls, type(scheduler)
        if key not in _subclasses:
            own = key[1]
            names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
            _subclasses[key] = type(own.__name__, (cls, own), names)
        made: Any = object.__new__(_subclasses[key])
        object.__setattr__(made, "_scheduler", scheduler)
        return made

    def __getattribute__(self, name: str) -> Any:
        if name in object.__getattribute__(self, "_OWN") or name in _ALWAYS_OWN:
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "_scheduler"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self._scheduler, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """One for a copy of the scheduler: some pipelines step a second latent, such as sound, with it."""
        made = object.__new__(type(self))
        for name, value in object.__getattribute__(self, "__dict__").items():
            object.__setattr__(made, name, copy.deepcopy(value, memo) if name == "_scheduler" else value)
        return made


_subclasses: dict[tuple[type, type], type] = {}
"""Of a kind of stand-in and a scheduler's class: the class that is both, and has the scheduler's name."""
_ALWAYS_OWN = {"_OWN", "_scheduler", "__class__", "__init__", "__deepcopy__"}


class _Captured(Exception):
    """Ends a pipeline's call once its scheduler is set up: a way out, not an error."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.scheduler = scheduler


class _Recorder(StandIn):
    """Stands in for a scheduler until `set_timesteps`, which it passes on to a copy."""

    _OWN = frozenset({"set_timesteps"})

    def __init__(self, scheduler: Any) -> None:
        object.__setattr__(self, "_scheduler", copy.deepcopy(scheduler))

    @property
    def set_timesteps(self) -> Callable[..., None]:
        own = self._scheduler.set_timesteps

        @functools.wraps(own)  # pipelines look at its signature
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            own(*args, **kwargs)
            raise _Captured(self._scheduler)

        return set_timesteps


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
        try:
            with swapped(pipe, _Recorder(scheduler)):
                pipe(**call)
        except _Captured as captured:
            return cls(captured.scheduler)
        raise ValueError(f"{type(pipe).__name__} never asked its scheduler for timesteps")


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


class StageScheduler(StandIn):
    """Steps [first, last) of a schedule, as a pipeline sees a scheduler."""

    _OWN = frozenset(
        {"timesteps", "sigmas", "num_inference_steps", "set_timesteps", "set_begin_index", "step", "show"}
        | {"latents", "taken", "on_step", "done", "keep", "_next", "_step_kwargs"}
    )

    def __init__(
        self, scheduler: Any, first: int, last: int, generators: Sequence[torch.Generator] | None = None
    ) -> None:
        self.show(first, last)
        self.taken: Tensor | None = None
        """What the first `step` was given to go on from."""
        self.latents: Tensor | None = None
        """What the last `step` gave; unlike the pipeline's result, never converted."""
        self.on_step: Callable[[int], None] = lambda done: None
        """Called after each step with the number of steps done."""
        self.done = 0
        """Steps so far."""
        self.keep: Callable[[Tensor, Tensor], Tensor] | None = None
        """What becomes of latents that have been brought to a noise level by a step."""
        takes_noise = generators and "generator" in inspect.signature(scheduler.step).parameters
        self._step_kwargs = {"generator": list(generators or ())} if takes_noise else {}

    def show(self, first: int, last: int) -> None:
        """From now on be the steps [first, last) of the schedule to who asks, a part of the stage that starts
        where the last `step` ended. The scheduler itself goes on: what it remembers, it keeps."""
        self.timesteps: Tensor = self._scheduler.timesteps[first:last]
        self.sigmas: Tensor = self._scheduler.sigmas[first : last + 1]
        self.num_inference_steps = last - first
        self._next = first

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

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's own step, and what `keep` makes of its result."""
        if self.taken is None:
            self.taken = sample
        result = self._scheduler.step(model_output, timestep, sample, *args, **(self._step_kwargs | kwargs))
        self._next += 1
        if self.keep is not None:
            kept = self.keep(result[0], self._scheduler.sigmas[self._next])
            if isinstance(result, tuple):
                result = kept, *result[1:]
            else:
                result.prev_sample = kept
        self.latents = result[0]
        self.done += 1
        self.on_step(self.done)
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
    told = levels[: len(timesteps)].double() * count
    apart = bool(((timesteps.to(told) - told).abs() > 1).any())
    known = [*reversed(own)], [0.0, *reversed(timesteps.tolist())]
    for index, sigma in enumerate(sigmas, start=first):
        if abs(own[index] - sigma) > LAST_BITS:  # a plan computed elsewhere may differ in the last bits
            levels[index] = sigma
            if index < len(timesteps):
                # Cast as the scheduler casts its own: UniPC keeps whole timesteps.
                timesteps[index] = float(np.interp(sigma, *known)) if apart else sigma * count
    scheduler.sigmas, scheduler.timesteps = levels, timesteps
