"""Pictures as a VAE takes them, and its latents as the transformer sees them. Knows no spectrum."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from overtone.progressive.families import Family
from overtone.progressive.pipelines import resolve
from overtone.progressive.schedule import grid_for
from overtone.progressive.spectral import patchify, unpatchify

logger = logging.getLogger(__name__)


def usable_pictures(images: Iterable[Any], size: tuple[int, int]) -> Iterator[Tensor]:
    """Pictures as the VAE takes them, all of one size; those much too small are left out."""
    left_out = 0
    for image in images:
        if min(side / wanted for side, wanted in zip(_size(image), size, strict=True)) < 0.5:
            left_out += 1
            continue
        yield _fitted(image, size)
    if left_out:
        logger.warning("%d pictures were left out: smaller than half of %dx%d px", left_out, *size)


def _size(image: Any) -> tuple[int, int]:
    """(height, width) in pixels. ValueError for what is no picture."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, Tensor) and image.ndim in (3, 4) and image.is_floating_point():
        return image.shape[-2], image.shape[-1]
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (3, 4):
        return image.shape[-3], image.shape[-2]
    shape = f" of shape {tuple(image.shape)} and type {image.dtype}" if hasattr(image, "shape") else ""
    raise ValueError(
        f"cannot calibrate on a {type(image).__name__}{shape}; give PIL pictures, uint8 [H, W, 3] or "
        "[T, H, W, 3], or float tensors [C, H, W]"
    )


def _fitted(image: Any, size: tuple[int, int]) -> Tensor:
    """[C, H, W] or [C, T, H, W] in [-1, 1]: scaled to cover `size`, then its middle."""
    if isinstance(image, Tensor):
        pixels = image.float()
    else:
        array = np.array(image.convert("RGB")) if isinstance(image, Image.Image) else image[..., :3]
        pixels = as_pixels(array).movedim(-1, 0)  # [3, (T,) H, W]
    scale = max(wanted / side for side, wanted in zip(pixels.shape[-2:], size, strict=True))
    if scale != 1:
        scaled = [
            max(round(side * scale), wanted) for side, wanted in zip(pixels.shape[-2:], size, strict=True)
        ]
        frames = pixels.flatten(1, -3).unsqueeze(0) if pixels.ndim == 4 else pixels.unsqueeze(0)
        planes = frames.reshape(1, -1, *pixels.shape[-2:])
        planes = torch.nn.functional.interpolate(planes, size=scaled, mode="bicubic", antialias=True)
        pixels = planes.reshape(*pixels.shape[:-2], *scaled)
    top, left = ((side - wanted) // 2 for side, wanted in zip(pixels.shape[-2:], size, strict=True))
    return pixels[..., top : top + size[0], left : left + size[1]]


def as_pixels(array: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] as float32 in [-1, 1], to the bit as diffusers does."""
    return 2.0 * torch.from_numpy(array.astype(np.float32) / 255.0) - 1.0


def batches(pictures: Iterator[Tensor], batch_size: int) -> Iterator[Tensor]:
    """[B, C, (T,) H, W], B at most `batch_size`; a new batch where the number of frames changes."""
    batch: list[Tensor] = []
    for picture in pictures:
        if batch and (len(batch) == batch_size or batch[0].shape != picture.shape):
            yield torch.stack(batch)
            batch = []
        batch.append(picture)
    if batch:
        yield torch.stack(batch)


class Coder:
    """A VAE with the normalisation that its pipeline applies to what it gives."""

    def __init__(self, pipe_or_vae: Any, family: Family | None = None) -> None:
        """`family`: the pipeline's, or the VAE's; None: known from the pipeline."""
        self.family = family
        if hasattr(pipe_or_vae, "vae"):
            self.family = family or resolve(pipe_or_vae, None)
            self.vae = pipe_or_vae.vae
        else:
            self.vae = pipe_or_vae
        if not hasattr(self.vae, "encode"):
            raise ValueError(f"{type(self.vae).__name__} cannot encode pictures; give a pipeline or its VAE")
        self.config = self.vae.config
        self.device = getattr(self.vae, "device", torch.device("cpu"))
        self.dtype = getattr(self.vae, "dtype", torch.float32)
        self.video = "temperal_downsample" in self.config  # as diffusers spells it: 3-D convolutions
        self.patched = hasattr(self.vae, "bn")

    def size(self, height_px: int | None, width_px: int | None, first: Any) -> tuple[int, int]:
        """The size to measure at, in pixels. ValueError where the family cannot make it."""
        if self.family is not None:
            height_px = height_px or self.family.default_height
            width_px = width_px or self.family.default_width
            grid_for(self.family, height_px, width_px)
            return height_px, width_px
        unit = self._cell_px() * (2 if self.patched else 1)
        own = _size(first)
        return (height_px or own[0] // unit * unit), (width_px or own[1] // unit * unit)

    def _cell_px(self) -> int:
        if self.config.get("scale_factor_spatial"):
            return int(self.config["scale_factor_spatial"])
        return 2 ** (len(self.config.get("block_out_channels", (0,))) - 1)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """[B, 3, (T,) H, W] in [-1, 1] to latents [B, C, (T,) h, w], the mode, normalised."""
        pixels = pixels.to(self.device, self.dtype)
        if self.config.get("in_channels", pixels.shape[1]) == pixels.shape[1] + 1:
            opaque = torch.ones_like(pixels[:, :1])
            pixels = torch.cat([pixels, opaque], dim=1)  # RGBA
        if self.video and pixels.ndim == 4:
            pixels = pixels.unsqueeze(2)  # one frame
        if not self.video and pixels.ndim == 5:  # an image VAE sees each frame by itself
            frames = [self.latents(pixels[:, :3, t]) for t in range(pixels.shape[2])]
            return torch.stack(frames, dim=2)
        encoded = self.vae.encode(pixels)
        if hasattr(encoded, "latent_dist"):
            return self._normalised(encoded.latent_dist.mode().float())
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
        return self._normalised(latents.float())

    def _normalised(self, latents: Tensor) -> Tensor:
        if self.patched:
            mean, variance = self.vae.bn.running_mean.float(), self.vae.bn.running_var.float()
            std = (variance + self.config["batch_norm_eps"]).sqrt()
            if self.family is not None and self.family.layout == "subcell_tokens":
                mean, std = (v.reshape(4, -1).T.flatten() for v in (mean, std))  # planes first, then channels
            cells = (patchify(latents, 2) - mean[:, None, None]) / std[:, None, None]
            return unpatchify(cells, 2)
        if self.config.get("latents_mean") is not None:
            shape = (-1, *[1] * (latents.ndim - 2))
            mean, std = (
                torch.tensor(self.config[name], device=latents.device).reshape(shape)
                for name in ("latents_mean", "latents_std")
            )
            return (latents - mean) * (1.0 / std)  # as the pipelines do, to the bit
        shifts = self.family is None or not self.family.unshifted
        shift = (self.config.get("shift_factor") or 0) if shifts else 0
        return (latents - shift) * (self.config.get("scaling_factor") or 1)
