"""The families that make videos. A table of facts: no rules, no tensors.

Where `spectrum` is said to be a stand-in nobody has published one: `overtone calibrate` fits it.
"""

from __future__ import annotations

from typing import Any

from overtone.progressive.families.family import GENERIC_BEFORE, WAN21_VAE, Family

_CELLS: dict[str, Any] = {"cell_px": 8, "grid_multiple": 2, "patch": 2, "frames_per_latent": 4}
"""Cells of 8 px and 4 frames, of which the transformer takes 2 x 2 as a token."""
_STAND_IN: dict[str, Any] = {"spectrum": WAN21_VAE, "default_delta": 0.05}

_WAN: dict[str, Any] = _CELLS | {
    "default_frames": 81,
    "default_delta": 0.05,
    "default_height": 480,
    "default_width": 832,
    "default_steps": 50,
    "pipelines": ("WanPipeline",),
    "guidance_default": 5.0,
    "spectrum": WAN21_VAE,
}

VIDEOS = (
    Family(name="wan2.1", **_WAN),
    # Told from 2.1 by its two transformers, hence by `boundary_ratio`.
    Family(name="wan2.2", transformers=("transformer", "transformer_2"), **_WAN),
    Family(
        name="wan2.2-5b",  # told by `expand_timesteps`; its own VAE, 16 x 16 px a cell, 48 channels
        **_WAN | {"cell_px": 16, "default_height": 704, "default_width": 1280, "default_frames": 121},
    ),
    Family(
        name="skyreels-v2",
        **_WAN
        | {
            "pipelines": ("SkyReelsV2Pipeline",),
            "changes": GENERIC_BEFORE,
            "guidance_default": 6.0,
            "needs": ("ftfy",),
            "default_height": 544,
            "default_width": 960,
            "default_frames": 97,
        },
    ),
    Family(
        name="hunyuan-video",
        pipelines=("HunyuanVideoPipeline",),
        changes=GENERIC_BEFORE,
        text=("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
        guidance=("true_cfg_scale", 1.0),
        guidance_default=1.0,
        negative="given",
        default_height=720,
        default_width=1280,
        default_frames=129,
        default_steps=50,
        **_CELLS,
        **_STAND_IN,
    ),
    Family(
        name="ltx-video",
        pipelines=("LTXPipeline",),
        changes=GENERIC_BEFORE,
        cell_px=32,
        grid_multiple=1,
        patch=1,
        frames_per_latent=8,
        layout="tokens",
        text=("prompt_embeds", "prompt_attention_mask", None, None),
        guidance_default=3.0,
        default_height=512,
        default_width=704,
        default_frames=161,
        default_steps=50,
        **_STAND_IN,
    ),
    Family(
        name="hunyuan-video-1.5",
        pipelines=("HunyuanVideo15Pipeline",),
        changes=GENERIC_BEFORE,
        cell_px=16,
        grid_multiple=1,
        patch=1,
        frames_per_latent=4,
        channels_per_latent=2,  # zeros and a mask beside them, for pictures to start from
        text=("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"),
        guidance=None,
        guider="guider",
        default_height=480,
        default_width=848,
        default_frames=121,
        default_steps=50,
        **_STAND_IN,
    ),
    Family(
        name="kandinsky5-video",
        pipelines=("Kandinsky5T2VPipeline",),
        changes=GENERIC_BEFORE,
        layout="channels_last",
        channels_key="in_visual_dim",
        unfit={
            "attention_type": (
                "nabla",
                "it attends by blocks of 128 px, of which the grids of stages are no multiples; use a "
                "checkpoint with regular attention",
            )
        },
        text=None,  # its embeddings of a batch are told apart by lengths that add up over the rows
        alone=True,
        guidance_default=5.0,
        negative_text=(
            "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, "
            "deformed, walking backwards"
        ),
        default_height=512,
        default_width=768,
        default_frames=121,
        default_steps=50,
        **_CELLS,
        **_STAND_IN,
    ),
)
