"""One pipeline and what its own call takes: arguments, schedule, sizes. Knows no rows and no stages.

All that the engine asks of a diffusers pipeline goes through `PipelineCall`. It keeps no settings of its own:
a caller who swaps the pipeline's scheduler or switches on a cache finds that obeyed at the next call.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from overtone.progressive import layouts, library
from overtone.progressive.caches import at_grid, row_by_row
from overtone.progressive.checkpoints import PUBLISHED, flow_shift_change
from overtone.progressive.cost import StepCost, step_cost
from overtone.progressive.families import Family, Guided
from overtone.progressive.schedule import SamplingPlan, Stage, grid_for, latent_frames, steps_of
from overtone.progressive.settings import FRAMES, Sampling, set_by_engine
from overtone.progressive.staged import Schedule, check_flow_matching

Text = dict[str, Any]
"""One prompt as the pipeline's call takes it, without the batch axis: {"prompt_embeds": [tokens, D], ...},
or {"prompt": str} for families whose text is not encoded ahead."""

OnStep = Callable[[int, int], None]
"""Called after each transformer step with (steps done, steps in all)."""


class PipelineCall:
    """A pipeline as its family's entry says to call it."""

    def __init__(self, pipe: Any, family: Family) -> None:
        self.pipe, self.family = pipe, family
        self.defaults: dict[str, Any] = {
            key: parameter.default for key, parameter in inspect.signature(pipe.__call__).parameters.items()
        }
        """The default of each argument that the pipeline's call takes."""
        self.mixes_rows = False
        """Whether a row comes out otherwise beside rows whose prompts are of other lengths, as a trial showed
        (engine/trial.py); such rows go alone."""
        self.latents_dtype: torch.dtype | None = None
        """What the pipeline is given latents in, as a trial showed; None: in the dtype that they have."""
        self._schedules: dict[tuple[Any, ...], Schedule] = {}
        self._owner_of_schedules: Any = None
        self._streams: dict[str, torch.cuda.Stream] = {}

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return library.execution_device(self.pipe)

    @property
    def transformer(self) -> Any:
        """The denoiser; of two, the first that is loaded."""
        return getattr(self.pipe, "transformer", None) or getattr(self.pipe, "transformer_2", None)

    @property
    def channels(self) -> int:
        """Channels C of a latent."""
        taken = self.transformer.config[self.family.channels_key] - self.family.channels_beside
        return taken // self.family.channels_per_latent

    @property
    def offloads(self) -> bool:
        """Whether parts of the pipeline wait in main memory until they are called."""
        return library.offloads(self.pipe)

    def steps(self, sampling: Sampling) -> int:
        """Steps of the full schedule: the settings' number, else the checkpoint's, else the family's."""
        published = PUBLISHED.get(library.source_of(self.pipe))
        return steps_of(sampling, self.family, published.default_steps if published else None)

    def step_cost(self, sampling: Sampling) -> StepCost:
        """What a step costs on any grid, as far as the transformer's class tells."""
        transformer = self.transformer
        name, guided = type(transformer).__name__, self.guided(sampling)
        return step_cost(name, transformer.config, self.family, sampling, guided=guided)

    def schedule(
        self, num_steps: int, height_px: int, width_px: int, num_frames: int | None, sampling: Sampling
    ) -> Schedule:
        """The pipeline's full-resolution schedule, as the pipeline itself sets it up."""
        scheduler = self.pipe.scheduler
        state = library.scheduler_state(scheduler)
        if (scheduler, state) != self._owner_of_schedules:  # another one, or the same with other settings
            check_flow_matching(type(self.pipe).__name__, scheduler)
            self._schedules, self._owner_of_schedules = {}, (scheduler, state)
        call = self.arguments(sampling)
        shift = sampling.flow_shift
        key = (num_steps, height_px, width_px, num_frames, shift, self.device, repr(sorted(call.items())))
        if key not in self._schedules:
            grid = grid_for(self.family, height_px, width_px)
            frames = latent_frames(self.family, num_frames)
            latents = torch.zeros(1, *layouts.shape(self.family, self.channels, frames, *grid))
            arguments = call | self.blank() | self.size(grid, num_frames, num_steps)
            arguments["latents"] = self.pack(latents.to(self.device))
            change = flow_shift_change(scheduler.config, shift)
            if change:
                scheduler = type(scheduler).from_config(scheduler.config, **change)
            self._schedules[key] = Schedule.of(self.pipe, scheduler, **arguments)
        return self._schedules[key]

    def pack(self, latents: Tensor) -> Tensor:
        """Latents as the call takes them; zeros beside them where the transformer also looks for a picture to
        start from (Kandinsky 5), which the pipeline adds to none but its own."""
        packed = layouts.pack(self.family, latents)
        if self.family.layout == "channels_last" and self.transformer.config.get("visual_cond"):
            channels = packed.shape[-1]
            packed = torch.nn.functional.pad(packed, (0, channels + 1))  # as many, and a mask
        return packed.to(self.latents_dtype or packed.dtype)

    def arguments(self, sampling: Sampling) -> dict[str, Any]:
        """The arguments that `sampling` passes on to the call. ValueError for those that it does not take."""
        asked = {n for n in ("guidance_scale", "true_cfg_scale") if getattr(sampling, n) is not None}
        unknown = sorted((asked | set(sampling.call_kwargs)) - set(self.defaults))
        if unknown:
            known = sorted(name for name in self.defaults if not set_by_engine(name))
            raise ValueError(
                f"{type(self.pipe).__name__} takes no argument {', '.join(unknown)}; it takes "
                + ", ".join(known)
            )
        call = self.family.arguments(sampling, self.steps(sampling))
        return {name: value for name, value in call.items() if name in self.defaults}

    def guidance(self, sampling: Sampling) -> dict[str, float | None]:
        """`guidance_scale` and `true_cfg_scale` as the pipeline's call gets them; None where it takes none,
        or takes one a step."""
        given = self.arguments(sampling)
        found = {
            name: given.get(name, self.defaults.get(name)) for name in ("guidance_scale", "true_cfg_scale")
        }
        return {name: float(v) if isinstance(v, int | float) else None for name, v in found.items()}

    def blank(self) -> dict[str, Any]:
        """Text arguments of one row without text or guidance, for calls that never reach the transformer."""
        if self.family.text is None:
            blank: dict[str, Any] = {"prompt": [""]}
        else:
            like = torch.zeros([1] * self.family.text_rank, device=self.device, dtype=self.transformer.dtype)
            flat = ("pooled", "mask")  # [D] and [tokens], where the others are [tokens, D]
            names = [name for name in self.family.text if name]
            text = {n: like.flatten() if any(part in n for part in flat) else like for n in names}
            if self.family.ragged == "pad":
                del text["prompt_embeds_mask"]  # `collate` makes it
            blank = self.collate([text])
        if self.family.guider:
            blank |= {f"negative_{name}": value for name, value in blank.items()}
        elif self.family.guidance and self.family.guidance[0] in self.defaults:
            blank[self.family.guidance[0]] = self.family.guidance[1]
        return blank

    def collate(self, texts: Sequence[Text], prefix: str = "") -> dict[str, Any]:
        """Rows of text as arguments of one call."""
        arguments: dict[str, Any] = {}
        for name in texts[0]:
            values = [text[name] for text in texts]
            if name == "prompt" or self.family.ragged == "list":
                arguments[prefix + name] = values
            elif self.family.ragged == "pad" and name == "prompt_embeds":
                mask = [value.new_ones(len(value), dtype=torch.long) for value in values]
                arguments[prefix + "prompt_embeds_mask"] = _padded(mask)
                arguments[prefix + name] = _padded(values)
            else:
                arguments[prefix + name] = torch.stack(values)
        return arguments

    def size(self, grid: tuple[int, int], num_frames: int | None, num_steps: int) -> dict[str, Any]:
        """The arguments for one call on this grid that returns latents."""
        size: dict[str, Any] = {
            "height": grid[0] * self.family.cell_px,
            "width": grid[1] * self.family.cell_px,
            "num_inference_steps": num_steps,
            "output_type": "latent",
            "return_dict": False,
        }
        return size | {name: num_frames for name in FRAMES if name in self.defaults}

    def guided(self, sampling: Sampling) -> Guided:
        """Whether the pipeline runs a negative prompt beside each prompt, as `Family.guided` says."""
        if self.family.guider:
            return "always" if library.guides(getattr(self.pipe, self.family.guider)) else "never"
        if not {"negative_prompt", "negative_prompt_embeds"} & set(self.defaults) or not self.family.guidance:
            return "never"
        default = self.defaults.get(self.family.guidance[0])
        return self.family.guided(sampling, default, distilled=bool(self.pipe.config.get("is_distilled")))

    def unguided(self) -> dict[str, float]:
        """The argument that takes guidance away, at the value with which no negative prompt runs."""
        assert self.family.guidance is not None, f"{self.family.name} has no argument for guidance"
        name, off = self.family.guidance
        return {name: off}

    def at_stage(self, sampling: Sampling, plan: SamplingPlan, stage: Stage) -> Sampling:
        """The settings as they are for a stage of the plan, which may have no step cache."""
        return at_grid(sampling, stage, grid_for(self.family, plan.height_px, plan.width_px))

    def row_by_row(self, sampling: Sampling) -> bool:
        """Whether rows must go through the transformer alone, since a row depends on itself alone: where the
        pipeline mixes rows, or a cache decides by the mean over its batch."""
        return self.family.alone or self.mixes_rows or row_by_row(sampling)

    def reset_caches(self, num_steps: int) -> None:
        """Empty the caller's step caches: they remember activations of the stage before, which was on another
        grid, or of a call that failed."""
        for component in self.pipe.components.values():
            library.reset_step_cache(component, num_steps)

    def check_parallel(self) -> None:
        """RuntimeError where the pipeline splits sequences over devices."""
        for name, component in self.pipe.components.items():
            if library.splits_sequences(component):
                raise RuntimeError(
                    f"{name} has context or sequence parallelism enabled, which cannot split a grid that "
                    "changes size; use more workers instead, each with a whole model"
                )

    def check_guiders(self) -> None:
        """ValueError where a component guides by the number of the step or by the steps before: each stage
        counts its own, and would begin anew."""
        for name, part in self.pipe.components.items():
            if library.is_guider(part) and not library.forgets_steps(part):
                raise ValueError(
                    f"{type(self.pipe).__name__} cannot run in stages: its {name}, a {type(part).__name__}, "
                    "guides by the step's number or by the steps before, which every stage counts anew; "
                    "only ClassifierFreeGuidance from start 0 to stop 1 does not"
                )

    @contextmanager
    def aside(self, purpose: str) -> Iterator[Any]:
        """A copy of the pipeline on a stream of its own, for work that may run beside a denoising loop.

        The copy has attributes of its own, for a pipeline's call sets some. The work waits for all that was
        queued before it, and is finished when the context ends.
        """
        pipe = self.pipe if self.offloads else copy.copy(self.pipe)  # hooks know the pipeline that set them
        if self.device.type != "cuda":
            yield pipe
            return
        if purpose not in self._streams:  # kept: each stream has memory of its own
            self._streams[purpose] = torch.cuda.Stream(self.device)
        stream = self._streams[purpose]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield pipe
        stream.synchronize()

    def now(self) -> float:
        """Seconds, with the device's queue empty."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """[B, longest, ...], zeros at the end."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
