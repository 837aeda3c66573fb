"""Pipelines of diffusers that have no entry, with tiny random weights, one builder a class. No downloads."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import tiny_pipes
import tiny_zoo
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2_diffusion_forcing
from tiny_pipes import kl, ready, t5, tokenizer, wan_vae
from transformers import Qwen3Config, Qwen3Model


def _of_parts(name: str, parts: dict[str, Any], **other: Any) -> Any:
    """A pipeline of another class made of the same parts."""
    return ready(getattr(diffusers, name)(**(parts | other)))


def sana_pag() -> Any:
    return _of_parts("SanaPAGPipeline", tiny_zoo.sana().components)


def sana_sprint() -> Any:
    scheduler = diffusers.SCMScheduler()
    return _of_parts("SanaSprintPipeline", tiny_zoo.sana().components, scheduler=scheduler)


def sd3_pag() -> Any:
    left_out = ("image_encoder", "feature_extractor")
    parts = {name: part for name, part in tiny_pipes.sd3().components.items() if name not in left_out}
    return _of_parts("StableDiffusion3PAGPipeline", parts, pag_applied_layers="blocks.0")


def skyreels_forcing() -> Any:
    """With what its module would have of ftfy, as `tiny_zoo.skyreels_v2`."""
    pipeline_skyreels_v2_diffusion_forcing.ftfy = SimpleNamespace(fix_text=lambda text: text)
    return _of_parts("SkyReelsV2DiffusionForcingPipeline", tiny_zoo.skyreels_v2().components)


def kandinsky5_image() -> Any:
    return _of_parts("Kandinsky5T2IPipeline", tiny_zoo.kandinsky5_video().components, vae=kl())


def hunyuan_image(guider: Any = None) -> Any:
    """As distilled; with a guider it is guided by a component."""
    torch.manual_seed(0)
    pipe: Any = ready(
        diffusers.HunyuanImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
            vae=diffusers.AutoencoderKLHunyuanImage(
                in_channels=3,
                out_channels=3,
                latent_channels=4,
                block_out_channels=(32, 32),
                layers_per_block=1,
                spatial_compression_ratio=2,
                sample_size=32,
                scaling_factor=0.75,
            ),
            text_encoder=Qwen3Model(Qwen3Config(**tiny_zoo.TEXT | {"num_hidden_layers": 3})),
            tokenizer=tokenizer(512),
            text_encoder_2=t5(),
            tokenizer_2=tokenizer(512),
            transformer=diffusers.HunyuanImageTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                patch_size=(1, 1),
                text_embed_dim=16,
                text_embed_2_dim=32,
                rope_axes_dim=(8, 8),
            ),
            guider=guider,
        )
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "a {} green", 1
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 16, 8
    return pipe


def lumina() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.LuminaPipeline(
            transformer=diffusers.LuminaNextDiT2DModel(
                sample_size=16,
                in_channels=4,
                hidden_size=32,
                num_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                cross_attention_dim=16,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=kl(),
            text_encoder=tiny_zoo.gemma(),
            tokenizer=tiny_zoo.ended(),
        )
    )


def cosmos2_image() -> Any:
    """Its scheduler's largest sigma scales the latents that it is given."""

    class Allows:
        """As much of a safety checker as is called."""

        def to(self, device: Any) -> None: ...

        def check_text_safety(self, text: str) -> bool:
            return True

        def check_video_safety(self, video: Any) -> Any:
            return video

    torch.manual_seed(0)
    return ready(
        diffusers.Cosmos2TextToImagePipeline(
            text_encoder=t5(),
            tokenizer=tokenizer(512),
            transformer=diffusers.CosmosTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=1,
                mlp_ratio=2,
                text_embed_dim=32,
                adaln_lora_dim=4,
                max_size=(4, 32, 32),
                concat_padding_mask=True,
                extra_pos_embed_type=None,
            ),
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
            safety_checker=Allows(),
        )
    )


def mochi() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.MochiPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            vae=diffusers.AutoencoderKLMochi(
                latent_channels=12,
                encoder_block_out_channels=(32, 32, 32, 32),
                decoder_block_out_channels=(32, 32, 32, 32),
                layers_per_block=(1, 1, 1, 1, 1),
            ),
            text_encoder=t5(),
            tokenizer=tokenizer(512),
            transformer=diffusers.MochiTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=1,
                pooled_projection_dim=16,
                text_embed_dim=32,
                time_embed_dim=4,
            ),
        )
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "OvisImagePipeline": tiny_zoo.ovis_image,
    "SanaPAGPipeline": sana_pag,
    "SanaSprintPipeline": sana_sprint,
    "StableDiffusion3PAGPipeline": sd3_pag,
    "SkyReelsV2DiffusionForcingPipeline": skyreels_forcing,
    "Kandinsky5T2IPipeline": kandinsky5_image,
    "HunyuanImagePipeline": hunyuan_image,
    "LuminaPipeline": lumina,
    "Cosmos2TextToImagePipeline": cosmos2_image,
    "MochiPipeline": mochi,
}
