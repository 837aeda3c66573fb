"""More pipelines of diffusers' own classes with tiny random weights, one builder a class. No downloads."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2
from tiny_pipes import chroma, clip, kl, qwen_vl, ready, t5, tokenizer, wan_vae
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    Qwen3Model,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}


def ended() -> Any:
    """A tokenizer with which the empty text has a token too."""
    words: Any = tokenizer(512)
    words.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    return words


def gemma() -> Any:
    return Gemma2Model(Gemma2Config(**TEXT, query_pre_attn_scalar=8))


def hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def sana() -> Any:
    """Cells of 32 px, a multistep solver, and a size that the pipeline would round by itself."""
    torch.manual_seed(0)
    pipe = diffusers.SanaPipeline(
        tokenizer=tokenizer(512),
        text_encoder=gemma(),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8,) * 6,
            decoder_block_out_channels=(8,) * 6,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 6,
            decoder_qkv_multiscales=((),) * 6,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
        ),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=32,
            **_HEADS,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    return ready(pipe)


def lumina2() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.Lumina2Pipeline(
            transformer=diffusers.Lumina2Transformer2DModel(
                in_channels=4,
                hidden_size=32,
                num_layers=1,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                axes_dim_rope=(4, 6, 6),
                axes_lens=(640, 64, 64),
                cap_feat_dim=16,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=kl(),
            text_encoder=gemma(),
            tokenizer=tokenizer(512),
        )
    )


def cogview4() -> Any:
    """Timesteps that are not its noise levels; prompts padded to the longest and not masked."""
    torch.manual_seed(0)
    return ready(
        diffusers.CogView4Pipeline(
            tokenizer=ended(),
            text_encoder=GlmModel(GlmConfig(**TEXT, pad_token_id=0)),
            vae=kl(),
            transformer=diffusers.CogView4Transformer2DModel(
                in_channels=4,
                out_channels=4,
                num_layers=1,
                text_embed_dim=16,
                time_embed_dim=16,
                condition_dim=4,
                pos_embed_max_size=64,
                sample_size=16,
                rope_axes_dim=(64, 64),
                **_HEADS,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
            ),
        )
    )


def ernie_image() -> Any:
    torch.manual_seed(0)
    vae: Any = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return ready(
        diffusers.ErnieImagePipeline(
            transformer=diffusers.ErnieImageTransformer2DModel(
                hidden_size=32,
                num_attention_heads=2,
                num_layers=1,
                ffn_hidden_size=32,
                in_channels=16,
                out_channels=16,
                text_in_dim=16,
                rope_axes_dim=(4, 6, 6),
            ),
            vae=vae,
            text_encoder=Qwen3Model(Qwen3Config(**TEXT)),
            tokenizer=tokenizer(512),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        )
    )


def krea2() -> Any:
    """Krea 2 without its Qwen3-VL: hidden states are drawn from the prompt's words."""

    class Drawn(diffusers.Krea2Pipeline):  # type: ignore[misc, name-defined]
        def get_text_hidden_states(
            self, prompt: Any, max_sequence_length: int = 512, device: Any = None
        ) -> Any:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            states = torch.zeros(len(prompt), max_sequence_length, 2, 16)
            mask = torch.zeros(len(prompt), max_sequence_length, dtype=torch.bool)
            for row, text in enumerate(prompt):
                count = len(text.split()) + 1
                drawn = torch.randn(count, 2, 16, generator=torch.Generator().manual_seed(count))
                states[row, :count] = drawn  # the padding is in the middle: a suffix comes after it
                states[row, -1] = drawn[0]
                mask[row, :count] = mask[row, -1] = True
            return states, mask

    torch.manual_seed(0)
    return ready(
        Drawn(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
            vae=diffusers.AutoencoderKLQwenImage(
                base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4
            ),
            text_encoder=None,
            tokenizer=None,
            transformer=diffusers.Krea2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_key_value_heads=1,
                intermediate_size=32,
                timestep_embed_dim=16,
                text_hidden_dim=16,
                num_text_layers=2,
                text_num_attention_heads=2,
                text_num_key_value_heads=1,
                text_intermediate_size=16,
                num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1,
                axes_dims_rope=(4, 6, 6),
                **_HEADS,
            ),
        )
    )


