"""Images or videos for prompts in one call of one function. Knows no jobs and no files."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from overtone.progressive import noise
from overtone.progressive.engine.call import OnStep
from overtone.progressive.engine.engine import Engine
from overtone.progressive.engine.trajectories import StageReport
from overtone.progressive.families import Family
from overtone.progressive.pictures import Pictures
from overtone.progressive.schedule import SamplingPlan, size_from
from overtone.progressive.settings import Sampling


@dataclass(frozen=True)
class Result:
    """What `generate` made, in the order of the prompts."""

    images: list[Any]
    """PIL images; videos as uint8 [frames, height, width, 3]. Empty with `decode=False`."""
    latents: Tensor
    """[B, C, H, W] or [B, C, T, H, W] on the full grid, as the model knows them (not as the VAE does)."""
    stages: list[StageReport]
    """In order; where there were several batches, one after the other."""
    plan: SamplingPlan
    seeds: list[int]


def generate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_steps: int | None = None,
    seeds: Any = None,
    negative_prompts: str | Sequence[str | None] | None = None,
    images: Image.Image | Sequence[Image.Image | None] | None = None,
    masks: Image.Image | Sequence[Image.Image | None] | None = None,
    on_step: OnStep | None = None,
    batch_size: int | None = None,
    decode: bool = True,
    family: Family | str | None = None,
    **sampling: Any,
) -> Result:
    """Images, or videos, for `prompts`: the whole library in one call.

    Sizes in pixels. `seeds`: one for each prompt, or one for all, in any kind of whole numbers (a numpy array
    or a tensor too); unset: drawn, and part of the result. A row is a function of its prompt and seed,
    whatever its batch. `images`: what each row starts from, or one for all; with `strength` its variations,
    and with `masks` the picture with what is white there made anew. A size that is not given is then the
    first picture's, as near as the family makes it. `on_step(done, total)` counts the transformer steps of
    one batch. More keywords are the fields of `progressive.Sampling`: mode, delta, levels, scales,
    guidance_scale, true_cfg_scale, call_kwargs, ... ValueError that names what is wrong with them.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    if seeds is None:
        seeds = [secrets.randbits(63) for _ in prompts]
    seeds = noise.whole_seeds([seeds] * len(prompts) if np.ndim(seeds) == 0 else seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one seed each, or one for all")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if negative_prompts is None or isinstance(negative_prompts, str):
        negative_prompts = [negative_prompts] * len(prompts)
    pictures = _pictures(images, masks, len(prompts))
    settings = Sampling(height=height, width=width, num_frames=num_frames, num_steps=num_steps, **sampling)
    engine = Engine(pipe, family)
    first = next((one.image for one in pictures if one), None)
    size = size_from(engine.family, first.height, first.width) if first else (None, None)
    plan = engine.plan(settings, height_px=height or size[0], width_px=width or size[1])
    encoded = engine.encode(prompts, list(negative_prompts), settings, pictures=pictures)
    made: list[Image.Image | np.ndarray] = []
    latents: list[Tensor] = []
    stages: list[StageReport] = []
    for start in range(0, len(prompts), batch_size or len(prompts)):
        rows = slice(start, start + (batch_size or len(prompts)))
        some, reports = engine.denoise(plan, encoded[rows], seeds[rows], settings, on_step=on_step)
        latents.append(some)
        stages += reports
        if decode:
            made += engine.decode(plan, some)
    return Result(made, torch.cat(latents), stages, plan, seeds)


def _pictures(images: Any, masks: Any, count: int) -> list[Pictures | None]:
    """What each row starts from."""
    given = []
    for name, values in (("images", images), ("masks", masks)):
        values = [values] * count if values is None or isinstance(values, Image.Image) else list(values)
        if len(values) != count:
            raise ValueError(f"{len(values)} {name} for {count} prompts; give one each, or one for all")
        given.append(values)
    if lonely := [
        row for row, (image, mask) in enumerate(zip(*given, strict=True)) if mask and image is None
    ]:
        raise ValueError(f"row {lonely[0]} has a mask and no picture; give what the mask keeps in `images`")
    known: dict[tuple[int, int], Pictures] = {}  # one object for all rows with the same
    for image, mask in zip(*given, strict=True):
        if image is not None and (id(image), id(mask)) not in known:
            known[id(image), id(mask)] = Pictures(image, mask)
    return [known.get((id(image), id(mask))) for image, mask in zip(*given, strict=True)]
