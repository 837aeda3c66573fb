"""Published models built at their real size, with random weights. Reads no checkpoint and no network."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights

from overtone.progressive import library
from overtone.progressive.bench.cases import Case
from overtone.progressive.checkpoints import Checkpoint, describe
from overtone.progressive.engine import Encoded, Engine
from overtone.progressive.pipelines import load


def build(
    checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0
) -> Any:
    """The checkpoint's pipeline with a random transformer and neither VAE nor text encoder: it can denoise
    from embeddings, and that is all. The weights are made on the device, so no copy passes through memory."""
    transformer = random_transformer(checkpoint, torch.device(device), dtype, seed)
    scheduler = getattr(diffusers, checkpoint.scheduler_class).from_config(checkpoint.scheduler)
    pipeline_class = getattr(diffusers, checkpoint.pipeline_class)
    parameters = inspect.signature(pipeline_class).parameters.values()
    absent = {p.name: None for p in parameters if p.default is p.empty}
    given = {"transformer": transformer, "scheduler": scheduler} | checkpoint.pipeline
    if checkpoint.family == "flux2":  # its pipeline reads the VAE's statistics even where nothing is decoded
        given["vae"] = _smallest_vae(checkpoint.transformer["in_channels"] // 4).to(device)
    pipe = pipeline_class(**(absent | given))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _smallest_vae(channels: int) -> Any:
    sizes: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 4, "layers_per_block": 1}
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        **sizes,
    )


def random_transformer(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> torch.nn.Module:
    """The checkpoint's transformer from its configuration, its weights small random numbers."""
    model = empty_transformer(checkpoint)
    generator = torch.Generator(device).manual_seed(seed)
    in_float32 = library.kept_in_float32(model)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # As when such a checkpoint is loaded in `dtype`: some parts stay in float32.
            keep = any(part in f"{path}.{name}".split(".") for part in in_float32)
            values = torch.empty(parameter.shape, device=device, dtype=torch.float32 if keep else dtype)
            # Small enough for activations to stay finite through sixty residual blocks.
            values.normal_(0, 0.02, generator=generator)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    return model.to(device).eval()


def empty_transformer(checkpoint: Checkpoint) -> torch.nn.Module:
    """The same without weights: parameters on no device, buffers, which hold real values, as they are."""
    with init_empty_weights():
        return getattr(diffusers, checkpoint.transformer_class)(**checkpoint.transformer)


def random_text(engine: Engine, tokens: int, rows: int, seed: int = 0, *, guided: bool = False) -> Encoded:
    """Embeddings of `rows` prompts that nobody wrote, in the shapes that the family's transformer takes;
    `guided`: as many negative ones of the same length."""
    config = engine.pipe.transformer.config
    width = next(
        config[key]
        for key in ("joint_attention_dim", "cap_feat_dim", "text_dim", "context_in_dim")
        if config.get(key)
    )
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (tokens, width)}
    if "pooled_prompt_embeds" in (engine.family.text or ()):
        shapes["pooled_prompt_embeds"] = (config["pooled_projection_dim"],)
    generator = torch.Generator(engine.device).manual_seed(seed)
    dtype = engine.pipe.transformer.dtype
    texts = [
        {
            name: torch.randn(shape, generator=generator, device=engine.device, dtype=dtype)
            for name, shape in shapes.items()
        }
        for _ in range(2 * rows if guided else rows)
    ]
    return Encoded(tuple(texts[:rows]), tuple(texts[rows:]) if guided else (None,) * rows)


def open_pipe(case: Case, device: torch.device, dtype: torch.dtype) -> Any:
    """The case's pipeline: the embedded model itself, or the published one with random weights."""
    if case.model == "tiny":
        return load("tiny", device=device)
    return build(describe(case.model).with_scheduler(**case.scheduler), device, dtype)