def longcat_image() -> Any:
    torch.manual_seed(0)
    pipe: Any = ready(
        diffusers.LongCatImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=kl(),
            text_encoder=qwen_vl(),
            tokenizer=tokenizer(512),
            text_processor=None,
            transformer=diffusers.LongCatImageTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                axes_dims_rope=[4, 6, 6],
                **_HEADS,
            ),
        )
    )
    pipe.tokenizer_max_length = 16
    return pipe


def skyreels_v2() -> Any:
    """With what its module would have of ftfy, which the pipeline calls whether it is installed or not."""
    torch.manual_seed(0)
    pipeline_skyreels_v2.ftfy = SimpleNamespace(fix_text=lambda text: text)
    text = UMT5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return ready(
        diffusers.SkyReelsV2Pipeline(
            tokenizer=tokenizer(512),
            text_encoder=UMT5EncoderModel(text),
            transformer=diffusers.SkyReelsV2Transformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=32,
                freq_dim=16,
                ffn_dim=32,
                num_layers=1,
            ),
            vae=wan_vae(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
            ),
        )
    )


def hunyuan_video() -> Any:
    """With a short template, for a tokenizer of words counts less than the real one's."""

    class Short(diffusers.HunyuanVideoPipeline):  # type: ignore[misc, name-defined]
        def _get_llama_prompt_embeds(
            self, prompt: Any, prompt_template: Any, *rest: Any, **named: Any
        ) -> Any:
            short = {"template": "user {} assistant", "crop_start": 1}
            return super()._get_llama_prompt_embeds(prompt, short, *rest, **named)

    torch.manual_seed(0)
    return ready(
        Short(
            text_encoder=LlamaModel(LlamaConfig(**TEXT | {"num_hidden_layers": 3})),
            tokenizer=tokenizer(512),
            transformer=diffusers.HunyuanVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=16,
                pooled_projection_dim=16,
                rope_axes_dim=(4, 6, 6),
                **_HEADS,
            ),
            vae=hunyuan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=clip(),
            tokenizer_2=tokenizer(),
        )
    )


def ltx() -> Any:
    """A video as tokens, and a schedule that shifts by their number."""
    torch.manual_seed(0)
    return ready(
        diffusers.LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
            ),
            vae=diffusers.AutoencoderKLLTXVideo(
                latent_channels=8,
                block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 8, 8, 8),
                layers_per_block=(1, 1, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1, 1),
            ),
            text_encoder=t5(),
            tokenizer=tokenizer(128),
            transformer=diffusers.LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                cross_attention_dim=32,
                num_layers=1,
                caption_channels=32,
                **_HEADS,
            ),
        )
    )


