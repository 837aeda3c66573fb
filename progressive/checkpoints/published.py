"""Published checkpoints as their own configuration files describe them: a table of facts. No rules."""

from __future__ import annotations

from overtone.progressive.checkpoints.checkpoint import Checkpoint
from overtone.progressive.checkpoints.sigmas import Config


def _hub(model_id: str) -> str:
    return f"https://huggingface.co/{model_id}"


_DYNAMIC = {  # FLUX's resolution shift; `shift` itself plays no part where shifting is dynamic
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def _flux1(model_id: str, *, dev: bool) -> Checkpoint:
    return Checkpoint(
        family="flux1",
        pipeline_class="FluxPipeline",
        transformer_class="FluxTransformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": dev,
            "axes_dims_rope": (16, 56, 56),
        },
        scheduler=_DYNAMIC if dev else _DYNAMIC | {"shift": 1.0, "use_dynamic_shifting": False},
        source=_hub(model_id),
        default_steps=28 if dev else 4,
    )


def _flux2_checkpoint(
    model_id: str, *, layers: tuple[int, int], heads: int, text_dim: int, distilled: bool | None
) -> Checkpoint:
    """`distilled` is None for FLUX.2-dev, whose pipeline has no such setting."""
    return Checkpoint(
        family="flux2",
        pipeline_class="Flux2Pipeline" if distilled is None else "Flux2KleinPipeline",
        transformer_class="Flux2Transformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "patch_size": 1,
            "in_channels": 128,
            "num_layers": layers[0],
            "num_single_layers": layers[1],
            "attention_head_dim": 128,
            "num_attention_heads": heads,
            "joint_attention_dim": text_dim,
            "timestep_guidance_channels": 256,
            "mlp_ratio": 3.0,
            "axes_dims_rope": (32, 32, 32, 32),
            "rope_theta": 2000,
            "eps": 1e-6,
            "guidance_embeds": distilled is None,
        },
        scheduler=_DYNAMIC,
        source=_hub(model_id),
        default_steps=4 if distilled else 50,
        pipeline={} if distilled is None else {"is_distilled": distilled},
        # The published stage splits confirm the dynamic exponential shift, all that sigmas depend on.
        unverified=("scheduler",),
    )


def _qwen_scheduler() -> Config:
    return _DYNAMIC | {"shift": 1.0, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}


def _z_image(model_id: str, *, shift: float, steps: int) -> Checkpoint:
    return Checkpoint(
        family="z-image",
        pipeline_class="ZImagePipeline",
        transformer_class="ZImageTransformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "norm_eps": 1e-5,
            "qk_norm": True,
            "cap_feat_dim": 2560,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
        },
        scheduler={"num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift": shift},
        source=_hub(model_id),
        default_steps=steps,
    )


def _wan(
    model_id: str,
    *,
    family: str,
    heads: int,
    layers: int,
    ffn: int,
    flow_shift: float,
    channels: int = 16,
    pipeline: Config | None = None,
    unverified: tuple[str, ...] = (),
) -> Checkpoint:
    return Checkpoint(
        family=family,
        pipeline_class="WanPipeline",
        transformer_class="WanTransformer3DModel",
        scheduler_class="UniPCMultistepScheduler",
        transformer={
            "patch_size": (1, 2, 2),
            "num_attention_heads": heads,
            "attention_head_dim": 128,
            "in_channels": channels,
            "out_channels": channels,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": ffn,
            "num_layers": layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "rope_max_seq_len": 1024,
        },
        scheduler={
            "num_train_timesteps": 1000,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "solver_order": 2,
            "prediction_type": "flow_prediction",
            "predict_x0": True,
            "solver_type": "bh2",
            "lower_order_final": True,
            "use_flow_sigmas": True,
            "flow_shift": flow_shift,
            "timestep_spacing": "linspace",
            "final_sigmas_type": "zero",
        },
        source=_hub(model_id),
        default_steps=50,
        pipeline=pipeline or {},
        unverified=unverified,
    )


