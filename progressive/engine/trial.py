"""A pipeline of a class that no entry names, tried before it makes samples. Knows no settings of a caller's.

What an engine takes for granted of a pipeline is checked here by behaviour, with a few steps on a tiny grid:
that it starts from the latents that it is given, that a run cut in two is the uncut run, that a call with a
prompt alone starts from unit noise of the same shape and makes the same of it, that latents are decoded to a
picture of the size asked for; and whether a row comes out the same beside rows whose prompts are longer. What
fails any but the last is refused in one sentence when it is loaded, not in every row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from overtone.progressive import layouts, noise
from overtone.progressive.engine.call import PipelineCall
from overtone.progressive.engine.decoding import decode
from overtone.progressive.engine.stage_runner import PipelineRunner, StageInput
from overtone.progressive.engine.text import Encoded, TextEncoder
from overtone.progressive.engine.trajectories import Trajectories
from overtone.progressive.families import Family
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.settings import Sampling
from overtone.progressive.staged import StageScheduler, Trajectory, swapped

ROUNDING = 1e-5
"""Two latents are the same if they differ by at most this share of the largest value, and twice what a prompt
beside a copy of itself differs from itself alone, which is what batched matrix products round here."""

_GRID = (5, 7)
"""Of a trial, in units of the smallest grid that the entry knows: odd, as grids of stages may be."""

_UNIT = 1.5
"""Noise of unit variance has a standard deviation within this factor of 1, on a grid as tiny as a trial's."""

