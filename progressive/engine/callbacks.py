"""The caller's own `callback_on_step_end`, as if the pipeline had been called once. Knows no grids.

It is told the numbers of the whole schedule. What it changes stays for the stages that follow: arguments
that a pipeline keeps for callbacks to change (`_guidance_scale`), embeddings that it gives back in another's
place, and an interrupt, after which no step is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from overtone.progressive import library
from overtone.progressive.engine.call import OnStep, PipelineCall, Text
from overtone.progressive.engine.text import Encoded
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Sampling
from overtone.progressive.staged import StageScheduler


@dataclass
class Carried:
    """What callbacks have changed for a row so far."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Of the pipeline's call, such as {"guidance_scale": 0.0}."""
    interrupted: bool = False
    encoded: Encoded | None = None
    """The texts of the chunk that it was last in, for its next stage; None: as they were."""

    def copy(self) -> Carried:
        return replace(self, arguments=dict(self.arguments))

    def changed(self, sampling: Sampling) -> Sampling:
        """The settings with those arguments of the call that are fields of theirs as a callback has set them,
        so that whether rows are guided follows."""
        fields = {name: value for name, value in self.arguments.items() if name in Sampling.model_fields}
        return sampling.model_copy(update=fields) if fields else sampling

    @property
    def key(self) -> str:
        """Equal for rows that may go on together."""
        return repr((sorted(self.arguments.items()), self.interrupted))


@dataclass
class Callback:
    """What a call of the pipeline gets for `callback_on_step_end`."""

    call: PipelineCall
    theirs: Callable[..., Any] | None
    on_step: OnStep | None
    scheduler: StageScheduler
    plan: SamplingPlan
    part: Stage
    """The steps of the call: a stage, or the part of one that is guided, or is not."""
    steps: int
    """Of the whole stage."""
    encoded: Encoded
    """The chunk's texts; after the call, those that the next one starts with."""
    carried: Carried
    """Filled in as the stage goes."""

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if self.theirs is not None:
            values = self._call_theirs(self.theirs, pipe, step, timestep, values)
        if self.on_step is not None:
            self.on_step(self.scheduler.done, self.steps)
        return values

    def _call_theirs(
        self, theirs: Callable[..., Any], pipe: Any, step: int, timestep: Any, values: dict[str, Any]
    ) -> dict[str, Any]:
        library.tell_num_timesteps(pipe, self.plan.num_steps)
        told, given = library.told_arguments(pipe), dict(values)
        values = theirs(pipe, self.part.first + step, timestep, values)
        library.tell_num_timesteps(pipe, self.part.steps)  # as a step cache counts them
        self.scheduler.latents = values.get("latents", self.scheduler.latents)
        for name, value in library.told_arguments(pipe).items():
            if name in self.call.defaults and value is not told.get(name, value):
                self.carried.arguments[name] = value
        if self.part.last < self.plan.stages[-1].last:
            for name, value in values.items():
                if name != "latents" and value is not given.get(name, value):
                    self.encoded = self._replaced(name, given[name], value)
        return values

    def _replaced(self, name: str, old: Any, new: Any) -> Encoded:
        """The texts with one of their tensors as the callback gave it back."""
        rows, plain = len(self.encoded), name.removeprefix("negative_")
        if isinstance(new, Tensor) and isinstance(old, Tensor) and len(new) < len(old):
            if torch.equal(new, old[-len(new) :]):
                return self.encoded  # no more than the negative half left out, where guidance ends
        known = self.call.family.text is not None and self.call.family.ragged is None
        if not known or plain not in self.encoded.positive[0] or len(new) not in (rows, 2 * rows):
            raise ValueError(
                f"a callback gave back another {name}, which the stages after this one cannot be given; "
                "use `mode: fullres`, where one call makes all steps"
            )
        if name != plain:
            return replace(self.encoded, negative=_with(self.encoded.negative, name=plain, values=new))
        negative = self.encoded.negative
        if len(new) == 2 * rows:  # as pipelines put them together for guidance: negative ones first
            negative, new = _with(negative, name=plain, values=new[:rows]), new[rows:]
        positive = _with(self.encoded.positive, name=plain, values=new)
        return replace(self.encoded, positive=positive, negative=negative)


def _with(texts: tuple[Any, ...], *, name: str, values: Tensor) -> tuple[Any, ...]:
    """The texts of some rows with one of their tensors replaced."""
    pairs: list[tuple[Mapping[str, Any] | None, Tensor]] = list(zip(texts, values, strict=True))
    made: list[Text | None] = [None if text is None else {**text, name: value} for text, value in pairs]
    return tuple(made)
