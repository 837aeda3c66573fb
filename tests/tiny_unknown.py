"""Pipelines of diffusers that have no entry, with tiny random weights, one builder a class. No downloads."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import tiny_pipes
import tiny_zoo
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.omnigen import pipeline_omnigen
from diffusers.pipelines.prx import pipeline_prx, pipeline_prx_pixel
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2_diffusion_forcing
from tiny_pipes import clip, kl, qwen_vl, ready, t5, tokenizer, wan_vae
from tiny_zoo import TEXT, ended, gemma
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
_FTFY = SimpleNamespace(fix_text=lambda text: text)
"""What some pipelines' modules have of ftfy, which they call whether it is installed or not."""


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
    pipeline_skyreels_v2_diffusion_forcing.ftfy = _FTFY
    return _of_parts("SkyReelsV2DiffusionForcingPipeline", tiny_zoo.skyreels_v2().components)


def kandinsky5_image() -> Any:
    return _of_parts(
        "Kandinsky5T2IPipeline", tiny_zoo.kandinsky5_video(visual_cond=False).components, vae=kl()
    )


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
            text_encoder=Qwen3Model(Qwen3Config(**TEXT | {"num_hidden_layers": 3})),
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
            text_encoder=gemma(),
            tokenizer=ended(),
        )
    )


class Allows:
    """As much of Cosmos' safety checker as is called."""

    def to(self, device: Any) -> None: ...

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _cosmos(channels: int, text_embed_dim: int) -> Any:
    """With what its module would have of torchvision: a picture made smaller."""
    smaller = torch.nn.functional.interpolate
    transformer_cosmos.transforms = SimpleNamespace(
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
        functional=SimpleNamespace(
            resize=lambda x, size, interpolation: smaller(x, size, mode=interpolation)
        ),
    )

    return diffusers.CosmosTransformer3DModel(
        in_channels=channels,
        out_channels=4,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=text_embed_dim,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=True,
        extra_pos_embed_type=None,
        **_HEADS,
    )


def cosmos2_image() -> Any:
    """Its scheduler's largest sigma scales the latents that it is given."""

    torch.manual_seed(0)
    return ready(
        diffusers.Cosmos2TextToImagePipeline(
            text_encoder=t5(),
            tokenizer=tokenizer(512),
            transformer=_cosmos(4, 32),
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


def cosmos2_5() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.Cosmos2_5_PredictBasePipeline(
            text_encoder=qwen_vl(),
            tokenizer=tokenizer(512),
            transformer=_cosmos(5, 16),  # a mask beside the latents, for pictures to start from
            vae=wan_vae(),
            scheduler=UniPCMultistepScheduler(
                use_karras_sigmas=True,
                use_flow_sigmas=True,
                prediction_type="flow_prediction",
                sigma_max=200.0,
                sigma_min=0.01,
            ),
            safety_checker=Allows(),
        )
    )


def cosmos3() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.Cosmos3OmniPipeline(
            transformer=diffusers.Cosmos3OmniTransformer(
                head_dim=16,
                hidden_size=32,
                intermediate_size=32,
                latent_channel=4,
                num_attention_heads=2,
                num_hidden_layers=1,
                num_key_value_heads=1,
                patch_latent_dim=16,
                rope_axes_dim=[4, 2, 2],
                vocab_size=32,
                dtype="float32",
            ),
            text_tokenizer=ended(),
            vae=wan_vae(),
            scheduler=UniPCMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
            ),
            enable_safety_checker=False,
        )
    )


def pixart(name: str = "PixArtAlphaPipeline", **other: Any) -> Any:
    torch.manual_seed(0)
    parts = {
        "tokenizer": tokenizer(512),
        "text_encoder": t5(),
        "vae": kl(),
        "transformer": diffusers.PixArtTransformer2DModel(
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=16,
            norm_num_groups=4,
            use_additional_conditions=False,
            **_HEADS,
        ),
        "scheduler": DPMSolverMultistepScheduler(),
    }
    return _of_parts(name, parts, **other)


def latte() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.LattePipeline(
            tokenizer=tokenizer(512),
            text_encoder=t5(),
            vae=kl(),
            transformer=diffusers.LatteTransformer3DModel(
                in_channels=4,
                out_channels=8,
                cross_attention_dim=32,
                caption_channels=32,
                sample_size=16,
                patch_size=2,
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                **_HEADS,
            ),
            scheduler=diffusers.DDIMScheduler(),
        )
    )


def allegro() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.AllegroPipeline(
            tokenizer=tokenizer(512),
            text_encoder=t5(),
            vae=diffusers.AutoencoderKLAllegro(
                block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
            ),
            transformer=diffusers.AllegroTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=24,
                num_layers=1,
                cross_attention_dim=48,
                caption_channels=32,
                sample_height=16,
                sample_width=16,
                sample_frames=4,
            ),
            scheduler=diffusers.EulerAncestralDiscreteScheduler(),
        )
    )


