"""Stage 6: transformer and text encoders together, on all grids. Knows no pictures and no VAE."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from overtone.progressive import library
from overtone.progressive.spectral import corner
from overtone.progressive.tiny import world
from overtone.progressive.tiny.train.clock import Checkpoint, Clock, log, set_lr, smooth
from overtone.progressive.tiny.train.models import build_denoiser
from overtone.progressive.tiny.train.muon import Muon, build_optimizers, is_hidden_matrix
from overtone.progressive.tiny.train.settings import Settings
from overtone.progressive.tiny.train.text import (
    reading_answers,
    reading_loss,
    thing_weights,
    tokenize,
    train_text,
)


def train_denoiser(
    settings: Settings,
    work: Path,
    device: torch.device,
    latents: Tensor,
    until: float | None = None,
) -> None:
    """Transformer and text encoders together, on velocity loss over all grids and on `reading_loss`."""
    torch.manual_seed(settings.seed + 1)
    denoiser = build_denoiser(settings).to(device).train()
    asked = [world.scene(seed).asked for seed in settings.seeds[: len(latents)]]
    words, pooled_words = (t.to(device) for t in tokenize([*(a.caption for a in asked), ""]))  # [N + 1, L]
    answers = torch.stack([*(reading_answers(a) for a in asked), reading_answers(None)]).to(device)
    file = work / "denoiser.pt"
    if not file.exists():
        train_text(settings, work, denoiser["text_encoder_2"], denoiser["reader"], words[:-1], answers[:-1])
    parameters = dict(denoiser.named_parameters())
    average = {name: p.detach().clone() for name, p in parameters.items()}
    optimizers = build_optimizers(denoiser, is_hidden_matrix, settings.matrix_lr, settings.other_lr)
    clock = Clock(settings.dit_minutes, settings.dit_steps, settings.checkpoint_s, until)
    checkpoint = Checkpoint(file, settings, denoiser, optimizers, clock, device)
    average = checkpoint.resume().get("average", average)

    weights = {
        grid: torch.stack(
            [*(thing_weights(a, grid // 2, settings) for a in asked), torch.ones(grid // 2, grid // 2)]
        ).to(device)
        for grid in settings.grids
    }
    latents = latents.to(device)
    rng = np.random.default_rng((settings.seed, 2, clock.step))
    shown: dict[str, Tensor] = {}
    seen = 0
    since = time.monotonic()
    for progress in clock:
        for optimizer in optimizers:
            peak = settings.matrix_lr if isinstance(optimizer, Muon) else settings.other_lr
            set_lr(optimizer, peak, progress, clock, settings.warmup)
        shares = (1 - progress) * np.array(settings.early) + progress * np.array(settings.late)
        which = rng.choice(len(shares), p=shares / shares.sum())
        grid, count = settings.grids[which], settings.batches[which]
        rows = torch.from_numpy(rng.integers(len(latents), size=count)).to(device)
        x0 = coarse(latents[rows].float(), grid)
        empty = torch.from_numpy(rng.random(count) < settings.unconditional).to(device)
        rows = torch.where(empty, len(asked), rows)
        farther = np.where(rng.random(count) < settings.high_noise, settings.high_noise_shift, 1.0)
        shift = torch.from_numpy(farther).float().to(device)
        text = denoiser["text_encoder_2"](words[rows])[0]
        velocity = velocity_loss(denoiser, x0, text, pooled_words[rows], shift, weights[grid][rows])
        reading = reading_loss(denoiser["reader"](text), answers[rows])
        loss = velocity + settings.reading_weight * reading
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(settings.ema, (1 + clock.step) / (10 + clock.step))
        with torch.no_grad():
            library.lerp_all(list(average.values()), list(parameters.values()), 1 - decay)
        seen += count
        # Numbers are read when logged: until then a GPU need not wait for this process, nor it for the GPU.
        shown = smooth(shown, {f"loss_{grid}": velocity.detach(), "reading": reading.detach()})
        if clock.step % settings.log_steps == 0:
            values = {name: float(value) for name, value in sorted(shown.items())}
            log(work, "denoiser", clock, values | {"samples_per_s": seen / (time.monotonic() - since)})
            seen, since = 0, time.monotonic()
        if clock.checkpoint_due():
            checkpoint.save(average=average)
    checkpoint.save(average=average)


def coarse(x0: Tensor, grid: int) -> Tensor:
    """What a stage on grid x grid cells must make of x0 [B, C, H, H]: [B, C, grid, grid]."""
    return x0 if grid == x0.shape[-1] else corner(x0, grid, grid) * (grid / x0.shape[-1])


def velocity_loss(
    denoiser: nn.ModuleDict,
    x0: Tensor,
    text: Tensor,
    pooled_words: Tensor,
    farther: Tensor,
    weights: Tensor,
) -> Tensor:
    """Weighted mean squared error of eps - x0 at logit-normal noise levels, shifted `farther` [B] times as
    far as the pipeline does. x0 [B, C, H, W], text [B, L, text_width], weights [B, H / 2, W / 2]."""
    batch, _, height, width = x0.shape
    shift = farther * math.exp(calculate_shift(height * width // 4))
    u = torch.sigmoid(torch.randn(batch, device=x0.device))
    sigma = shift * u / (1 + (shift - 1) * u)
    noise = torch.randn_like(x0)
    level = sigma[:, None, None, None]
    x = (1 - level) * x0 + level * noise
    predicted = denoiser["transformer"](
        hidden_states=library.pack_flux(FluxPipeline, x),
        timestep=sigma,
        pooled_projections=denoiser["text_encoder"](pooled_words).pooler_output,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
        img_ids=library.flux_positions(FluxPipeline, height // 2, width // 2, x),
        return_dict=False,
    )[0]
    error = (predicted - library.pack_flux(FluxPipeline, noise - x0)).square().mean(-1)  # [B, tokens]
    return (error * weights.flatten(1)).sum() / weights.sum()