def hunyuan_video_15() -> Any:
    """Guided by a component, with one word of text a prompt that the second encoder is for."""
    torch.manual_seed(0)
    pipe: Any = ready(
        diffusers.HunyuanVideo15Pipeline(
            text_encoder=Qwen3Model(Qwen3Config(**TEXT | {"num_hidden_layers": 3})),
            tokenizer=tokenizer(512),
            transformer=diffusers.HunyuanVideo15Transformer3DModel(
                in_channels=9,
                out_channels=4,
                num_layers=1,
                num_refiner_layers=1,
                text_embed_dim=16,
                text_embed_2_dim=32,
                image_embed_dim=16,
                rope_axes_dim=(4, 6, 6),
                **_HEADS,
            ),
            vae=diffusers.AutoencoderKLHunyuanVideo15(
                latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=t5(),
            tokenizer_2=tokenizer(512),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        )
    )
    pipe.system_message, pipe.prompt_template_encode_start_idx = "a", 2
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 16, 8
    pipe.vision_num_semantic_tokens = 4
    return pipe


def kandinsky5_video(*, visual_cond: bool = True) -> Any:
    """Channels last, written into in place; with places for a picture to start from beside them."""

    class OfTexts:
        """As much of a processor as is called."""

        def __init__(self) -> None:
            self.tokenizer = tokenizer(512)

        def __call__(self, text: Any, images: Any, videos: Any, **how: Any) -> Any:
            return self.tokenizer(text, **how)

        def decode(self, ids: Any) -> Any:
            return self.tokenizer.decode(ids)

    torch.manual_seed(0)
    pipe: Any = ready(
        diffusers.Kandinsky5T2VPipeline(
            transformer=diffusers.Kandinsky5Transformer3DModel(
                in_visual_dim=4,
                out_visual_dim=4,
                in_text_dim=16,
                in_text_dim2=16,
                time_dim=16,
                model_dim=32,
                ff_dim=32,
                num_text_blocks=1,
                num_visual_blocks=1,
                axes_dims=(4, 6, 6),
                visual_cond=visual_cond,
            ),
            vae=hunyuan_vae(),
            text_encoder=qwen_vl(),
            tokenizer=OfTexts(),
            text_encoder_2=clip(),
            tokenizer_2=tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    )
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "a {} green", 1
    return pipe


def aura_flow() -> Any:
    torch.manual_seed(0)
    return ready(
        diffusers.AuraFlowPipeline(
            tokenizer=tokenizer(512),
            text_encoder=UMT5EncoderModel(
                UMT5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
            ),
            vae=kl(),
            transformer=diffusers.AuraFlowTransformer2DModel(
                in_channels=4,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                joint_attention_dim=32,
                caption_projection_dim=32,
                pos_embed_max_size=64,
                sample_size=16,
                **_HEADS,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    )


def bria_fibo() -> Any:
    """A token a cell, and the token of the empty text by its number in the real vocabulary."""
    torch.manual_seed(0)
    text = SmolLM3Config(**TEXT | {"vocab_size": 128001}, pad_token_id=0)
    return ready(
        diffusers.BriaFiboPipeline(
            transformer=diffusers.BriaFiboTransformer2DModel(
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                joint_attention_dim=32,
                axes_dims_rope=[4, 6, 6],
                text_encoder_dim=16,
                **_HEADS,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=diffusers.AutoencoderKLWan(
                base_dim=8,
                decoder_base_dim=8,
                z_dim=4,
                num_res_blocks=1,
                is_residual=True,
                patch_size=2,
                in_channels=12,
                out_channels=12,
                scale_factor_spatial=16,
                latents_mean=[0.1] * 4,
                latents_std=[1.5] * 4,
            ),
            text_encoder=SmolLM3ForCausalLM(text),
            tokenizer=ended(),
        )
    )


def ovis_image() -> Any:
    """A pipeline that has no entry."""
    torch.manual_seed(0)
    pipe: Any = ready(
        diffusers.OvisImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=kl(),
            text_encoder=Qwen3Model(Qwen3Config(**TEXT)),
            tokenizer=tokenizer(512),
            transformer=diffusers.OvisImageTransformer2DModel(
                in_channels=16,
                out_channels=16,
                num_layers=1,
                num_single_layers=1,
                joint_attention_dim=16,
                axes_dims_rope=(4, 6, 6),
                **_HEADS,
            ),
        )
    )
    pipe.user_prompt_begin_id = 2
    return pipe


BUILDERS: dict[str, Callable[[], Any]] = {
    "chroma": chroma,
    "sana": sana,
    "lumina2": lumina2,
    "cogview4": cogview4,
    "ernie-image": ernie_image,
    "krea2": krea2,
    "longcat-image": longcat_image,
    "skyreels-v2": skyreels_v2,
    "hunyuan-video": hunyuan_video,
    "ltx-video": ltx,
    "aura-flow": aura_flow,
    "bria-fibo": bria_fibo,
    "hunyuan-video-1.5": hunyuan_video_15,
    "kandinsky5-video": kandinsky5_video,
}