def cogvideox() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.CogVideoXPipeline(
            tokenizer=tokenizer(226),
            text_encoder=t5(),
            vae=diffusers.AutoencoderKLCogVideoX(
                block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4
            ),
            transformer=diffusers.CogVideoXTransformer3DModel(
                in_channels=4,
                out_channels=4,
                time_embed_dim=4,
                text_embed_dim=32,
                num_layers=1,
                sample_width=8,
                sample_height=8,
                sample_frames=9,
                **_HEADS,
            ),
            scheduler=diffusers.CogVideoXDDIMScheduler(),
        )
    )


def cogview3() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.CogView3PlusPipeline(
            tokenizer=tokenizer(224),
            text_encoder=t5(),
            vae=kl(),
            transformer=diffusers.CogView3PlusTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=1,
                text_embed_dim=32,
                time_embed_dim=16,
                condition_dim=4,
                pos_embed_max_size=32,
                sample_size=16,
                **_HEADS,
            ),
            scheduler=diffusers.CogVideoXDDIMScheduler(),
        )
    )


def bria() -> Any:
    """It counts its cells from a VAE of 2 x 2 of them, and asks for its scheduler's very class."""
    torch.manual_seed(0)
    return ready(
        diffusers.BriaPipeline(
            transformer=diffusers.BriaTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                joint_attention_dim=32,
                axes_dims_rope=[4, 6, 6],
                **_HEADS,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=kl(),
            text_encoder=t5(),
            tokenizer=ended(),
        )
    )


class Processor:
    """As much of Qwen3-VL's as is called for text alone."""

    def __init__(self) -> None:
        self.tokenizer = ended()

    def __call__(self, text: Any, images: Any = None, **how: Any) -> Any:
        return self.tokenizer(text, **how)

    def apply_chat_template(self, messages: Any, **how: Any) -> Any:
        contents = [
            m["content"] if isinstance(m["content"], str) else m["content"][0]["text"] for m in messages
        ]
        messages = [m | {"content": text} for m, text in zip(messages, contents, strict=True)]
        return self.tokenizer.apply_chat_template(messages, **how)


def _qwen3_vl() -> Any:
    config = Qwen3VLConfig(
        text_config=TEXT
        | {
            "num_hidden_layers": 4,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "deepstack_visual_indexes": [],
        },
    )
    return Qwen3VLForConditionalGeneration(config)


def bria_fibo2() -> Any:
    """A negative prompt of its own where none is given."""
    torch.manual_seed(0)
    pipe: Any = ready(
        diffusers.BriaFibo2Pipeline(
            transformer=diffusers.BriaFibo2Transformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=1,
                n_refiner_layers=1,
                n_heads=2,
                cap_feat_dim=16,
                injection_layer_ids=(0,),
                perceiver_num_layers=1,
                min_num_gist_tokens=4,
                max_num_gist_tokens=8,
                gist_step=4,
                gist_min_text_len=4,
                gist_max_text_len=16,
                axes_dims=(4, 6, 6),
                axes_lens=(640, 64, 64),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_pipes.flux2().vae,
            text_encoder=_qwen3_vl(),
            processor=Processor(),
        )
    )
    pipe.text_encoder_out_layers = ((1,), (2,))
    pipe.prompt_template_encode = "user {} assistant"
    return pipe


def easy_animate() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.EasyAnimatePipeline(
            vae=diffusers.AutoencoderKLMagvit(
                latent_channels=4, block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=4
            ),
            text_encoder=Qwen3Model(Qwen3Config(**TEXT)),
            tokenizer=tokenizer(512),
            transformer=diffusers.EasyAnimateTransformer3DModel(
                in_channels=4,
                out_channels=4,
                patch_size=2,
                num_layers=1,
                mmdit_layers=1,
                time_embed_dim=16,
                text_embed_dim=16,
                **_HEADS,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    )


def hidream() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.HiDreamImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=kl(),
            text_encoder=clip(projection=True, positions=248),
            tokenizer=tokenizer(),
            text_encoder_2=clip(projection=True, positions=248),
            tokenizer_2=tokenizer(),
            text_encoder_3=t5(),
            tokenizer_3=tokenizer(128),
            text_encoder_4=LlamaForCausalLM(LlamaConfig(**TEXT)),
            tokenizer_4=tokenizer(128),
            transformer=diffusers.HiDreamImageTransformer2DModel(
                patch_size=2,
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                caption_channels=[32, 16],
                text_emb_dim=32,
                axes_dims_rope=(8, 8),
                llama_layers=[0, 1],
                **_HEADS,
            ),
        )
    )


def hunyuan_refiner() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.HunyuanImageRefinerPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
            vae=diffusers.AutoencoderKLHunyuanImageRefiner(
                latent_channels=4,
                block_out_channels=(8, 8, 8, 8),
                layers_per_block=1,
                spatial_compression_ratio=8,
            ),
            text_encoder=qwen_vl(),
            tokenizer=tokenizer(512),
            transformer=diffusers.HunyuanImageTransformer2DModel(
                in_channels=8,
                out_channels=4,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                patch_size=(1, 1, 1),
                text_embed_dim=16,
                rope_axes_dim=(4, 6, 6),
                guidance_embeds=True,
                **_HEADS,
            ),
        )
    )


