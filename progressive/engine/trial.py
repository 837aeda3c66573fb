"""A pipeline of a class that no entry names, tried before it makes samples. Knows no settings of a caller's.

What an engine takes for granted of a pipeline is checked here by behaviour, with a few steps on a tiny grid:
that it starts from the latents that it is given, that a run cut in two is the uncut run, that it decodes them
to a picture of the size asked for; and whether a row comes out the same beside rows whose prompts are longer.
What fails the first three is refused in one sentence when it is loaded, not in every row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from overtone.progressive import layouts
from overtone.progressive.engine.call import PipelineCall
from overtone.progressive.engine.decoding import decode
from overtone.progressive.engine.stage_runner import PipelineRunner, StageInput
from overtone.progressive.engine.text import Encoded, TextEncoder
from overtone.progressive.engine.trajectories import Trajectories
from overtone.progressive.families import Family
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.settings import Sampling

ROUNDING = 1e-5
"""Two latents are the same if they differ by at most this share of the largest value, and twice what a prompt
beside a copy of itself differs from itself alone, which is what batched matrix products round here."""

_PROMPTS = ("a", " ".join(["a small blue square above a green ring"] * 4))
"""Of very different lengths."""
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
def try_out(call: PipelineCall, text: TextEncoder, plan_of: Callable[[Sampling], SamplingPlan]) -> bool:
    """Whether rows whose prompts differ in length change each other. ValueError, in one sentence, for a
    pipeline that cannot run in stages."""
    try:
        trial = _Trial(call, text, plan_of)
        trial.check_cut()
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
            height=8 * unit,
            width=12 * unit,
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
        self._encoded = text.encode(_PROMPTS, [None, None], self._sampling)
        self._after_one = self._after_two = torch.empty(0)

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

    def check_decoded(self) -> None:
        """Raise `_Refused` unless the latents become a picture of the size asked for."""
        if getattr(self._call.pipe, "vae", None) is None:
            return
        (picture,) = decode(self._call, self._plan, self._after_two)
        asked = self._plan.height_px, self._plan.width_px
        made = picture.shape[1:3] if hasattr(picture, "shape") else picture.size[::-1]
        if tuple(made) != asked:
            raise _Refused(f"it makes {made[0]}x{made[1]} px of {asked[0]}x{asked[1]} px that were asked for")

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
        encoded: Encoded = self._encoded[list(rows)]
        seeds = [_SEEDS[row] for row in rows]
        runner = _Watching(self._call)
        return Trajectories(self._call, plan, encoded, seeds, self._sampling, runner=runner)


class _Watching(PipelineRunner):
    """Raises `_Refused` where the first step does not start from the latents that the pipeline was given."""

    def run(self, given: StageInput) -> Tensor:
        latents = super().run(given)
        start = layouts.pack(self._call.family, given.latents)
        taken = given.scheduler.taken
        assert taken is not None
        if taken.shape != start.shape:
            raise _Refused(
                f"it works on latents of the shape {tuple(taken.shape)}, given those of {tuple(start.shape)}"
            )
        if not torch.equal(taken, start.to(taken)):
            raise _Refused("it changes the latents that it is given before its first step")
        return latents


def _sentence(call: PipelineCall, why: str) -> str:
    others = [name for name in call.defaults if _NOT_TEXT.search(name) and not _OPTIONAL.search(name)]
    hint = f" (its call also takes {', '.join(others)}, which prompts do not give)" if others else ""
    return (
        f"{type(call.pipe).__name__} cannot run in stages from prompts alone: {why}{hint}; "
        "use a pipeline that makes pictures or videos of text, or describe this one as a `Family`"
    )
