"""The families that make images. A table of facts: no rules, no tensors.

Where `spectrum` is said to be a stand-in nobody has published one: `overtone calibrate` fits it.
"""

from __future__ import annotations

import json
from typing import Any

from overtone.progressive import tiny
from overtone.progressive.families.family import FLUX1_VAE, GENERIC_BEFORE, Family
from overtone.progressive.formulas import Spectrum

_SQUARE: dict[str, Any] = {"default_height": 1024, "default_width": 1024}
_CELLS: dict[str, Any] = {"cell_px": 8, "grid_multiple": 2, "patch": 2}
"""Cells of 8 px, of which the transformer takes 2 x 2 as a token."""
_TOKENS: dict[str, Any] = _CELLS | {"layout": "tokens2x2", "channels_per_latent": 4}
"""The same, and the pipeline itself packs them."""
_STAND_IN: dict[str, Any] = {"spectrum": FLUX1_VAE, "default_delta": 0.05}

_FLUX1: dict[str, Any] = _TOKENS | {
    "pipelines": ("FluxPipeline",),
    "text": ("prompt_embeds", "pooled_prompt_embeds"),
    "guidance": ("true_cfg_scale", 1.0),
    "guidance_default": 1.0,
    "negative": "given",
    "default_delta": 0.05,
}

_FLUX2: dict[str, Any] = _SQUARE | {
    # The pipeline's latents are 2 x 2 patches of the VAE's, normalised channel by channel; the
    # published splits count that grid, 64 x 64 at 1024 px.
    "cell_px": 16,
    "grid_multiple": 1,
    "patch": 1,
    "subcells": 2,
    "layout": "grid_to_tokens",
    "spectrum": FLUX1_VAE,  # a stand-in, as published
    "default_delta": 0.10,
}


def _tiny_spectrum() -> Spectrum:
    """Fitted on the embedded model's own latents (`progressive.tiny.train` writes the file); until there is
    one, the fit of a first trial: A 8.6, beta 1.42 over 1 < w < 15.5 on the 32x32 grid."""
    path = tiny.FOLDER / "spectrum.json"
    fit = json.loads(path.read_text()) if path.exists() else {"amplitude": 8.6, "beta": 1.42}
    return Spectrum(fit["amplitude"], fit["beta"])


def _polished(main: int, polish: int, mu: float, std: float) -> dict[str, Any]:
    """A sampler preset of Ideogram 4: steps at guidance 7, then at 3, and the shape of the schedule."""
    return {"guidance_schedule": (7.0,) * main + (3.0,) * polish, "mu": mu, "std": std}