def motif_video() -> Any:
    """Guided by a component, with places for a picture to start from beside the latents."""
    torch.manual_seed(0)
    return ready(
        diffusers.MotifVideoPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            vae=wan_vae(),
            text_encoder=t5(),
            tokenizer=tokenizer(512),
            transformer=diffusers.MotifVideoTransformer3DModel(
                in_channels=9,
                out_channels=4,
                num_layers=1,
                num_single_layers=1,
                text_embed_dim=32,
                rope_axes_dim=(4, 6, 6),
                **_HEADS,
            ),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        )
    )


def nucleus() -> Any:
    """Experts that choose among a row's tokens, as many as the grid's size allows."""
    torch.manual_seed(0)
    pipe: Any = ready(
        diffusers.NucleusMoEImagePipeline(
            transformer=diffusers.NucleusMoEImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=5,  # all but the first three and the last have experts
                joint_attention_dim=16,
                axes_dims_rope=(4, 6, 6),
                num_experts=4,
                moe_intermediate_dim=16,
                capacity_factors=2.0,
                **_HEADS,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=diffusers.AutoencoderKLQwenImage(
                base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4
            ),
            text_encoder=_qwen3_vl(),
            processor=Processor(),
        )
    )
    pipe.default_return_index = -2
    return pipe


def omnigen() -> Any:
    """With a processor in place of its own, which needs torchvision."""
    pipeline_omnigen.OmniGenMultiModalProcessor = lambda *args, **named: None
    torch.manual_seed(0)
    return ready(
        diffusers.OmniGenPipeline(
            transformer=diffusers.OmniGenTransformer2DModel(
                in_channels=4,
                hidden_size=32,
                num_attention_heads=2,
                num_key_value_heads=2,
                intermediate_size=32,
                num_layers=1,
                pad_token_id=0,
                vocab_size=32,
                pos_embed_max_size=32,
                time_step_dim=16,
                rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "su"},
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
            vae=kl(),
            tokenizer=ended(),
        )
    )


def _prx(channels: int, patch_size: int) -> Any:
    return diffusers.PRXTransformer2DModel(
        in_channels=channels,
        patch_size=patch_size,
        context_in_dim=32,
        hidden_size=32,
        num_heads=2,
        depth=1,
        axes_dim=[8, 8],
    )


def prx() -> Any:
    pipeline_prx.ftfy = _FTFY
    torch.manual_seed(0)
    return ready(
        diffusers.PRXPipeline(
            transformer=_prx(4, 2),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=t5(),
            tokenizer=tokenizer(64),
            vae=kl(),
        )
    )


def prx_pixel(noise_scale: float = 2.0) -> Any:
    """It makes pixels without a VAE, from noise of twice the unit."""
    pipeline_prx_pixel.ftfy = _FTFY
    torch.manual_seed(0)
    return ready(
        diffusers.PRXPixelPipeline(
            transformer=_prx(3, 8),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=t5(),
            tokenizer=tokenizer(64),
            prompt_max_tokens=16,
            noise_scale=noise_scale,
        )
    )


def sana_video() -> Any:
    """It calls its frames otherwise than all others do."""
    torch.manual_seed(0)
    return ready(
        diffusers.SanaVideoPipeline(
            tokenizer=tokenizer(512),
            text_encoder=gemma(),
            vae=wan_vae(),
            transformer=diffusers.SanaVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=1,
                num_cross_attention_heads=2,
                cross_attention_head_dim=12,
                cross_attention_dim=24,
                caption_channels=16,
            ),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
            ),
        )
    )


def z_image_omni() -> Any:
    """Without the encoder of pictures, which prompts alone do not need."""
    parts = tiny_pipes.z_image().components
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        siglip_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[640, 64, 64],
    )
    other = {"transformer": transformer, "siglip": None, "siglip_processor": None}
    return _of_parts("ZImageOmniPipeline", parts, **other)


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
    "PixArtAlphaPipeline": pixart,
    "PixArtSigmaPipeline": lambda: pixart("PixArtSigmaPipeline"),
    "PixArtSigmaPAGPipeline": lambda: pixart("PixArtSigmaPAGPipeline", pag_applied_layers="blocks.0"),
    "LattePipeline": latte,
    "AllegroPipeline": allegro,
    "CogVideoXPipeline": cogvideox,
    "CogView3PlusPipeline": cogview3,
    "BriaPipeline": bria,
    "BriaFibo2Pipeline": bria_fibo2,
    "Cosmos2_5_PredictBasePipeline": cosmos2_5,
    "Cosmos3OmniPipeline": cosmos3,
    "EasyAnimatePipeline": easy_animate,
    "HiDreamImagePipeline": hidream,
    "HunyuanImageRefinerPipeline": hunyuan_refiner,
    "MotifVideoPipeline": motif_video,
    "NucleusMoEImagePipeline": nucleus,
    "OmniGenPipeline": omnigen,
    "PRXPipeline": prx,
    "PRXPixelPipeline": prx_pixel,
    "SanaVideoPipeline": sana_video,
    "ZImageOmniPipeline": z_image_omni,
}
