"""Trains the embedded model: `python -m progressive.tiny.train [all | export | restore] --work .train`.

Six stages: pictures -> VAE -> latents -> the VAE's decoder again, on whole pictures -> T5 encoder, by reading
captions -> transformer and text encoders. All but the fifth, which takes two minutes, resume from their
checkpoints in the work folder. Learning rates
fall with the clock, so a stage ends when its minutes are spent however busy the machine is. `export` writes
the averaged weights as a diffusers folder at any moment of the last stage; `all` ends with it. `restore` is
its inverse: it makes the work folder of an exported model, from where `all` trains it on.

Coarse grids: x0 of grid m is the low-frequency corner of the full latent over the side ratio, which is what
a coarse stage must make for its expansion to be right (progressive/spectral.py, progressive/schedule.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from progressive.spectral import corner, dct_basis, frequencies
from progressive.tiny import MAX_SEQUENCE_LENGTH, world


@dataclass(frozen=True)
class Settings:
    """All that training depends on. The defaults made the weights in the repository."""

    scenes: int = 49152
    """Training pictures, of the seeds that `world.training` names."""
    skip_scenes: int = 12288
    """Seeds left out before those: what was trained on earlier, to go on with scenes that are new."""
    latent_scenes: int = 49152
    """How many of them the transformer is trained on, for encoding them takes time too."""
    side_px: int = world.SIDE_PX
    seed: int = 0
    """Of weights and batches."""

    vae_channels: tuple[int, ...] = (8, 16, 48, 48)
    latent_channels: int = 8
    vae_minutes: float = 12.0
    vae_steps: int | None = None
    """Ends the stage early; None: the clock alone."""
    vae_lr: float = 4e-3
    vae_warmup: int = 20
    """Steps."""
    crop_px: int = 64
    """Side of a training crop; twice that in the last `large_crops` of the time, and a quarter as many."""
    large_crops: float = 0.3
    vae_batch: int = 16
    gradient_weight: float = 0.5
    kl_weight: float = 2e-4

    decoder_minutes: float = 24.0
    decoder_steps: int | None = None
    decoder_lr: float = 5e-4
    decoder_batch: int = 2
    """Whole pictures: group norms see what they will see."""
    outline_weight: float = 6.0
    """Weight of a pixel's loss on and near a thing; the rest of the picture has 1."""
    latent_noise: float = 0.05
    """Standard deviation of what is added to the latents: a transformer's are never exact."""

    width: int = 192
    head_dim: int = 32
    double_blocks: int = 2
    single_blocks: int = 4
    text_width: int = 128
    text_layers: int = 2
    pooled_width: int = 32
    text_steps: int = 1500
    """Of the T5 encoder on `reading_loss` alone, before the transformer: pictures teach it very slowly."""
    text_batch: int = 64
    """Captions."""
    text_lr: float = 2e-3
    place_lr: float = 0.05
    """Of the T5 encoder's relative position biases: all it knows of order, and they must grow to 5 or so."""
    dit_minutes: float = 2.3
    dit_steps: int | None = None
    matrix_lr: float = 3e-3
    """Of the hidden matrices, by Muon."""
    other_lr: float = 1.5e-3
    """Of everything else, by AdamW."""
    warmup: int = 50
    """Steps."""
    high_noise: float = 0.4
    """Share of the samples whose noise levels are shifted `high_noise_shift` times as far as the pipeline
    does: shapes and places are settled there, and by the caption alone."""
    high_noise_shift: float = 5.0
    thing_weight: float = 4.0
    """Weight of the loss where the caption has a large thing; a small one has more, by the ratio of their
    radii, and the background 1. As the caption alone says where, the best prediction stays the same; shapes,
    a small part of a picture's energy, are learnt sooner."""
    reading_weight: float = 0.2
    """Weight of `reading_loss` beside the pictures'."""
    unconditional: float = 0.1
    """Share of captions replaced by the empty one."""
    ema: float = 0.998
    grids: tuple[int, ...] = (16, 18, 20, 22, 24, 26, 28, 30, 32)
    """Latent cells a side, the last the full grid. One that is left out is out of distribution, even between
    two that are in."""
    batches: tuple[int, ...] = (384, 312, 256, 224, 192, 168, 144, 128, 112)
    """Samples of a step at each grid: about equally long steps. For a GPU; two CPU cores did with an
    eighth."""
    early: tuple[float, ...] = (0.10, 0.09, 0.05, 0.09, 0.07, 0.09, 0.06, 0.10, 0.35)
    """Share of the steps at each grid when training begins; moves linearly to `late`."""
    late: tuple[float, ...] = (0.08, 0.06, 0.05, 0.07, 0.06, 0.06, 0.06, 0.08, 0.48)
    checkpoint_s: float = 120.0
    log_steps: int = 50

    @cached_property
    def seeds(self) -> list[int]:
        """Of the training scenes."""
        return world.training(self.scenes, self.skip_scenes)


