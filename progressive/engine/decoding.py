"""Latents decoded by the pipeline itself, and pixels that are no numbers found. Knows no steps and no jobs.

A pipeline clamps what its VAE gives it to [0, 1]: infinity becomes white, and NaN becomes black when it is
made an integer. So the VAE's own output is watched, and the pipeline is asked for a tensor, not a picture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from overtone.progressive import library
from overtone.progressive.engine.call import PipelineCall
from overtone.progressive.errors import NonFinitePixels
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.settings import Sampling
from overtone.progressive.staged import StageScheduler, swapped


def decode(call: PipelineCall, plan: SamplingPlan, latents: Tensor) -> list[Any]:
    """See `Engine.decode`."""
    arguments = _arguments(call, plan)
    made: list[Any] = []
    bad: list[int] = []
    with call.aside("decode") as pipe:
        for number, row in enumerate(latents):
            scheduler = StageScheduler(copy.copy(pipe.scheduler), 0, 0)  # no step left
            with swapped(pipe, scheduler), _watched(pipe) as overflows:
                output, *_ = pipe(latents=call.pack(row[None]), **arguments)
            pixels = _pixels(output[0])
            if np.isfinite(pixels).all() and not any(map(bool, overflows)):
                _check_range(pipe, pixels)
                made.append(_uint8(pixels) if call.family.default_frames else Image.fromarray(_uint8(pixels)))
            else:
                bad.append(number)
    if bad:
        raise NonFinitePixels(bad)
    return made


def _arguments(call: PipelineCall, plan: SamplingPlan) -> dict[str, Any]:
    """The arguments of a call on the full grid that makes no step and gives pixels."""
    arguments = call.arguments(Sampling()) | call.blank()
    arguments |= call.size(plan.stages[-1].grid, plan.num_frames, 1)
    arguments["output_type"] = "pt"
    for name in call.family.per_step:
        arguments[name] = list(call.defaults[name])[:1]
    if getattr(call.transformer.config, "guidance_embeds", False):
        arguments.setdefault("guidance_scale", 1.0)
    return arguments


@contextmanager
def _watched(pipe: Any) -> Iterator[list[Tensor]]:
    """Within it, the list gets a truth value for each output of the VAE's decoder: whether it overflowed."""
    seen: list[Tensor] = []

    def look(module: Any, inputs: Any, output: Any) -> None:
        seen.extend(~tensor.isfinite().all() for _, tensor in library.named_tensors(output))

    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    handle = decoder.register_forward_hook(look) if isinstance(decoder, torch.nn.Module) else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def _pixels(output: Any) -> np.ndarray:
    """One row's output, [C, H, W] or [T, C, H, W], as [H, W, C] or [T, H, W, C] in [0, 1]."""
    return np.moveaxis(torch.as_tensor(output).float().cpu().numpy(), -3, -1)


def _check_range(pipe: Any, pixels: np.ndarray) -> None:
    """ValueError for values that are no pixels, which as integers would wrap around."""
    if not 0 <= pixels.min() <= pixels.max() <= 1:
        raise ValueError(
            f"{type(pipe).__name__} decodes to values from {pixels.min():.2f} to {pixels.max():.2f}, and "
            "pixels are from 0 to 1; use a pipeline that makes pictures of its latents itself"
        )


def _uint8(pixels: np.ndarray) -> np.ndarray:
    """As the pipelines make pictures of theirs."""
    return (pixels * 255).round().astype(np.uint8)
