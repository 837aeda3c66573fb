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

With `encode(..., pictures=)` rows start from pictures: variations, where `Sampling.strength` is set, and
inpainting, where a row has a mask (`progressive.pictures`).

A coarse stage has few tokens, so it takes more rows at once for the same memory. `denoise(..., batch_sizes=)`
splits the rows anew at every stage; `begin` gives the rows themselves, for a caller that decides on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from overtone.progressive import noise
from overtone.progressive.caches import check_cache
from overtone.progressive.engine.call import OnStep, PipelineCall, Text
from overtone.progressive.engine.decoding import decode
from overtone.progressive.engine.stage_runner import PipelineRunner, StageRunner
from overtone.progressive.engine.step_arguments import check_step_arguments
from overtone.progressive.engine.text import Encoded, TextEncoder
from overtone.progressive.engine.trajectories import StageReport, Trajectories, counting
from overtone.progressive.engine.trial import is_unknown, try_out, with_unit
from overtone.progressive.families import Family
from overtone.progressive.pictures import Pictures
from overtone.progressive.pipelines import resolve
from overtone.progressive.schedule import SamplingPlan, grid_for, latent_frames, plan_sampling, size_of
from overtone.progressive.settings import Sampling
from overtone.progressive.staged import check_flow_matching


class Engine:
    """One pipeline, ready to make samples. Not for use by several threads at once, but for what `overlaps`
    allows."""

    runner: StageRunner
    """How rows go through a stage; another one may take its place, or wrap it, before `begin`."""

    def __init__(self, pipe: Any, family: Family | str | None = None) -> None:
        """`family`: a key of `FAMILIES`, an entry of your own, or unset: known from the pipeline's class.

        A class that no entry names is tried with a few steps on a tiny grid (engine/trial.py). ValueError if
        the pipeline cannot run in stages, or is not flow-matching; RuntimeError if it splits sequences over
        devices.
        """
        check_flow_matching(type(pipe).__name__, getattr(pipe, "scheduler", None))
        self.pipe = pipe
        self.family = resolve(pipe, family)
        if self.family.name == "generic":
            self.family = with_unit(pipe, self.family)
        self.call = PipelineCall(pipe, self.family)
        self.runner = PipelineRunner(self.call)
        self._text = TextEncoder(self.call)
        self.call.check_parallel()
        self.call.check_guiders()
        if is_unknown(pipe, self.family):
            self.call.mixes_rows = try_out(self.call, self._text, self.plan)
        if self.call.offloads:
            warnings.warn(
                "the pipeline offloads its parts to main memory: moving weights takes the same time at every "
                "grid, which dilutes the saving of coarse stages",
                stacklevel=2,
            )

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return self.call.device

    @property
    def channels(self) -> int:
        """Channels C of a latent."""
        return self.call.channels

    @property
    def overlaps(self) -> bool:
        """Whether `encode` and `decode` may run in other threads, one each, while `denoise` runs in its own:
        on a GPU that has the whole pipeline resident. A CPU would only take its own cores away."""
        return self.device.type == "cuda" and not self.call.offloads

    def row_by_row(self, sampling: Sampling) -> bool:
        """Whether rows go through the transformer one at a time, however many are given together: for caches
        and pipelines with which a row would depend on the rows beside it."""
        return self.call.row_by_row(sampling)

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
        if sampling.strength is not None:
            self.family.check_pictures()
        self.family.check_guidance_interval(sampling, self.call.guided(sampling))
        height_px, width_px, num_frames = size_of(sampling, self.family, height_px, width_px, num_frames)
        grid_for(self.family, height_px, width_px)  # before the pipeline rounds what it cannot make
        latent_frames(self.family, num_frames)
        num_steps = self.call.steps(sampling)
        schedule = self.call.schedule(num_steps, height_px, width_px, num_frames, sampling)
        plan = plan_sampling(
            sampling,
            self.family,
            schedule.sigmas,
            height_px=height_px,
            width_px=width_px,
            num_frames=num_frames,
            step_cost=self.call.step_cost(sampling),
        )
        check_step_arguments(type(self.pipe).__name__, self.family, sampling, plan)
        return plan

    def guidance(self, sampling: Sampling) -> dict[str, float | None]:
        """`guidance_scale` and `true_cfg_scale` as the pipeline's call gets them."""
        return self.call.guidance(sampling)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        sampling: Sampling,
        *,
        known: MutableMapping[str, Text] | None = None,
        pictures: Sequence[Pictures | None] | None = None,
    ) -> Encoded:
        """Prompts through the pipeline's text encoders, each distinct text once.

        Where guidance runs a negative prompt, None means the empty one, as in the pipelines' own examples.
        `known`: texts that were encoded before, by the same pipeline with the same `sampling`, which are not
        encoded again; new ones are added. `pictures`: what each row starts from, None for noise; they are
        encoded when the rows begin. ValueError for a picture that would change nothing.
        """
        encoded = self._text.encode(prompts, negatives, sampling, known)
        if pictures is None or not any(pictures):
            return encoded
        self.family.check_pictures()
        for row, one in enumerate(pictures):
            if one is not None and one.mask is None and sampling.strength is None:
                raise ValueError(
                    f"the picture of row {row} has no mask, and `strength` is not set: it would change "
                    "nothing; set `strength`, or give a mask of what to make anew"
                )
        return replace(encoded, pictures=tuple(pictures))

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
        went wrong; an error of the pipeline goes through.
        """
        sizes = [len(seeds)] * len(plan.stages) if batch_sizes is None else list(batch_sizes)
        if len(sizes) != len(plan.stages) or min(sizes) < 1 <= len(seeds):
            raise ValueError(f"batch_sizes is {sizes}; give {len(plan.stages)} numbers of 1 or more")
        trajectories = self.begin(plan, encoded, seeds, sampling)
        batches = [
            (index, range(start, min(start + size, len(seeds))))
            for index, size in enumerate(sizes)
            for start in range(0, len(seeds), size)
        ]
        total, done = sum(plan.stages[index].steps for index, _ in batches), 0
        reports: list[StageReport] = []
        for index, rows in batches:
            counted = None if on_step is None else counting(on_step, done, total)
            reports += trajectories.run(index, rows, on_step=counted)
            done += plan.stages[index].steps
        return trajectories.latents(range(len(seeds))), reports

    def begin(
        self, plan: SamplingPlan, encoded: Encoded, seeds: Sequence[int], sampling: Sampling
    ) -> Trajectories:
        """Rows ready for their first stage, one for each prompt and seed: pictures that they start from are
        encoded, and nothing else is computed yet."""
        if len(seeds) != len(encoded):
            raise ValueError(f"{len(seeds)} seeds for {len(encoded)} prompts; give one seed each")
        if not len(encoded):
            raise ValueError("nothing to denoise: the batch has no rows")
        self.call.check_parallel()
        self.call.check_guiders()
        seeds = noise.whole_seeds(seeds)
        return Trajectories(self.call, plan, encoded, seeds, sampling, runner=self.runner)

    def decode(self, plan: SamplingPlan, latents: Tensor) -> list[Any]:
        """Latents as `denoise` gives them, as PIL images, or uint8 [frames, height, width, 3] for video.

        By the pipeline itself, called with no step left to do; row by row, which bounds the VAE's memory.
        Raises NonFinitePixels, once all rows are decoded, where the VAE made NaN or infinite pixels.
        """
        return decode(self.call, plan, latents)