# ------------------------------------------------------------------------------------------- the model


def build_tokenizer(begin: bool, max_length: int) -> PreTrainedTokenizerFast:
    """One token a word; unknown words become <unk>. With `begin`, <s> comes first; </s> always ends."""
    specials = ["<pad>", "</s>", "<unk>", "<s>"]
    vocabulary = {word: i for i, word in enumerate([*specials, *world.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "<s> $A </s>" if begin else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("</s>", 1), ("<s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=max_length,
    )


def build_vae(settings: Settings) -> Any:
    """An `AutoencoderKL`, which type checkers do not know as a module."""
    levels = len(settings.vae_channels)
    return AutoencoderKL(
        block_out_channels=settings.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=settings.side_px,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_denoiser(settings: Settings) -> nn.ModuleDict:
    """Transformer and both text encoders, named as the pipeline names them, and `reader`, the linear heads of
    `reading_loss`, which are in no pipeline."""
    words = 4 + len(world.vocabulary())
    rotary = (settings.head_dim // 8, (settings.head_dim - settings.head_dim // 8) // 2)
    transformer: Any = FluxTransformer2DModel(
        in_channels=4 * settings.latent_channels,
        num_layers=settings.double_blocks,
        num_single_layers=settings.single_blocks,
        attention_head_dim=settings.head_dim,
        num_attention_heads=settings.width // settings.head_dim,
        joint_attention_dim=settings.text_width,
        pooled_projection_dim=settings.pooled_width,
        guidance_embeds=False,
        axes_dims_rope=(rotary[0], rotary[1], rotary[1]),
    )
    for name, parameter in transformer.named_parameters():
        # Blocks begin as the identity and the first prediction is zero (Peebles and Xie 2023, adaLN-Zero).
        if (".norm" in name and ".linear." in name) or name.startswith(("norm_out.linear", "proj_out")):
            nn.init.zeros_(parameter)
    text = T5Config(
        vocab_size=words,
        d_model=settings.text_width,
        d_kv=settings.text_width // 4,
        d_ff=2 * settings.text_width,
        num_layers=settings.text_layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    pooled = CLIPTextConfig(
        vocab_size=words,
        hidden_size=settings.pooled_width,
        intermediate_size=2 * settings.pooled_width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=MAX_SEQUENCE_LENGTH,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
    )
    return nn.ModuleDict(
        {
            "transformer": transformer,
            "text_encoder": CLIPTextModel(pooled),
            "text_encoder_2": T5EncoderModel(text),
            "reader": nn.Linear(settings.text_width, sum(READING_SIZES)),
        }
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    )


# -------------------------------------------------------------------------------------------- pictures


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


# -------------------------------------------------------------------------------------------- stage 1


def train_vae(settings: Settings, work: Path, device: torch.device, pictures: np.ndarray) -> Any:
    """The autoencoder, each latent channel brought to mean 0 and variance 1. Trained on crops near edges."""
    torch.manual_seed(settings.seed)
    vae = build_vae(settings).to(device, memory_format=torch.channels_last)
    optimizers = _optimizers(vae, _is_hidden_kernel, settings.vae_lr, settings.vae_lr)
    clock = Clock(settings.vae_minutes, settings.vae_steps, settings.checkpoint_s)
    checkpoint = Checkpoint(work / "vae.pt", settings, vae, optimizers, clock, device)
    if checkpoint.resume().get("done"):
        return vae.eval()

    rng = np.random.default_rng((settings.seed, 1, clock.step))
    shown: dict[str, float] = {}
    for progress in clock:
        for optimizer in optimizers:
            _set_lr(optimizer, settings.vae_lr, progress, clock, settings.vae_warmup)
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
            shown = _smooth(shown, {k: float(v) for k, v in values.items()})
        if clock.step % settings.log_steps == 0:
            _log(work, "vae", clock, shown)
        if clock.checkpoint_due():
            checkpoint.save()
    vae.eval()
    _normalise(vae, pictures[: min(len(pictures), 128)], device)
    _log(work, "vae", clock, shown | {"held_out_psnr_db": _held_out_psnr(vae, settings, device)})
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
        _save(target, {"latents": torch.cat(list(_encode(vae, pictures, device)))})
    return torch.load(target, weights_only=True)["latents"]


def train_decoder(
    settings: Settings, work: Path, device: torch.device, vae: Any, pictures: np.ndarray, latents: Tensor
) -> None:
    """The decoder alone, on whole pictures, sharp where the things are. The encoder stays as it is, and so do
    the latents that the transformer learns."""
    torch.manual_seed(settings.seed + 2)
    decoder = decoder_of(vae).train()
    optimizers = _optimizers(decoder, _is_hidden_kernel, settings.decoder_lr, settings.decoder_lr)
    clock = Clock(settings.decoder_minutes, settings.decoder_steps, settings.checkpoint_s)
    checkpoint = Checkpoint(work / "decoder.pt", settings, decoder, optimizers, clock, device)
    if checkpoint.resume().get("done"):
        vae.eval()
        return

    rng = np.random.default_rng((settings.seed, 4, clock.step))
    shown: dict[str, float] = {}
    for progress in clock:
        for optimizer in optimizers:
            _set_lr(optimizer, settings.decoder_lr, progress, clock, settings.vae_warmup)
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
            shown = _smooth(shown, {k: float(v) for k, v in values.items()})
        if clock.step % settings.log_steps == 0:
            _log(work, "decoder", clock, shown)
        if clock.checkpoint_due():
            checkpoint.save()
    vae.eval()
    _log(work, "decoder", clock, shown | {"held_out_psnr_db": _held_out_psnr(vae, settings, device)})
    checkpoint.save(done=True)


def decoder_of(vae: Any) -> nn.ModuleDict:
    """The part of an autoencoder that makes pictures of latents."""
    return nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})


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


# -------------------------------------------------------------------------------------------- stage 2


def train_text(
    settings: Settings, work: Path, encoder: nn.Module, reader: nn.Module, words: Tensor, answers: Tensor
) -> None:
    """Teach the T5 encoder to read, before anything is drawn. words [N, L], answers [N, L, 4]."""
    places = [p for name, p in encoder.named_parameters() if "relative_attention_bias" in name]
    others = [p for p in (*encoder.parameters(), *reader.parameters()) if all(p is not q for q in places)]
    optimizers = [
        torch.optim.AdamW(some, lr=lr, betas=(0.9, 0.98), weight_decay=0)
        for some, lr in ((others, settings.text_lr), (places, settings.place_lr))
    ]
    clock = Clock(math.inf, settings.text_steps, math.inf)
    rng = np.random.default_rng((settings.seed, 3))
    for progress in clock:
        for optimizer, peak in zip(optimizers, (settings.text_lr, settings.place_lr), strict=True):
            _set_lr(optimizer, peak, progress, clock, settings.warmup)
        rows = torch.from_numpy(rng.integers(len(words), size=settings.text_batch)).to(words.device)
        logits = reader(encoder(words[rows])[0])
        loss = reading_loss(logits, answers[rows])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if clock.step % (5 * settings.log_steps) == 0 or clock.step == settings.text_steps - 1:
            read = torch.stack([part.argmax(-1) for part in logits.split(READING_SIZES, dim=-1)], dim=-1)
            right = (read == answers[rows])[answers[rows] >= 0].float().mean()
            _log(work, "text", clock, {"reading": float(loss.detach()), "right": float(right)})


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
    optimizers = _optimizers(denoiser, _is_hidden_matrix, settings.matrix_lr, settings.other_lr)
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
            _set_lr(optimizer, peak, progress, clock, settings.warmup)
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
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
        seen += count
        # Numbers are read when logged: until then a GPU need not wait for this process, nor it for the GPU.
        shown = _smooth(shown, {f"loss_{grid}": velocity.detach(), "reading": reading.detach()})
        if clock.step % settings.log_steps == 0:
            values = {name: float(value) for name, value in sorted(shown.items())}
            _log(work, "denoiser", clock, values | {"samples_per_s": seen / (time.monotonic() - since)})
            seen, since = 0, time.monotonic()
        if clock.checkpoint_due():
            checkpoint.save(average=average)
    checkpoint.save(average=average)


def tokenize(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of both text encoders, int64 [N, MAX_SEQUENCE_LENGTH] each."""
    ids = [
        build_tokenizer(begin, MAX_SEQUENCE_LENGTH)(
            list(captions),
            padding="max_length",
            max_length=MAX_SEQUENCE_LENGTH,
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        for begin in (False, True)
    ]
    return ids[0], ids[1]


def coarse(x0: Tensor, grid: int) -> Tensor:
    """What a stage on grid x grid cells must make of x0 [B, C, H, H]: [B, C, grid, grid]."""
    return x0 if grid == x0.shape[-1] else corner(x0, grid, grid) * (grid / x0.shape[-1])


PLACES = sorted({place for relation in (None, *world.RELATIONS) for place in world.places(relation)})
"""Mean centres that a thing can have, pixels."""
READING_SIZES = (len(world.SIZES), len(world.COLOURS), len(world.SHAPES), len(PLACES))
"""Classes of each question that is read off a thing's words."""


def reading_answers(asked: world.Asked | None) -> Tensor:
    """What is to be read at each T5 token: int64 classes [MAX_SEQUENCE_LENGTH, 4]; -1: a word of no thing."""
    answers = torch.full((MAX_SEQUENCE_LENGTH, 4), -1)
    if asked is None:
        return answers
    classes = (list(world.SIZES), list(world.COLOURS), list(world.SHAPES))
    first = 0
    for kind, place in zip(asked.kinds, world.places(asked.relation), strict=True):
        said = (kind.size, kind.colour, kind.shape)
        own = [names.index(word) for names, word in zip(classes, said, strict=True)]
        answers[first : first + 4] = torch.tensor([*own, PLACES.index(place)])  # a SIZE COLOUR SHAPE
        first += 4 + len((asked.relation or "").split())
    return answers


def thing_weights(asked: world.Asked, tokens: int, settings: Settings) -> Tensor:
    """Weight of each image token's loss, float32 [tokens, tokens]: more where the caption has a thing."""
    sizes = tuple(kind.size for kind in asked.kinds)
    return _thing_weights(sizes, asked.relation, tokens, settings.thing_weight)


@cache  # two dozen different ones for any number of scenes
def _thing_weights(sizes: tuple[str, ...], relation: str | None, tokens: int, thing_weight: float) -> Tensor:
    middle = (torch.arange(tokens) + 0.5) * (world.SIDE_PX / tokens)
    weights = torch.ones(tokens, tokens)
    for size, (x, y) in zip(sizes, world.places(relation), strict=True):
        reach = 1.1 * world.SIZES[size] + 12
        near = ((middle - y).abs() < reach)[:, None] & ((middle - x).abs() < reach)[None]
        weights[near] = thing_weight * world.SIZES["large"] / world.SIZES[size]
    return weights


def reading_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean cross entropy of `READING_SIZES` logits [B, L, sum] over all words of things; answers [B, L, 4].

    From the T5 encoder's output at each word of a thing, linear heads read the thing's size, colour, shape
    and place, so that an image token finds all about its thing in one text token.
    """
    losses = [
        nn.functional.cross_entropy(part.mT, answer, ignore_index=-1, reduction="sum")
        for part, answer in zip(logits.split(READING_SIZES, dim=-1), answers.unbind(-1), strict=True)
    ]
    return torch.stack(losses).sum() / (answers >= 0).sum().clamp_min(1)  # captions may all be empty


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
    batch, channels, height, width = x0.shape
    shift = farther * math.exp(calculate_shift(height * width // 4))
    u = torch.sigmoid(torch.randn(batch, device=x0.device))
    sigma = shift * u / (1 + (shift - 1) * u)
    noise = torch.randn_like(x0)
    level = sigma[:, None, None, None]
    x = (1 - level) * x0 + level * noise
    pack = FluxPipeline._pack_latents
    predicted = denoiser["transformer"](
        hidden_states=pack(x, batch, channels, height, width),
        timestep=sigma,
        pooled_projections=denoiser["text_encoder"](pooled_words).pooler_output,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype),
        return_dict=False,
    )[0]
    error = (predicted - pack(noise - x0, batch, channels, height, width)).square().mean(-1)  # [B, tokens]
    return (error * weights.flatten(1)).sum() / weights.sum()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), for hidden matrices and kernels.

    A kernel is a matrix with one row an output channel; those of one shape are handled together. The
    update's root mean square is 0.2, about AdamW's, so both take alike learning rates (Liu et al. 2025,
    section 2.2).
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((len(p), p[0].numel()), []).append(p)
            for shape, ps in shapes.items():
                for p in ps:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in ps]
                grads = [p.grad for p in ps if p.grad is not None]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = [
                    g.lerp(m, group["momentum"]).flatten(1) for g, m in zip(grads, momenta, strict=True)
                ]
                update = orthogonal(torch.stack(nesterov)) * (0.2 * math.sqrt(max(shape)))
                for p, change in zip(ps, update.unbind(), strict=True):
                    p.add_(change.view(p.shape), alpha=-group["lr"])


def orthogonal(matrices: Tensor, steps: int = 4) -> Tensor:
    """Nearly the nearest orthogonal matrices, [N, a, b], by a quintic Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def _optimizers(
    module: nn.Module, is_hidden: Callable[[str, Tensor], bool], hidden_lr: float, other_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for everything else."""
    named = list(module.named_parameters())
    return [
        Muon([p for name, p in named if is_hidden(name, p)], lr=hidden_lr),
        torch.optim.AdamW(
            [p for name, p in named if not is_hidden(name, p)], lr=other_lr, betas=(0.9, 0.98), weight_decay=0
        ),
    ]


def _is_hidden_kernel(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 4 and "conv_in" not in name and "conv_out" not in name


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    inside = "blocks." in name or ".block." in name
    return parameter.ndim == 2 and inside and not any(part in name for part in ("norm", "embed", "bias"))


# ---------------------------------------------------------------------------------- clock, files, log


class Clock:
    """Iterates over training steps, giving the progress in [0, 1), until minutes or steps are spent.

    With `until`, seconds since the epoch, the minutes are those until then. Minutes, progress and warm-up
    count from `began`, which is not zero where a finished model is trained on.
    """

    def __init__(
        self, minutes: float, steps: int | None, checkpoint_s: float, until: float | None = None
    ) -> None:
        self.budget_s, self.steps, self.checkpoint_s, self.until = 60 * minutes, steps, checkpoint_s, until
        self.step, self.before_s = 0, 0.0
        self.began_step, self.began_s = 0, 0.0
        self._started = self._saved = time.monotonic()

    def resume(self, state: dict[str, Any]) -> None:
        self.step, self.before_s = state["step"], state["elapsed_s"]
        self.began_step, self.began_s = state["began_step"], state["began_s"]

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "began_step": self.began_step,
            "began_s": self.began_s,
        }

    @property
    def elapsed_s(self) -> float:
        """Training time of all runs together, seconds."""
        return self.before_s + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        by_steps = (self.step - self.began_step) / self.steps if self.steps is not None else 0.0
        return max(by_steps, (self.elapsed_s - self.began_s) / self.budget_s)

    def __iter__(self) -> Iterator[float]:
        self._started = self._saved = time.monotonic()
        if self.until is not None:
            self.budget_s = self.before_s - self.began_s + max(1.0, self.until - time.time())
        while (progress := self.progress) < 1:
            yield progress
            self.step += 1

    def checkpoint_due(self) -> bool:
        due = time.monotonic() - self._saved >= self.checkpoint_s
        if due:
            self._saved = time.monotonic()
        return due


class Checkpoint:
    """A stage's file: its module, the optimizers and how far the clock is."""

    def __init__(
        self,
        file: Path,
        settings: Settings,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        clock: Clock,
        device: torch.device,
    ) -> None:
        self._file, self._settings, self._device = file, settings, device
        self._module, self._optimizers, self._clock = module, optimizers, clock

    def resume(self) -> dict[str, Any]:
        """Go on from the file, and what it holds; of a stage that is done, the module alone is taken over,
        and of a restored one no optimizer. Empty where there is no file."""
        if not self._file.exists():
            return {}
        state: dict[str, Any] = torch.load(self._file, map_location=self._device, weights_only=True)
        self._module.load_state_dict(state["model"])
        if not state.get("done"):
            if state["optimizers"] is not None:
                for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
            self._clock.resume(state)
        return state

    def save(self, *, done: bool = False, **more: Any) -> None:
        """Replace the file; `more` comes back from `resume`. `done`: there is nothing left to train."""
        state = {
            "model": self._module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "done": done,
            "settings": asdict(self._settings),
        }
        _save(self._file, state | more | self._clock.state())


def _set_lr(
    optimizer: torch.optim.Optimizer, peak: float, progress: float, clock: Clock, warmup: int
) -> None:
    """Linear warm-up by steps, then cosine to zero by progress."""
    warm = min(1.0, (clock.step - clock.began_step + 1) / warmup)
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * 0.5 * (1 + math.cos(math.pi * progress))


def _smooth(shown: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return shown | {k: 0.95 * shown.get(k, v) + 0.05 * v for k, v in new.items()}


def _save(file: Path, state: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


def _log(work: Path, stage: str, clock: Clock, values: dict[str, float]) -> None:
    line = {"stage": stage, "step": clock.step, "minutes": round(clock.elapsed_s / 60, 2)}
    line |= {k: float(f"{v:.4g}") for k, v in values.items()}
    with (work / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


# --------------------------------------------------------------------------------------------- export


def export(work: Path, out: Path) -> None:
    """Write the averaged weights as a diffusers folder, half precision on disk, with spectrum and log.

    FileNotFoundError before the last stage has its first checkpoint. The old folder is replaced at the end.
    """
    vae_state = torch.load(work / "vae.pt", map_location="cpu", weights_only=True)
    state = torch.load(work / "denoiser.pt", map_location="cpu", weights_only=True)
    latents = torch.load(work / "latents.pt", weights_only=True)["latents"]
    settings = Settings(**state["settings"])
    vae, denoiser = build_vae(settings), build_denoiser(settings)
    vae.load_state_dict(vae_state["model"])
    decoder_state = torch.load(work / "decoder.pt", map_location="cpu", weights_only=True)
    decoder_of(vae).load_state_dict(decoder_state["model"])
    denoiser.load_state_dict(state["model"])
    denoiser.load_state_dict(state["average"], strict=False)  # buffers have no average
    pipe: Any = FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=denoiser["text_encoder"],
        tokenizer=build_tokenizer(True, MAX_SEQUENCE_LENGTH),
        text_encoder_2=denoiser["text_encoder_2"],
        tokenizer_2=build_tokenizer(False, 512),
        transformer=denoiser["transformer"],
    )
    pipe.to(dtype=torch.float16)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial, safe_serialization=True)
    _polish(partial)
    spectrum = fit_spectrum(latents[:1024])
    _write_json(partial / "spectrum.json", spectrum)
    weights = sorted(partial.rglob("*.safetensors"))
    facts = {
        "settings": asdict(settings),
        "log": _log_summary(work),
        "sha256": {f.relative_to(partial).as_posix(): _sha256(f) for f in weights},
    }
    _write_json(partial / "training.json", facts)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    card = out.parent / "README.md"
    if card.exists():
        card.write_text(_with_facts(card.read_text(), facts, spectrum))


def restore(model: Path, work: Path) -> None:
    """The inverse of `export`: a work folder from which `train` goes on with an exported model.

    The weights come back as exported, in half precision, and without optimizer state; the linear heads of
    `reading_loss`, which no pipeline has, are fitted to the T5 encoder as it is. The next schedule begins
    here. FileExistsError where the work folder already has a checkpoint.
    """
    if (work / "denoiser.pt").exists():
        raise FileExistsError(f"{work / 'denoiser.pt'} is there already: `all` goes on with it")
    work.mkdir(parents=True, exist_ok=True)
    facts = json.loads((model / "training.json").read_text())
    settings = Settings(**facts["settings"])
    pipe: Any = FluxPipeline.from_pretrained(model, torch_dtype=torch.float32)
    denoiser = build_denoiser(settings)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        denoiser[name].load_state_dict(getattr(pipe, name).state_dict())
    asked = [world.scene(seed).asked for seed in settings.seeds[: settings.latent_scenes]]
    answers = torch.stack([reading_answers(a) for a in asked])
    encoder = denoiser["text_encoder_2"].requires_grad_(False)
    train_text(settings, work, encoder, denoiser["reader"], tokenize([a.caption for a in asked])[0], answers)
    (work / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in facts["log"]))
    last = [line for line in facts["log"] if line["stage"] == "denoiser"][-1]
    begun = {"step": last["step"], "elapsed_s": 60 * last["minutes"]}
    begun |= {"began_step": begun["step"], "began_s": begun["elapsed_s"]}
    fresh = {"optimizers": None, "done": False, "settings": asdict(settings)}
    average = {name: p.detach() for name, p in denoiser.named_parameters()}
    _save(work / "vae.pt", fresh | begun | {"model": pipe.vae.state_dict(), "done": True})
    _save(work / "decoder.pt", fresh | begun | {"model": decoder_of(pipe.vae).state_dict(), "done": True})
    _save(work / "denoiser.pt", fresh | begun | {"model": denoiser.state_dict(), "average": average})


def _polish(folder: Path) -> None:
    """Half precision is for the disk alone: configs say float32, and name classes that all versions have."""
    for config in folder.rglob("config.json"):
        values = json.loads(config.read_text())
        for key in ("dtype", "torch_dtype"):
            if key in values:
                values[key] = "float32"
        values.pop("_name_or_path", None)
        _write_json(config, values)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = index["tokenizer_2"] = ["transformers", "PreTrainedTokenizerFast"]
    _write_json(folder / "model_index.json", index)
    for config in folder.rglob("tokenizer_config.json"):
        _write_json(config, json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def fit_spectrum(latents: Tensor) -> dict[str, float]:
    """A and beta of P(w) = A w^-beta over 1 < w < 15.5, a least-squares line through the logarithms.

    P(w) is the mean square of the orthonormal DCT coefficients of latents [N, C, H, H], averaged over rings
    half a cycle wide, w = k / 2 cycles over the side.
    """
    side = latents.shape[-1]
    basis = dct_basis(side)
    power = (basis @ latents.float() @ basis.T).square().mean((0, 1)).double().numpy()  # [H, H]
    w = frequencies("dct", (side, side))
    ring = np.rint(2 * w).astype(int)
    rings = [r for r in range(3, min(31, side))]
    middles = np.array([w[ring == r].mean() for r in rings])
    powers = np.array([power[ring == r].mean() for r in rings])
    slope, intercept = np.polyfit(np.log(middles), np.log(powers), 1)
    return {"amplitude": round(float(np.exp(intercept)), 4), "beta": round(float(-slope), 4)}


def _with_facts(card: str, facts: dict[str, Any], spectrum: dict[str, float]) -> str:
    """The model card with the part between its markers written anew."""
    begin, end = "<!-- export: begin -->", "<!-- export: end -->"
    before, _, rest = card.partition(begin)
    lines = [
        f"Spectrum of its latents, P(w) = A w^-beta over 1 < w < 15.5: A = {spectrum['amplitude']:.4g}, "
        f"beta = {spectrum['beta']:.4g}.",
        "",
        "| weights | SHA-256 |",
        "|---|---|",
        *(f"| {name} | `{digest}` |" for name, digest in facts["sha256"].items()),
        "",
        "Settings:",
        "",
        *(f"    {name} = {value}" for name, value in facts["settings"].items()),
        "",
        "Log (smoothed; a loss for each grid):",
        "",
        *("    " + ", ".join(f"{k} {v}" for k, v in line.items()) for line in facts["log"]),
        "",
    ]
    return before + "\n".join([begin, *lines, end]) + rest.partition(end)[2]


def _log_summary(work: Path) -> list[dict[str, Any]]:
    """At most 12 lines of each stage's log, evenly over its minutes, the last included."""
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    summary = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        own = [line for line in lines if line["stage"] == stage]
        if len(own) > 12:
            minutes = np.array([line["minutes"] for line in own])
            wanted = np.linspace(minutes[0], minutes[-1], 12)
            own = [own[i] for i in sorted({int(np.abs(minutes - m).argmin()) for m in wanted})]
        summary += own
    return summary


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------- main


def train(settings: Settings, work: Path, device: torch.device, until: float | None = None) -> None:
    """All stages, from wherever the work folder stands. `until`, seconds since the epoch, ends the last."""
    work.mkdir(parents=True, exist_ok=True)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    pictures = make_pictures(settings, work)
    vae = train_vae(settings, work, device, pictures)
    latents = make_latents(work, vae, pictures[: settings.latent_scenes], device)
    train_decoder(settings, work, device, vae, pictures, latents)
    train_denoiser(settings, work, device, latents, until)


def main(argv: Sequence[str] | None = None) -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m progressive.tiny.train", description=__doc__.splitlines()[0]
    )  # type: ignore[union-attr]
    parser.add_argument("command", nargs="?", choices=["all", "export", "restore"], default="all")
    parser.add_argument("--work", type=Path, default=Path(".train"), help="checkpoints; may be deleted after")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model", help="diffusers folder")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--vae-minutes", type=float, default=defaults.vae_minutes)
    parser.add_argument("--dit-minutes", type=float, default=defaults.dit_minutes)
    parser.add_argument("--until", help="end of the last stage instead of --dit-minutes: HH:MM today")
    given = parser.parse_args(argv)
    if given.command == "restore":
        restore(given.out, given.work)
        return
    if given.command == "all":
        settings = Settings(vae_minutes=given.vae_minutes, dit_minutes=given.dit_minutes)
        until = None
        if given.until is not None:
            clock = datetime.strptime(given.until, "%H:%M").time()
            until = datetime.combine(datetime.now().date(), clock).timestamp()
        train(settings, given.work, torch.device(given.device), until)
    export(given.work, given.out)


if __name__ == "__main__":
    main(sys.argv[1:])
