"""The embedded model's parts, untrained, in the library's own classes. Knows no training."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from overtone.progressive.tiny import MAX_SEQUENCE_LENGTH, world
from overtone.progressive.tiny.train.settings import Settings

PLACES = sorted({place for relation in (None, *world.RELATIONS) for place in world.places(relation)})
"""Mean centres that a thing can have, pixels."""
READING_SIZES = (len(world.SIZES), len(world.COLOURS), len(world.SHAPES), len(PLACES))
"""Classes of each question that is read off a thing's words."""


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


def decoder_of(vae: Any) -> nn.ModuleDict:
    """The part of an autoencoder that makes pictures of latents."""
    return nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
