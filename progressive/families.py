"""What the engine must know of each family of models: sizes, layout of latents, text arguments, spectrum.

Plain data, no torch: `overtone plan` reads it too. A new family is one entry in `FAMILIES`; what an entry
cannot say (how to call the pipeline, its schedule, its decoding) comes from the pipeline itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from overtone.progressive import tiny
from overtone.progressive.formulas import Spectrum

Layout = Literal["grid", "tokens2x2", "tokens", "grid_to_tokens", "subcell_tokens"]
"""How latents go through the pipeline's `latents` argument and come out of its scheduler.
`grid`: [B, C, H, W] or [B, C, T, H, W]. `tokens2x2`: [B, H / 2 * W / 2, C * 4], channel c * 4 + row * 2 +
column of 2 x 2 cells. `tokens`: [B, H * W, C]. `grid_to_tokens`: in as `grid`, out as `tokens`.
`subcell_tokens`: `tokens` with channel (row * s + column) * C / s**2 + c for s x s subcells."""

FLUX1_VAE = Spectrum(203.615097, 1.915461)  # published with the method; FLUX.1's VAE, also Z-Image's
WAN21_VAE = Spectrum(219.484718, 2.422687)  # published with the method; Wan 2.1's VAE


@dataclass(frozen=True)
class Family:
    """One family of models. Lengths are in pixels where the name says so, else in latent cells."""

    name: str
    pipelines: tuple[str, ...]
    """Class names of the diffusers pipelines that make up the family."""
    cell_px: int
    """Pixels that a side of a latent cell covers, as the pipeline counts cells."""
    grid_multiple: int
    """Each side of a grid must be a multiple of this many cells."""
    patch: int
    """Cells on the side of a token: a grid has H * W * T / patch**2 image tokens."""
    spectrum: Spectrum
    default_delta: float
    default_height: int
    """Pixels."""
    default_width: int
    """Pixels."""
    default_steps: int
    default_frames: int | None = None
    """Frames of a video; None for families that make images."""
    frames_per_latent: int = 1
    """A latent frame after the first stands for this many frames."""
    layout: Layout = "grid"
    subcells: int = 1
    """Each cell's channels are a block of subcells x subcells finer cells, channel c * s * s + row * s +
    column: expansions happen on that finer grid, since each plane by itself would be half a cell off."""
    channels_per_latent: int = 1
    """The transformer's `in_channels` over the latent's channels C."""
    text: tuple[str | None, ...] | None = ("prompt_embeds",)
    """The pipeline's call arguments that take the values `encode_prompt` returns, in that order; None for a
    value that is left out. None altogether: prompts go into each stage as text."""
    ragged: Literal["pad", "list"] | None = None
    """Embeddings that differ in length: `pad` to the longest, with `prompt_embeds_mask`, or a `list`."""
    guidance: tuple[str, float] | None = ("guidance_scale", 1.0)
    """(argument, value above which the pipeline also runs the negative prompt); None: it never does."""
    per_step: tuple[str, ...] = ()
    """Call arguments that hold one value a step of the whole schedule."""
    fractions: tuple[str, ...] = ()
    """Call arguments that name a step as a fraction of the whole schedule's steps."""
    counts: tuple[str, ...] = ()
    """Call arguments that name a step by its number in the whole schedule."""
    transformers: tuple[str, ...] = ("transformer",)
    """The pipeline's denoisers that adapters can be loaded into; of several, an adapter says which."""
    call: dict[str, Any] = field(default_factory=dict, hash=False)
    """Arguments of the pipeline's call that differ from its own defaults."""


def _tiny_spectrum() -> Spectrum:
    """Fitted on the embedded model's own latents (`progressive.tiny.train` writes the file); until there is
    one, the fit of a first trial: A 8.6, beta 1.42 over 1 < w < 15.5 on the 32x32 grid."""
    path = tiny.FOLDER / "spectrum.json"
    fit = json.loads(path.read_text()) if path.exists() else {"amplitude": 8.6, "beta": 1.42}
    return Spectrum(fit["amplitude"], fit["beta"])


_FLUX1: dict[str, Any] = {
    "pipelines": ("FluxPipeline",),
    "cell_px": 8,
    "grid_multiple": 2,
    "patch": 2,
    "layout": "tokens2x2",
    "channels_per_latent": 4,
    "text": ("prompt_embeds", "pooled_prompt_embeds"),
    "guidance": ("true_cfg_scale", 1.0),
    "default_delta": 0.05,
}