IMAGES = (
    Family(name="flux1", default_steps=50, spectrum=FLUX1_VAE, **_SQUARE, **_FLUX1),
    Family(
        name="flux2",
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
        guidance_default=4.0,
        without_negative=("Flux2Pipeline",),
        default_steps=50,
        **_FLUX2,
    ),
    # As FLUX.2-klein, distilled; what it remembers of pictures to start from it does not remember of prompts.
    Family(
        name="flux2-klein-kv",
        pipelines=("Flux2KleinKVPipeline",),
        guidance=None,
        default_steps=4,
        **_FLUX2,
    ),
    Family(
        name="qwen-image",
        pipelines=("QwenImagePipeline",),
        text=("prompt_embeds", "prompt_embeds_mask"),
        ragged="pad",
        guidance=("true_cfg_scale", 1.0),
        guidance_default=4.0,
        negative="given",
        changes=("with true_cfg_scale unset, a negative prompt runs only where a row has one",),
        spectrum=FLUX1_VAE,  # a stand-in, as published
        default_delta=0.20,
        default_steps=50,
        **_SQUARE,
        **_TOKENS,
    ),
    Family(
        name="z-image",
        pipelines=("ZImagePipeline",),
        ragged="list",
        guidance=("guidance_scale", 0.0),
        guidance_default=5.0,
        spectrum=FLUX1_VAE,
        default_delta=0.10,
        default_steps=50,
        **_SQUARE,
        **_CELLS,
    ),
    Family(
        name="sd3",
        pipelines=("StableDiffusion3Pipeline",),
        text=("prompt_embeds", None, "pooled_prompt_embeds", None),
        fractions=("skip_layer_guidance_start", "skip_layer_guidance_stop"),
        guidance_default=7.0,
        default_steps=28,
        **_SQUARE,
        **_CELLS,
        **_STAND_IN,
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
        guidance_default=1.0,
        negative="given",
        default_steps=40,
        **_SQUARE,
        **_STAND_IN,
    ),
    Family(
        name="ideogram4",
        pipelines=("Ideogram4Pipeline",),
        cell_px=16,
        grid_multiple=1,
        patch=1,
        subcells=2,
        waves_per_cell=2,  # as the published splits count
        layout="subcell_tokens",
        text=None,  # its embeddings depend on the grid
        guidance=None,
        unprompted=True,
        changes=(
            "transitions count the spectrum's frequencies as published, and 12 and 20 steps run the authors' "
            "presets",
        ),
        per_step=("guidance_schedule",),
        presets={
            48: _polished(45, 3, 0.0, 1.5),
            20: _polished(18, 2, 0.0, 1.75),
            12: _polished(11, 1, 0.5, 1.75),
        },
        default_height=2048,
        default_width=2048,
        default_steps=48,
        **_STAND_IN,
    ),
    Family(
        name="chroma",
        pipelines=("ChromaPipeline",),
        changes=GENERIC_BEFORE,
        text=("prompt_embeds", None, "prompt_attention_mask", None, None, None),
        guidance_default=5.0,
        spectrum=FLUX1_VAE,
        default_delta=0.05,
        default_steps=35,
        **_SQUARE,
        **_TOKENS,
    ),
    Family(
        name="sana",
        pipelines=("SanaPipeline",),
        changes=GENERIC_BEFORE,
        cell_px=32,
        grid_multiple=1,
        patch=1,
        text=None,  # it puts an instruction before prompts, and none before negative ones
        guidance_default=4.5,
        fixed={"use_resolution_binning": (False, "it would round the size of every stage by itself")},
        default_steps=20,
        **_SQUARE,
        **_STAND_IN,
    ),
    Family(
        name="lumina2",
        pipelines=("Lumina2Pipeline",),
        changes=GENERIC_BEFORE,
        text=None,  # it puts a system prompt before prompts, and none before negative ones
        guidance_default=4.0,
        fractions=("cfg_trunc_ratio",),
        spectrum=FLUX1_VAE,
        default_delta=0.05,
        default_steps=30,
        **_SQUARE,
        **_CELLS,
    ),
    Family(
        name="cogview4",
        pipelines=("CogView4Pipeline",),
        changes=GENERIC_BEFORE,
        text=("prompt_embeds", None),
        guidance_default=5.0,
        alone=True,
        unshifted=True,
        default_steps=50,
        **_SQUARE,
        **_CELLS,
        **_STAND_IN,
    ),
    Family(
        name="ernie-image",
        pipelines=("ErnieImagePipeline",),
        changes=GENERIC_BEFORE,
        cell_px=16,
        grid_multiple=1,
        patch=1,
        subcells=2,  # FLUX.2's VAE, whose latents it patches 2 x 2
        waves_per_cell=2,
        ragged="list",
        guidance_default=4.0,
        fixed={"use_pe": (False, "it would write the prompt anew; rewrite the prompts of the table instead")},
        default_steps=50,
        **_SQUARE,
        **_STAND_IN,
    ),
    Family(
        name="krea2",
        pipelines=("Krea2Pipeline",),
        changes=GENERIC_BEFORE,
        text=("prompt_embeds", "prompt_embeds_mask"),
        text_rank=3,
        guidance=("guidance_scale", 0.0),
        guidance_default=4.5,
        default_steps=28,
        **_SQUARE,
        **_TOKENS,
        **_STAND_IN,
    ),
    Family(
        name="longcat-image",
        pipelines=("LongCatImagePipeline",),
        changes=GENERIC_BEFORE,
        text=None,  # its call counts prompts, and so takes no embeddings alone
        guidance_default=4.5,
        fixed={
            "enable_prompt_rewrite": (
                False,
                "it would write the prompt anew at every stage; rewrite the prompts of the table instead",
            )
        },
        spectrum=FLUX1_VAE,
        default_delta=0.05,
        default_steps=50,
        **_SQUARE,
        **_TOKENS,
    ),
    Family(
        name="aura-flow",
        pipelines=("AuraFlowPipeline",),
        changes=GENERIC_BEFORE,
        text=("prompt_embeds", "prompt_attention_mask", None, None),
        unshifted=True,
        guidance_default=3.5,
        default_steps=50,
        **_SQUARE,
        **_CELLS,
        **_STAND_IN,
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
        name="bria-fibo",
        pipelines=("BriaFiboPipeline",),
        cell_px=16,
        grid_multiple=1,
        patch=1,
        layout="tokens",
        text=None,  # every layer of its encoder goes into a layer of the transformer, and none is an argument
        alone=True,  # an empty prompt becomes as many tokens as the longest beside it has
        guidance_default=5.0,
        fixed={"do_patching": (False, "its latents are handed over a cell a token")},
        default_steps=30,
        **_SQUARE,
        **_STAND_IN,
    ),
    Family(
        # Any other flow-matching pipeline: sizes are read off the pipeline, text passes as text.
        name="generic",
        pipelines=(),
        text=None,
        fractions=(
            *("skip_layer_guidance_start", "skip_layer_guidance_stop", "cfg_trunc_ratio"),
            *("cfg_interval_start", "cfg_interval_end", "control_guidance_start", "control_guidance_end"),
        ),
        counts=("zero_steps", "zero_init_steps"),
        default_steps=50,
        **_SQUARE,
        **_CELLS,
        **_STAND_IN,
    ),
)
