"""Pipelines of diffusers' own classes with tiny random weights, one builder a family. No downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

PROMPTS = ["a large red circle", "a small blue square above a green ring on a striped background"]
"""Of different lengths."""
_WORDS = "a large red circle small blue square above green ring on striped background user assistant".split()
_CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"


def tokenizer(max_length: int = 77) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *_WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=max_length,
        chat_template=_CHAT,
        padding_side="right",
    )


def clip(projection: bool = False, dim: int = 16, positions: int = 77) -> Any:
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=dim,
        intermediate_size=dim,
        num_hidden_layers=1 + projection,
        num_attention_heads=2,
        max_position_embeddings=positions,
        projection_dim=dim,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def kl(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def wan_vae() -> AutoencoderKLWan:
    """Wan's, of four channels that are neither centred nor of one size."""
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4
    )


def ready(pipe: Any) -> Any:
    """Weights large enough for the output to depend on all inputs, and evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
            for parameter in component.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux1(*, guidance_embeds: bool = True, layers: int = 1) -> Any:
    """FLUX.1-dev's scheduler and guidance; the smallest of transformers."""
    torch.manual_seed(0)
    return ready(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=kl(),
            text_encoder=clip(),
            tokenizer=tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=tokenizer(512),
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=layers,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=16,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    )


def flux2() -> Any:
    """FLUX.2-klein: latents are 2 x 2 patches, normalised plane by plane by a batch norm."""
    torch.manual_seed(0)
    vae: Any = AutoencoderKLFlux2(
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
    text = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=28,  # the pipeline reads hidden states 9, 18 and 27
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return ready(
        Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae,
            text_encoder=Qwen3ForCausalLM(text),
            tokenizer=tokenizer(512),
            transformer=Flux2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=48,
                timestep_guidance_channels=16,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            ),
        )
    )


def qwen_vl() -> Any:
    text = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(text)


def qwen_image() -> Any:
    """Qwen-Image with its published scheduler settings."""
    torch.manual_seed(0)
    pipe: Any = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4
        ),
        text_encoder=qwen_vl(),
        tokenizer=tokenizer(512),
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "user {} assistant", 1
    return ready(pipe)


def z_image() -> Any:
    """Z-Image: prompts are a list of embeddings of different lengths."""
    torch.manual_seed(0)
    text = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return ready(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=kl(),
            text_encoder=Qwen3Model(text),
            tokenizer=tokenizer(512),
            transformer=ZImageTransformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=1,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=16,
                axes_dims=[4, 6, 6],
                axes_lens=[640, 64, 64],
            ),
        )
    )


def wan(*, two: bool = False) -> Any:
    """Wan 2.1, or with `two` Wan 2.2: transformers split by noise level."""
    torch.manual_seed(0)

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
        )

    text = UMT5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return ready(
        WanPipeline(
            tokenizer=tokenizer(512),
            text_encoder=UMT5EncoderModel(text),
            vae=wan_vae(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=transformer(),
            transformer_2=transformer() if two else None,
            boundary_ratio=0.875 if two else None,
        )
    )


def sd3() -> Any:
    """Stable Diffusion 3 without its T5."""
    torch.manual_seed(0)
    return ready(
        StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=kl(),
            text_encoder=clip(projection=True),
            tokenizer=tokenizer(),
            text_encoder_2=clip(projection=True),
            tokenizer_2=tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
            transformer=SD3Transformer2DModel(
                sample_size=16,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                caption_projection_dim=32,
                pooled_projection_dim=32,
                pos_embed_max_size=32,
            ),
        )
    )


def ideogram4() -> Any:
    """Ideogram 4 without its Qwen3-VL: text features are drawn from the prompt's length."""

    class Drawn(Ideogram4Pipeline):
        def encode_prompt(
            self, prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any
        ) -> Any:
            lengths = [len(text.split()) + 1 for text in prompt]
            features = torch.zeros(len(prompt), max_sequence_length + grid_h * grid_w, 8)
            for row, length in enumerate(lengths):
                drawn = torch.randn(length, 8, generator=torch.Generator().manual_seed(length))
                features[row, max_sequence_length - length : max_sequence_length] = drawn
            ids = self._prepare_ids(  # type: ignore[attr-defined]
                lengths, grid_h, grid_w, max_sequence_length, device
            )
            return features, *ids

    def transformer() -> Ideogram4Transformer2DModel:
        return Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=8,
            mrope_section=(4, 2, 2),
        )

    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return ready(Drawn(scheduler, flux2().vae, None, None, transformer(), transformer()))


def qwen_image_21() -> Any:
    """Qwen-Image 2.1 without its text encoder and VAE."""

    class Processor:
        """As much of one as the pipeline's constructor asks for."""

        tokenizer = tokenizer()

        def apply_chat_template(self, messages: Any, **_: Any) -> list[list[int]]:
            return [[0]]

    torch.manual_seed(0)
    return ready(
        QwenImage21Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=None,
            text_encoder=None,
            processor=Processor(),
            transformer=QwenImage21Transformer2DModel(
                in_channels=16,
                out_channels=16,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                context_in_dim=8,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    )


def chroma() -> Any:
    """Chroma."""
    torch.manual_seed(0)
    return ready(
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=kl(),
            text_encoder=t5(),
            tokenizer=tokenizer(512),
            transformer=ChromaTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 6, 6),
                approximator_num_channels=8,
                approximator_hidden_dim=16,
                approximator_layers=1,
            ),
        )
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "flux1": flux1,
    "flux2": flux2,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "wan2.1": wan,
    "wan2.2": lambda: wan(two=True),
    "sd3": sd3,
}
