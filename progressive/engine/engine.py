"""Samples from any flow-matching diffusers pipeline, coarse grids first. Knows no jobs and no files.

The pipeline is called once a stage through its own public call, with its scheduler replaced by a view of
the stage's steps (`progressive.staged`), and between calls the latent is expanded (`progressive.spectral`).
So `fullres` is the pipeline itself, and guidance, adapters, step caches and attention backends are the
library's.

    engine = Engine(pipe)
    plan = engine.plan(Sampling(delta=0.05))
    encoded = engine.encode(prompts, [None] * len(prompts), sampling)
    latents, reports = engine.denoise(plan, encoded, seeds, sampling)
    images = engine.decode(plan, latents)

A coarse stage has few tokens, so it takes more rows at once for the same memory. `denoise(..., batch_sizes=)`
splits the rows anew at every stage; `begin` gives the rows themselves, for a caller that decides on the way.
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from overtone.progressive import layouts, noise, spectral
from overtone.progressive.caches import check_cache, row_by_row, step_cache
from overtone.progressive.checkpoints import PUBLISHED, flow_shift_change
from overtone.progressive.engine.call import FROM_ENGINE, OnStep, Text, callback, padded
from overtone.progressive.engine.text import ENCODE_TOGETHER, Encoded
from overtone.progressive.engine.trajectories import StageReport, Trajectories, counting, exact
from overtone.progressive.families import Family
from overtone.progressive.pipelines import resolve
from overtone.progressive.schedule import SamplingPlan, grid_for, latent_frames, plan_sampling
from overtone.progressive.settings import Sampling
from overtone.progressive.staged import Schedule, StageScheduler, check_flow_matching, swapped

logger = logging.getLogger(__name__)


class Engine:
    """One pipeline, ready to make samples. Not for use by several threads at once."""

    def __init__(self, pipe: Any, family: Family | str | None = None) -> None:
        """`family`: a key of `FAMILIES`, an entry of your own, or unset: known from the pipeline's class.

        ValueError if the pipeline is not flow-matching; RuntimeError if it splits sequences over devices.
        """
        name = type(pipe).__name__
        check_flow_matching(name, getattr(pipe, "scheduler", None))
        self.pipe = pipe
        self.family = resolve(pipe, family)
        self._call_defaults = {
            key: parameter.default for key, parameter in inspect.signature(pipe.__call__).parameters.items()
        }
        self._schedules: dict[tuple[Any, ...], Schedule] = {}
        self._owner_of_schedules: Any = None
        self._told: set[str] = set()
        self._check_parallel()
        if self._offloads:
            warnings.warn(
                "the pipeline offloads its parts to main memory: moving weights takes the same time at every "
                "grid, which dilutes the saving of coarse stages",
                stacklevel=2,
            )

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return self.pipe._execution_device

    @property
    def _transformer(self) -> Any:
        return getattr(self.pipe, "transformer", None) or getattr(self.pipe, "transformer_2", None)

    @property
    def channels(self) -> int:
        """Channels C of a latent."""
        return self._transformer.config.in_channels // self.family.channels_per_latent

    # ------------------------------------------------------------------------------------------- plan

    def plan(
        self,
        sampling: Sampling,
        *,
        height_px: int | None = None,
        width_px: int | None = None,
        num_frames: int | None = None,
    ) -> SamplingPlan:
        """The stages of one sample, from the pipeline's own schedule. A size given here comes before
        `sampling`'s, which comes before the family's. ValueError for what cannot be made."""
        check_cache(self.pipe, sampling)
        height_px = height_px or sampling.height or self.family.default_height
        width_px = width_px or sampling.width or self.family.default_width
        num_frames = num_frames or sampling.num_frames or self.family.default_frames
        grid_for(self.family, height_px, width_px)  # before the pipeline rounds what it cannot make
        latent_frames(self.family, num_frames)
        schedule = self._schedule(self._steps(sampling), height_px, width_px, num_frames, sampling)
        return plan_sampling(
            sampling,
            self.family,
            schedule.sigmas,
            height_px=height_px,
            width_px=width_px,
            num_frames=num_frames,
        )

    def _steps(self, sampling: Sampling) -> int:
        if sampling.num_steps is not None:
            return sampling.num_steps
        source = str(self.pipe.config.get("_name_or_path") or "")
        published = PUBLISHED.get(source)
        return (published and published.default_steps) or self.family.default_steps

    def _schedule(
        self, num_steps: int, height_px: int, width_px: int, num_frames: int | None, sampling: Sampling
    ) -> Schedule:
        """The pipeline's full-resolution schedule, as the pipeline itself sets it up."""
        scheduler = self.pipe.scheduler
        if scheduler is not self._owner_of_schedules:
            check_flow_matching(type(self.pipe).__name__, scheduler)
            self._schedules, self._owner_of_schedules = {}, scheduler
        call = self._arguments(sampling)
        shift = sampling.flow_shift
        key = (num_steps, height_px, width_px, num_frames, shift, self.device, repr(sorted(call.items())))
        if key not in self._schedules:
            grid = grid_for(self.family, height_px, width_px)
            frames = latent_frames(self.family, num_frames)
            latents = torch.zeros(1, *layouts.shape(self.family, self.channels, frames, *grid))
            arguments = call | self._blank() | self._size(grid, num_frames, num_steps)
            arguments["latents"] = layouts.pack(self.family, latents.to(self.device))
            change = flow_shift_change(scheduler.config, shift)
            if change:
                scheduler = type(scheduler).from_config(scheduler.config, **change)
            self._schedules[key] = Schedule.of(self.pipe, scheduler, **arguments)
        return self._schedules[key]

    # ------------------------------------------------------------------------- arguments of the call

    def _arguments(self, sampling: Sampling) -> dict[str, Any]:
        """What `sampling` passes on to the pipeline's call. ValueError for what the call does not take."""
        fields = {
            name: value
            for name in ("guidance_scale", "true_cfg_scale")
            if (value := getattr(sampling, name)) is not None
        }
        own = {name for name in sampling.call_kwargs if name in FROM_ENGINE or "prompt" in name}
        if own:
            raise ValueError(
                f"call_kwargs names {', '.join(sorted(own))}, which the engine sets itself; "
                "use the fields of the sampling settings, or leave it out"
            )
        call = self.family.call | sampling.call_kwargs | fields
        unknown = sorted(set(call) - set(self._call_defaults) - set(self.family.call))
        if unknown:
            known = sorted(n for n in self._call_defaults if n not in FROM_ENGINE and "prompt" not in n)
            raise ValueError(
                f"{type(self.pipe).__name__} takes no argument {', '.join(unknown)}; it takes "
                + ", ".join(known)
            )
        if "guidance_scale" in fields:  # one value takes the place of values by step
            call |= dict.fromkeys(self.family.per_step)
        return {name: value for name, value in call.items() if name in self._call_defaults}

    def _blank(self) -> dict[str, Any]:
        """Text arguments of one row without text or guidance, for calls that never reach the transformer."""
        if self.family.text is None:
            blank: dict[str, Any] = {"prompt": [""]}
        else:
            like = torch.zeros(1, 1, device=self.device, dtype=self._transformer.dtype)
            text = {name: like[0] if "pooled" in name else like for name in self.family.text if name}
            text.pop("prompt_embeds_mask", None)
            blank = self._collate([text])
        if self.family.guidance and self.family.guidance[0] in self._call_defaults:
            blank[self.family.guidance[0]] = self.family.guidance[1]
        return blank

    def _size(self, grid: tuple[int, int], num_frames: int | None, num_steps: int) -> dict[str, Any]:
        size: dict[str, Any] = {
            "height": grid[0] * self.family.cell_px,
            "width": grid[1] * self.family.cell_px,
            "num_inference_steps": num_steps,
            "output_type": "latent",
            "return_dict": False,
        }
        if "num_frames" in self._call_defaults:
            size["num_frames"] = num_frames
        return size

    def _guided(self, sampling: Sampling) -> bool:
        """Whether the pipeline runs a negative prompt beside each prompt: up to the settings alone, so that
        a row never depends on its batch."""
        takes_negative = {"negative_prompt", "negative_prompt_embeds"} & set(self._call_defaults)
        if not (self.family.guidance and takes_negative) or self.pipe.config.get("is_distilled"):
            return False
        name, threshold = self.family.guidance
        scale = self._arguments(sampling).get(name, self._call_defaults.get(name))
        return scale is not None and scale > threshold

    # ----------------------------------------------------------------------------------------- encode

    @property
    def overlaps(self) -> bool:
        """Whether `encode` and `decode` may go on in other threads, one each, while `denoise` runs in its
        own: on a GPU that has the whole pipeline resident. A CPU would only take its own cores away."""
        return self.device.type == "cuda" and not self._offloads

    @property
    def _offloads(self) -> bool:
        return bool(getattr(self.pipe, "_all_hooks", None))

    @cached_property
    def _streams(self) -> dict[str, torch.cuda.Stream]:
        return {}

    @contextmanager
    def _aside(self, what: str) -> Iterator[Any]:
        """The pipeline with its own attributes (its call sets some), on a stream of its own, for work that
        may go on beside a denoising loop. What was queued before is waited for, and it is done at the end."""
        pipe = self.pipe if self._offloads else copy.copy(self.pipe)  # hooks know the pipeline that set them
        if self.device.type != "cuda":
            yield pipe
            return
        if what not in self._streams:  # kept: each stream has memory of its own
            self._streams[what] = torch.cuda.Stream(self.device)
        stream = self._streams[what]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield pipe
        stream.synchronize()

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        sampling: Sampling,
        *,
        known: MutableMapping[str, Text] | None = None,
    ) -> Encoded:
        """Prompts through the pipeline's text encoders, each distinct text once.

        Where guidance runs a negative prompt, None means the empty one, as in the pipelines' own examples.
        `known`: texts that were encoded before, by the same pipeline with the same `sampling`, which are not
        encoded again; new ones are added.
        """
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one each")
        if self._guided(sampling):
            wanted = [negative or "" for negative in negatives]
        else:
            wanted = []
            if any(negatives):
                self._tell("negative prompts have no effect: these settings run no negative prompt")
        known = {} if known is None else known
        encoded = self._encode(prompts, sampling, known)
        # As the pipelines do, not in one batch with the prompts: that may change an embedding's last bits.
        negative = self._encode(wanted, sampling, known)
        return Encoded(tuple(encoded), tuple(negative) or (None,) * len(prompts))

    def _encode(
        self, texts: Sequence[str], sampling: Sampling, known: MutableMapping[str, Text]
    ) -> list[Text]:
        """Each distinct text once, and none of those that are `known`."""
        if self.family.text is None:
            return [{"prompt": text} for text in texts]
        here = {text: known[text] for text in dict.fromkeys(texts) if text in known}
        new = [text for text in dict.fromkeys(texts) if text not in here]
        if new:
            added = dict(zip(new, self._encode_all(new, sampling), strict=True))
            here |= added
            known.update(added)
        return [here[text] for text in texts]

    def _encode_all(self, texts: list[str], sampling: Sampling) -> list[Text]:
        call = self._arguments(sampling)
        parameters = inspect.signature(self.pipe.encode_prompt).parameters
        arguments: dict[str, Any] = {
            name: call.get(name, self._call_defaults[name])  # the call's default, not encode_prompt's own
            for name in parameters
            if name in self._call_defaults and "prompt" not in name
        }
        arguments |= {name: None for name, p in parameters.items() if p.default is p.empty}
        arguments |= {"device": self.device}
        if "do_classifier_free_guidance" in parameters:
            arguments["do_classifier_free_guidance"] = False  # negatives are encoded like any other text
        if "lora_scale" in parameters:
            arguments["lora_scale"] = (call.get("joint_attention_kwargs") or {}).get("scale")
        assert self.family.text is not None
        rows: list[Text] = []
        with self._aside("encode") as pipe:
            for start in range(0, len(texts), ENCODE_TOGETHER):
                some = texts[start : start + ENCODE_TOGETHER]
                # A list of its own: some pipelines write their chat template into it.
                values = pipe.encode_prompt(**(arguments | {"prompt": list(some)}))
                values = values if isinstance(values, tuple) else (values,)
                named = {n: v for n, v in zip(self.family.text, values, strict=False) if n and v is not None}
                rows += [self._row(named, i) for i in range(len(some))]
        return rows

    def _row(self, named: Mapping[str, Any], index: int) -> Text:
        row = {name: value[index] for name, value in named.items()}
        if self.family.ragged == "pad":
            mask = row.pop("prompt_embeds_mask", None)
            if mask is not None:
                row["prompt_embeds"] = row["prompt_embeds"][: int(mask.sum())]  # [tokens, D]
        return row

    def _collate(self, texts: Sequence[Text], prefix: str = "") -> dict[str, Any]:
        """Rows of text as arguments of one call."""
        arguments: dict[str, Any] = {}
        for name in texts[0]:
            values = [text[name] for text in texts]
            if name == "prompt" or self.family.ragged == "list":
                arguments[prefix + name] = values
            elif self.family.ragged == "pad" and name == "prompt_embeds":
                mask = [value.new_ones(len(value), dtype=torch.long) for value in values]
                arguments[prefix + "prompt_embeds_mask"] = padded(mask)
                arguments[prefix + name] = padded(values)
            else:
                arguments[prefix + name] = torch.stack(values)
        return arguments

    # ---------------------------------------------------------------------------------------- denoise

    def denoise(
        self,
        plan: SamplingPlan,
        encoded: Encoded,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        batch_sizes: Sequence[int] | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, list[StageReport]]:
        """Rows from noise to latents on the full grid, [B, C, H, W] or [B, C, T, H, W], in the dtype of the
        pipeline's own latents.

        `encoded` and `plan` must be made with the same `sampling`. `batch_sizes`: for each stage the most
        rows to take at once, or unset: all. Raises NonFiniteLatents at the end of the batch in which a row
        went wrong; whatever the pipeline raises goes through.
        """
        sizes = [len(seeds)] * len(plan.stages) if batch_sizes is None else list(batch_sizes)
        if len(sizes) != len(plan.stages) or min(sizes) < 1 <= len(seeds):
            raise ValueError(f"batch_sizes is {sizes}; give {len(plan.stages)} numbers of 1 or more")
        group = self.begin(plan, encoded, seeds, sampling)
        batches = [
            (index, range(start, min(start + size, len(group))))
            for index, size in enumerate(sizes)
            for start in range(0, len(group), size)
        ]
        total, done = sum(plan.stages[index].steps for index, _ in batches), 0
        reports: list[StageReport] = []
        for index, rows in batches:
            told = None if on_step is None else counting(on_step, done, total)
            reports += group.run(index, rows, on_step=told)
            done += plan.stages[index].steps
        return group.latents(range(len(group))), reports

    def begin(
        self, plan: SamplingPlan, encoded: Encoded, seeds: Sequence[int], sampling: Sampling
    ) -> Trajectories:
        """Rows ready for their first stage, one for each prompt and seed. Nothing is computed yet."""
        if len(seeds) != len(encoded):
            raise ValueError(f"{len(seeds)} seeds for {len(encoded)} prompts; give one seed each")
        if not len(encoded):
            raise ValueError("nothing to denoise: the batch has no rows")
        self._check_parallel()
        return Trajectories(self, plan, encoded, seeds, sampling)

    def _batches(
        self, plan: SamplingPlan, index: int, rows: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """The rows as they go through stage `index` together. One that is there twice fills its batch up."""
        if row_by_row(sampling):
            return [[row] for row in rows]
        return [list(rows)]

    def _text(self, encoded: Encoded, sampling: Sampling) -> dict[str, Any]:
        arguments = self._collate(encoded.positive)
        if self._guided(sampling):
            negative = [text for text in encoded.negative if text is not None]
            if len(negative) != len(encoded):
                raise ValueError("guidance needs negative prompts: encode with the same sampling settings")
            arguments |= self._collate(negative, "negative_")
        return arguments

    def _noise(self, seeds: Sequence[int], purpose: str, frames: int, grid: tuple[int, int]) -> Tensor:
        one = layouts.shape(self.family, self.channels, frames, *grid)
        return noise.batch_noise(seeds, purpose, one).to(self.device)

    def _corner(self, plan: SamplingPlan, grid: tuple[int, int], base: Tensor) -> Tensor:
        """The noise that a coarse trajectory starts from, as white as the full grid's."""
        with exact(self.device):
            return spectral.corner(base, *grid, transform=plan.transform, patch=self.family.subcells)

    def _expand(
        self, plan: SamplingPlan, index: int, latents: Tensor, base: Tensor, seeds: Sequence[int]
    ) -> Tensor:
        """Latents after stage `index` - 1 on the grid of stage `index`, float32."""
        stage = plan.stages[index]
        if plan.noise == "fresh":
            base = self._noise(seeds, noise.expansion(index - 1), stage.frames, stage.grid)
        with exact(self.device):
            return spectral.expand(
                latents,
                base,
                plan.stages[index - 1].sigma_end,
                *stage.grid,
                kappa=plan.kappa(index - 1),
                transform=plan.transform,
                patch=self.family.subcells,
                fill=plan.fill(index - 1),
            )

    def _run(
        self,
        plan: SamplingPlan,
        index: int,
        scheduler: StageScheduler,
        latents: Tensor,
        encoded: Encoded,
        generators: list[torch.Generator],
        sampling: Sampling,
        on_step: OnStep | None,
    ) -> Tensor:
        """One stage: the pipeline's own call on the stage's grid and steps."""
        stage = plan.stages[index]
        call = self._arguments(sampling)
        for name in self.family.per_step:
            values = call.get(name, self._call_defaults[name])
            if values is not None:
                call[name] = list(values)[stage.first : stage.last]
        theirs = call.pop("callback_on_step_end", None)
        if theirs is not None or on_step is not None:
            call["callback_on_step_end"] = callback(theirs, on_step, scheduler, stage.steps)
        if "generator" in self._call_defaults:
            call["generator"] = generators
        self._reset_caches(stage.steps)
        with swapped(self.pipe, scheduler), step_cache(self.pipe, sampling, scheduler):
            self.pipe(
                # float32; the pipeline casts to its model's dtype, as it does for any caller's latents.
                latents=layouts.pack(self.family, latents),
                **self._size(stage.grid, plan.num_frames, stage.steps),
                **self._text(encoded, sampling),
                **call,
            )
        # Not the call's result: FLUX.2 hands that out converted for its VAE, which cannot be undone exactly.
        assert scheduler.latents is not None
        return layouts.unpack(self.family, scheduler.latents, *stage.grid)

    def _reset_caches(self, num_steps: int) -> None:
        """Step caches remember activations of the stage before, on another grid, or of a call that failed."""
        for component in self.pipe.components.values():
            if getattr(component, "is_cache_enabled", False):
                component._reset_stateful_cache()
            # cache-dit on the transformer alone; on a pipeline it starts afresh with every call.
            if getattr(getattr(component, "_context_manager", None), "persistent_context", False):
                import cache_dit

                cache_dit.refresh_context(component, num_inference_steps=num_steps, verbose=False)

    def _check_parallel(self) -> None:
        for name, component in self.pipe.components.items():
            config = getattr(component, "_parallel_config", None)
            if getattr(config, "context_parallel_config", None) is not None:
                raise RuntimeError(
                    f"{name} has context or sequence parallelism enabled, which cannot split a grid that "
                    "changes size; use more workers instead, each with a whole model"
                )

    def _now(self) -> float:
        """Seconds, with the device's queue empty."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s: %s", self.family.name, message)

    # ----------------------------------------------------------------------------------------- decode

    def decode(self, plan: SamplingPlan, latents: Tensor) -> list[Any]:
        """Latents as `denoise` gives them, as PIL images, or uint8 [frames, height, width, 3] for video.

        By the pipeline itself, called with no step left to do; row by row, which bounds the VAE's memory.
        """
        video = self.family.default_frames is not None
        arguments = self._arguments(Sampling()) | self._blank()
        arguments |= self._size(plan.stages[-1].grid, plan.num_frames, 1)
        arguments["output_type"] = "np" if video else "pil"
        for name in self.family.per_step:
            arguments[name] = list(self._call_defaults[name])[:1]
        if getattr(self._transformer.config, "guidance_embeds", False):
            arguments.setdefault("guidance_scale", 1.0)
        made: list[Any] = []
        with self._aside("decode") as pipe:
            for row in latents:
                scheduler = StageScheduler(pipe.scheduler, 0, 0)  # no step left
                with swapped(pipe, scheduler):
                    (output,) = pipe(latents=layouts.pack(self.family, row[None]), **arguments)
                made.append(_uint8(output[0]) if video else output[0])
        return made


def _uint8(video: Any) -> np.ndarray:
    """[T, H, W, 3] in [0, 1] as uint8."""
    return (np.asarray(video) * 255).round().astype(np.uint8)