_WAN: dict[str, Any] = {
    "cell_px": 8,
    "grid_multiple": 2,
    "patch": 2,
    "frames_per_latent": 4,
    "default_frames": 81,
    "default_delta": 0.05,
    "default_height": 480,
    "default_width": 832,
    "default_steps": 50,
    "pipelines": ("WanPipeline",),
    "spectrum": WAN21_VAE,
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="flux1",
            default_height=1024,
            default_width=1024,
            default_steps=50,
            spectrum=FLUX1_VAE,
            **_FLUX1,
        ),
        Family(
            name="flux2",
            pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
            # The pipeline's latents are 2 x 2 patches of the VAE's, normalised channel by channel; the
            # published splits count that grid, 64 x 64 at 1024 px.
            cell_px=16,
            grid_multiple=1,
            patch=1,
            subcells=2,
            layout="grid_to_tokens",
            spectrum=FLUX1_VAE,  # a stand-in, as published
            default_delta=0.10,
            default_height=1024,
            default_width=1024,
            default_steps=50,
        ),
        Family(
            name="qwen-image",
            pipelines=("QwenImagePipeline",),
            cell_px=8,
            grid_multiple=2,
            patch=2,
            layout="tokens2x2",
            channels_per_latent=4,
            text=("prompt_embeds", "prompt_embeds_mask"),
            ragged="pad",
            guidance=("true_cfg_scale", 1.0),
            spectrum=FLUX1_VAE,  # a stand-in, as published
            default_delta=0.20,
            default_height=1024,
            default_width=1024,
            default_steps=50,
        ),
        Family(
            name="z-image",
            pipelines=("ZImagePipeline",),
            cell_px=8,
            grid_multiple=2,
            patch=2,
            ragged="list",
            guidance=("guidance_scale", 0.0),
            spectrum=FLUX1_VAE,
            default_delta=0.10,
            default_height=1024,
            default_width=1024,
            default_steps=50,
        ),
        Family(name="wan2.1", **_WAN),
        # Told from 2.1 by its two transformers, hence by `boundary_ratio`.
        Family(name="wan2.2", transformers=("transformer", "transformer_2"), **_WAN),
        Family(
            name="wan2.2-5b",  # told by `expand_timesteps`; its own VAE, 16 x 16 px a cell, 48 channels
            **_WAN | {"cell_px": 16, "default_height": 704, "default_width": 1280, "default_frames": 121},
        ),
        Family(
            name="sd3",
            pipelines=("StableDiffusion3Pipeline",),
            cell_px=8,
            grid_multiple=2,
            patch=2,
            text=("prompt_embeds", None, "pooled_prompt_embeds", None),
            fractions=("skip_layer_guidance_start", "skip_layer_guidance_stop"),
            spectrum=FLUX1_VAE,  # a stand-in: calibrate for your checkpoint
            default_delta=0.05,
            default_height=1024,
            default_width=1024,
            default_steps=28,
        ),
        Family(
            name="qwen-image-2.1",
            pipelines=("QwenImage21Pipeline",),
            cell_px=16,
            grid_multiple=2,
            patch=1,
            layout="tokens",
            text=("prompt_embeds", "prompt_embeds_mask", None),
            ragged="pad",
            guidance=("true_cfg_scale", 1.0),
            spectrum=FLUX1_VAE,  # a stand-in: calibrate for your checkpoint
            default_delta=0.05,
            default_height=1024,
            default_width=1024,
            default_steps=40,
        ),
        Family(
            name="ideogram4",
            pipelines=("Ideogram4Pipeline",),
            cell_px=16,
            grid_multiple=1,
            patch=1,
            subcells=2,
            layout="subcell_tokens",
            text=None,  # its embeddings depend on the grid
            guidance=None,  # a transformer of its own runs without the text
            per_step=("guidance_schedule",),
            spectrum=FLUX1_VAE,  # a stand-in: calibrate for your checkpoint
            default_delta=0.05,
            default_height=2048,
            default_width=2048,
            default_steps=48,
        ),
        Family(
            name="tiny",
            default_height=256,
            default_width=256,
            default_steps=30,
            spectrum=_tiny_spectrum(),
            call={"max_sequence_length": 20},
            **_FLUX1,
        ),
        Family(
            # Any other flow-matching pipeline: sizes are read off the pipeline, text passes as text.
            name="generic",
            pipelines=(),
            cell_px=8,
            grid_multiple=2,
            patch=2,
            text=None,
            fractions=(
                *("skip_layer_guidance_start", "skip_layer_guidance_stop", "cfg_trunc_ratio"),
                *("cfg_interval_start", "cfg_interval_end", "control_guidance_start", "control_guidance_end"),
            ),
            counts=("zero_steps", "zero_init_steps"),
            spectrum=FLUX1_VAE,
            default_delta=0.05,
            default_height=1024,
            default_width=1024,
            default_steps=50,
        ),
    )
}


_CONDITIONED = re.compile(
    r"Control|Img2Img|I2I|Image2Image|ImageToImage|Inpaint|Kontext|Edit(?!or)|Layered|Fill|Redux|Upscal|Upsampl"
    r"|ImageToVideo|Image2Video|I2V|VideoToVideo|V2V|VACE|Animate|Condition|TextToWorld|VideoToWorld"
)


def conditioned(pipeline_class: str) -> str | None:
    """Why a pipeline cannot make samples of prompts alone, in a sentence, where its class's name tells; None
    where it does not. A name that does not tell is found out when the model is loaded (engine/trial.py)."""
    if any(pipeline_class in family.pipelines for family in FAMILIES.values()):
        return None
    found = _CONDITIONED.search(pipeline_class)
    if found is None:
        return None
    return (
        f"{pipeline_class} is a pipeline for more than a prompt ({found[0]}), such as a picture to start "
        "from or to keep to, which a table of prompts does not give; use the model's text-to-image or "
        "text-to-video pipeline"
    )


def family_name(pipeline_class: str, config: Mapping[str, Any]) -> str:
    """Key in `FAMILIES` of a pipeline's class name and configuration (model_index.json), or "generic".

    The embedded model is a FLUX.1 by class: whoever loads it says "tiny".
    """
    if pipeline_class == "WanPipeline":
        if config.get("expand_timesteps"):
            return "wan2.2-5b"
        return "wan2.1" if config.get("boundary_ratio") is None else "wan2.2"
    known = (f.name for f in FAMILIES.values() if f.name != "tiny" and pipeline_class in f.pipelines)
    return next(known, "generic")


MEASURED_SPECTRA = frozenset({"flux1", "z-image", "wan2.1", "wan2.2", "tiny"})
"""Families whose spectrum was fitted on the latents of their own VAE; that of any other is a stand-in."""