def _sd3(model_id: str, transformer: Config, steps: int) -> Checkpoint:
    return Checkpoint(
        family="sd3",
        pipeline_class="StableDiffusion3Pipeline",
        transformer_class="SD3Transformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
        }
        | transformer,
        scheduler={"num_train_timesteps": 1000, "shift": 3.0},
        source=_hub(model_id),
        default_steps=steps,
        unverified=("scheduler", "default_steps"),
    )


PUBLISHED: dict[str, Checkpoint] = {
    "black-forest-labs/FLUX.1-dev": _flux1("black-forest-labs/FLUX.1-dev", dev=True),
    "black-forest-labs/FLUX.1-schnell": _flux1("black-forest-labs/FLUX.1-schnell", dev=False),
    "black-forest-labs/FLUX.2-dev": _flux2_checkpoint(
        "black-forest-labs/FLUX.2-dev", layers=(8, 48), heads=48, text_dim=15360, distilled=None
    ),
    **{
        f"black-forest-labs/FLUX.2-klein-{name}": _flux2_checkpoint(
            f"black-forest-labs/FLUX.2-klein-{name}",
            layers=layers,
            heads=heads,
            text_dim=text_dim,
            distilled=not name.startswith("base-"),
        )
        for size, layers, heads, text_dim in (("4B", (5, 20), 24, 7680), ("9B", (8, 24), 32, 12288))
        for name in (size, f"base-{size}")
    },
    "Qwen/Qwen-Image": Checkpoint(
        family="qwen-image",
        pipeline_class="QwenImagePipeline",
        transformer_class="QwenImageTransformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "guidance_embeds": False,
            "axes_dims_rope": (16, 56, 56),
        },
        scheduler=_qwen_scheduler(),
        source=_hub("Qwen/Qwen-Image"),
        default_steps=50,
    ),
    "Qwen/Qwen-Image-2.1": Checkpoint(
        family="qwen-image-2.1",
        pipeline_class="QwenImage21Pipeline",
        transformer_class="QwenImage21Transformer2DModel",
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        transformer={
            "patch_size": 1,
            "in_channels": 64,
            "out_channels": 64,
            "num_layers": 32,
            "attention_head_dim": 128,
            "num_attention_heads": 32,
            "context_in_dim": 4096,
            "mlp_ratio": 3,
            "axes_dims_rope": (16, 56, 56),
            "eps": 1e-6,
            "causal_condition": True,
        },
        scheduler=_qwen_scheduler(),
        source=_hub("Qwen/Qwen-Image-2.1"),
        default_steps=40,
        unverified=("default_steps",),
    ),
    "Tongyi-MAI/Z-Image": _z_image("Tongyi-MAI/Z-Image", shift=6.0, steps=50),
    "Tongyi-MAI/Z-Image-Turbo": _z_image("Tongyi-MAI/Z-Image-Turbo", shift=3.0, steps=9),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", family="wan2.1", heads=12, layers=30, ffn=8960, flow_shift=3.0
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        family="wan2.1",
        heads=40,
        layers=40,
        ffn=13824,
        flow_shift=3.0,
        unverified=("flow_shift",),
    ),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        family="wan2.2",
        heads=40,
        layers=40,
        ffn=13824,
        flow_shift=3.0,
        pipeline={"boundary_ratio": 0.875},
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _wan(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        family="wan2.2-5b",
        heads=24,
        layers=30,
        ffn=14336,
        flow_shift=5.0,
        channels=48,
        pipeline={"expand_timesteps": True},
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": _sd3(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        28,
    ),
    "stabilityai/stable-diffusion-3.5-large": _sd3(
        "stabilityai/stable-diffusion-3.5-large",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        28,
    ),
    "stabilityai/stable-diffusion-3.5-medium": _sd3(
        "stabilityai/stable-diffusion-3.5-medium",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        40,
    ),
}
"""By hub name. The scheduler is the checkpoint's own: Wan's published splits are for flow shift 5."""
