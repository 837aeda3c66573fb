"""Stages 1 to 4: pictures, the VAE, latents, and its decoder again. Knows no captions and no transformer."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overtone.progressive.tiny import world
from overtone.progressive.tiny.train.clock import Checkpoint, Clock, log, save, set_lr, smooth
from overtone.progressive.tiny.train.models import build_vae, decoder_of
from overtone.progressive.tiny.train.muon import build_optimizers, is_hidden_kernel
from overtone.progressive.tiny.train.settings import Settings


def _draw(job: tuple[int, int]) -> np.ndarray:
    seed, side_px = job
    return world.render(world.scene(seed), side_px)


def make_pictures(settings: Settings, work: Path) -> np.ndarray:
    """All training pictures, uint8 [N, H, W, 3], mapped from a file that is made once."""
    target = work / "pictures.npy"
    if not target.exists():
        partial = work / "pictures.partial.npy"
        side = settings.side_px
        shape = (settings.scenes, side, side, 3)
        out = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        jobs = [(seed, side) for seed in settings.seeds]
        if settings.scenes > 500:
            with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
                for i, picture in enumerate(pool.imap(_draw, jobs, chunksize=32)):
                    out[i] = picture
        else:
            for i, job in enumerate(jobs):
                out[i] = _draw(job)
        out.flush()
        partial.replace(target)
    return np.load(target, mmap_mode="r")


def _to_tensor(pictures: np.ndarray, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3] as float32 [B, 3, H, W] in [-1, 1]."""
    picture = torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2)
    return (picture.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_vae(settings: Settings, work: Path, device: torch.device, pictures: np.ndarray) -> Any:
    """The autoencoder, each latent channel brought to mean 0 and variance 1. Trained on crops near edges."""
    torch.manual_seed(settings.seed)
    vae = build_vae(settings).to(device, memory_format=torch.channels_last)
    optimizers = build_optimizers(vae, is_hidden_kernel, settings.vae_lr, settings.vae_lr)
    clock = Clock(settings.vae_minutes, settings.vae_steps, settings.checkpoint_s)
    checkpoint = Checkpoint(work / "vae.pt", settings, vae, optimizers, clock, device)
    if checkpoint.resume().get("done"):
        return vae.eval()

    rng = np.random.default_rng((settings.seed, 1, clock.step))
    shown: dict[str, float] = {}
    for progress in clock:
        for optimizer in optimizers:
            set_lr(optimizer, settings.vae_lr, progress, clock, settings.vae_warmup)
        large = progress > 1 - settings.large_crops
        side, count = (
            (2 * settings.crop_px, settings.vae_batch // 4)
            if large
            else (settings.crop_px, settings.vae_batch)
        )
        x = _to_tensor(_crops(pictures, settings, side, count, rng), device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        gradient = sum((torch.diff(y, dim=d) - torch.diff(x, dim=d)).abs().mean() for d in (2, 3))
        pixel = (y - x).abs().mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = pixel + settings.gradient_weight * gradient + settings.kl_weight * kl
        vae.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            values = {"l1": pixel, "psnr_db": -10 * ((y - x) / 2).square().mean().log10(), "kl": kl}
            shown = smooth(shown, {k: float(v) for k, v in values.items()})
        if clock.step % settings.log_steps == 0:
            log(work, "vae", clock, shown)
        if clock.checkpoint_due():
            checkpoint.save()
    vae.eval()
    _normalise(vae, pictures[: min(len(pictures), 128)], device)
    log(work, "vae", clock, shown | {"held_out_psnr_db": _held_out_psnr(vae, settings, device)})
    checkpoint.save(done=True)
    return vae


def _crops(
    pictures: np.ndarray, settings: Settings, side: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Random crops, three of four near a thing: uint8 [count, side, side, 3]."""
    crops = []
    scale = settings.side_px / world.SIDE_PX
    for i in rng.integers(len(pictures), size=count):
        corner_px = rng.uniform(0, settings.side_px - side, 2)
        if rng.random() < 0.75:
            things = world.scene(settings.seeds[i]).things
            thing = things[rng.integers(len(things))]
            centre = np.array([thing.y, thing.x]) + rng.uniform(-1.1, 1.1, 2) * thing.radius
            corner_px = centre * scale - side / 2
        y, x = np.clip(np.rint(corner_px), 0, settings.side_px - side).astype(int)
        crops.append(pictures[i, y : y + side, x : x + side])
    return np.stack(crops)


@torch.no_grad()
def _normalise(vae: Any, pictures: np.ndarray, device: torch.device) -> None:
    """Fold each latent channel's mean and spread over `pictures` into the 1x1 convolutions around it."""
    means = torch.cat([m for m in _encode(vae, pictures, device)]).float()  # [N, C, h, w]
    mean, std = means.mean((0, 2, 3)).to(device), means.std((0, 2, 3)).to(device)
    std = std.clamp_min(0.1 * float(std.max()))  # a channel that is hardly used stays small
    channels = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= std[None, :, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def _encode(vae: Any, pictures: np.ndarray, device: torch.device) -> Iterator[Tensor]:
    """Means of the latents, float16 [B, C, h, w], a few pictures at a time."""
    for i in range(0, len(pictures), 16):
        yield vae.encode(_to_tensor(pictures[i : i + 16], device)).latent_dist.mean.half().cpu()


def make_latents(work: Path, vae: Any, pictures: np.ndarray, device: torch.device) -> Tensor:
    """Latents of all training pictures, float16 [N, C, h, w], from a file that is made once."""
    target = work / "latents.pt"
    if not target.exists():
        save(target, {"latents": torch.cat(list(_encode(vae, pictures, device)))})
    return torch.load(target, weights_only=True)["latents"]


def train_decoder(
    settings: Settings, work: Path, device: torch.device, vae: Any, pictures: np.ndarray, latents: Tensor
) -> None:
    """The decoder alone, on whole pictures, sharp where the things are. The encoder stays as it is, and so do
    the latents that the transformer learns."""
    torch.manual_seed(settings.seed + 2)
    decoder = decoder_of(vae).train()
    optimizers = build_optimizers(decoder, is_hidden_kernel, settings.decoder_lr, settings.decoder_lr)
    clock = Clock(settings.decoder_minutes, settings.decoder_steps, settings.checkpoint_s)
    checkpoint = Checkpoint(work / "decoder.pt", settings, decoder, optimizers, clock, device)
    if checkpoint.resume().get("done"):
        vae.eval()
        return

    rng = np.random.default_rng((settings.seed, 4, clock.step))
    shown: dict[str, float] = {}
    for progress in clock:
        for optimizer in optimizers:
            set_lr(optimizer, settings.decoder_lr, progress, clock, settings.vae_warmup)
        rows = rng.integers(len(latents), size=settings.decoder_batch)
        x, z = _to_tensor(pictures[rows], device), latents[torch.from_numpy(rows)].float().to(device)
        weight = torch.stack([outline_weights(row, settings) for row in rows.tolist()]).to(device)
        y = vae.decode(z + settings.latent_noise * torch.randn_like(z)).sample
        pixel = (weight * (y - x).abs()).sum() / (3 * weight.sum())
        gradient: Any = 0.0
        for d in (2, 3):
            near = weight.narrow(d, 1, weight.shape[d] - 1)
            gradient += (near * torch.diff(y - x, dim=d).abs()).sum() / (3 * near.sum())
        decoder.zero_grad(set_to_none=True)
        (pixel + settings.gradient_weight * gradient).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            values = {"l1": pixel, "psnr_db": -10 * ((y - x) / 2).square().mean().log10()}
            shown = smooth(shown, {k: float(v) for k, v in values.items()})
        if clock.step % settings.log_steps == 0:
            log(work, "decoder", clock, shown)
        if clock.checkpoint_due():
            checkpoint.save()
    vae.eval()
    log(work, "decoder", clock, shown | {"held_out_psnr_db": _held_out_psnr(vae, settings, device)})
    checkpoint.save(done=True)


def outline_weights(row: int, settings: Settings) -> Tensor:
    """Weight of each pixel's loss in a training picture, float32 [1, side_px, side_px]."""
    scale = settings.side_px / world.SIDE_PX
    middle = (torch.arange(settings.side_px) + 0.5) / scale
    weights = torch.ones(1, settings.side_px, settings.side_px)
    for thing in world.scene(settings.seeds[row]).things:
        distance = ((middle - thing.y)[:, None] ** 2 + (middle - thing.x)[None] ** 2).sqrt()
        weights[0][distance < thing.radius + 6] = settings.outline_weight
    return weights


@torch.no_grad()
def _held_out_psnr(vae: Any, settings: Settings, device: torch.device) -> float:
    """Of 16 held-out pictures through the autoencoder, dB."""
    held_out = np.stack([_draw((world.HELD_OUT_SEEDS[i], settings.side_px)) for i in range(16)])
    x = _to_tensor(held_out, device)
    error = (vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x) / 2
    return float(-10 * error.square().flatten(1).mean(1).log10().mean())
