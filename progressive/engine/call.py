"""TODO: progressive/engine/call.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from overtone.progressive.staged import StageScheduler

Text = dict[str, Any]
"""One prompt as the pipeline's call takes it, without the batch axis: {"prompt_embeds": [tokens, D], ...},
or {"prompt": str} for families whose text is not encoded ahead."""

OnStep = Callable[[int, int], None]
"""Called after each transformer step with (steps done, steps in all)."""

FROM_ENGINE = {
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "guidance_scale",
    "true_cfg_scale",
}


def padded(rows: Sequence[Tensor]) -> Tensor:
    """[B, longest, ...], zeros at the end."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def callback(
    theirs: Any, on_step: OnStep | None, scheduler: StageScheduler, total: int
) -> Callable[..., dict[str, Any]]:
    def call(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if theirs is not None:
            values = theirs(pipe, step, timestep, values)
            scheduler.latents = values.get("latents", scheduler.latents)
        if on_step is not None:
            on_step(step + 1, total)
        return values

    return call
