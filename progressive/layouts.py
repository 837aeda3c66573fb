"""Latents between the engine's layout and the pipelines'. Knows shapes, no numbers and no steps.

The engine's: [B, C, H, W], or [B, C, T, H, W] for video; with subcells s > 1 the channel is
c * s * s + row * s + column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from overtone.progressive.families import Family


def shape(family: Family, channels: int, frames: int, height: int, width: int) -> tuple[int, ...]:
    """One row's latent in the engine's layout, without the batch axis; lengths in cells."""
    if family.default_frames is None:
        return channels, height, width
    return channels, frames, height, width


def pack(family: Family, latents: Tensor) -> Tensor:
    """Latents as the pipeline's `latents` argument takes them."""
    if family.layout in ("grid", "grid_to_tokens"):
        return latents
    if family.layout == "channels_last":
        return latents.movedim(1, -1).clone(memory_format=torch.contiguous_format)  # [B, T, H, W, C]
    batch, channels, height, width = latents.shape[0], latents.shape[1], *latents.shape[-2:]
    if family.layout == "tokens2x2":
        cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
        cells = cells.permute(0, 2, 4, 1, 3, 5)  # [B, H / 2, W / 2, C, 2, 2]
        return cells.reshape(batch, height // 2 * (width // 2), channels * 4)
    if family.layout == "subcell_tokens":
        block = family.subcells**2
        latents = latents.reshape(batch, channels // block, block, height, width)
        latents = latents.transpose(1, 2).reshape(batch, channels, height, width)
    return latents.flatten(2).transpose(1, 2)  # [B, (T *) H * W, C]


def pack_as_stepped(family: Family, latents: Tensor) -> Tensor:
    """Latents as the scheduler's steps see them: the inverse of `unpack`."""
    if family.layout == "grid_to_tokens":
        return latents.flatten(2).transpose(1, 2)  # [B, (T *) H * W, C]
    return pack(family, latents)


def unpack(family: Family, latents: Tensor, height: int, width: int) -> Tensor:
    """Latents as the last scheduler step gives them, in the engine's layout on a grid of height x width."""
    if family.layout == "grid":
        return latents
    if family.layout == "channels_last":
        return latents.movedim(-1, 1)
    batch, _, channels = latents.shape
    if family.layout == "tokens2x2":
        cells = latents.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
        cells = cells.permute(0, 3, 1, 4, 2, 5)  # [B, C, H / 2, 2, W / 2, 2]
        return cells.reshape(batch, channels // 4, height, width)
    latents = latents.transpose(1, 2)  # [B, C, (T *) H * W]
    if family.layout == "subcell_tokens":
        block = family.subcells**2
        latents = latents.reshape(batch, block, channels // block, height * width).transpose(1, 2)
    frames = () if family.default_frames is None else (-1,)
    return latents.reshape(batch, channels, *frames, height, width)