_PROMPTS = ("a", " ".join(["a small blue square above a green ring"] * 4))
"""Of very different lengths."""
_NEGATIVE = "a red circle"
"""The first one's, where guidance always runs one; the second has none."""
_SEEDS = (1, 2)
_PASSES_ON = (ImportError, OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""What is wrong with the machine or the installation, and not with the pipeline."""
_NOT_TEXT = re.compile(r"image|mask|control|video$|pose|camera|audio$|^layers$")
_OPTIONAL = re.compile(r"prompt|ip_adapter|attention_mask|num_images|text")


def is_unknown(pipe: Any, family: Family) -> bool:
    """Whether nobody has said of this class how it is called: the generic entry's, and one derived from a
    known class, which may do anything. Not one without text encoders, which cannot be tried."""
    if family.name != "generic" and type(pipe).__name__ in family.pipelines:
        return False
    encoders = [part for name, part in pipe.components.items() if "text_encoder" in name]
    return family.name == "generic" or any(part is not None for part in encoders)


@torch.no_grad()
def with_unit(pipe: Any, family: Family) -> Family:
    """The generic entry for the smallest grid, once, twice or four times its own, of which the pipeline takes
    odd multiples: some ask for more than their patches need. As it is where none will do: a trial tells."""
    for times in (1, 2, 4):
        larger = replace(family, grid_multiple=times * family.grid_multiple)
        unit = larger.grid_multiple * larger.cell_px
        frames = None if larger.default_frames is None else larger.frames_per_latent + 1
        try:
            PipelineCall(pipe, larger).schedule(2, _GRID[0] * unit, _GRID[1] * unit, frames, Sampling())
        except _PASSES_ON:
            raise
        except Exception:  # noqa: BLE001 - whatever it says of this size, it may not say of another
            continue
        return larger
    return family


@torch.no_grad()
def try_out(call: PipelineCall, text: TextEncoder, plan_of: Callable[[Sampling], SamplingPlan]) -> bool:
    """Whether rows whose prompts differ in length change each other. ValueError, in one sentence, for a
    pipeline that cannot run in stages."""
    try:
        trial = _Trial(call, text, plan_of)
        trial.check_noise()
        trial.check_cut()
        trial.check_own_call()
        trial.check_decoded()
    except _PASSES_ON:
        raise
    except _Refused as refused:
        raise ValueError(_sentence(call, str(refused))) from None
    except Exception as error:
        why = f"a trial of two steps ends with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(_sentence(call, why)) from error
    try:
        return trial.mixes_rows()
    except Exception:  # noqa: BLE001 - it takes no two prompts at once, or has no room for them: they go alone
        return True


class _Refused(Exception):
    """The pipeline breaks a rule."""


class _Trial:
    """Two steps of two prompts on a tiny grid."""

    def __init__(
        self, call: PipelineCall, text: TextEncoder, plan_of: Callable[[Sampling], SamplingPlan]
    ) -> None:
        self._call = call
        unit = call.family.cell_px * call.family.grid_multiple
        video = call.family.default_frames is not None
        self._sampling = Sampling(
            mode="fullres",
            num_steps=2,
            height=_GRID[0] * unit,
            width=_GRID[1] * unit,
            num_frames=call.family.frames_per_latent + 1 if video else None,
        )
        self._plan = plan_of(self._sampling)
        (stage,) = self._plan.stages
        first, second = stage.first, stage.first + 1
        parts = (
            replace(stage, last=second, sigmas=stage.sigmas[:2]),
            replace(stage, first=second, sigmas=stage.sigmas[1:]),
        )
        assert stage.last - first == len(parts), f"{stage.last - first} steps, not two"
        self._cut = replace(self._plan, stages=parts)
        self._negative = call.family.negative_text
        self._guided = call.guided(self._sampling) == "always"
        negatives = (_NEGATIVE if self._guided else None, None)
        # One by one, as in the pipeline's own call: a batch rounds otherwise.
        alone = [
            text.encode([prompt], [negative], self._sampling)
            for prompt, negative in zip(_PROMPTS, negatives, strict=True)
        ]
        self._encoded = Encoded.cat(alone)
        self._start = self._begin(self._plan, [1]).latents([0])
        self._after_one = self._after_two = torch.empty(0)

    def check_noise(self) -> None:
        """Raise `_Refused` unless the pipeline by itself starts from noise as the engine draws it. From now
        on it is given latents in the dtype of that noise, which not every pipeline casts them to."""
        taken = self._own_call().taken
        assert taken is not None
        deviation, shape = float(taken.float().std()), tuple(_stepped(self._call, self._start).shape)
        if taken.shape != shape or not 1 / _UNIT < deviation < _UNIT:
            raise _Refused(
                f"it starts from noise of the shape {tuple(taken.shape)} and a standard deviation of "
                f"{deviation:.2f}, and stages from unit noise of the shape {shape}"
            )
        self._call.latents_dtype = taken.dtype

    def check_cut(self) -> None:
        """Raise `_Refused` unless the given latents are what the first step starts from, and two steps are
        the same in one call and in two."""
        whole = self._begin(self._plan, [1])
        whole.run(0, [0])
        parts = self._begin(self._cut, [1])
        parts.run(0, [0])
        self._after_one = parts.latents([0])
        parts.run(1, [0])
        self._after_two = whole.latents([0])
        if not torch.equal(parts.latents([0]), self._after_two):
            raise _Refused("two steps in two calls are not the same as in one call")

    def check_own_call(self) -> None:
        """Raise `_Refused` unless the pipeline makes what the engine makes of a prompt and given noise."""
        latents = self._call.pack(self._start)
        if self._is_ours(self._own_call(latents=latents)):
            return
        if self._guided and self._is_ours(self._own_call(latents=latents, negative_prompt=[self._negative])):
            raise _Refused(
                "where no negative prompt is given it runs one of its own, which is not known here"
            )
        raise _Refused("its own call with a prompt alone makes something else of the same noise")

    def _own_call(self, **more: Any) -> StageScheduler:
        """The scheduler after the two steps of the pipeline's own call, with a prompt and `more` alone."""
        call, (stage,) = self._call, self._plan.stages
        generators = [noise.row_generator(_SEEDS[1], noise.sampler(0))]
        schedule = call.schedule(
            self._plan.num_steps,
            self._plan.height_px,
            self._plan.width_px,
            self._plan.num_frames,
            self._sampling,
        )
        scheduler = Trajectory(schedule, self._plan).stage(0, generators)
        arguments = {"prompt": [_PROMPTS[1]], **call.arguments(self._sampling), **more}
        arguments |= call.size(stage.grid, self._plan.num_frames, stage.steps)
        if "generator" in call.defaults:
            arguments["generator"] = generators
        try:
            with swapped(call.pipe, scheduler):
                call.pipe(**arguments)
        except Exception:
            if not self._guided or "negative_prompt" in more:
                raise
            return self._own_call(**more, negative_prompt=[self._negative])  # it cannot do without
        return scheduler

    def _is_ours(self, own: StageScheduler) -> bool:
        """Whether the pipeline's own call came to the latents that the engine came to."""
        assert own.latents is not None
        return torch.equal(
            layouts.unpack(self._call.family, own.latents, *self._plan.stages[0].grid), self._after_two
        )

    def check_decoded(self) -> None:
        """Raise `_Refused` unless the latents become a picture or video of the size asked for."""
        if getattr(self._call.pipe, "vae", self) is None:  # left out, where there is one
            return
        (picture,) = decode(self._call, self._plan, self._after_two)
        asked = self._plan.num_frames or 1, self._plan.height_px, self._plan.width_px
        made = picture.shape[:3] if hasattr(picture, "shape") else (1, *picture.size[::-1])
        if tuple(made) != asked:
            sizes = [
                "x".join(map(str, size if self._plan.num_frames else size[1:])) for size in (made, asked)
            ]
            raise _Refused(f"it makes {sizes[0]} px of {sizes[1]} px that were asked for")

    def mixes_rows(self) -> bool:
        """Whether the prompts come out otherwise together than each alone."""
        alone = torch.cat([self._one_step([0]), self._after_one])
        together = self._one_step([0, 1])
        copies = self._one_step([1, 1])
        rounding = (copies - self._after_one).abs().max()
        tolerance = 2 * rounding + ROUNDING * alone.abs().max()
        return not bool((together - alone).abs().max() <= tolerance)

    def _one_step(self, rows: Sequence[int]) -> Tensor:
        trajectories = self._begin(self._cut, rows)
        trajectories.run(0, range(len(rows)))
        return trajectories.latents(range(len(rows))).float()

    def _begin(self, plan: SamplingPlan, rows: Sequence[int]) -> Trajectories:
        encoded = self._encoded[list(rows)]
        seeds = [_SEEDS[row] for row in rows]
        runner = _Watching(self._call)
        return Trajectories(self._call, plan, encoded, seeds, self._sampling, runner=runner)


class _Watching(PipelineRunner):
    """Raises `_Refused` where the first step does not start from the latents that the pipeline was given."""

    def run(self, given: StageInput) -> Tensor:
        latents = super().run(given)
        start, taken = _stepped(self._call, given.latents), given.scheduler.taken
        assert taken is not None
        if taken.shape != start.shape:
            raise _Refused(
                f"it works on latents of the shape {tuple(taken.shape)}, given those of {tuple(start.shape)}"
            )
        if not torch.equal(taken, start.to(taken)):
            raise _Refused("it changes the latents that it is given before its first step")
        return latents


def _stepped(call: PipelineCall, latents: Tensor) -> Tensor:
    """Latents as the pipeline's scheduler is given them."""
    packed = layouts.pack(call.family, latents)
    return packed.flatten(2).transpose(1, 2) if call.family.layout == "grid_to_tokens" else packed


def _sentence(call: PipelineCall, why: str) -> str:
    others = [name for name in call.defaults if _NOT_TEXT.search(name) and not _OPTIONAL.search(name)]
    hint = f" (its call also takes {', '.join(others)}, which prompts do not give)" if others else ""
    return (
        f"{type(call.pipe).__name__} cannot run in stages from prompts alone: {why}{hint}; "
        "use a pipeline that makes pictures or videos of text, or describe this one as a `Family`"
    )
